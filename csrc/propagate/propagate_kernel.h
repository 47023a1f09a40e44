// The CPU kernel, written once over a vector type V and compiled by one translation unit for each
// instruction set. Everything here has internal linkage, so that no code of a higher instruction
// set can be picked by the linker for a lower one.
//
// A call handles a range of rows and one block of up to V::kMaxVecs vectors of columns, with the
// sums of one row in registers. Blocks are the outer loop: a block of h is gathered from all over
// and should stay in cache while every row passes. The rows of edges 16 ahead are prefetched: the
// addresses come from an index list that no hardware prefetcher follows. What bounds it is the
// gather: L3 bandwidth while a block of h fits there, DRAM bandwidth beyond.
//
// Variants, interleaved in one process on a busy Zen 4 machine, medians of CPU time, one thread,
// N / stored entries / d = 13752 / 492k / 600 (A) and 200k / 10M / 128 (C): no prefetch A 103,
// C 792 ms; prefetch 8, 16, 32 edges ahead A 77, 81, 84, C 615, 725, 715; blocks of 64 instead of
// 128 columns A 63, C 685 (backward A 91 instead of 154, C 1063 instead of 946): narrow blocks pay
// only where they make a block of h fit the cache, hence choose_block_cols in
// propagate_cpu.cpp.
// The residual is added last. Starting the sums from it costs one addition less and ten times the
// rounding error, because every later partial sum is then as large as the residual.
#pragma once

#include <cstdint>

#include "common/hd.h"
#include "propagate/propagate.h"

namespace fastclust {

template <typename T>
struct PropagateKernel {
  int64_t max_block_cols;  // a multiple of 32: blocks never share a word of a bit mask
  void (*rows)(const PropagateParams<T>&, int64_t row_begin, int64_t row_end, int64_t col);
  void (*segment)(const PropagateParams<T>&, int64_t segment, int64_t col);
  void (*combine)(const PropagateParams<T>&, int64_t hub, int64_t col);
};

template <typename T>
PropagateKernel<T> propagate_kernel_portable();
template <typename T>
PropagateKernel<T> propagate_kernel_avx2();
template <typename T>
PropagateKernel<T> propagate_kernel_avx512();

namespace {

constexpr int64_t kAhead = 16;

// NV vectors of columns from `col` on; the last one is cut at the last column by `tail`.
template <typename V, int NV>
struct Block {
  using T = typename V::T;
  using Reg = typename V::Reg;
  static constexpr int W = V::kWidth;

  const PropagateParams<T>& p;
  int64_t col;
  int64_t words;
  int n_last;
  typename V::Mask tail;

  Block(const PropagateParams<T>& params, int64_t col)
      : p(params), col(col), words(mask_words(params.n_cols)) {
    const int64_t left = params.n_cols - col - (NV - 1) * W;
    n_last = static_cast<int>(left < W ? left : W);
    tail = V::mask(n_last == 32 ? ~0u : (1u << n_last) - 1u);
  }

  Reg load(const T* row, int v) const {
    return v == NV - 1 ? V::load_masked(row + v * W, tail) : V::load(row + v * W);
  }
  void store(T* row, int v, Reg x) const {
    if (v == NV - 1) {
      V::store_masked(row + v * W, tail, x);
    } else {
      V::store(row + v * W, x);
    }
  }
  template <bool kMask>
  Reg load_h(int64_t node, int v) const {
    const T* row = p.h + node * p.h_stride + col;
    if constexpr (kMask) {
      // bits past the last column are zero, so they also cut the tail
      return V::load_masked(row + v * W, V::mask_at(p.h_mask + node * words + col / 32, v));
    } else {
      return load(row, v);
    }
  }

  // Forced inline: gcc 12 takes a function that only prefetches for one without effect and drops
  // the call.
  template <bool kMask>
  __attribute__((always_inline)) void prefetch(int64_t edge) const {
    const int64_t ahead = edge + kAhead < p.indptr[p.n_nodes] ? edge + kAhead : edge;
    const int64_t node = p.indices[ahead];
    const char* row = reinterpret_cast<const char*>(p.h + node * p.h_stride + col);
    if constexpr (kMask) __builtin_prefetch(p.h_mask + node * words + col / 32, 0, 3);
    constexpr int kBytes = NV * W * static_cast<int>(sizeof(T));
#pragma GCC unroll 16
    for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(row + b, 0, 3);
    // one line more where rows do not begin on a cache line
    __builtin_prefetch(row + kBytes - 1, 0, 3);
  }

  // acc += sum of the edges' rows
  template <bool kCoef, bool kMask>
  void gather(int64_t edge_begin, int64_t edge_end, Reg (&acc)[NV]) const {
    for (int64_t e = edge_begin; e < edge_end; ++e) {
      prefetch<kMask>(e);
      const int64_t j = p.indices[e];
      if constexpr (kCoef) {
        T c = p.values != nullptr ? static_cast<T>(p.values[e]) : T(1);
        if (p.col_scale != nullptr) c *= p.col_scale[j];
        const Reg coef = V::broadcast(c);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[v] = V::fma(load_h<kMask>(j, v), coef, acc[v]);
      } else {
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[v] = V::add(acc[v], load_h<kMask>(j, v));
      }
    }
  }

