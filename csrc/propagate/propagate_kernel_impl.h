// The CPU kernel, written once over the vectors of common/vec.h and compiled by one translation unit
// for each instruction set. Everything here has internal linkage, so that no code of a higher
// instruction set can be picked by the linker for a lower one.
//
// The sums of a row over one panel live in registers; even and odd edges are summed apart, which
// halves the chain of additions, and joined at the end.
// The residual is added last. Starting the sums from it costs one addition less and ten times the
// rounding error, because every later partial sum is then as large as the residual.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/vec.h"
#include "propagate/propagate_kernel.h"

namespace fastclust {
namespace {

// Edges between a prefetch and its use; the addresses come from an index list that no hardware
// prefetcher follows.
constexpr int64_t kAhead = 32;
// Rows between a prefetch of a node's own row and its use, where neighbours are few: no one of them
// may have asked for it.
constexpr int64_t kRowsAhead = 16;

// One bit per lane of an integer mask of 0 and -1.
template <typename T>
FASTCLUST_INLINE uint32_t lane_mask_bits(typename Vec<T>::Int m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)m);
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask((__m512i)m);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
  if constexpr (sizeof(T) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)m));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < Vec<T>::width; ++i) bits |= static_cast<uint32_t>(m[i] & 1) << i;
  return bits;
}

template <typename T>
FASTCLUST_INLINE void store_around_cache(T* p, typename Vec<T>::Reg x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#else
  store(p, x);
#endif
}

