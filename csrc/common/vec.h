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

}  // namespace
}  // namespace fastclust
