// The inner loops of the low-rank kernels that depend on the instruction set, as a table.
// lowrank_cpu.cpp holds the portable copy; lowrank_avx2.cpp and lowrank_avx512.cpp one copy each.
#pragma once

#include <cstdint>

namespace fastclust::lowrank::detail {

constexpr int64_t kColumnBlock = 16;  // columns of the sketch that one sparse task owns

template <typename T>
struct SparseKernel {
  // w [n_rows, width], rows ldw apart: X v - shift, v [D, ldv] and shift [ldv] padded with zeros to a
  // multiple of kColumnBlock columns. indptr points at the first of the rows.
  void (*project)(int64_t n_rows, const T* values, const int64_t* indptr, const int32_t* indices,
                  int64_t width, const T* v, int64_t ldv, const T* shift, T* w, int64_t ldw);
  // z [D, kColumnBlock] += X^T q, total [kColumnBlock] += column sums of q; q [n_rows, n], n <=
  // kColumnBlock, rows ldq apart.
  void (*scatter)(int64_t n_rows, const T* values, const int64_t* indptr, const int32_t* indices,
                  int64_t n, const T* q, int64_t ldq, T* z, double* total);
};

// The small dense algebra of a batch, in double.
struct SmallKernel {
  // Upper Cholesky factor r of the upper triangle of g [l, l], which is overwritten, and its inverse.
  // A column whose pivot is below tolerance times the largest diagonal entry depends on earlier ones:
  // its row of r and its column of the inverse become zero.
  void (*cholesky)(int64_t l, double tolerance, double* g, double* r, double* inverse);
  // The same inverse from r.
  void (*invert)(int64_t l, const double* r, double* inverse);
  // Smallest singular value of r from its inverse, by power iteration: at least the true one. x [2 l]
  // is scratch.
  double (*smallest)(int64_t l, const double* inverse, double* x);
  // One-sided Jacobi: the rows of a [l, ld] are made orthogonal by plane rotations. ld: l rounded up
  // to a multiple of 8, the padding zero. A pair counts as orthogonal when its product is below
  // `tolerance` times the square of the shorter, or is rounding. norm [l] is scratch.
  void (*jacobi)(int64_t l, int64_t ld, double* a, double* norm, double tolerance);
};

// count [n]: bits that a [words] has in common with each row of b [n, words].
using BitsKernel = void (*)(int64_t words, int64_t n, const uint64_t* a, const uint64_t* b,
                            int64_t* count);

struct Kernels {
  SparseKernel<float> sparse_float;
  SparseKernel<double> sparse_double;
  SmallKernel small;
  BitsKernel common_bits;
};

const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace fastclust::lowrank::detail
