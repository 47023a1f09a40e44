// AVX-512 instance of the propagation kernel: 128 float or 64 double columns in 8 registers.
#include <immintrin.h>

#include <cstring>

#include "propagate/propagate_kernel.h"

namespace fastclust {
namespace {

struct FloatVec {
  using T = float;
  using Reg = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  static constexpr int kMaxVecs = 8;

  static Mask mask(uint32_t bits) { return static_cast<Mask>(bits); }
  // a load of just these bits goes straight into a mask register, where a shift would not
  static Mask mask_at(const uint32_t* words, int v) {
    Mask m;
    std::memcpy(&m, reinterpret_cast<const char*>(words) + v * sizeof(m), sizeof(m));
    return m;
  }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg broadcast(T x) { return _mm512_set1_ps(x); }
  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static Reg load_masked(const T* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(T* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void store_masked(T* p, Mask m, Reg x) { _mm512_mask_storeu_ps(p, m, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg relu(Reg x) {
    return _mm512_maskz_mov_ps(static_cast<Mask>(not_below_or_zero(x)), x);
  }
  // NaN passes, as in torch.relu and its gradient
  static uint32_t not_below_or_zero(Reg x) {
    return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  }
};

struct DoubleVec {
  using T = double;
  using Reg = __m512d;
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  static constexpr int kMaxVecs = 8;

  static Mask mask(uint32_t bits) { return static_cast<Mask>(bits); }
  // a load of just these bits goes straight into a mask register, where a shift would not
  static Mask mask_at(const uint32_t* words, int v) {
    Mask m;
    std::memcpy(&m, reinterpret_cast<const char*>(words) + v * sizeof(m), sizeof(m));
    return m;
  }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg broadcast(T x) { return _mm512_set1_pd(x); }
  static Reg load(const T* p) { return _mm512_loadu_pd(p); }
  static Reg load_masked(const T* p, Mask m) { return _mm512_maskz_loadu_pd(m, p); }
  static void store(T* p, Reg x) { _mm512_storeu_pd(p, x); }
  static void store_masked(T* p, Mask m, Reg x) { _mm512_mask_storeu_pd(p, m, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg relu(Reg x) {
    return _mm512_maskz_mov_pd(static_cast<Mask>(not_below_or_zero(x)), x);
  }
  static uint32_t not_below_or_zero(Reg x) {
    return _mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
};

}  // namespace

template <>
PropagateKernel<float> propagate_kernel_avx512<float>() {
  return make_propagate_kernel<FloatVec>();
}
template <>
PropagateKernel<double> propagate_kernel_avx512<double>() {
  return make_propagate_kernel<DoubleVec>();
}

}  // namespace fastclust
