// Packed matrix product for the CPU kernels, float and double, any strides:
//
//   C[m, n] = alpha * A[m, k] B[k, n] + beta * C[m, n]
//
// A transposed operand is a swap of strides. The sum over k runs in the same order for any number
// of threads and for any position of a tile, so results are reproducible to the bit at one
// dispatch level (levels differ by rounding: AVX2 and AVX-512 contract to FMA).
#pragma once

#include <cstdint>

namespace fastclust {

// A read-only strided matrix; strides in elements.
template <typename T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;
};

template <typename T>
MatrixView<T> row_major(const T* data, int64_t ld) {
  return {data, ld, 1};
}
template <typename T>
MatrixView<T> transposed(MatrixView<T> a) {
  return {a.data, a.col_stride, a.row_stride};
}

// On the calling thread. beta == 0 never reads C (it may hold NaN).
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b, T beta,
          T* c /* [m, n], rows ldc apart */, int64_t ldc);

// The same, split over the thread pool by tiles of C.
template <typename T>
void parallel_gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b,
                   T beta, T* c /* [m, n], rows ldc apart */, int64_t ldc);

// Highest rate of the fused multiply-adds of the dispatch level in force on one core, in Gflop/s:
// the best of a few loops on registers. Benchmarks state rates as a share of it.
template <typename T>
double fma_peak_gflops();

}  // namespace fastclust
