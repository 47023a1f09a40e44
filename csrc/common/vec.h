// One name for the vector registers of the instruction set that a file is compiled for: Vec<float>
// and Vec<double> are AVX-512, AVX2 + FMA, or 16-byte vectors that any target has. Everything is in
// an unnamed namespace, so each translation unit has its own copy and code for a newer processor
// cannot leak into the portable path through a shared inline function.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTCLUST_INLINE static inline __attribute__((always_inline))

namespace fastclust {

// Two bf16 numbers that follow each other along k, the first in the low half: an operand whose
// products are summed in float.
struct Bf16Pair {
  uint32_t bits;
};

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int width = kVectorBytes / 4;
  typedef float Reg __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));  // also lane masks: 0 or -1
};
template <>
struct Vec<double> {
  static constexpr int width = kVectorBytes / 8;
  typedef double Reg __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg load(const T* p) {
  typename Vec<T>::Reg r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
template <typename T>
FASTCLUST_INLINE void store(T* p, typename Vec<T>::Reg r) {
  std::memcpy(p, &r, sizeof(r));
}
template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg broadcast(T x) {
  return x - typename Vec<T>::Reg{};
}

// a * b + c, fused where the instruction exists.
#if defined(__AVX512F__)
FASTCLUST_INLINE Vec<float>::Reg fma(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  return (Vec<float>::Reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTCLUST_INLINE Vec<double>::Reg fma(Vec<double>::Reg a, Vec<double>::Reg b,
                                      Vec<double>::Reg c) {
  return (Vec<double>::Reg)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
FASTCLUST_INLINE Vec<float>::Reg fma(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  return (Vec<float>::Reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTCLUST_INLINE Vec<double>::Reg fma(Vec<double>::Reg a, Vec<double>::Reg b,
                                      Vec<double>::Reg c) {
  return (Vec<double>::Reg)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
FASTCLUST_INLINE Vec<float>::Reg fma(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  return a * b + c;
}
FASTCLUST_INLINE Vec<double>::Reg fma(Vec<double>::Reg a, Vec<double>::Reg b,
                                      Vec<double>::Reg c) {
  return a * b + c;
}
#endif

#if defined(__AVX512BF16__)
template <>
struct Vec<Bf16Pair> {
  static constexpr int width = kVectorBytes / 4;
  using Reg = Vec<float>::Int;
};
FASTCLUST_INLINE Vec<Bf16Pair>::Reg broadcast(Bf16Pair x) {
  return static_cast<int32_t>(x.bits) - Vec<Bf16Pair>::Reg{};
}
FASTCLUST_INLINE Vec<float>::Reg fma(Vec<Bf16Pair>::Reg a, Vec<Bf16Pair>::Reg b,
                                     Vec<float>::Reg c) {
  return (Vec<float>::Reg)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
// Rounded to nearest even and put side by side.
FASTCLUST_INLINE Vec<Bf16Pair>::Reg pair(Vec<float>::Reg first, Vec<float>::Reg second) {
  const auto wide = [](Vec<float>::Reg x) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    return (Vec<Bf16Pair>::Reg)_mm512_maskz_cvtepu16_epi32(0xffff, rounded);
  };
  return wide(first) | wide(second) << 16;
}
FASTCLUST_INLINE void store(Bf16Pair* p, Vec<Bf16Pair>::Reg r) { std::memcpy(p, &r, sizeof(r)); }
#endif

}  // namespace
}  // namespace fastclust
