// The functions of the packed matrix product that depend on the instruction set, as a table.
// gemm.cpp holds the portable copy and the loops; gemm_avx2.cpp and gemm_avx512.cpp one copy each.
#pragma once

#include <cstdint>

#include "common/gemm.h"

namespace fastclust::detail {

template <typename T>
struct GemmKernel {
  int64_t mr, nr;  // register tile; panels are packed in slivers of mr rows of A, nr columns of B

  // A[m, k] -> [ceil(m / mr), k, mr] and B[k, n] -> [ceil(n / nr), k, nr], padded with zeros.
  void (*pack_a)(int64_t m, int64_t k, MatrixView<T> a, T* packed);
  void (*pack_b)(int64_t k, int64_t n, MatrixView<T> b, T* packed);

  // C[m, n] = alpha A B + beta C, A and B packed.
  void (*packed)(int64_t m, int64_t n, int64_t k, T alpha, const T* a, const T* b, T beta, T* c,
                 int64_t ldc);
  // The same with A where it lies: right for few columns, where packing A would not pay.
  void (*direct)(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, const T* b, T beta,
                 T* c, int64_t ldc);

  // y[m], `y_stride` apart: y = alpha A x + beta y with rows of A contiguous, and with columns.
  void (*rows_times)(int64_t m, int64_t k, T alpha, const T* a, int64_t row_stride, const T* x,
                     T beta, T* y, int64_t y_stride);
  void (*columns_times)(int64_t m, int64_t k, T alpha, const T* a, int64_t col_stride, const T* x,
                        T beta, T* y, int64_t y_stride);

  // `rounds` times fma_flops operations on registers alone: the rate that bounds every product.
  void (*fma_loop)(int64_t rounds);
  int64_t fma_flops;
};

const GemmKernel<float>& gemm_kernel_avx2(float);
const GemmKernel<double>& gemm_kernel_avx2(double);
const GemmKernel<float>& gemm_kernel_avx512(float);
const GemmKernel<double>& gemm_kernel_avx512(double);

}  // namespace fastclust::detail
