// Bodies of the inner loops, compiled once per instruction set. See lowrank_kernel.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/vec.h"
#include "lowrank/lowrank_kernel.h"

namespace fastclust::lowrank::detail {
namespace {

template <typename T>
void sparse_project(int64_t n_rows, const T* values, const int64_t* indptr, const int32_t* indices,
                    int64_t width, const T* v, int64_t ldv, const T* shift, T* w, int64_t ldw) {
  constexpr int kRegs = kColumnBlock / Vec<T>::width;
  alignas(64) T block[kColumnBlock];
  for (int64_t i = 0; i < n_rows; ++i) {
    const int64_t begin = indptr[i], end = indptr[i + 1];
    for (int64_t c = 0; c < width; c += kColumnBlock) {
      typename Vec<T>::Reg sum[kRegs];
      for (int k = 0; k < kRegs; ++k) sum[k] = -load(shift + c + k * Vec<T>::width);
      for (int64_t e = begin; e < end; ++e) {
        const auto value = broadcast(values[e]);
        const T* row = v + int64_t{indices[e]} * ldv + c;
        for (int k = 0; k < kRegs; ++k) {
          sum[k] = fma(value, load(row + k * Vec<T>::width), sum[k]);
        }
      }
      T* out = w + i * ldw + c;
      if (c + kColumnBlock <= width) {
        for (int k = 0; k < kRegs; ++k) store(out + k * Vec<T>::width, sum[k]);
      } else {
        for (int k = 0; k < kRegs; ++k) store(block + k * Vec<T>::width, sum[k]);
        for (int64_t k = 0; k < width - c; ++k) out[k] = block[k];
      }
    }
  }
}

template <typename T>
void sparse_scatter(int64_t n_rows, const T* values, const int64_t* indptr, const int32_t* indices,
                    int64_t n, const T* q, int64_t ldq, T* z, double* total) {
  constexpr int kRegs = kColumnBlock / Vec<T>::width;
  alignas(64) T block[kColumnBlock] = {};
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      block[c] = q[i * ldq + c];
      total[c] += double(block[c]);
    }
    typename Vec<T>::Reg row[kRegs];
    for (int k = 0; k < kRegs; ++k) row[k] = load(block + k * Vec<T>::width);
    for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) {
      const auto value = broadcast(values[e]);
      T* out = z + int64_t{indices[e]} * kColumnBlock;
      for (int k = 0; k < kRegs; ++k) {
        store(out + k * Vec<T>::width, fma(value, row[k], load(out + k * Vec<T>::width)));
      }
    }
  }
}