// The first `count` lanes of a vector in memory, no byte beyond them is touched; a loaded vector is
// zero in the others.
#if defined(__AVX512F__)
constexpr bool kLoadsLanes = true;
FASTCLUST_INLINE Vec<float>::Reg load_lanes(const float* p, int count) {
  const auto lanes = static_cast<__mmask16>((1u << count) - 1u);
  return (Vec<float>::Reg)_mm512_maskz_loadu_ps(lanes, p);
}
FASTCLUST_INLINE Vec<double>::Reg load_lanes(const double* p, int count) {
  const auto lanes = static_cast<__mmask8>((1u << count) - 1u);
  return (Vec<double>::Reg)_mm512_maskz_loadu_pd(lanes, p);
}
FASTCLUST_INLINE void store_lanes(float* p, Vec<float>::Reg x, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)x);
}
FASTCLUST_INLINE void store_lanes(double* p, Vec<double>::Reg x, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1u), (__m512d)x);
}
#elif defined(__AVX2__)
constexpr bool kLoadsLanes = true;
FASTCLUST_INLINE Vec<float>::Int lanes_below(float, int count) {
  return Vec<float>::Int{0, 1, 2, 3, 4, 5, 6, 7} < count;
}
FASTCLUST_INLINE Vec<double>::Int lanes_below(double, int count) {
  return Vec<double>::Int{0, 1, 2, 3} < int64_t{count};
}
FASTCLUST_INLINE Vec<float>::Reg load_lanes(const float* p, int count) {
  return (Vec<float>::Reg)_mm256_maskload_ps(p, (__m256i)lanes_below(0.f, count));
}
FASTCLUST_INLINE Vec<double>::Reg load_lanes(const double* p, int count) {
  return (Vec<double>::Reg)_mm256_maskload_pd(p, (__m256i)lanes_below(0., count));
}
// In halves, not by vmaskmov: as a store that is microcode on AMD's processors (some 20 cycles).
FASTCLUST_INLINE void store_lanes(float* p, Vec<float>::Reg r, int count) {
  if (count == 8) return store(p, r);
  const auto x = (__m256)r;
  __m128 part = _mm256_castps256_ps128(x);
  if (count & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(x, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, part);
}
FASTCLUST_INLINE void store_lanes(double* p, Vec<double>::Reg r, int count) {
  if (count == 4) return store(p, r);
  const auto x = (__m256d)r;
  __m128d part = _mm256_castpd256_pd128(x);
  if (count & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd(x, 1);
    p += 2;
  }
  if (count & 1) _mm_store_sd(p, part);
}
#else
constexpr bool kLoadsLanes = false;  // slower than a whole vector
template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg load_lanes(const T* p, int count) {
  T x[Vec<T>::width] = {};
  std::memcpy(x, p, count * sizeof(T));
  return load<T>(x);
}
template <typename T>
FASTCLUST_INLINE void store_lanes(T* p, typename Vec<T>::Reg r, int count) {
  T x[Vec<T>::width];
  store<T>(x, r);
  std::memcpy(p, x, count * sizeof(T));
}
#endif

// A product that is rounded before it is added: without this the compiler makes one instruction of
// the two, and a row gathered in place would have other bits than one gathered from a copy.
template <typename Reg>
FASTCLUST_INLINE Reg rounded(Reg x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

FASTCLUST_INLINE void finish_stores_around_cache() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Columns whose sums fit the registers: 8 vectors where there are 32 registers, 4 where there are 16.
template <typename T>
constexpr int64_t kMaxPieceCols =
    (kVectorBytes == 64 ? 8 : 4) * Vec<T>::width < kGroupCols
        ? kGroupCols
        : (kVectorBytes == 64 ? 8 : 4) * Vec<T>::width;

// Rows of a wide panel that are gathered before the columns that are left of them.
constexpr int64_t kRowsOfPieces = 16;

// The loops for panels of NV vectors, or of pieces of the most vectors that there are loops for, which
// are gathered row by row.
template <typename T, int NV>
struct Loops {
  using Reg = typename Vec<T>::Reg;
  using Int = typename Vec<T>::Int;
  using P = const PropagateParams<T>&;
  static constexpr int W = Vec<T>::width;
  static constexpr int kPerGroup = static_cast<int>(kGroupCols) / W;

  // Whether the last vector reaches past the last column of h; the loops below then load and store as
  // many lanes of it as there are columns.
  static bool is_ragged(P p, const Panel<T>& panel) { return panel.col + NV * W > p.n_cols; }
  static int last_columns(P p, const Panel<T>& panel) {
    const int64_t left = p.n_cols - panel.col - (NV - 1) * W;
    return static_cast<int>(left < W ? left : W);
  }
  // Vector v of the panel in a row of p.n_cols columns, zero past the last.
  template <bool kRagged>
  FASTCLUST_INLINE Reg load_at(P p, const Panel<T>& panel, const T* row, int v) {
    if (!kRagged || v < NV - 1) return load<T>(row + panel.col + v * W);
    return load_lanes(row + panel.col + v * W, last_columns(p, panel));
  }
  template <bool kRagged>
  FASTCLUST_INLINE void store_at(P p, const Panel<T>& panel, T* row, int v, Reg r) {
    if (!kRagged || v < NV - 1) return store<T>(row + panel.col + v * W, r);
    store_lanes(row + panel.col + v * W, r, last_columns(p, panel));
  }
  // Vector v of a row of the panel itself; of h there is nothing past the last column.
  template <bool kRagged>
  FASTCLUST_INLINE Reg gathered(P p, const Panel<T>& panel, const T* row, int v) {
    if (!kRagged || !kLoadsLanes || v < NV - 1) return load<T>(row + v * W);
    return load_lanes(row + v * W, last_columns(p, panel));
  }

  // M h at row i and vector v
  template <bool kRagged>
  FASTCLUST_INLINE Reg masked(P p, const Panel<T>& panel, int64_t i, int v) {
    // Not loaded by the mask: that load would wait for the mask, where both come from memory.
    const Reg x = load_at<kRagged>(p, panel, p.h + i * p.h_stride, v);
    if (p.h_mask == nullptr) return x;
    const uint32_t* words = p.h_mask + i * mask_words(p.n_cols);
    const int64_t col = panel.col + v * W;
    using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    Int lane;
    for (int l = 0; l < W; ++l) lane[l] = Lane{1} << l;
    const Int all = Int{} + static_cast<Lane>(words[col / 32] >> (col % 32));
    return (Reg)((Int)x & ((all & lane) == lane));
  }

  template <bool kRagged>
  static void pack(P p, const Panel<T>& panel, T* x, int64_t row_begin, int64_t row_end) {
    for (int64_t i = row_begin; i < row_end; ++i) {
      const Reg scale = broadcast(p.col_scale != nullptr ? p.col_scale[i] : T(1));
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        const Reg own = masked<kRagged>(p, panel, i, v);
        T* const to = x + i * panel.stride + v * W;
        if (kRagged && kLoadsLanes && v == NV - 1) {
          store_lanes(to, own * scale, last_columns(p, panel));
        } else {
          store<T>(to, own * scale);
        }
        if (p.masked_h != nullptr) store_at<kRagged>(p, panel, p.masked_h + i * p.n_cols, v, own);
      }
    }
  }

  FASTCLUST_INLINE void prefetch_row(const T* row) {
    const char* bytes = reinterpret_cast<const char*>(row);
    constexpr int kBytes = NV * W * static_cast<int>(sizeof(T));
#pragma GCC unroll 16
    for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(bytes + b, 0, 3);
  }

  // acc = sum of the edges' rows. kInPlace: the panel is h itself, with a mask or a scale to come.
  template <bool kValued, bool kFar, bool kRagged, bool kInPlace>
  FASTCLUST_INLINE void gather(P p, const Panel<T>& panel, int64_t begin, int64_t end, Reg (&acc)[NV]) {
    const int32_t* const indices = p.indices;
    const float* const values = p.values;
    const T* const x = panel.x;
    const int64_t stride = panel.stride;
    const int64_t last = p.n_edges - 1;
    const auto prefetch = [&](int64_t e) __attribute__((always_inline)) {
      if constexpr (kFar) {
        const int64_t j = indices[e < last ? e : last];
        prefetch_row(x + j * stride);
        if constexpr (kInPlace) {
          if (p.col_scale != nullptr) __builtin_prefetch(p.col_scale + j, 0, 3);
          if (p.h_mask != nullptr) {
            __builtin_prefetch(p.h_mask + j * mask_words(p.n_cols) + panel.col / 32, 0, 3);
          }
        }
      }
    };
    const auto add = [&](int64_t e, Reg(&sum)[NV]) __attribute__((always_inline)) {
      const T* row = x + indices[e] * stride;
      if constexpr (kInPlace) {
        const int64_t j = indices[e];
        const Reg scale = broadcast(p.col_scale != nullptr ? p.col_scale[j] : T(1));
        const Reg value = broadcast(values != nullptr ? static_cast<T>(values[e]) : T(1));
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
          const Reg own = masked<kRagged>(p, panel, j, v);
          sum[v] = fma(rounded(own * scale), value, sum[v]);
        }
      } else if constexpr (kValued) {
        const Reg value = broadcast(static_cast<T>(values[e]));
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
          sum[v] = fma(gathered<kRagged>(p, panel, row, v), value, sum[v]);
        }
      } else {
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) sum[v] += gathered<kRagged>(p, panel, row, v);
      }
    };
    Reg odd[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[v] = odd[v] = Reg{};
    int64_t e = begin;
    for (; e + 2 <= end; e += 2) {
      prefetch(e + kAhead);
      prefetch(e + kAhead + 1);
      add(e, acc);
      add(e + 1, odd);
    }
    if (e < end) {
      prefetch(e + kAhead);
      add(e, acc);
    }
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[v] += odd[v];
  }

  template <bool kRagged, bool kInPlace>
  FASTCLUST_INLINE void finish(P p, const Panel<T>& panel, int64_t i, Reg (&acc)[NV]) {
    const Reg scale = broadcast(p.row_scale != nullptr ? p.row_scale[i] : T(1));
    const Reg own_scale = broadcast(kInPlace && p.col_scale != nullptr ? p.col_scale[i] : T(1));
    const T* const own = panel.x + i * panel.stride;  // c_i M_i h_i; in place: h_i
    uint32_t bits = 0;
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      Reg x = acc[v];
      Reg mine{};
      if constexpr (kInPlace) {
        mine = masked<kRagged>(p, panel, i, v);
        if (p.masked_h != nullptr) store_at<kRagged>(p, panel, p.masked_h + i * p.n_cols, v, mine);
        if (p.self_loops) x += rounded(mine * own_scale);
      } else if (p.self_loops) {
        x += gathered<kRagged>(p, panel, own, v);
      }
      x *= scale;
      if (p.residual != nullptr) {
        x += load_at<kRagged>(p, panel, p.residual + i * p.residual_stride, v);
      } else if (p.add_input && kInPlace) {
        x += mine;
      } else if (p.add_input) {
        x += p.col_scale == nullptr ? gathered<kRagged>(p, panel, own, v)
                                    : masked<kRagged>(p, panel, i, v);
      }
      const Int passed = ~(x <= Reg{});  // NaN passes, as in torch.relu and its gradient
      if (p.out_mask != nullptr) {
        bits |= lane_mask_bits<T>(passed) << (v % kPerGroup * W);
        if ((v + 1) % kPerGroup == 0 || v == NV - 1) {
          store_bits(p, i, panel.col + v / kPerGroup * kGroupCols, bits);
          bits = 0;
        }
      }
      if (p.relu) x = (Reg)((Int)x & passed);
      T* const out = p.out + i * p.n_cols;
      if (panel.stream) {
        store_around_cache<T>(out + panel.col + v * W, x);
      } else {
        store_at<kRagged>(p, panel, out, v, x);
      }
    }
  }

  // The mask of 16 columns is half a word (of a machine that puts the low half first, as all do
  // that this runs on). Bits past the last column are zero.
  static void store_bits(P p, int64_t i, int64_t col, uint32_t bits) {
    const int64_t left = p.n_cols - col;
    if (left < kGroupCols) bits &= (1u << left) - 1u;
    char* half = reinterpret_cast<char*>(p.out_mask + i * mask_words(p.n_cols)) + col / 8;
    if (left <= kGroupCols && col % 32 == 0) {
      std::memcpy(half, &bits, 4);
    } else {
      std::memcpy(half, &bits, 2);
    }
  }

  template <bool kValued, bool kFar, bool kRagged, bool kInPlace>
  static void rows(P params, const Panel<T>& where, int64_t row_begin, int64_t row_end) {
    const PropagateParams<T> p = params;  // copies, which no store below can change
    const Panel<T> whole = where;
    const auto sum_row = [&](const Panel<T>& panel, int64_t i) __attribute__((always_inline)) {
      const int64_t begin = p.indptr[i], end = p.indptr[i + 1];
      if (end - begin > p.hub.hub_edges) return;
      if (kFar && panel.few) {
        const int64_t ahead = i + kRowsAhead < row_end ? i + kRowsAhead : row_end - 1;
        prefetch_row(panel.x + ahead * panel.stride);
      }
      Reg acc[NV];
      gather<kValued, kFar, kRagged, kInPlace>(p, panel, begin, end, acc);
      finish<kRagged, kInPlace>(p, panel, i, acc);
    };
    if (NV * W < kMaxPieceCols<T> || whole.n_cols == NV * W) {
      for (int64_t i = row_begin; i < row_end; ++i) sum_row(whole, i);
    } else {
      for (int64_t i = row_begin; i < row_end; ++i) {
        Panel<T> piece = whole;
        for (int64_t c = 0; c < whole.n_cols; c += NV * W) {
          piece.x = whole.x + c;
          piece.col = whole.col + c;
          sum_row(piece, i);
        }
      }
    }
    if (whole.stream) finish_stores_around_cache();
  }

  template <bool kValued, bool kInPlace>
  static void segment(P p, const Panel<T>& panel, int64_t s) {
    Reg acc[NV];
    const int64_t* const edges = p.hub.segments + 3 * s + 1;
    gather<kValued, true, true, kInPlace>(p, panel, edges[0], edges[1], acc);
    T* const slot = p.scratch + s * p.n_cols;
    for (int v = 0; v < NV; ++v) store_at<true>(p, panel, slot, v, acc[v]);
  }

  template <bool kInPlace>
  static void combine(P p, const Panel<T>& panel, int64_t hub) {
    const int64_t* entry = p.hub.hubs + 3 * hub;
    Reg acc[NV] = {};
    for (int64_t s = entry[1]; s < entry[2]; ++s) {
      const T* row = p.scratch + s * p.n_cols;
      for (int v = 0; v < NV; ++v) acc[v] += load_at<true>(p, panel, row, v);
    }
    finish<true, kInPlace>(p, panel, entry[0], acc);
    if (panel.stream) finish_stores_around_cache();
  }
};

