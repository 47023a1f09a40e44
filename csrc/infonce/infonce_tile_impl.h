// Implementation of infonce_tile.h on the vectors of common/vec.h, included once per instruction
// set. All of it is in an unnamed namespace.
#pragma once

#include <cmath>

#include "common/microkernel.h"
#include "common/vec_math.h"
#include "infonce/infonce_tile.h"

namespace fastclust::infonce {
namespace {

// `count` elements that follow each other as operands: where they stand, or rounded into `room`.
template <typename T>
FASTCLUST_INLINE const T* operands(const T* from, int64_t, T*) {
  return from;
}

// Rows of a block [rows, nr] as operands along the rows; rows of `out` are ld apart.
template <typename T>
FASTCLUST_INLINE void pack_block(int64_t rows, const T* block, T* out, int64_t ld) {
  constexpr int64_t nr = kNr<T>;
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * ld, block + i * nr, nr * sizeof(T));
}

#if defined(__AVX512BF16__)
FASTCLUST_INLINE const Bf16Pair* operands(const float* from, int64_t count, Bf16Pair* room) {
  for (int64_t p = 0; p < count; p += 16) {
    const auto there = static_cast<__mmask16>(count - p < 16 ? (1 << (count - p)) - 1 : 0xffff);
    const auto rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from + p));
    std::memcpy(room + p / 2, &rounded, sizeof(rounded));
  }
  return room;
}

FASTCLUST_INLINE void pack_block(int64_t rows, const float* block, Bf16Pair* out, int64_t ld) {
  constexpr int nr = kNr<float>, width = Vec<float>::width;
  for (int64_t i = 0; i < rows; i += 2) {
    for (int j = 0; j < nr; j += width) {
      store(out + i / 2 * ld + j, pair(load(block + i * nr + j), load(block + (i + 1) * nr + j)));
    }
  }
}
#endif

template <typename T, typename X>
void pack_rows(const T* const* rows, int64_t d, X* sliver) {
  constexpr int64_t nr = kNr<T>, terms = kTerms<X>;
  constexpr int64_t run = 64;  // of one row before the next: long enough for the prefetcher
  X room[run];
  for (int64_t p = 0; p < d; p += run, sliver += run / terms * nr) {
    const int64_t count = d - p < run ? d - p : run;
    for (int64_t i = 0; i < nr; ++i) {
      const X* line = rows[i] == nullptr ? nullptr : operands(rows[i] + p, count, room);
      for (int64_t q = 0; q < (count + terms - 1) / terms; ++q) {
        sliver[q * nr + i] = line == nullptr ? X{} : line[q];
      }
    }
  }
}

template <typename T, typename X>
void pack_factor(const T* block, X* sliver) {
  pack_block(kTile, block, sliver, kNr<T>);
}

template <typename T, typename X>
void similarity(int64_t rows, int64_t k, const X* a, const X* b, T* out) {
  constexpr int nr = kNr<T>;
  for (int64_t i = 0; i < rows; i += kMr) {
    // The rows of A are columns of its slivers: read by broadcasts, no second packed copy.
    const X* from = a + i / nr * k * nr + i % nr;
    Accumulator<T, kNv> acc;
    multiply<X, kNv, true>(k, from, 1, nr, b, nr, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kNv; ++j) store(out + (i + r) * nr + j * Vec<T>::width, acc.v[r][j]);
    }
  }
}

template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg mix(T alpha, T rest, const T* gz, const T* ge) {
  const auto z = broadcast(alpha) * load(gz);
  return ge == nullptr ? z : fma(broadcast(rest), load(ge), z);
}

// Positions of the lanes of vector j of a sliver.
template <typename T>
FASTCLUST_INLINE typename Vec<T>::Int lane_index(int64_t first) {
  using Element = typename LaneInt<T>::type;
  Element index[Vec<T>::width];
  for (int i = 0; i < Vec<T>::width; ++i) index[i] = static_cast<Element>(first + i);
  typename Vec<T>::Int r;
  std::memcpy(&r, index, sizeof(r));
  return r;
}

