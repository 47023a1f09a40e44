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

// Doubles from one row to the next of a small matrix with one column more than its width l: odd, so
// that a column meets all banks of shared memory.
FASTCLUST_HD int64_t pitch_of(int64_t l) { return (l + 1) | 1; }
// Doubles that the factorisations of one matrix work in: its rows and two vectors.
FASTCLUST_HD int64_t work_size(int64_t l) { return l * pitch_of(l) + 2 * l; }

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
FASTCLUST_HD void pair_of(int players, int round, int pair, int* p, int* q) {
  const int ring = players - 1;  // all but the last, who stays
  int a = round + pair, b = round + ring - pair;
  if (a >= ring) a -= ring;
  if (b >= ring) b -= ring;
  if (pair == 0) b = ring;
  *p = a < b ? a : b;
  *q = a < b ? b : a;
}

// Place of row i among l rows by descending squared length. A permutation of any numbers: what is not
// one comes last, ties stay in order.
FASTCLUST_HD int place_of(const double* norm, int l, int i) {
  const double own = norm[i] >= 0.0 ? norm[i] : -1.0;
  int place = 0;
  for (int k = 0; k < l; ++k) {
    const double other = norm[k] >= 0.0 ? norm[k] : -1.0;
    place += other > own || (other == own && k < i);
  }
  return place;
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

// Makes rows x, y orthogonal: x' = c x - s y, y' = s x + c y. The tangent is good to float: what it
// leaves of `cross` is 1e-7 of it, for later sweeps, of which it costs none; c^2 + s^2 is 1 to double.
FASTCLUST_HD Rotation rotation_of(double np, double nq, double cross) {
  const auto zeta = static_cast<float>((nq - np) / (2.0 * cross));
  const float size = std::fabs(zeta);
  const float tangent = size > 1e8f ? 0.5f / size : 1.0f / (size + std::sqrt(1.0f + size * size));
  const double t = zeta < 0.0f ? -tangent : tangent;
#if defined(__CUDA_ARCH__)
  const double c = rsqrt(1.0 + t * t);
#else
  const double c = 1.0 / std::sqrt(1.0 + t * t);
#endif
  return {c, c * t, t};
}

}  // namespace fastclust::lowrank