// The loops for one column that is not scaled or masked in place: a vector holds a column of
// consecutive rows, since one of a single row would be idle but for one lane. The sums over edges are
// scalar, in the order of the loops above and with the same roundings, so with the same bits.
template <typename T>
struct ColumnLoops {
  using Reg = typename Vec<T>::Reg;
  using Int = typename Vec<T>::Int;
  using P = const PropagateParams<T>&;
  static constexpr int W = Vec<T>::width;
  static constexpr int64_t kBlock = 256;  // rows summed before they are finished, a multiple of W

  static bool fits(P p, const Panel<T>& panel) { return p.n_cols == 1 && !panel.in_place; }

  // Rows [i, i + count) of a column; a vector is whole where all its rows exist.
  template <bool kWhole>
  FASTCLUST_INLINE Reg load_rows(const T* x, int64_t stride, int64_t i, int count) {
    if (stride == 1) {
      if constexpr (kWhole) return load<T>(x + i);
      return load_lanes(x + i, count);
    }
    T rows[W] = {};
    for (int l = 0; l < (kWhole ? W : count); ++l) rows[l] = x[(i + l) * stride];
    return load<T>(rows);
  }
  template <bool kWhole>
  FASTCLUST_INLINE void store_rows(T* x, Reg r, int count) {
    if constexpr (kWhole) return store<T>(x, r);
    store_lanes(x, r, count);
  }
  // M h of those rows; a row of the mask is one word.
  template <bool kWhole>
  FASTCLUST_INLINE Reg masked(P p, int64_t i, int count) {
    const Reg x = load_rows<kWhole>(p.h, p.h_stride, i, count);
    if (p.h_mask == nullptr) return x;
    Int words{};
    if constexpr (sizeof(T) == 4) {
      words = (Int)load_rows<kWhole>(reinterpret_cast<const T*>(p.h_mask), 1, i, count);
    } else {
      for (int l = 0; l < (kWhole ? W : count); ++l) words[l] = p.h_mask[i + l];
    }
    return (Reg)((Int)x & -(words & 1));
  }

