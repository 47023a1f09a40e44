// Arithmetic that CPU and CUDA share: random picks, rounding slack, the stopping rule, and the index
// maps of the CUDA kernels (which CPU tests run).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/hd.h"
#include "common/rng.h"

namespace fastclust::kmeans {

inline constexpr int kCentralDraws = 20;  // draws among which Init::kCentral picks

FASTCLUST_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Trials of a greedy k-means++ step.
FASTCLUST_HD int64_t n_trials(int64_t n_clusters) {
  return 2 + static_cast<int64_t>(std::log(static_cast<double>(n_clusters)));
}

FASTCLUST_HD double draw_uniform(int64_t seed, int64_t restart, int64_t index) {
  return philox_uniform(static_cast<uint64_t>(seed), static_cast<uint64_t>(restart),
                        static_cast<uint64_t>(index));
}

// u in (0, 1) to an index below n.
FASTCLUST_HD int64_t pick_below(int64_t n, double u) {
  const auto pick = static_cast<int64_t>(u * static_cast<double>(n));
  return pick < n ? pick : n - 1;
}

// K distinct indices below n (R. W. Floyd's sampling) from the draws first, first + 1, ... of a
// restart. `taken` [n] is all zero before and after.
FASTCLUST_HD void sample_distinct(int64_t n, int64_t k, int64_t seed, int64_t restart,
                                  int64_t first, uint8_t* taken, int64_t* out) {
  for (int64_t j = 0; j < k; ++j) {
    const int64_t bound = n - k + j;
    int64_t pick = pick_below(bound + 1, draw_uniform(seed, restart, first + j));
    if (taken[pick]) pick = bound;
    taken[pick] = 1;
    out[j] = pick;
  }
  for (int64_t j = 0; j < k; ++j) taken[out[j]] = 0;
}

// Rounding error to expect in |x|^2 - 2 x.c + |c|^2, relative to |x|^2 + |c|^2, when each partial
// sum adds up `terms` products: errors add up like a random walk; a margin of eight.
FASTCLUST_HD double rounding_error(double epsilon, double terms) {
  return 8.0 * epsilon * std::sqrt(4.0 + terms);
}

// Below this share of |x|^2 + |c|^2 the expanded squared distance has lost most of its digits.
FASTCLUST_HD double doubtful_share(double rounding) { return 64.0 * rounding; }

FASTCLUST_HD bool is_converged(double movement, bool norm_rule, double tolerance) {
  return norm_rule ? movement * movement < tolerance : movement <= tolerance;
}

// --- index maps of the CUDA kernels ---------------------------------------------------------------

inline constexpr int kCudaTile = 64;     // rows and columns of a tile of products
inline constexpr int kCudaStep = 16;     // depth of a step
inline constexpr int kClusterRange = 16;  // clusters whose sums one block holds

// Restarts whose centres share a tile: as many as fit, at least one.
FASTCLUST_HD int64_t restarts_per_tile(int64_t n_clusters) {
  return n_clusters >= kCudaTile ? 1 : kCudaTile / n_clusters;
}

// Rows of a block that sums clusters: the float64 partial sums of a restart then take at most 1/8
// byte per element of x.
FASTCLUST_HD int64_t rows_per_chunk(int64_t n_clusters) {
  return n_clusters < 8 ? 512 : 64 * n_clusters;
}

// Threads of a block that have a column each: whole warps, and the block is a multiple of them.
FASTCLUST_HD int threads_per_row(int64_t width, int threads) {
  int count = 32;
  while (count < threads && count < width) count *= 2;
  return count;
}

// First of the n tiles that belongs to part p of `parts`.
FASTCLUST_HD int64_t part_begin(int64_t n, int64_t parts, int64_t p) { return n * p / parts; }

}  // namespace fastclust::kmeans