template <typename T>
FASTCLUST_INLINE typename Vec<T>::Int load_int(const typename LaneInt<T>::type* p) {
  typename Vec<T>::Int r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

template <typename T, int kPower>  // kPower < 0: any exponent
void weigh_power(const WeightStrip<T>& s) {
  constexpr int nr = kNr<T>, width = Vec<T>::width;
  using Reg = typename Vec<T>::Reg;
  using Int = typename Vec<T>::Int;
  const Reg one = broadcast(T(1));
  for (int64_t i = 0; i < s.rows; ++i) {
    if (s.row_member[i] == 0) continue;
    for (int j = 0; j < kNv; ++j) {
      const int64_t at = i * nr + j * width;
      const Reg q = mix(s.alpha, s.rest, s.gz + at, s.ge == nullptr ? nullptr : s.ge + at);
      const Reg scaled = (q - broadcast(s.least)) * broadcast(s.per_width);
      const Int same = load_int<T>(s.column_labels + j * width) == s.row_labels[i];
      const Reg hard = vec_abs<T>(same ? one - scaled : scaled);
      Reg power = one;
      if constexpr (kPower >= 0) {
        for (int p = 0; p < kPower; ++p) power = power * hard;
      } else if (s.beta == std::floor(s.beta) && s.beta <= 64) {
        Reg square = hard;  // binary powers
        for (int rest = static_cast<int>(s.beta); rest > 0; rest >>= 1, square = square * square) {
          if (rest & 1) power = power * square;
        }
      } else {
        power = vec_pow<T>(hard, static_cast<T>(s.beta));
      }
      const Int member = load_int<T>(s.column_member + j * width);
      T* w = s.w + i * kTile + j * width;
      store(w, member ? power : load(w));
    }
  }
}

template <typename T>
void weigh(const WeightStrip<T>& s) {
  if (s.beta == 0) return weigh_power<T, 0>(s);
  if (s.beta == 1) return weigh_power<T, 1>(s);
  if (s.beta == 2) return weigh_power<T, 2>(s);
  if (s.beta == 3) return weigh_power<T, 3>(s);
  weigh_power<T, -1>(s);
}

// kMasked: the strip touches the diagonal or lacks columns.
template <typename T, bool kMasked>
FASTCLUST_INLINE typename Vec<T>::Reg without_absent(const Strip<T>& s, int64_t i, int j,
                                                     typename Vec<T>::Reg p) {
  if constexpr (kMasked) {
    using Element = typename LaneInt<T>::type;
    const auto column = lane_index<T>(j * Vec<T>::width);
    const auto absent = column >= static_cast<Element>(s.columns);
    const typename Vec<T>::Reg zero = {};
    p = absent ? zero : p;
    if (s.first >= 0) p = column == static_cast<Element>(i - s.first) ? zero : p;
  }
  return p;
}

template <typename T, bool kMasked>
void forward_strip(const Strip<T>& s, T* row_sums, T* column_sums) {
  constexpr int nr = kNr<T>, width = Vec<T>::width;
  using Reg = typename Vec<T>::Reg;
  Reg columns[kNv] = {};
  for (int64_t i = 0; i < s.rows; ++i) {
    Reg row = load(row_sums + i * width);
    for (int j = 0; j < kNv; ++j) {
      const int64_t at = i * nr + j * width;
      Reg x = mix(s.alpha, s.rest, s.gz + at, s.ge == nullptr ? nullptr : s.ge + at);
      if (s.w != nullptr) x = x * load(s.w + i * kTile + j * width);
      const Reg p = without_absent<T, kMasked>(s, i, j, vec_exp<T>(x));
      row = row + p;
      columns[j] = columns[j] + p;
    }
    store(row_sums + i * width, row);
  }
  for (int j = 0; j < kNv; ++j) store(column_sums + j * width, columns[j]);
}

template <typename T>
T logit(const Strip<T>& s, int64_t i, int64_t j) {
  const int64_t at = i * kNr<T> + j;
  T x = s.alpha * s.gz[at] + (s.ge == nullptr ? T(0) : s.rest * s.ge[at]);
  return s.w == nullptr ? x : x * s.w[i * kTile + j];
}

template <typename T>
void forward(const Strip<T>& s, T* row_sums, T* column_sums, T* positive) {
  if (s.first < 0 && s.columns == kNr<T>) return forward_strip<T, false>(s, row_sums, column_sums);
  forward_strip<T, true>(s, row_sums, column_sums);
  if (s.first < 0) return;
  for (int64_t j = 0; j < s.columns; ++j) {  // rows 2u and 2u + 1 are the views of a node
    const int64_t i = (s.first + j) ^ 1;
    positive[i] = logit(s, i, j);
  }
}

template <typename T, bool kMasked>
double gradient_strip(const Strip<T>& s, const T* per_row, const T* per_column, T* out,
                      int64_t ld) {
  constexpr int nr = kNr<T>, width = Vec<T>::width;
  using Reg = typename Vec<T>::Reg;
  Reg slope[kNv] = {};
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int j = 0; j < kNv; ++j) {
      const int64_t at = i * nr + j * width;
      const T* ge = s.ge == nullptr ? nullptr : s.ge + at;
      Reg x = mix(s.alpha, s.rest, s.gz + at, ge);
      Reg w = broadcast(T(1));
      if (s.w != nullptr) {
        w = load(s.w + i * kTile + j * width);
        x = x * w;
      }
      Reg t = vec_exp<T>(x) * w * (broadcast(per_row[i]) + load(per_column + j * width));
      t = without_absent<T, kMasked>(s, i, j, t);
      const Reg difference = ge == nullptr ? load(s.gz + at) : load(s.gz + at) - load(ge);
      slope[j] = fma(t, difference, slope[j]);
      store(out + i * ld + j * width, t);
    }
  }
  double sum = 0;
  for (int j = 0; j < kNv; ++j) {
    T lanes[width];
    store(lanes, slope[j]);
    for (int l = 0; l < width; ++l) sum += static_cast<double>(lanes[l]);
  }
  return sum;
}

