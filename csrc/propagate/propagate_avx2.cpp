// AVX2 + FMA instance of the propagation kernel: 64 float or 32 double columns in 8 registers.
#include <immintrin.h>

#include "propagate/propagate_kernel.h"

namespace fastclust {
namespace {

struct FloatVec {
  using T = float;
  using Reg = __m256;
  using Mask = __m256i;
  static constexpr int kWidth = 8;
  static constexpr int kMaxVecs = 8;

  static Mask mask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return _mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane);
  }
  static Mask mask_at(const uint32_t* words, int v) {
    return mask((words[v * kWidth / 32] >> (v * kWidth % 32)) & ((1u << kWidth) - 1u));
  }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg broadcast(T x) { return _mm256_set1_ps(x); }
  static Reg load(const T* p) { return _mm256_loadu_ps(p); }
  static Reg load_masked(const T* p, Mask m) { return _mm256_maskload_ps(p, m); }
  static void store(T* p, Reg x) { _mm256_storeu_ps(p, x); }
  static void store_masked(T* p, Mask m, Reg x) { _mm256_maskstore_ps(p, m, x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  // max returns its second operand where one is NaN
  static Reg relu(Reg x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
  static uint32_t not_below_or_zero(Reg x) {
    const Reg passed = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ);
    return static_cast<uint32_t>(_mm256_movemask_ps(passed));
  }
};

struct DoubleVec {
  using T = double;
  using Reg = __m256d;
  using Mask = __m256i;
  static constexpr int kWidth = 4;
  static constexpr int kMaxVecs = 8;

  static Mask mask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(bits));
    return _mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane);
  }
  static Mask mask_at(const uint32_t* words, int v) {
    return mask((words[v * kWidth / 32] >> (v * kWidth % 32)) & ((1u << kWidth) - 1u));
  }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg broadcast(T x) { return _mm256_set1_pd(x); }
  static Reg load(const T* p) { return _mm256_loadu_pd(p); }
  static Reg load_masked(const T* p, Mask m) { return _mm256_maskload_pd(p, m); }
  static void store(T* p, Reg x) { _mm256_storeu_pd(p, x); }
  static void store_masked(T* p, Mask m, Reg x) { _mm256_maskstore_pd(p, m, x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg relu(Reg x) { return _mm256_max_pd(_mm256_setzero_pd(), x); }
  static uint32_t not_below_or_zero(Reg x) {
    const Reg passed = _mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_NLE_UQ);
    return static_cast<uint32_t>(_mm256_movemask_pd(passed));
  }
};

}  // namespace

template <>
PropagateKernel<float> propagate_kernel_avx2<float>() {
  return make_propagate_kernel<FloatVec>();
}
template <>
PropagateKernel<double> propagate_kernel_avx2<double>() {
  return make_propagate_kernel<DoubleVec>();
}

}  // namespace fastclust
