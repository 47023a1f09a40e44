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

// out [M, B, D]: X_c; rows past the end of a short last batch are zero.
template <typename T>
void center(const Rows<T>& x, T* out);

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

// One step of the subspace iteration: q = orthonormal basis of y + shift v. Columns that depend on
// earlier ones up to rounding become zero.
//
// With v, y being X_c^T X_c v: shift = 32 eps |y|_F - root bound. The first term, a little more than
// the rounding noise of y, keeps directions alive that are small in X but, not being squared there,
// no noise. The second makes a run of steps a polynomial of X_c^T X_c: with the roots of a Chebyshev
// polynomial of [0, 1] it grows fastest above `bound` and stays small below. new_bound is what this
// step knows of the l-th eigenvalue of X_c^T X_c, from below: the smallest singular value of
// X_c^T X_c v, where the shift leaves it (root <= 1/2), else `bound` again. |v|_2 must not exceed 1.
// Without v: shift = 0.
template <typename T>
struct Orthonormalize {
  int64_t n_batches;    // M
  int64_t n_rows;       // n
  int64_t width;        // l
  int passes;           // 1: columns independent enough to iterate on; 2: orthonormal to rounding
  double root;          // in [0, 1)
  const T* y;           // [M, n, l]
  const T* v;           // [M, n, l] or nullptr
  const double* bound;  // [M], or nullptr: 0
  T* q;                 // [M, n, l]
  double* new_bound;    // [M]
};
template <typename T>
void orthonormalize(const Orthonormalize<T>& p);

// Thin SVD of tall matrices: the leading `rank` left vectors, all singular values in descending order
// and all right vectors, by CholeskyQR and one-sided Jacobi rotations. Vectors that belong to s = 0
// are zero.
template <typename T>
struct ThinSvd {
  int64_t n_batches;  // M
  int64_t n_rows;     // n
  int64_t width;      // l
  int64_t rank;       // r <= l
  const T* y;         // [M, n, l]
  T* u;               // [M, n, r]
  double* s;          // [M, l]
  double* vt;         // [M, l, l]
};
template <typename T>
void thin_svd(const ThinSvd<T>& p);

// out [M, n, l]: normal numbers of mean 0 and deviation 1 / (sqrt(n) + sqrt(l)), so that |out|_2 is
// about 1 at most, keyed by (seed, first_batch + batch, element / 4).
template <typename T>
void normal(int64_t n_batches, int64_t first_batch, int64_t n_rows, int64_t width, uint64_t seed,
            T* out);

}  // namespace fastclust::lowrank
