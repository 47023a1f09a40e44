// Body of the inner loops, compiled once per instruction set: the including file defines
// FASTCLUST_KMEANS_BYTES (bytes of a vector) and FASTCLUST_KMEANS_CENTERS (most centres in a register
// block). Everything is in an anonymous namespace, so no instruction of one level can be linked into
// another.
//
// `dots` is a matrix product without packing: rows of x and centres are both contiguous along the
// summed index, so a register block of 4 rows x CENTERS vector accumulators reads both as they lie
// (rows may be any subset) and sums each accumulator's lanes at the end. Tried and lost: points packed
// into the register tiles of common/microkernel.h, 8 centres by 32 points, Lloyd at N 13752, d 500, one
// thread 48 Gflop/s where this ran at 55 (two readings, not interleaved).

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
  using Index = decltype(Vec{} < Vec{});  // a lane of 0 or -1, or any integer
};

// Index vectors for __builtin_shuffle: lane j of the result is lane f(j) of the concatenation.
template <typename T, typename F>
constexpr auto shuffle_mask(F f) {
  typename Simd<T>::Index mask{};
  for (int j = 0; j < Simd<T>::kLanes; ++j) mask[j] = f(j);
  return mask;
}

// out[0..3] = the lane sums of a, b, c, d: halves of 128-bit blocks are interleaved and added until
// each block holds parts of all four, then the blocks are added.
template <typename T>
inline void four_sums(typename Simd<T>::Vec a, typename Simd<T>::Vec b, typename Simd<T>::Vec c,
                      typename Simd<T>::Vec d, T* out) {
  constexpr int kLanes = Simd<T>::kLanes, kBlock = 16 / static_cast<int>(sizeof(T));
  const auto low = shuffle_mask<T>([](int j) {  // unpack low halves of blocks
    return j / kBlock * kBlock + j % kBlock / 2 + j % 2 * kLanes;
  });
  const auto high = shuffle_mask<T>([](int j) {
    return j / kBlock * kBlock + kBlock / 2 + j % kBlock / 2 + j % 2 * kLanes;
  });
  const auto ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const auto cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  T block[kLanes];
  if constexpr (kBlock == 2) {  // double: every block of ab is (a, b)
    T other[kLanes];
    __builtin_memcpy(block, &ab, sizeof(ab));
    __builtin_memcpy(other, &cd, sizeof(cd));
#pragma GCC unroll 4
    for (int half = kLanes / 2; half >= kBlock; half /= 2) {
#pragma GCC unroll 8
      for (int j = 0; j < half; ++j) {
        block[j] += block[j + half];
        other[j] += other[j + half];
      }
    }
    for (int j = 0; j < 2; ++j) {
      out[j] = block[j];
      out[2 + j] = other[j];
    }
  } else {  // float: blocks of ab are (a, b, a, b)
    const auto first = shuffle_mask<T>([](int j) {
      return j / 4 * 4 + j % 2 + (j % 4 / 2) * kLanes;
    });
    const auto last = shuffle_mask<T>([](int j) {
      return j / 4 * 4 + 2 + j % 2 + (j % 4 / 2) * kLanes;
    });
    const auto all = __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, last);
    __builtin_memcpy(block, &all, sizeof(all));
#pragma GCC unroll 4
    for (int half = kLanes / 2; half >= kBlock; half /= 2) {
#pragma GCC unroll 8
      for (int j = 0; j < half; ++j) block[j] += block[j + half];
    }
    for (int j = 0; j < 4; ++j) out[j] = block[j];
  }
}

// kRows = 4 rows (fewer are padded by repeating one) against kCenters centres.
template <typename T, int kCenters>
inline void dots_block(const T* const* x, const T* c, int64_t width, T* out) {
  using Vec = typename Simd<T>::Vec;
  using Loose = typename Simd<T>::Loose;
  Vec acc[kCenters][4];
#pragma GCC unroll 8
  for (int k = 0; k < kCenters; ++k) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[k][i] = Vec{};
  }
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
#if FASTCLUST_KMEANS_CENTERS > 4
    // Registers for four rows; the centres pass through one more. Rows mostly lie one after the
    // other, so the next four can be called into the first-level cache.
    __builtin_prefetch(x0 + j + 4 * width);
    __builtin_prefetch(x1 + j + 4 * width);
    __builtin_prefetch(x2 + j + 4 * width);
    __builtin_prefetch(x3 + j + 4 * width);
    const Vec row[4] = {*reinterpret_cast<const Loose*>(x0 + j),
                        *reinterpret_cast<const Loose*>(x1 + j),
                        *reinterpret_cast<const Loose*>(x2 + j),
                        *reinterpret_cast<const Loose*>(x3 + j)};
#pragma GCC unroll 8
    for (int k = 0; k < kCenters; ++k) {
      const Vec center = *reinterpret_cast<const Loose*>(c + k * width + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[k][i] += row[i] * center;
    }
#else
    Vec center[kCenters];
#pragma GCC unroll 8
    for (int k = 0; k < kCenters; ++k) center[k] = *reinterpret_cast<const Loose*>(c + k * width + j);
    const T* const rows[4] = {x0, x1, x2, x3};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec row = *reinterpret_cast<const Loose*>(rows[i] + j);
#pragma GCC unroll 8
      for (int k = 0; k < kCenters; ++k) acc[k][i] += row * center[k];
    }
