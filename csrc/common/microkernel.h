// The inner loop of every matrix product on the CPU: a register tile of kMr rows by up to kNv
// vectors, acc[i][j] += sum_p A[i, p] B[p, j]. B is packed in slivers of kNr contiguous columns per
// p; A is read by broadcasts through two strides, so that packed panels, slivers of the other
// operand and plain row- or column-major matrices all serve without another copy.
//
// Included by one file per instruction set (see vec.h): 8 x 48 float on AVX-512 (24 of 32
// registers accumulate), 4 x 24 on AVX2 (12 of 16), 4 x 8 portable.
#pragma once

#include <type_traits>

#include "common/vec.h"

namespace fastclust {
namespace {

#if defined(__AVX512F__)
constexpr int kMr = 8, kNv = 3;
#elif defined(__AVX2__)
constexpr int kMr = 4, kNv = 3;
#else
constexpr int kMr = 4, kNv = 2;
#endif

template <typename T>
constexpr int kNr = kNv * Vec<T>::width;  // columns of a sliver

// Operands are float, double, or pairs of bf16 (two terms of k each) that are summed in float.
template <typename X>
struct SumOf {
  using type = X;
};
template <>
struct SumOf<Bf16Pair> {
  using type = float;
};
template <typename X>
constexpr int64_t kTerms = std::is_same_v<X, Bf16Pair> ? 2 : 1;

template <typename T, int NV>
struct Accumulator {
  typename Vec<T>::Reg v[kMr][NV];
};

// out += A B over k operands. kUnitRows: row_stride is 1, which leaves one address register for all
// of A. Inlined calls in a row keep `out` in registers.
template <typename X, int NV, bool kUnitRows>
FASTCLUST_INLINE void multiply_add(int64_t k, const X* __restrict a, int64_t row_stride,
                                   int64_t k_stride, const X* __restrict b, int64_t b_stride,
                                   Accumulator<typename SumOf<X>::type, NV>& out) {
  typename Vec<typename SumOf<X>::type>::Reg acc[kMr][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = out.v[i][j];
  }
  const X* rows[kMr];
  for (int i = 0; i < kMr; ++i) rows[i] = kUnitRows ? a + i : a + i * row_stride;
  for (int64_t p = 0; p < k; ++p) {
    typename Vec<X>::Reg column[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) column[j] = load(b + j * Vec<X>::width);
#pragma GCC unroll 8
    for (int i = 0; i < kMr; ++i) {
      const auto x = broadcast(kUnitRows ? a[i] : rows[i][p * k_stride]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(x, column[j], acc[i][j]);
    }
    b += b_stride;
    if (kUnitRows) a += k_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) out.v[i][j] = acc[i][j];
  }
}

// out = A B.
template <typename X, int NV, bool kUnitRows>
FASTCLUST_INLINE void multiply(int64_t k, const X* a, int64_t row_stride, int64_t k_stride,
                               const X* b, int64_t b_stride,
                               Accumulator<typename SumOf<X>::type, NV>& out) {
  out = {};
  multiply_add<X, NV, kUnitRows>(k, a, row_stride, k_stride, b, b_stride, out);
}

}  // namespace
}  // namespace fastclust