  template <bool kWhole>
  FASTCLUST_INLINE void pack_rows(P p, T* x, int64_t i, int count) {
    const Reg own = masked<kWhole>(p, i, count);
    const Reg scale = p.col_scale != nullptr ? load_rows<kWhole>(p.col_scale, 1, i, count)
                                             : broadcast(T(1));
    store_rows<kWhole>(x + i, own * scale, count);
    if (p.masked_h != nullptr) store_rows<kWhole>(p.masked_h + i, own, count);
  }
  static void pack(P params, T* x, int64_t row_begin, int64_t row_end) {
    const PropagateParams<T> p = params;
    int64_t i = row_begin;
    for (; i + W <= row_end; i += W) pack_rows<true>(p, x, i, W);
    if (i < row_end) pack_rows<false>(p, x, i, static_cast<int>(row_end - i));
  }

  FASTCLUST_INLINE T fused(T a, T b, T c) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
  }

  template <bool kWhole>
  FASTCLUST_INLINE void finish(P p, const Panel<T>& panel, int64_t i, int count, Reg x) {
    const auto own = [&]() __attribute__((always_inline)) {
      return load_rows<kWhole>(panel.x, panel.stride, i, count);
    };
    if (p.self_loops) x += own();
    if (p.row_scale != nullptr) x = rounded(x * load_rows<kWhole>(p.row_scale, 1, i, count));
    if (p.residual != nullptr) {
      x += load_rows<kWhole>(p.residual, p.residual_stride, i, count);
    } else if (p.add_input) {
      x += p.col_scale == nullptr ? own() : masked<kWhole>(p, i, count);
    }
    const Int passed = ~(x <= Reg{});  // NaN passes, as above
    if (p.out_mask != nullptr) {
      const Int bits = passed & 1;
      if constexpr (sizeof(T) == 4) {
        store_rows<kWhole>(reinterpret_cast<T*>(p.out_mask + i), (Reg)bits, count);
      } else {
        for (int l = 0; l < (kWhole ? W : count); ++l) {
          p.out_mask[i + l] = static_cast<uint32_t>(bits[l]);
        }
      }
    }
    if (p.relu) x = (Reg)((Int)x & passed);
    store_rows<kWhole>(p.out + i, x, count);
  }

  // Rows of hubs are written as well, and again when their segments are joined.
  template <bool kValued, bool kFar>
  static void rows(P params, const Panel<T>& where, int64_t row_begin, int64_t row_end) {
    const PropagateParams<T> p = params;
    const Panel<T> panel = where;
    const T* const x = panel.x;
    const int64_t stride = panel.stride, last = p.n_edges - 1;
    const auto add = [&](int64_t e, T sum) __attribute__((always_inline)) {
      const T row = x[p.indices[e] * stride];
      if constexpr (kFar) {
        const int64_t ahead = e + kAhead;
        __builtin_prefetch(x + p.indices[ahead < last ? ahead : last] * stride, 0, 3);
      }
      if constexpr (kValued) return fused(row, static_cast<T>(p.values[e]), sum);
      return sum + row;
    };
    alignas(64) T sums[kBlock];
    for (int64_t first = row_begin; first < row_end; first += kBlock) {
      const int64_t n = first + kBlock < row_end ? kBlock : row_end - first;
      int64_t e = p.indptr[first];
      for (int64_t k = 0; k < n; ++k) {
        const int64_t begin = e, end = p.indptr[first + k + 1];
        T even = 0, odd = 0;
        if (end - begin <= p.hub.hub_edges) {
          for (; e + 2 <= end; e += 2) {
            even = add(e, even);
            odd = add(e + 1, odd);
          }
          if (e < end) even = add(e, even);
        }
        e = end;
        sums[k] = even + odd;
      }
      int64_t k = 0;
      for (; k + W <= n; k += W) finish<true>(p, panel, first + k, W, load<T>(sums + k));
      if (k < n) {
        const int count = static_cast<int>(n - k);
        finish<false>(p, panel, first + k, count, load_lanes(sums + k, count));
      }
    }
  }
};

