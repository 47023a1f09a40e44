// What every instruction set provides of the CPU kernel: four loops over panels of columns, split
// over threads by propagate_cpu.cpp. The loops themselves are in propagate_kernel_impl.h.
#pragma once

#include <cstdint>

#include "propagate/propagate.h"

namespace fastclust {

// A mask is written and read 16 columns at a time, so panels never share a piece of it.
constexpr int64_t kGroupCols = 16;

// The matrix that is gathered, for `n_cols` columns of h from `col` on.
template <typename T>
struct Panel {
  const T* x;      // [N, n_cols], rows `stride` apart: c_j M_j h_j, or h itself. Past the last
                   //   column of h: zero where loads_lanes is false, else not to be read
  bool in_place;   // x is h, and c_j or M_j is still to be applied
  int64_t stride;
  int64_t col;
  int64_t n_cols;  // a multiple of kGroupCols
  bool far;        // too large for a core's own cache: worth a prefetch
  bool few;        // few neighbours a node: its own row is worth a prefetch as well
  bool stream;     // the output is too large for any cache: write around it
};

template <typename T>
struct PropagateKernel {
  int64_t max_cols;   // columns of the widest panel of a copy; panels of h are this wide, or multiples
  bool loads_lanes;   // whether a panel of h itself may reach past its last column
  // Writes c_j M_j h_j of the panel's columns to x, and M h to p.masked_h.
  void (*pack)(const PropagateParams<T>& p, const Panel<T>& panel, T* x, int64_t row_begin,
               int64_t row_end);
  void (*rows)(const PropagateParams<T>& p, const Panel<T>& panel, int64_t row_begin,
               int64_t row_end);
  void (*segment)(const PropagateParams<T>& p, const Panel<T>& panel, int64_t segment);
  void (*combine)(const PropagateParams<T>& p, const Panel<T>& panel, int64_t hub);
};

template <typename T>
PropagateKernel<T> propagate_kernel_portable();
template <typename T>
PropagateKernel<T> propagate_kernel_avx2();
template <typename T>
PropagateKernel<T> propagate_kernel_avx512();

}  // namespace fastclust
