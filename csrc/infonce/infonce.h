// Contract of the hard-sample InfoNCE kernels (HSAN, AAAI 2023, Eqs. 6 and 8 to 11), CPU and CUDA.
//
// Rows: the two views of N nodes stacked, M = 2N; row i and row p(i) = i + N (mod 2N) are the
// views of node i mod N. With S = alpha Z Z^T + (1 - alpha) E E^T and weights W (below, 1 without):
//
//   r_i = sum_{k != i} exp(W_ik S_ik)
//   L   = 1/M sum_i ( log r_i - W_{i,p(i)} S_{i,p(i)} )
//
// Gradients with W constant, P = exp(W o S) off the diagonal and 0 on it, Pi the pair permutation:
//
//   T  = (P o W) o (1/r_i + 1/r_k) - 2 Pi o W          (symmetric, [M, M], never stored whole)
//   dZ = g/M alpha T Z,  dE = g/M (1 - alpha) T E,  dalpha = g/M 1/2 sum_ik T_ik (Z Z^T - E E^T)_ik
//
// Weights: refresh s left a snapshot of embeddings, alpha, the least and greatest entry of its own
// S (diagonal included), labels and confident nodes. For nodes u, v of rows i, k let s be the
// highest bit common to membership[u] and membership[v]; then
//
//   W_ik = | [labels_s[u] == labels_s[v]] - (S_s[i, k] - min_s) / (max_s - min_s) | ^ beta
//
// and W_ik = 1 when they share no bit. 0^0 = 1. Where max_s - min_s is no normal number the quotient
// counts as 0.
// One snapshot is the published method; several, with the newest in the highest bit, keep the
// value of the last refresh at which both nodes were confident (the released code's behaviour).
//
// Each snapshot costs a product more per tile that needs it, M^2 D flop per pass in the worst case.
// Where M^2 elements fit in memory the CPU takes stored weights instead: the upper triangle of W in
// tiles, which update_stored_weights_cpu overwrites where both nodes are confident, once a refresh.
// Reading them costs next to nothing beside the products (2 D flop for 4 or 8 bytes).
#pragma once

#include <cstdint>

namespace fastclust::infonce {

// Arithmetic of the products; values shared with fastclust/ops/infonce.py. The CPU has
// kFp32 and, with AVX-512 BF16, kBf16; the others run as kFp32 there. Float64 inputs allow kFp32
// only. Weights are made from products of float32 grade in any of them.
enum class Precision : int { kFp32 = 0, kTf32 = 1, kBf16x3 = 2, kBf16 = 3 };

constexpr int kMaxSnapshots = 63;  // bits of membership that are used

// Stored weights: tiles [P, kWeightTile, kWeightTile] of the upper triangle of W, row of tiles after
// row of tiles, each from its diagonal on; P = weight_tiles(N). Entries have the place of their rows,
// 2u + v for view v of node u. Plain rows at every dispatch level: a checkpoint may change machines.
// Tiles on the diagonal are whole; entries of rows that do not exist are never used.
constexpr int64_t kWeightTile = 192;
inline int64_t weight_tiles(int64_t n_nodes) {
  const int64_t side = (2 * n_nodes + kWeightTile - 1) / kWeightTile;
  return side * (side + 1) / 2;
}

// The part of the work that a call does, for several processes that share it. S is symmetric: only
// entries on and above its diagonal are computed, in tiles, and a window holds the tiles with rows in
// [row_begin, row_end) and columns from column_begin on. Rows count as the kernels take them: row
// 2u + v is view v of the u-th node of the weights' order (of node u without weights). Bounds are
// multiples of kWindowRows, row_end may be 2N; column_begin is row_begin (with the diagonal) or >= row_end.
//
// Of a call with a window row_sums, gradients and range are the window's share, which add up (or
// widen) to the whole over windows that cover the triangle once; *loss is the window's share of
// -1/M sum_i W_{i,p(i)} S_{i,p(i)}, since no window alone knows r_i. M is the 2N of the call.
struct Window {
  bool whole = true;  // everything, in one call; nothing below is read
  int64_t row_begin = 0, row_end = 0, column_begin = 0;

  bool has_diagonal() const { return whole || column_begin == row_begin; }
};
constexpr int64_t kWindowRows = 384;  // a multiple of the tiles of every backend

// One pair of stacked views. Pointers are to memory of the kernel's device.
template <typename T>
struct Views {
  const T* z;      // [2N, dz] contiguous
  const T* e;      // [2N, de] contiguous; not read when de == 0
  int64_t dz, de;  // either may be 0
  const T* alpha;  // [] not clamped: leaves [0, 1] in ordinary training
};

template <typename T>
struct Weights {
  int n_snapshots;             // S; 0: every weight is 1 and nothing below is read
  const Views<T>* snapshots;   // [S] (host array), each with its own widths
  const T* range;              // [S, 2] least and greatest entry of the snapshot's S
  const int32_t* labels;       // [S, N]
  const int64_t* membership;   // [N] bit s: the node was confident at refresh s
  const int32_t* order;        // [N] nodes by descending membership, a permutation: rows taken in
                               //     this order give tiles that mostly need one snapshot or none
  double beta;                 // >= 0
  const T* stored = nullptr;   // [P, kWeightTile, kWeightTile] all weights, with n_snapshots = 0;
                               //     CPU only
};

template <typename T>
struct ForwardParams {
  int64_t n_nodes;  // N >= 1
  Views<T> views;
  Weights<T> weights;
  Precision precision;
  T* loss;           // []
  double* row_sums;  // [2N] r_i, kept for the backward pass; the CPU writes NaN where logits leave
                     //   the range of its exponential
  Window window = {};
};

template <typename T>
struct BackwardParams {
  int64_t n_nodes;
  Views<T> views;
  Weights<T> weights;
  Precision precision;
  const double* row_sums;  // [2N]
  const T* grad_loss;      // []
  T* grad_z;               // [2N, dz] or nullptr: not wanted, and then not computed
  T* grad_e;               // [2N, de] or nullptr
  T* grad_alpha;           // [] or nullptr
  Window window = {};
};

template <typename T>
struct RangeParams {
  int64_t n_nodes;
  Views<T> views;
  Precision precision;
  T* range;  // [2] min and max over all entries of S, diagonal included
  Window window = {};
};

template <typename T>
struct UpdateParams {
  int64_t n_nodes;
  Views<T> views;
  const T* range;         // [2] of their S
  const int32_t* labels;  // [N]
  const bool* confident;  // [N] only entries of two such nodes are written
  double beta;
  T* stored;              // [P, kWeightTile, kWeightTile] in and out; 1 everywhere before the first
};

// CPU implementations (infonce_cpu.cpp), float and double.
template <typename T>
void forward_cpu(const ForwardParams<T>& p);
template <typename T>
void backward_cpu(const BackwardParams<T>& p);
template <typename T>
void range_cpu(const RangeParams<T>& p);
template <typename T>
void update_stored_weights_cpu(const UpdateParams<T>& p);

}  // namespace fastclust::infonce