// Calls f(Loops<T, NV>) with as many vectors as the panel has columns for.
template <typename T, int NV = static_cast<int>(kMaxPieceCols<T>) / Vec<T>::width, typename F>
void with_loops(const PropagateParams<T>& p, const Panel<T>& panel, const F& f) {
  if constexpr (NV > 1) {
    constexpr int64_t kFewer = (NV - 1) * Vec<T>::width;
    if (panel.n_cols <= kFewer || p.n_cols - panel.col <= kFewer) {
      return with_loops<T, NV - 1>(p, panel, f);
    }
  }
  f(Loops<T, NV>{});
}

// Columns [begin, end) of a panel.
template <typename T>
Panel<T> part_of(const Panel<T>& panel, int64_t begin, int64_t end) {
  Panel<T> part = panel;
  part.x += begin;
  part.col += begin;
  part.n_cols = end - begin;
  return part;
}

// Calls f(part) for parts of the panel that fit the registers.
template <typename T, typename F>
void for_each_piece(const Panel<T>& panel, const F& f) {
  for (int64_t c = 0; c < panel.n_cols; c += kMaxPieceCols<T>) {
    const int64_t end = c + kMaxPieceCols<T>;
    f(part_of(panel, c, end < panel.n_cols ? end : panel.n_cols));
  }
}