template <typename T, typename X>
double gradient(const Strip<T>& s, const T* per_row, const T* per_column, X* tile, int64_t column,
                T* positive) {
  const bool plain = s.first < 0 && s.columns == kNr<T>;
  const auto run = plain ? gradient_strip<T, false> : gradient_strip<T, true>;
  double sum;
  if constexpr (std::is_same_v<T, X>) {
    sum = run(s, per_row, per_column, tile + column, kTileLd);
  } else {
    T strip[kTile * kNr<T>];
    sum = run(s, per_row, per_column, strip, kNr<T>);
    for (int64_t i = 0; i < s.rows; ++i) {
      operands(strip + i * kNr<T>, kNr<T>, tile + (i * kTileLd + column) / 2);
    }
    pack_block(s.rows, strip, tile + kStoredTile / 2 + column, kTileLd);
  }
  if (s.first < 0) return sum;
  for (int64_t j = 0; j < s.columns; ++j) {
    const int64_t i = (s.first + j) ^ 1, at = i * kNr<T> + j;
    positive[i] = s.w == nullptr ? T(1) : s.w[i * kTile + j];
    sum -= 2 * static_cast<double>(positive[i]) *
           static_cast<double>(s.gz[at] - (s.ge == nullptr ? T(0) : s.ge[at]));
  }
  return sum;
}

