#include "common/gemm.h"

#include <algorithm>

#include "common/parallel.h"

namespace fastclust {

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b, T beta,
          T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = c + i * ldc;
    if (beta == T(0)) {
      std::fill(row, row + n, T(0));
    } else if (beta != T(1)) {
      for (int64_t j = 0; j < n; ++j) row[j] *= beta;
    }
    for (int64_t p = 0; p < k; ++p) {
      const T scale = alpha * a.data[i * a.row_stride + p * a.col_stride];
      const T* b_row = b.data + p * b.row_stride;
      for (int64_t j = 0; j < n; ++j) row[j] += scale * b_row[j * b.col_stride];
    }
  }
}

template <typename T>
void parallel_gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b,
                   T beta, T* c, int64_t ldc) {
  constexpr int64_t kTile = 192;
  const int64_t col_tiles = (n + kTile - 1) / kTile;
  const int64_t row_tiles = (m + kTile - 1) / kTile;
  parallel_tasks(row_tiles * col_tiles, [&](int64_t task, int) {
    const int64_t i = task / col_tiles * kTile, j = task % col_tiles * kTile;
    const MatrixView<T> a_tile{a.data + i * a.row_stride, a.row_stride, a.col_stride};
    const MatrixView<T> b_tile{b.data + j * b.col_stride, b.row_stride, b.col_stride};
    gemm(std::min(kTile, m - i), std::min(kTile, n - j), k, alpha, a_tile, b_tile, beta,
         c + i * ldc + j, ldc);
  });
}

#define FASTCLUST_INSTANTIATE(T)                                                               \
  template void gemm<T>(int64_t, int64_t, int64_t, T, MatrixView<T>, MatrixView<T>, T, T*,     \
                        int64_t);                                                              \
  template void parallel_gemm<T>(int64_t, int64_t, int64_t, T, MatrixView<T>, MatrixView<T>, T, \
                                 T*, int64_t);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust
