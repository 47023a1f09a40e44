// The inner loops of k-means, one table per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace fastclust::kmeans {

inline constexpr int64_t kTile = 64;  // rows whose products with the centres are taken together

template <typename T>
struct Kernels {
  // out[k * kTile + i] = x[rows[i]] . c[k] for i < n_rows <= kTile, k < n_centers; the sum runs in
  // the same order for every i and k. Columns up to the next multiple of 4 are overwritten too.
  void (*dots)(const T* x, const int32_t* rows, int64_t n_rows, const T* c, int64_t n_centers,
               int64_t width, T* out);
  // The same for the kTile rows of a tile that lies by columns, x[j * kTile + i], j < n_columns <=
  // width; x is 64-byte aligned. Sums run over j in order.
  void (*column_dots)(const T* x, int64_t n_columns, const T* c, int64_t n_centers, int64_t width,
                      T* out);
  // Over k, the least and the second least of score[i] = norms[k] - 2 dots[k * kTile + i] and the
  // (lowest) index of the least, for all kTile columns i.
  void (*least)(const T* dots, const T* norms, int64_t n_centers, T* best, T* second,
                int32_t* arg);
  // sum_j (a[j] - b[j])^2 in float64.
  double (*square_distance)(const T* a, const T* b, int64_t width);
  // sum[j] += x[j].
  void (*add)(double* sum, const T* x, int64_t width);
  // from[j] -= x[j], to[j] += x[j].
  void (*move)(double* from, double* to, const T* x, int64_t width);
  int lanes;  // of one vector of T: the number of partial sums in `dots`
};

template <typename T>
const Kernels<T>& portable_kernels();
template <typename T>
const Kernels<T>& avx2_kernels();
template <typename T>
const Kernels<T>& avx512_kernels();

// The table for the level in force.
template <typename T>
inline const Kernels<T>& kernels() {
#if defined(FASTCLUST_X86_SIMD)
  switch (cpu_level()) {
    case CpuLevel::kAvx512: return avx512_kernels<T>();
    case CpuLevel::kAvx2: return avx2_kernels<T>();
    default: break;
  }
#endif
  return portable_kernels<T>();
}

}  // namespace fastclust::kmeans