#endif
  }
#pragma GCC unroll 8
  for (int k = 0; k < kCenters; ++k) {
    four_sums<T>(acc[k][0], acc[k][1], acc[k][2], acc[k][3], out + k * kTile);
  }
}

template <typename T, int kCenters>
void dots_columns(const T* x, const int32_t* rows, int64_t n_rows, const T* c, int64_t width,
                  T* out) {
  for (int64_t i = 0; i < n_rows; i += 4) {
    const T* x_rows[4];
    for (int64_t r = 0; r < 4; ++r) {
      x_rows[r] = x + rows[i + r < n_rows ? i + r : n_rows - 1] * width;
    }
    dots_block<T, kCenters>(x_rows, c, width, out + i);
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
#if FASTCLUST_KMEANS_CENTERS > 2
      FASTCLUST_CASE(3)
#endif
#if FASTCLUST_KMEANS_CENTERS > 4
      FASTCLUST_CASE(4)
      FASTCLUST_CASE(5)
      FASTCLUST_CASE(6)
#endif
#undef FASTCLUST_CASE
      default: break;
    }
    k += count;
  }
}

// Of few columns a register block ends before its lanes have paid for being summed: here a lane is a
// row, kCenters centres meet four vectors of rows at a time.
template <typename T, int kCenters>
inline void column_block(const T* x, int64_t n_columns, const T* c, int64_t width, T* out) {
  using Vec = typename Simd<T>::Vec;
  using Loose = typename Simd<T>::Loose;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < kTile; i += 4 * kLanes) {
    Vec acc[kCenters][4];
#pragma GCC unroll 4
    for (int k = 0; k < kCenters; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[k][v] = Vec{};
    }
    for (int64_t j = 0; j < n_columns; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec rows = *reinterpret_cast<const Loose*>(x + j * kTile + i + v * kLanes);
#pragma GCC unroll 4
        for (int k = 0; k < kCenters; ++k) acc[k][v] += rows * c[k * width + j];
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kCenters; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        __builtin_memcpy(out + k * kTile + i + v * kLanes, &acc[k][v], sizeof(Vec));
      }
    }
  }
}

template <typename T>
void column_dots(const T* x, int64_t n_columns, const T* c, int64_t n_centers, int64_t width,
                 T* out) {
  constexpr int kMost = FASTCLUST_KMEANS_CENTERS > 4 ? 4 : 2;
  int64_t k = 0;
  for (; k + kMost <= n_centers; k += kMost) {
    column_block<T, kMost>(x, n_columns, c + k * width, width, out + k * kTile);
  }
  for (; k < n_centers; ++k) {
    column_block<T, 1>(x, n_columns, c + k * width, width, out + k * kTile);
  }
}

// Written in vectors: of a loop over single values the compiler makes masked stores, which AMD's AVX2
// processors execute as microcode.
template <typename T>
void least(const T* dots, const T* norms, int64_t n_centers, T* best, T* second, int32_t* arg) {
  using Vec = typename Simd<T>::Vec;
  using Loose = typename Simd<T>::Loose;
  using Index = typename Simd<T>::Index;  // as wide as T, so that both fit the same lanes
  using Lane = std::remove_reference_t<decltype(Index{}[0])>;
  constexpr int kLanes = Simd<T>::kLanes, kVecs = 4;
  for (int64_t i = 0; i < kTile; i += kVecs * kLanes) {
    Vec first[kVecs], next[kVecs];
    Index index[kVecs] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      first[v] = norms[0] - 2 * *reinterpret_cast<const Loose*>(dots + i + v * kLanes);
      next[v] = std::numeric_limits<T>::infinity() - Vec{};
    }
    for (int64_t k = 1; k < n_centers; ++k) {
      const T* row = dots + k * kTile + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec score = norms[k] - 2 * *reinterpret_cast<const Loose*>(row + v * kLanes);
        const Index less = score < first[v];
        const Vec larger = less ? first[v] : score;
        next[v] = larger < next[v] ? larger : next[v];
        index[v] = less ? static_cast<Lane>(k) - Index{} : index[v];
        first[v] = less ? score : first[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      *reinterpret_cast<Loose*>(best + i + v * kLanes) = first[v];
      *reinterpret_cast<Loose*>(second + i + v * kLanes) = next[v];
      for (int l = 0; l < kLanes; ++l) arg[i + v * kLanes + l] = static_cast<int32_t>(index[v][l]);
    }
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
void add(double* __restrict sum, const T* __restrict x, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sum[j] += static_cast<double>(x[j]);
}
template <typename T>
void move(double* __restrict from, double* __restrict to, const T* __restrict x, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    const auto value = static_cast<double>(x[j]);
    from[j] -= value;
    to[j] += value;
  }
}

template <typename T>
constexpr Kernels<T> kTable{&dots<T>,  &column_dots<T>, &least<T>, &square_distance<T>,
                            &add<T>,   &move<T>,        Simd<T>::kLanes};

}  // namespace
}  // namespace fastclust::kmeans
