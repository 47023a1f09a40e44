// Index maps and rotation arithmetic of the CUDA kernels, which CPU tests run too.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/hd.h"

namespace fastclust::lowrank {

inline constexpr int kCudaTile = 32;   // rows and columns of a tile of products
inline constexpr int kSlotRows = 256;  // rows of a partial Gram matrix
// Half a unit of float rounding, squared: a column shorter than that is noise.
inline constexpr double kFloatNoise = 3.6e-15;

FASTCLUST_HD int64_t slots_of(int64_t n) { return (n + kSlotRows - 1) / kSlotRows; }

// Tile (i, j), i <= j, number index = j (j + 1) / 2 + i.
FASTCLUST_HD void tile_of(int64_t index, int64_t* i, int64_t* j) {
  int64_t column = 0;
  while ((column + 1) * (column + 2) / 2 <= index) ++column;
  *j = column;
  *i = index - column * (column + 1) / 2;
}

// Round-robin tournament of an even number of players: in players - 1 rounds of players / 2 disjoint
// pairs everyone meets everyone once. p < q.
FASTCLUST_HD void pair_of(int64_t players, int64_t round, int64_t pair, int64_t* p, int64_t* q) {
  const int64_t ring = players - 1;  // all but the last, who stays
  const int64_t a = (round + pair) % ring;
  const int64_t b = pair == 0 ? ring : (round + ring - pair) % ring;
  *p = a < b ? a : b;
  *q = a < b ? b : a;
}

struct Rotation {
  double c, s, t;
};

// Whether rows of squared lengths np, nq need no rotation: see SmallKernel in lowrank_kernel.h.
FASTCLUST_HD bool is_orthogonal(double np, double nq, double cross, double largest,
                                double tolerance) {
  const double shorter = np < nq ? np : nq, square = cross * cross;
  return (np <= 1e-32 * largest && nq <= 1e-32 * largest) ||
         square <= tolerance * tolerance * shorter * shorter || square <= 1e-30 * np * nq;
}

// Makes rows x, y orthogonal: x' = c x - s y, y' = s x + c y.
FASTCLUST_HD Rotation rotation_of(double np, double nq, double cross) {
  const double zeta = (nq - np) / (2.0 * cross);
  const double root = std::sqrt(1.0 + zeta * zeta);
  const double t = zeta < 0.0 ? -1.0 / (root - zeta) : 1.0 / (root + zeta);
  const double c = 1.0 / std::sqrt(1.0 + t * t);
  return {c, c * t, t};
}

}  // namespace fastclust::lowrank
