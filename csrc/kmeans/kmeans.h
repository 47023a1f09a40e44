// k-means (Lloyd 1982) with all restarts at once. The contract of the kernels.
//
// Every function works on centred data: `x` holds the rows minus their mean, padded with zero
// columns to a multiple of kPad, so that |x|^2 - 2 x.c + |c|^2 loses no digits to a far origin and
// no loop has a tail. Padding changes no distance.
#pragma once

#include <cstdint>

namespace fastclust::kmeans {

inline constexpr int64_t kPad = 16;  // columns of x and of centres come in multiples of this

enum class Init : int { kPlusPlus = 0, kRandom = 1, kCentral = 2 };

template <typename T>
struct Problem {
  const T* x;           // [N, dp] centred rows, 64-byte aligned
  int64_t n_points;     // N < 2^31
  int64_t width;        // dp, a multiple of kPad
  int64_t n_clusters;   // K <= N
  int64_t n_restarts;   // R
};

// xc[i] = x[i] - mean, zero in the padding; variance is the mean over columns of the (population)
// variance, in float64.
template <typename T>
void center(const T* x /* [N, d] */, int64_t n, int64_t d, T* xc /* [N, dp] */, int64_t dp,
            double* mean /* [d] */, double* variance /* [1] */);

// Initial centres, each a row of x. Random numbers are philox(seed, restart, draw).
//   kPlusPlus  greedy k-means++ with 2 + floor(log K) trials a step (Arthur and Vassilvitskii 2007)
//   kRandom    K distinct points
//   kCentral   of 20 draws of K distinct points the one with the least sum of squared distances
//              between all points and all K centres
template <typename T>
void initialize(const Problem<T>& p, Init init, int64_t seed, T* centers /* [R, K, dp] */);

// Lloyd iterations of every restart until it has converged: assignment to the nearest centre (ties
// to the lowest index), empty clusters moved to the points farthest from their centres, centres to
// the means (sums in float64). A restart stops after an iteration with
//   sum_k |dC_k|^2 <= tolerance        (norm_rule false)
//   (sum_k |dC_k|)^2 < tolerance       (norm_rule true)
// that repaired nothing, or after max_iter of them.
template <typename T>
void lloyd(const Problem<T>& p, double tolerance, bool norm_rule, int64_t max_iter,
           T* centers /* [R, K, dp], in and out */, int64_t* n_iter /* [R] */,
           bool* converged /* [R] */);

// Nearest centre of every point and the sum of squared distances to it, in float64.
template <typename T>
void assign(const Problem<T>& p, const T* centers /* [R, K, dp] */, int32_t* labels /* [R, N] */,
            double* inertia /* [R] */);

}  // namespace fastclust::kmeans
