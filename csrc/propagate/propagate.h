// Fused sparse propagation over a graph, the one operator behind ECN-MF's layers (Eqs. 10-11), the
// HSAN and SSGC filters and HSAN's structure encoder, and at the same time its own backward:
//
//   x_i = s_i ( sum_{j in N(i)} a_ij c_j M_j h_j  +  [self loop] c_i M_i h_i )
//         + r_i  or  + M_i h_i  or  nothing
//   y_i = max(x_i, 0)  or  x_i
//
// s = row_scale and c = col_scale hold the normalisation, a = edge values (absent: all one), M is an
// optional 0/1 mask of the elements of h. Forward has no M. Backward has h = the gradient of y,
// M = the bits that the forward saved (y > 0), and s and c swapped: A is symmetric, so the same CSR
// serves and no transposed copy exists.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace fastclust {

// A number that is stored as bf16 and computed with as float; CUDA only.
struct Bf16 {
  uint16_t bits;
};
// The type of sums, scales and arithmetic.
template <typename T>
struct SumType {
  using type = T;
};
template <>
struct SumType<Bf16> {
  using type = float;
};

// 32-bit words of one row of a bit mask over n_cols columns; bit c of a row is bit (c % 32) of
// word (c / 32). Bits past the last column are zero. (static: every instruction set its own copy)
static FASTCLUST_HD int64_t mask_words(int64_t n_cols) { return (n_cols + 31) / 32; }

// A row of more than hub_edges edges is a hub. Its edges are cut into segments of hub_edges, each
// summed on its own into a slot of scratch memory; the slots are then added in order. All other
// rows are summed in one go, from the first edge to the last. Neither depends on how many threads
// or warps there are, so every run gives the same bits.
struct HubTables {
  int64_t hub_edges;
  int64_t n_segments;
  const int64_t* segments;  // [n_segments, 3]: row, first edge, last edge + 1
  int64_t n_hubs;
  const int64_t* hubs;      // [n_hubs, 3]: row, first segment, last segment + 1
};

template <typename T>
struct PropagateParams {
  using Sum = typename SumType<T>::type;

  int64_t n_nodes;           // N
  int64_t n_halo;            // rows of h and col_scale beyond N, which edges may lead to; only of a
                             //   forward pass: the nodes of other processes that hold the rest
  int64_t n_cols;            // d
  int64_t n_edges;           // E, both directions of every edge
  const int64_t* indptr;     // [N + 1]
  const int32_t* indices;    // [E], ascending in each row, no self loops
  const float* values;       // [E] or nullptr: all one
  const Sum* row_scale;      // [N] or nullptr: all one
  const Sum* col_scale;      // [N + n_halo] or nullptr: all one
  bool self_loops;
  int64_t n_tasks;
  const int64_t* task_rows;  // [n_tasks + 1], CPU only: first row of each task, balanced by edges
  HubTables hub;

  const T* h;                // [N + n_halo, d], rows h_stride apart
  int64_t h_stride;
  const uint32_t* h_mask;    // [N, mask_words(d)] or nullptr: no masking
  const T* residual;         // [N, d], rows residual_stride apart, or nullptr
  int64_t residual_stride;
  bool add_input;            // adds M h in place of a residual
  bool relu;

  T* out;                    // [N, d]
  uint32_t* out_mask;        // [N, mask_words(d)] or nullptr: which x the activation let pass
  T* masked_h;               // [N, d] or nullptr: M h
  Sum* scratch;              // [n_segments, d]; set inside on the CPU
};

// Runs on the thread pool, at the CPU level in force.
template <typename T>
void propagate_cpu(PropagateParams<T> p);

// out = M h alone, for a backward of which only the gradient of the residual is wanted.
template <typename T>
void mask_rows_cpu(int64_t n_nodes, int64_t n_cols, const T* h /* [N, d] */, int64_t h_stride,
                   const uint32_t* h_mask /* [N, mask_words(d)] */, T* out /* [N, d] */);

}  // namespace fastclust