FASTCLUST_INLINE double dot(const double* a, const double* b, int64_t n) {
  constexpr int kWidth = Vec<double>::width;
  Vec<double>::Reg sum[8 / kWidth] = {};
  for (int64_t i = 0; i < n; i += 8) {
    for (int k = 0; k < 8 / kWidth; ++k) {
      sum[k] = fma(load(a + i + k * kWidth), load(b + i + k * kWidth), sum[k]);
    }
  }
  double lanes[8];
  for (int k = 0; k < 8 / kWidth; ++k) store(lanes + k * kWidth, sum[k]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

FASTCLUST_INLINE void rotate(double* a, double* b, int64_t n, double cosine, double sine) {
  const auto c = broadcast(cosine), s = broadcast(sine);
  for (int64_t i = 0; i < n; i += Vec<double>::width) {
    const auto x = load(a + i), y = load(b + i);
    store(a + i, c * x - s * y);
    store(b + i, s * x + c * y);
  }
}

void jacobi(int64_t l, int64_t ld, double* a, double* norm, double tolerance) {
  constexpr int kMaxSweeps = 40;
  bool rotated = true;
  for (int sweep = 0; sweep < kMaxSweeps && rotated; ++sweep) {
    rotated = false;
    double largest = 0.0;
    for (int64_t i = 0; i < l; ++i) {
      norm[i] = dot(a + i * ld, a + i * ld, ld);
      largest = norm[i] > largest ? norm[i] : largest;
    }
    for (int64_t p = 0; p + 1 < l; ++p) {
      for (int64_t q = p + 1; q < l; ++q) {
        // Nothing to gain between rows that are both rounding noise of the largest.
        if (norm[p] <= 1e-32 * largest && norm[q] <= 1e-32 * largest) continue;
        const double cross = dot(a + p * ld, a + q * ld, ld);
        const double shorter = norm[p] < norm[q] ? norm[p] : norm[q];
        if (cross * cross <= tolerance * tolerance * shorter * shorter ||
            cross * cross <= 1e-30 * norm[p] * norm[q]) {
          continue;
        }
        rotated = true;
        const double zeta = (norm[q] - norm[p]) / (2.0 * cross);
        const double root = std::sqrt(1.0 + zeta * zeta);
        const double t = zeta < 0.0 ? -1.0 / (root - zeta) : 1.0 / (root + zeta);
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t;
        rotate(a + p * ld, a + q * ld, ld, c, s);
        norm[p] = norm[p] > t * cross ? norm[p] - t * cross : 0.0;
        norm[q] += t * cross;
      }
    }
  }
}

// to -= factor from.
FASTCLUST_INLINE void subtract(double* __restrict to, const double* __restrict from, int64_t n,
                               double factor) {
  for (int64_t j = 0; j < n; ++j) to[j] -= factor * from[j];
}

// Back substitution by rows: inverse[k, :] = (e_k - sum_{i > k} r[k, i] inverse[i, :]) / r[k, k].
void invert(int64_t l, const double* r, double* inverse) {
  for (int64_t i = 0; i < l * l; ++i) inverse[i] = 0.0;
  for (int64_t k = l - 1; k >= 0; --k) {
    const double pivot = r[k * l + k];
    if (pivot == 0.0) continue;
    double* row = inverse + k * l;
    row[k] = 1.0;
    for (int64_t i = k + 1; i < l; ++i) subtract(row + i, inverse + i * l + i, l - i, r[k * l + i]);
    for (int64_t j = k; j < l; ++j) row[j] /= pivot;
  }
  for (int64_t j = 0; j < l; ++j) {
    if (r[j * l + j] != 0.0) continue;
    for (int64_t i = 0; i < l; ++i) inverse[i * l + j] = 0.0;
  }
}

void cholesky(int64_t l, double tolerance, double* g, double* r, double* inverse) {
  double largest = 0.0;
  for (int64_t j = 0; j < l; ++j) largest = g[j * l + j] > largest ? g[j * l + j] : largest;
  for (int64_t i = 0; i < l * l; ++i) r[i] = 0.0;
  for (int64_t k = 0; k < l; ++k) {
    const double pivot = g[k * l + k];
    if (!(pivot > tolerance * largest)) continue;
    double* row = r + k * l;
    const double scale = 1.0 / std::sqrt(pivot);
    for (int64_t j = k; j < l; ++j) row[j] = g[k * l + j] * scale;
    for (int64_t i = k + 1; i < l; ++i) subtract(g + i * l + i, row + i, l - i, row[i]);
  }
  invert(l, r, inverse);
}

double smallest(int64_t l, const double* inverse, double* x) {
  constexpr int kSteps = 5;
  double* z = x + l;
  for (int64_t j = 0; j < l; ++j) {
    if (inverse[j * l + j] == 0.0) return 0.0;
    x[j] = 1.0;
  }
  double norm = 0.0;
  for (int step = 0; step < kSteps; ++step) {
    // z = inverse^T x, then x = inverse z.
    for (int64_t j = 0; j < l; ++j) z[j] = 0.0;
    for (int64_t i = 0; i < l; ++i) subtract(z + i, inverse + i * l + i, l - i, -x[i]);
    double length = 0.0, square = 0.0;
    for (int64_t j = 0; j < l; ++j) length += z[j] * z[j];
    const double scale = 1.0 / std::sqrt(length);
    for (int64_t j = 0; j < l; ++j) z[j] *= scale;
    for (int64_t i = 0; i < l; ++i) {
      double sum = 0.0;
      for (int64_t j = i; j < l; ++j) sum += inverse[i * l + j] * z[j];
      x[i] = sum;
      square += sum * sum;
    }
    norm = std::sqrt(square);
  }
  return 1.0 / norm;
}

// Every processor with AVX2 counts bits in one instruction.
#if defined(__AVX2__)
__attribute__((target("popcnt")))
#endif
void common_bits(int64_t words, int64_t n, const uint64_t* a, const uint64_t* b, int64_t* count) {
  for (int64_t j = 0; j < n; ++j, b += words) {
    int64_t sum[4] = {};
    int64_t i = 0;
    for (; i + 4 <= words; i += 4) {
      for (int k = 0; k < 4; ++k) sum[k] += __builtin_popcountll(a[i + k] & b[i + k]);
    }
    for (; i < words; ++i) sum[0] += __builtin_popcountll(a[i] & b[i]);
    count[j] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

constexpr Kernels kKernels = {
    {sparse_project<float>, sparse_scatter<float>},
    {sparse_project<double>, sparse_scatter<double>},
    {cholesky, invert, smallest, jacobi},
    common_bits,
};

}  // namespace
}  // namespace fastclust::lowrank::detail
