// Index maps and epilogue arithmetic of the CUDA kernels, as plain functions that tests run on the
// host (tests/test_propagate_map.py).
#pragma once

#include <string.h>

#include <cstdint>

#include "common/hd.h"
#include "propagate/propagate.h"

namespace fastclust {

// A stored number as the arithmetic takes it, and back: bf16 by round to nearest even, NaN kept.
template <typename T>
FASTCLUST_HD T widen(T x) {
  return x;
}
FASTCLUST_HD float widen(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
FASTCLUST_HD void narrow(T value, T* out) {
  *out = value;
}
FASTCLUST_HD void narrow(float value, Bf16* out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40u);
}

// How a warp covers columns: `slots` times 32 lanes of `vec` neighbouring columns each.
struct WarpShape {
  int vec;
  int slots;  // 1, 2 or 4
};

// vec is 16 bytes' worth where all rows begin on 16 bytes and there are columns enough to keep the
// lanes busy, else 1. At most 512 columns of float and of bf16, 16 registers of sums.
FASTCLUST_HD WarpShape warp_shape(int64_t n_cols, bool aligned, int element_size) {
  const int wide = 16 / element_size;
  const int vec = aligned && n_cols % wide == 0 && n_cols > 64 ? wide : 1;
  const int64_t slots = (n_cols + 32 * vec - 1) / (32 * vec);
  return {vec, slots <= 1 ? 1 : slots == 2 || vec == 8 ? 2 : 4};
}

// Slices of columns, each of which is one pass of warps over all rows.
FASTCLUST_HD int64_t warp_slices(int64_t n_cols, WarpShape shape) {
  const int64_t width = int64_t{32} * shape.vec * shape.slots;
  return (n_cols + width - 1) / width;
}

// First column of a lane; it owns shape.vec columns from there on.
FASTCLUST_HD int64_t lane_column(int64_t slice, int slot, int lane, WarpShape shape) {
  return ((slice * shape.slots + slot) * 32 + lane) * shape.vec;
}

// What one warp sums. Hub segments come first, as they take longest; then all rows in order. A
// hub row itself is left to the combining kernel.
struct WarpWork {
  bool any;
  int64_t row;
  int64_t edge_begin;
  int64_t edge_end;
  int64_t segment;  // slot of scratch memory, or -1 for a whole row
};

FASTCLUST_HD int64_t n_warp_units(int64_t n_nodes, const HubTables& hub) {
  return hub.n_segments + n_nodes;
}

FASTCLUST_HD WarpWork warp_work(int64_t unit, int64_t n_nodes, const int64_t* indptr,
                                const HubTables& hub) {
  if (unit < hub.n_segments) {
    const int64_t* s = hub.segments + 3 * unit;
    return {true, s[0], s[1], s[2], unit};
  }
  const int64_t row = unit - hub.n_segments;
  if (row >= n_nodes) return {false, 0, 0, 0, -1};
  const int64_t begin = indptr[row], end = indptr[row + 1];
  return {end - begin <= hub.hub_edges, row, begin, end, -1};
}

// The bits that a lane's `vec` columns have in their word of a mask row.
FASTCLUST_HD uint32_t lane_bits(uint32_t word, int64_t col, int vec) {
  return (word >> (col % 32)) & ((1u << vec) - 1u);
}

// One element from its sum over edges: own is M h, residual is zero where there is none.
// `passed` tells whether the activation lets it through; NaN passes, as in torch.relu.
template <typename T>
struct Finished {
  T value;
  bool passed;
};

template <typename T>
FASTCLUST_HD Finished<T> finish_element(T sum, T own, T self_coef, T row_scale, T residual,
                                        bool relu) {
  const T x = (sum + self_coef * own) * row_scale + residual;  // the residual last: see _kernel.h
  const bool passed = !(x <= T(0));
  return {relu && !passed ? T(0) : x, passed};
}

}  // namespace fastclust