  template <bool kMask>
  void finish(int64_t i, Reg (&acc)[NV]) const {
    const Reg self = V::broadcast(p.col_scale != nullptr ? p.col_scale[i] : T(1));
    const Reg scale = V::broadcast(p.row_scale != nullptr ? p.row_scale[i] : T(1));
    uint32_t word = 0;
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      Reg x = acc[v];
      const Reg own = load_h<kMask>(i, v);
      if (p.self_loops) x = V::fma(own, self, x);
      x = V::mul(x, scale);
      if (p.residual != nullptr) {
        x = V::add(x, load(p.residual + i * p.residual_stride + col, v));
      } else if (p.add_input) {
        x = V::add(x, own);
      }
      if (p.out_mask != nullptr) {
        uint32_t passed = V::not_below_or_zero(x);
        if (v == NV - 1) passed &= n_last == 32 ? ~0u : (1u << n_last) - 1u;
        word |= passed << ((v * W) % 32);
        if ((v + 1) * W % 32 == 0 || v == NV - 1) {
          p.out_mask[i * words + col / 32 + (v * W) / 32] = word;
          word = 0;
        }
      }
      if (p.relu) x = V::relu(x);
      store(p.out + i * p.n_cols + col, v, x);
      if (p.masked_h != nullptr) store(p.masked_h + i * p.n_cols + col, v, own);
    }
  }

  static void zero(Reg (&acc)[NV]) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[v] = V::zero();
  }

  template <bool kCoef, bool kMask>
  void rows(int64_t row_begin, int64_t row_end) const {
    for (int64_t i = row_begin; i < row_end; ++i) {
      const int64_t begin = p.indptr[i], end = p.indptr[i + 1];
      if (end - begin > p.hub.hub_edges) continue;
      Reg acc[NV];
      zero(acc);
      gather<kCoef, kMask>(begin, end, acc);
      finish<kMask>(i, acc);
    }
  }

  template <bool kCoef, bool kMask>
  void segment(int64_t s) const {
    Reg acc[NV];
    zero(acc);
    gather<kCoef, kMask>(p.hub.segments[3 * s + 1], p.hub.segments[3 * s + 2], acc);
    for (int v = 0; v < NV; ++v) store(p.scratch + s * p.n_cols + col, v, acc[v]);
  }

  template <bool kMask>
  void combine(int64_t hub) const {
    const int64_t* entry = p.hub.hubs + 3 * hub;
    Reg acc[NV];
    zero(acc);
    for (int64_t s = entry[1]; s < entry[2]; ++s) {
      const T* row = p.scratch + s * p.n_cols + col;
      for (int v = 0; v < NV; ++v) acc[v] = V::add(acc[v], load(row, v));
    }
    finish<kMask>(entry[0], acc);
  }
};

// Calls f(Block<V, NV>) with NV vectors, as many as the block of columns from `col` on needs.
template <typename V, int NV = V::kMaxVecs, typename F>
void with_block(const PropagateParams<typename V::T>& p, int64_t col, const F& f) {
  if constexpr (NV > 1) {
    const int64_t left = p.n_cols - col;
    const int64_t width = left < p.block_cols ? left : p.block_cols;
    if (width <= (NV - 1) * V::kWidth) return with_block<V, NV - 1>(p, col, f);
  }
  f(Block<V, NV>(p, col));
}

template <typename V>
PropagateKernel<typename V::T> make_propagate_kernel() {
  using T = typename V::T;
  using P = PropagateParams<T>;
  constexpr int64_t kBlock = V::kMaxVecs * V::kWidth;
  static_assert(kBlock % 32 == 0 && 32 % V::kWidth == 0);
  return {
      kBlock,
      [](const P& p, int64_t row_begin, int64_t row_end, int64_t col) {
        const bool coef = p.values != nullptr || p.col_scale != nullptr;
        const bool mask = p.h_mask != nullptr;
        with_block<V>(p, col, [&](const auto& block) {
          if (coef && mask) block.template rows<true, true>(row_begin, row_end);
          if (coef && !mask) block.template rows<true, false>(row_begin, row_end);
          if (!coef && mask) block.template rows<false, true>(row_begin, row_end);
          if (!coef && !mask) block.template rows<false, false>(row_begin, row_end);
        });
      },
      [](const P& p, int64_t s, int64_t col) {
        const bool coef = p.values != nullptr || p.col_scale != nullptr;
        const bool mask = p.h_mask != nullptr;
        with_block<V>(p, col, [&](const auto& block) {
          if (coef && mask) block.template segment<true, true>(s);
          if (coef && !mask) block.template segment<true, false>(s);
          if (!coef && mask) block.template segment<false, true>(s);
          if (!coef && !mask) block.template segment<false, false>(s);
        });
      },
      [](const P& p, int64_t hub, int64_t col) {
        with_block<V>(p, col, [&](const auto& block) {
          if (p.h_mask != nullptr) {
            block.template combine<true>(hub);
          } else {
            block.template combine<false>(hub);
          }
        });
      },
  };
}

}  // namespace
}  // namespace fastclust
