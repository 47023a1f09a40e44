// exp, log and powers on vectors, accurate to about one unit in the last place. Like vec.h, in an
// unnamed namespace.
#pragma once

#include "common/vec.h"

namespace fastclust {
namespace {

template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg vec_abs(typename Vec<T>::Reg x) {
  return x < T(0) ? -x : x;
}

template <typename T>
struct MathTable;
template <>
struct MathTable<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float limit = 87.0f;
  static constexpr float ln2_hi = 0x1.62e400p-1f, ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr int exp_terms = 7;
  static constexpr int log_terms = 5;
};
template <>
struct MathTable<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr double round_magic = 6755399441055744.0;
  static constexpr double limit = 708.0;
  static constexpr double ln2_hi = 0x1.62e42fee00000p-1, ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr int exp_terms = 13;
  static constexpr int log_terms = 11;
};

// e^x for |x| up to MathTable::limit, beyond that the value at the limit; NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of e^r, whose first missing term is
// below a twentieth of a unit in the last place.
template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg vec_exp(typename Vec<T>::Reg x) {
  using Table = MathTable<T>;
  using Reg = typename Vec<T>::Reg;
  using Int = typename Vec<T>::Int;
  constexpr T inverse_factorial[] = {
      T(1),           T(1),            T(1) / 2,         T(1) / 6,          T(1) / 24,
      T(1) / 120,     T(1) / 720,      T(1) / 5040,      T(1) / 40320,      T(1) / 362880,
      T(1) / 3628800, T(1) / 39916800, T(1) / 479001600, T(1) / 6227020800,
  };
  x = x > Table::limit ? broadcast(Table::limit) : x;
  x = x < -Table::limit ? broadcast(-Table::limit) : x;
  const Reg shifted = fma(x, broadcast(T(1.44269504088896340736)), broadcast(Table::round_magic));
  const Reg n = shifted - Table::round_magic;
  Reg r = fma(n, broadcast(-Table::ln2_hi), x);
  r = fma(n, broadcast(-Table::ln2_lo), r);
  Reg y = broadcast(inverse_factorial[Table::exp_terms]);
#pragma GCC unroll 16
  for (int k = Table::exp_terms - 1; k >= 0; --k) y = fma(y, r, broadcast(inverse_factorial[k]));
  // The low bits of `shifted` are n; moved to the exponent they make 2^n.
  const Int bits = (Int)shifted << Table::mantissa_bits;
  return y * (Reg)(bits + (Int)broadcast(T(1)));
}

// ln x for normal x > 0. x = 2^n m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s),
// s = (m - 1) / (m + 1).
template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg vec_log(typename Vec<T>::Reg x) {
  using Table = MathTable<T>;
  using Reg = typename Vec<T>::Reg;
  using Int = typename Vec<T>::Int;
  const Int half_root = (Int)broadcast(T(0.70710678118654752440));
  const Int offset = (Int)x - half_root;
  const Int n = offset >> Table::mantissa_bits;
  const Reg m = (Reg)((Int)x - (n << Table::mantissa_bits));
  // n is small: written below the magic number's leading bit it becomes a float by subtraction.
  const Reg magic = broadcast(Table::round_magic);
  const Reg n_real = (Reg)((Int)magic + n) - magic;
  const Reg s = (m - T(1)) / (m + T(1));
  const Reg s2 = s * s;
  Reg y = broadcast(T(1) / (2 * Table::log_terms + 1));
#pragma GCC unroll 16
  for (int k = Table::log_terms - 1; k >= 0; --k) y = fma(y, s2, broadcast(T(1) / (2 * k + 1)));
  return fma(n_real, broadcast(Table::ln2_hi), fma(n_real, broadcast(Table::ln2_lo), 2 * (s * y)));
}

// x^y for x >= 0, y > 0. Relative error about |y ln x| units in the last place.
template <typename T>
FASTCLUST_INLINE typename Vec<T>::Reg vec_pow(typename Vec<T>::Reg x, T y) {
  const typename Vec<T>::Reg zero = {};
  const T tiny = sizeof(T) == 4 ? T(1.17549435e-38f) : T(2.2250738585072014e-308);
  const auto power = vec_exp<T>(y * vec_log<T>(x < tiny ? broadcast(tiny) : x));
  return x < tiny ? zero : power;
}

}  // namespace
}  // namespace fastclust
