// Body of the inner loops, compiled once per instruction set: the including file defines
// FASTCLUST_KMEANS_BYTES (bytes of a vector), FASTCLUST_KMEANS_ROWS(n) (rows of a register block of
// n centres) and FASTCLUST_KMEANS_CENTERS (most centres in a block). Everything is in an anonymous
// namespace, so no instruction of one level can be linked into another.
//
// `dots` is a matrix product without packing: rows of x and centres are both contiguous along the
// summed index, so a register block of ROWS x CENTERS vector accumulators reads both as they lie
// (rows may be any subset) and sums each accumulator's lanes at the end.

#include <cstdint>
#include <limits>
#include <type_traits>

#include "kmeans/kmeans_kernels.h"

namespace fastclust::kmeans {
namespace {

template <typename T>
struct Simd {
  static constexpr int kLanes = FASTCLUST_KMEANS_BYTES / static_cast<int>(sizeof(T));
  typedef T Vec __attribute__((vector_size(FASTCLUST_KMEANS_BYTES), may_alias));
  typedef T Loose __attribute__((vector_size(FASTCLUST_KMEANS_BYTES), may_alias, aligned(16)));
};

template <typename T>
inline T lane_sum(typename Simd<T>::Vec v) {
  T s[Simd<T>::kLanes];
  __builtin_memcpy(s, &v, sizeof(v));
#pragma GCC unroll 4
  for (int half = Simd<T>::kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

template <typename T, int kRows, int kCenters>
inline void dots_block(const T* const* x, const T* c, int64_t width, T* out) {
  using Vec = typename Simd<T>::Vec;
  using Loose = typename Simd<T>::Loose;
  Vec acc[kRows][kCenters];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int k = 0; k < kCenters; ++k) acc[i][k] = Vec{};
  }
  for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
    Vec row[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) row[i] = *reinterpret_cast<const Loose*>(x[i] + j);
#pragma GCC unroll 8
    for (int k = 0; k < kCenters; ++k) {
      const Vec center = *reinterpret_cast<const Loose*>(c + k * width + j);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) acc[i][k] += row[i] * center;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kCenters; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) out[k * kTile + i] = lane_sum<T>(acc[i][k]);
  }
}

template <typename T, int kCenters>
void dots_columns(const T* x, const int32_t* rows, int64_t n_rows, const T* c, int64_t width,
                  T* out) {
  constexpr int kRows = FASTCLUST_KMEANS_ROWS(kCenters);
  int64_t i = 0;
  for (; i + kRows <= n_rows; i += kRows) {
    const T* x_rows[kRows];
    for (int r = 0; r < kRows; ++r) x_rows[r] = x + rows[i + r] * width;
    dots_block<T, kRows, kCenters>(x_rows, c, width, out + i);
  }
  for (; i < n_rows; ++i) {
    const T* x_row = x + rows[i] * width;
    dots_block<T, 1, kCenters>(&x_row, c, width, out + i);
  }
}

template <typename T>
void dots(const T* x, const int32_t* rows, int64_t n_rows, const T* c, int64_t n_centers,
          int64_t width, T* out) {
  constexpr int64_t kMost = FASTCLUST_KMEANS_CENTERS;
  const int64_t n_blocks = (n_centers + kMost - 1) / kMost;
  int64_t k = 0;
  for (int64_t b = 0; b < n_blocks; ++b) {  // blocks as even as can be: 10 = 5 + 5, not 8 + 2
    const int64_t count = (n_centers - k + n_blocks - b - 1) / (n_blocks - b);
    const T* c_block = c + k * width;
    T* out_block = out + k * kTile;
    switch (count) {
#define FASTCLUST_CASE(n)                                              \
  case n:                                                              \
    dots_columns<T, n>(x, rows, n_rows, c_block, width, out_block);    \
    break;
      FASTCLUST_CASE(1)
      FASTCLUST_CASE(2)
      FASTCLUST_CASE(3)
      FASTCLUST_CASE(4)
#if FASTCLUST_KMEANS_CENTERS > 4
      FASTCLUST_CASE(5)
      FASTCLUST_CASE(6)
#endif
#undef FASTCLUST_CASE
      default: break;
    }
    k += count;
  }
}

template <typename T>
void least(const T* dots, const T* norms, int64_t n_centers, T* best, T* second, int32_t* arg) {
  // The index is carried in an integer as wide as T, so that both fit the same vectors.
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  T first[kTile], next[kTile];
  Index index[kTile];
  for (int i = 0; i < kTile; ++i) {
    first[i] = norms[0] - 2 * dots[i];
    next[i] = std::numeric_limits<T>::infinity();
    index[i] = 0;
  }
  for (int64_t k = 1; k < n_centers; ++k) {
    const T* row = dots + k * kTile;
    const T norm = norms[k];
    for (int i = 0; i < kTile; ++i) {
      const T score = norm - 2 * row[i];
      const bool less = score < first[i];
      const T larger = less ? first[i] : score;
      next[i] = larger < next[i] ? larger : next[i];
      index[i] = less ? static_cast<Index>(k) : index[i];
      first[i] = less ? score : first[i];
    }
  }
  for (int i = 0; i < kTile; ++i) {
    best[i] = first[i];
    second[i] = next[i];
    arg[i] = static_cast<int32_t>(index[i]);
  }
}

// Eight partial sums in every instruction set, so that this result differs between levels only by
// the contraction to FMA.
template <typename T>
double square_distance(const T* a, const T* b, int64_t width) {
  double sum[8] = {};
  for (int64_t j = 0; j < width; j += 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const double diff = static_cast<double>(a[j + i]) - static_cast<double>(b[j + i]);
      sum[i] += diff * diff;
    }
  }
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

template <typename T>
void add(double* sum, const T* x, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sum[j] += static_cast<double>(x[j]);
}
template <typename T>
void subtract(double* sum, const T* x, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sum[j] -= static_cast<double>(x[j]);
}

template <typename T>
constexpr Kernels<T> kTable{&dots<T>, &least<T>, &square_distance<T>, &add<T>, &subtract<T>,
                            Simd<T>::kLanes};

}  // namespace
}  // namespace fastclust::kmeans