template <typename T>
void rows_of_panel(const PropagateParams<T>& p, const Panel<T>& panel, int64_t row_begin,
                   int64_t row_end) {
  if constexpr (kLoadsLanes) {
    using Loops = ColumnLoops<T>;
    if (Loops::fits(p, panel)) {
      auto* const rows = p.values != nullptr ? Loops::template rows<true, true>
                         : panel.far         ? Loops::template rows<false, true>
                                             : Loops::template rows<false, false>;
      return rows(p, panel, row_begin, row_end);
    }
  }
  const int64_t whole = (p.n_cols - panel.col) / kMaxPieceCols<T> * kMaxPieceCols<T>;
  if (0 < whole && whole < panel.n_cols) {
    for (int64_t i = row_begin; i < row_end; i += kRowsOfPieces) {
      const int64_t end = i + kRowsOfPieces < row_end ? i + kRowsOfPieces : row_end;
      rows_of_panel(p, part_of(panel, 0, whole), i, end);
      rows_of_panel(p, part_of(panel, whole, panel.n_cols), i, end);
    }
    return;
  }
  with_loops(p, panel, [&](auto loops) {
    const bool ragged = loops.is_ragged(p, panel);
    if constexpr (kLoadsLanes) {
      if (panel.in_place && ragged) {
        return loops.template rows<true, true, true, true>(p, panel, row_begin, row_end);
      }
      if (panel.in_place) {
        return loops.template rows<true, true, false, true>(p, panel, row_begin, row_end);
      }
    }
    if (p.values != nullptr && ragged) {
      loops.template rows<true, true, true, false>(p, panel, row_begin, row_end);
    } else if (p.values != nullptr) {
      loops.template rows<true, true, false, false>(p, panel, row_begin, row_end);
    } else if (ragged && panel.far) {
      loops.template rows<false, true, true, false>(p, panel, row_begin, row_end);
    } else if (ragged) {
      loops.template rows<false, false, true, false>(p, panel, row_begin, row_end);
    } else if (panel.far) {
      loops.template rows<false, true, false, false>(p, panel, row_begin, row_end);
    } else {
      loops.template rows<false, false, false, false>(p, panel, row_begin, row_end);
    }
  });
}

