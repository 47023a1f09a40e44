// Building blocks of the batched randomised SVD. The algorithm itself reads top to bottom in
// fastclust/ops/lowrank.py; everything that touches O(N) or O(D^2) numbers is here.
//
// X [N, D] is cut into M = ceil(N / B) batches of B rows (the last may be shorter). X_c is a batch
// minus its column means, never stored for the whole of X: dense rows are centred panel by panel
// (exact for data with a large mean), sparse products get a rank-one correction.
#pragma once

#include <cstdint>

namespace fastclust::lowrank {

// The rows of X, dense or CSR.
template <typename T>
struct Rows {
  const T* values;         // [N, D], or [nnz] when indptr is set
  const int64_t* indptr;   // [N + 1] positions in values and indices, or nullptr: dense
  const int32_t* indices;  // [nnz]
  const T* mean;           // [M, D] column means to subtract, or nullptr
  int64_t n_rows;          // N
  int64_t n_cols;          // D
  int64_t batch_size;      // B

  int64_t n_batches() const { return (n_rows + batch_size - 1) / batch_size; }
};

// out [M, D]: column means of each batch, summed in double. Dense columns are summed as
// differences from the batch's first row, so constant columns come out exact.
template <typename T>
void column_means(const Rows<T>& x, T* out);

// out [M, D, D] = X_c^T X_c of each batch.
template <typename T>
void gram(const Rows<T>& x, T* out);

// out [M, m, n] = a [M, m, k] b [M, k, n].
template <typename T>
void multiply(int64_t n_batches, int64_t m, int64_t k, int64_t n, const T* a, const T* b, T* out);

// out [M, B, l] = X_c v; rows past the end of a short last batch are zero. v [M, D, l].
template <typename T>
void project(const Rows<T>& x, int64_t width, const T* v, T* out);

// out [M, D, l] = X_c^T q, q [M, B, l].
template <typename T>
void project_transposed(const Rows<T>& x, int64_t width, const T* q, T* out);

// y + shift v = q r with q^T q = I. Columns that depend on earlier ones up to rounding become zero in
// q, and their row in r is zero. With v (orthonormal), y being X_c^T X_c v: shift = 32 eps |y|_F, a
// little more than the rounding noise of y, keeps directions alive that are small in X but, not being
// squared there, no noise. Without v: shift = 0.
template <typename T>
struct Orthonormalize {
  int64_t n_batches;  // M
  int64_t n_rows;     // n
  int64_t width;      // l
  int passes;         // 1: columns independent enough to iterate on; 2: orthonormal to rounding
  const T* y;         // [M, n, l]
  const T* v;         // [M, n, l] or nullptr
  T* q;               // [M, n, l]
  double* r;          // [M, l, l] upper triangular
};
template <typename T>
void orthonormalize(const Orthonormalize<T>& p);

// a = u diag(s) vt for small square matrices by one-sided Jacobi rotations, s descending. Rows of vt
// that belong to s = 0 are zero.
struct SmallSvd {
  int64_t n_batches;  // M
  int64_t width;      // l
  double tolerance;   // rows of diag(s) vt are orthogonal up to this, relative to their lengths
  const double* a;    // [M, l, l]
  double* u;          // [M, l, l]
  double* s;          // [M, l]
  double* vt;         // [M, l, l]
};
void small_svd(const SmallSvd& p);

// out [M, n, l]: standard normal numbers keyed by (seed, first_batch + batch, element / 4).
template <typename T>
void normal(int64_t n_batches, int64_t first_batch, int64_t n_rows, int64_t width, uint64_t seed,
            T* out);

}  // namespace fastclust::lowrank
