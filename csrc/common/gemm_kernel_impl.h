// Implementation of gemm_kernel.h, included once by each file that has an instruction set.
#pragma once

#include "common/gemm_kernel.h"
#include "common/microkernel.h"

namespace fastclust {
namespace {

template <typename T>
void pack_slivers(int64_t n, int64_t k, const T* x, int64_t stride, int64_t k_stride, int64_t width,
                  T* packed) {
  for (int64_t first = 0; first < n; first += width) {
    const int64_t used = n - first < width ? n - first : width;
    const T* from = x + first * stride;
    if (stride == 1) {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t i = 0; i < used; ++i) packed[p * width + i] = from[p * k_stride + i];
      }
    } else {
      // Blocks of 16 along k: every line of the source is read once while it is in L1.
      for (int64_t p0 = 0; p0 < k; p0 += 16) {
        const int64_t p1 = p0 + 16 < k ? p0 + 16 : k;
        for (int64_t i = 0; i < used; ++i) {
          for (int64_t p = p0; p < p1; ++p) packed[p * width + i] = from[i * stride + p * k_stride];
        }
      }
    }
    for (int64_t p = 0; used < width && p < k; ++p) {
      for (int64_t i = used; i < width; ++i) packed[p * width + i] = T(0);
    }
    packed += k * width;
  }
}

template <typename T>
void pack_a(int64_t m, int64_t k, MatrixView<T> a, T* packed) {
  pack_slivers(m, k, a.data, a.row_stride, a.col_stride, kMr, packed);
}

template <typename T>
void pack_b(int64_t k, int64_t n, MatrixView<T> b, T* packed) {
  pack_slivers(n, k, b.data, b.col_stride, b.row_stride, kNr<T>, packed);
}

// C[rows, columns] = alpha acc + beta C for the used part of a register tile.
template <typename T, int NV>
FASTCLUST_INLINE void write_tile(const Accumulator<T, NV>& acc, int64_t rows, int64_t columns,
                                 T alpha, T beta, T* c, int64_t ldc) {
  constexpr int kWidth = Vec<T>::width;
  const typename Vec<T>::Reg scale = broadcast(alpha), keep = broadcast(beta);
  if (rows == kMr && columns == NV * kWidth) {
#pragma GCC unroll 8
    for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        T* at = c + i * ldc + j * kWidth;
        const auto x = scale * acc.v[i][j];
        store(at, beta == T(0) ? x : fma(keep, load(at), x));
      }
    }
    return;
  }
  T full[kMr][NV * kWidth];
  for (int i = 0; i < kMr; ++i) {
    for (int j = 0; j < NV; ++j) store(full[i] + j * kWidth, scale * acc.v[i][j]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      T& at = c[i * ldc + j];
      at = beta == T(0) ? full[i][j] : full[i][j] + beta * at;
    }
  }
}

template <typename T, int NV, bool kUnitRows>
void column_of_tiles(int64_t m, int64_t columns, int64_t k, T alpha, const T* a, int64_t row_stride,
                     int64_t k_stride, int64_t next_tile, const T* b, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i += kMr) {
    const int64_t rows = m - i < kMr ? m - i : kMr;
    Accumulator<T, NV> acc;
    multiply<T, NV, kUnitRows>(k, a + i / kMr * next_tile, row_stride, k_stride, b, kNr<T>, acc);
    write_tile(acc, rows, columns, alpha, beta, c + i * ldc, ldc);
  }
}

// Columns that fill only part of a sliver run with fewer vectors.
template <typename T, bool kUnitRows>
void row_of_columns(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t row_stride,
                    int64_t k_stride, int64_t next_tile, const T* b, T beta, T* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += kNr<T>, b += k * kNr<T>) {
    const int64_t columns = n - j < kNr<T> ? n - j : kNr<T>;
    const int64_t vectors = (columns + Vec<T>::width - 1) / Vec<T>::width;
    auto* run = column_of_tiles<T, kNv, kUnitRows>;
    if (vectors == 1) run = column_of_tiles<T, 1, kUnitRows>;
    if (kNv > 2 && vectors == 2) run = column_of_tiles<T, 2, kUnitRows>;
    run(m, columns, k, alpha, a, row_stride, k_stride, next_tile, b, beta, c + j, ldc);
  }
}

template <typename T>
void packed_product(int64_t m, int64_t n, int64_t k, T alpha, const T* a, const T* b, T beta, T* c,
                    int64_t ldc) {
  row_of_columns<T, true>(m, n, k, alpha, a, 1, kMr, k * kMr, b, beta, c, ldc);
}

template <typename T>
void direct_product(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, const T* b, T beta,
                    T* c, int64_t ldc) {
  const int64_t whole = m / kMr * kMr;
  row_of_columns<T, false>(whole, n, k, alpha, a.data, a.row_stride, a.col_stride,
                           kMr * a.row_stride, b, beta, c, ldc);
  // A register tile reads kMr rows: the last few stand one by one, each kMr times.
  for (int64_t i = whole; i < m; ++i) {
    row_of_columns<T, false>(1, n, k, alpha, a.data + i * a.row_stride, 0, a.col_stride, 0, b, beta,
                             c + i * ldc, ldc);
  }
}

constexpr int kFmaChains = 12;  // independent sums: more than latency times width anywhere

template <typename T>
void fma_loop(int64_t rounds) {
  typename Vec<T>::Reg sum[kFmaChains] = {};
  typename Vec<T>::Reg x = broadcast(T(0.999)), y = broadcast(T(0.001));
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+m"(x), "+m"(y));  // unknown values: nothing can be computed ahead
#pragma GCC unroll 96
    for (int r = 0; r < 8 * kFmaChains; ++r) {
      sum[r % kFmaChains] = fma(sum[r % kFmaChains], x, y);
    }
  }
  for (int j = 0; j < kFmaChains; ++j) asm volatile("" : "+m"(sum[j]));
}

template <typename T>
constexpr detail::GemmKernel<T> kGemmKernel = {
    kMr,         kNr<T>,
    pack_a<T>,   pack_b<T>,
    packed_product<T>, direct_product<T>,
    fma_loop<T>, 2 * 8 * kFmaChains * Vec<T>::width};

}  // namespace
}  // namespace fastclust
