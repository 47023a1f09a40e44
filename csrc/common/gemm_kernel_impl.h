// Implementation of gemm_kernel.h, included once by each file that has an instruction set.
#pragma once

#include <cstring>
#include <utility>

#include "common/gemm_kernel.h"
#include "common/microkernel.h"

namespace fastclust {
namespace {

// to[p * to_stride + i] = from[i * from_stride + p] for i and p below Q, in log2(Q) rounds of Q
// shuffles: a round swaps the bit H of the two indices.
template <typename Row, int H, size_t... J>
FASTCLUST_INLINE void swap_bit(Row& x, Row& y, std::index_sequence<J...>) {
  constexpr int Q = sizeof...(J);
  const Row low = __builtin_shufflevector(x, y, (J & H ? Q + J - H : J)...);
  y = __builtin_shufflevector(x, y, (J & H ? Q + J : J + H)...);
  x = low;
}

template <typename T, int Q>
FASTCLUST_INLINE void transpose_block(const T* from, int64_t from_stride, T* to,
                                      int64_t to_stride) {
  typedef T Row __attribute__((vector_size(Q * sizeof(T))));
  constexpr auto lanes = std::make_index_sequence<Q>();
  Row rows[Q];
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) {
    if ((i & 1) == 0) swap_bit<Row, 1>(rows[i], rows[i + 1], lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) {
    if (Q > 2 && (i & 2) == 0) swap_bit<Row, 2>(rows[i], rows[i + (Q > 2 ? 2 : 0)], lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) {
    if (Q > 4 && (i & 4) == 0) swap_bit<Row, 4 % Q>(rows[i], rows[i + (Q > 4 ? 4 : 0)], lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) {
    if (Q > 8 && (i & 8) == 0) swap_bit<Row, 8 % Q>(rows[i], rows[i + (Q > 8 ? 8 : 0)], lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(Row));
}

// x[i, p] -> packed[i / kWidth][p][i % kWidth] for i < n, p < k, where x[i, p] and x[i + 1, p] are
// neighbours; n a multiple of kWidth. A few p at a time, so that a line of x is read for all slivers
// on it while in L1; lines further down are prefetched to L2, because no hardware prefetcher follows
// the jumps from row to row. A transposed 1536 x 13752 x 624 product takes 2 % longer than the plain
// one of as many terms.
template <typename T, int kWidth>
void pack_neighbours(int64_t n, int64_t k, const T* x, int64_t k_stride, T* packed) {
  constexpr int64_t kGroup = 8;
  for (int64_t p0 = 0; p0 < k; p0 += kGroup) {
    const int64_t p1 = p0 + kGroup < k ? p0 + kGroup : k;
    for (int64_t p = p0 + 2 * kGroup; p < p1 + 2 * kGroup && p < k; ++p) {
      for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(x + p * k_stride + i, 0, 2);
    }
    for (int64_t i = 0; i < n; i += kWidth) {
      for (int64_t p = p0; p < p1; ++p) {
        std::memcpy(packed + i * k + p * kWidth, x + p * k_stride + i, kWidth * sizeof(T));
      }
    }
  }
}

// The same for any strides and any n; what is missing of the last sliver becomes 0.
template <typename T, int kWidth>
void pack_slivers(int64_t n, int64_t k, const T* x, int64_t stride, int64_t k_stride, T* packed) {
  constexpr int Q = kWidth < Vec<T>::width ? kWidth : Vec<T>::width;
  const int64_t whole = n / kWidth * kWidth;
  if (stride == 1) pack_neighbours<T, kWidth>(whole, k, x, k_stride, packed);
  for (int64_t first = stride == 1 ? whole : 0; first < n; first += kWidth) {
    const int64_t used = n - first < kWidth ? n - first : kWidth;
    const T* from = x + first * stride;
    T* to = packed + first * k;
    int64_t p = 0;
    if (used == kWidth && k_stride == 1) {
      for (; p + Q <= k; p += Q) {
        for (int i = 0; i < kWidth; i += Q) {
          transpose_block<T, Q>(from + i * stride + p, stride, to + p * kWidth + i, kWidth);
        }
      }
    }
    for (; p < k; ++p) {
      for (int64_t i = 0; i < kWidth; ++i) {
        to[p * kWidth + i] = i < used ? from[i * stride + p * k_stride] : T(0);
      }
    }
  }
}

template <typename T>
void pack_a(int64_t m, int64_t k, MatrixView<T> a, T* packed) {
  pack_slivers<T, kMr>(m, k, a.data, a.row_stride, a.col_stride, packed);
}

template <typename T>
void pack_b(int64_t k, int64_t n, MatrixView<T> b, T* packed) {
  pack_slivers<T, kNr<T>>(n, k, b.data, b.col_stride, b.row_stride, packed);
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

template <typename T>
FASTCLUST_INLINE T lane_sum(typename Vec<T>::Reg v) {
  T lane[Vec<T>::width];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = Vec<T>::width / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  return lane[0];
}

// Four rows at a time, the last one again where there are fewer; lanes and the terms that fill no
// vector are summed apart.
template <typename T>
void rows_times(int64_t m, int64_t k, T alpha, const T* a, int64_t row_stride, const T* x, T beta,
                T* y, int64_t y_stride) {
  constexpr int kRows = 4, kWidth = Vec<T>::width;
  const int64_t whole = k / kWidth * kWidth;
  for (int64_t i = 0; i < m; i += kRows) {
    const T* row[kRows];
    for (int64_t r = 0; r < kRows; ++r) row[r] = a + (i + r < m ? i + r : m - 1) * row_stride;
    typename Vec<T>::Reg even[kRows] = {}, odd[kRows] = {};
    int64_t p = 0;
    for (; p + 2 * kWidth <= whole; p += 2 * kWidth) {
      const auto x0 = load(x + p), x1 = load(x + p + kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        even[r] = fma(load(row[r] + p), x0, even[r]);
        odd[r] = fma(load(row[r] + p + kWidth), x1, odd[r]);
      }
    }
    if (p < whole) {
      const auto x0 = load(x + p);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) even[r] = fma(load(row[r] + p), x0, even[r]);
    }
    T rest[kRows] = {};
    for (p = whole; p < k; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) rest[r] += row[r][p] * x[p];
    }
    T sum[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] = alpha * (lane_sum<T>(even[r] + odd[r]) + rest[r]);
    for (int64_t r = 0; r < kRows && i + r < m; ++r) {
      T& at = y[(i + r) * y_stride];
      at = beta == T(0) ? sum[r] : sum[r] + beta * at;
    }
  }
}

// Blocks of y that stay in L1 take blocks of columns, four columns at a time.
template <typename T>
void columns_times(int64_t m, int64_t k, T alpha, const T* a, int64_t col_stride, const T* x,
                   T beta, T* y, int64_t y_stride) {
  constexpr int64_t kBlock = 8192 / sizeof(T), kTerms = 256;
  constexpr int kWidth = Vec<T>::width;
  alignas(64) T sum[kBlock], part[kBlock];
  for (int64_t i = 0; i < m; i += kBlock) {
    const int64_t rows = m - i < kBlock ? m - i : kBlock;
    const int64_t whole = rows / kWidth * kWidth;
    for (int64_t p0 = 0; p0 < k; p0 += kTerms) {
      const int64_t p1 = p0 + kTerms < k ? p0 + kTerms : k;
      T* to = p0 == 0 ? sum : part;
      std::memset(to, 0, rows * sizeof(T));
      int64_t p = p0;
      for (; p + 4 <= p1; p += 4) {
        const T* c[4];
        typename Vec<T>::Reg factor[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          c[q] = a + (p + q) * col_stride + i;
          factor[q] = broadcast(x[p + q]);
        }
        for (int64_t j = 0; j < whole; j += kWidth) {
          auto acc = load(to + j);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) acc = fma(load(c[q] + j), factor[q], acc);
          store(to + j, acc);
        }
        for (int64_t j = whole; j < rows; ++j) {
          for (int q = 0; q < 4; ++q) to[j] += c[q][j] * x[p + q];
        }
      }
      for (; p < p1; ++p) {
        const T* c = a + p * col_stride + i;
        for (int64_t j = 0; j < whole; j += kWidth) {
          store(to + j, fma(load(c + j), broadcast(x[p]), load(to + j)));
        }
        for (int64_t j = whole; j < rows; ++j) to[j] += c[j] * x[p];
      }
      if (p0 > 0) {
        for (int64_t j = 0; j < rows; ++j) sum[j] += part[j];
      }
    }
    for (int64_t j = 0; j < rows; ++j) {
      T& at = y[(i + j) * y_stride];
      at = beta == T(0) ? alpha * sum[j] : alpha * sum[j] + beta * at;
    }
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
    rows_times<T>, columns_times<T>,
    fma_loop<T>, 2 * 8 * kFmaChains * Vec<T>::width};

}  // namespace
}  // namespace fastclust