template <typename T>
void range(const Strip<T>& s, T* least, T* greatest) {
  constexpr int nr = kNr<T>, width = Vec<T>::width;
  using Reg = typename Vec<T>::Reg;
  using Element = typename LaneInt<T>::type;
  Reg lo = broadcast(*least), hi = broadcast(*greatest);
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int j = 0; j < kNv; ++j) {
      const int64_t at = i * nr + j * width;
      const Reg x = mix(s.alpha, s.rest, s.gz + at, s.ge == nullptr ? nullptr : s.ge + at);
      const auto present = lane_index<T>(j * width) < static_cast<Element>(s.columns);
      lo = present & (x < lo) ? x : lo;
      hi = present & (x > hi) ? x : hi;
    }
  }
  T lows[width], highs[width];
  store(lows, lo);
  store(highs, hi);
  for (int l = 0; l < width; ++l) {
    if (lows[l] < *least) *least = lows[l];
    if (highs[l] > *greatest) *greatest = highs[l];
  }
}

// Register tiles of the gradient product: accumulators stay in registers over all segments.
template <typename T, typename X, bool kTransposed>
void accumulate_tiles(int64_t rows, const int64_t* row_of, int64_t n_segments,
                      const Segment<X>* segments, const Target<T>* targets, bool fresh) {
  constexpr int nr = kNr<T>, width = Vec<T>::width;
  constexpr int64_t terms = kTerms<X>;
  constexpr int64_t row_stride = kTransposed ? 1 : kTileLd / terms;
  constexpr int64_t k_stride = kTransposed ? kTileLd : 1;
  constexpr int64_t form = kTransposed ? kStoredTile * (terms - 1) / terms : 0;
  for (int64_t i = 0; i < rows; i += kMr) {
    const int64_t used = rows - i < kMr ? rows - i : kMr;
    const bool whole = used == kMr && targets[0].count == nr;
    T* to[kMr];
    for (int r = 0; whole && r < kMr; ++r) {
      to[r] = targets[0].base + row_of[i + r] * targets[0].ld;
      for (int j = 0; j < kNv; ++j) __builtin_prefetch(to[r] + j * width, 1);
    }
    Accumulator<T, kNv> acc = {};
    for (int64_t s = 0; s < n_segments; ++s) {
      multiply_add<X, kNv, kTransposed>(segments[s].k / terms,
                                        segments[s].tile + form + i * row_stride, row_stride,
                                        k_stride, segments[s].f, nr, acc);
    }
    if (whole) {
#pragma GCC unroll 8
      for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kNv; ++j) {
          T* at = to[r] + j * width;
          store(at, fresh ? acc.v[r][j] : load(at) + acc.v[r][j]);
        }
      }
      continue;
    }
    T tile[kMr][nr];
    for (int r = 0; r < kMr; ++r) {
      for (int j = 0; j < kNv; ++j) store(tile[r] + j * width, acc.v[r][j]);
    }
    for (const Target<T>* target = targets; target < targets + 2; ++target) {
      for (int64_t r = 0; target->count > 0 && r < used; ++r) {
        T* at = target->base + row_of[i + r] * target->ld;
        for (int64_t j = 0; j < target->count; ++j) {
          const T x = tile[r][target->offset + j];
          at[j] = fresh ? x : at[j] + x;
        }
      }
    }
  }
}

template <typename T, typename X>
void accumulate(int64_t rows, const int64_t* row_of, int64_t n_segments,
                const Segment<X>* segments, bool transposed, const Target<T>* targets, bool fresh) {
  const auto run = transposed ? accumulate_tiles<T, X, true> : accumulate_tiles<T, X, false>;
  run(rows, row_of, n_segments, segments, targets, fresh);
}

template <typename T, typename X>
constexpr TileKernels<T, X> kTileKernels = {
    kNr<T>,   Vec<T>::width, kTerms<X>,      pack_rows<T, X>, pack_factor<T, X>, similarity<T, X>,
    weigh<T>, forward<T>,    gradient<T, X>, range<T>,        accumulate<T, X>,
};

}  // namespace
}  // namespace fastclust::infonce