template <typename T>
PropagateKernel<T> make_propagate_kernel() {
  using P = const PropagateParams<T>&;
  return {
      kMaxPieceCols<T>,
      kLoadsLanes,
      [](P p, const Panel<T>& panel, T* x, int64_t row_begin, int64_t row_end) {
        if constexpr (kLoadsLanes) {
          if (ColumnLoops<T>::fits(p, panel)) return ColumnLoops<T>::pack(p, x, row_begin, row_end);
        }
        with_loops(p, panel, [&](auto loops) {
          if (loops.is_ragged(p, panel)) {
            loops.template pack<true>(p, panel, x, row_begin, row_end);
          } else {
            loops.template pack<false>(p, panel, x, row_begin, row_end);
          }
        });
      },
      rows_of_panel<T>,
      [](P p, const Panel<T>& wide, int64_t s) {
        for_each_piece(wide, [&](const Panel<T>& panel) {
          with_loops(p, panel, [&](auto loops) {
            if constexpr (kLoadsLanes) {
              if (panel.in_place) return loops.template segment<true, true>(p, panel, s);
            }
            if (p.values != nullptr) {
              loops.template segment<true, false>(p, panel, s);
            } else {
              loops.template segment<false, false>(p, panel, s);
            }
          });
        });
      },
      [](P p, const Panel<T>& wide, int64_t hub) {
        for_each_piece(wide, [&](const Panel<T>& panel) {
          with_loops(p, panel, [&](auto loops) {
            if constexpr (kLoadsLanes) {
              if (panel.in_place) return loops.template combine<true>(p, panel, hub);
            }
            loops.template combine<false>(p, panel, hub);
          });
        });
      },
  };
}

}  // namespace
}  // namespace fastclust
