// k-means on CUDA: the algorithm of kmeans_cpu.cpp, all restarts at once, any width and K.
//
// Work split: a block of 256 threads forms the products of 64 rows with 64 columns (the centres of
// as many restarts as fit, or K in turns of 64) in registers, turns them into scores in shared
// memory and reduces them to labels there, so neither an N x K array nor one of N x K x d exists.
// Near ties are resolved by a warp each, in float64. Centres are summed in float64 by blocks that
// own (restart, rows, columns, clusters) and combined in a fixed order; the only atomics count
// integers. Same bits on every run; no host synchronisation; can be captured in a CUDA graph.
// Bound by the products (2 N R K d flops an iteration) on plain FMA units, which keeps float32
// labels those of the CPU; tensor cores would need a second pass over every doubtful pair.
#if defined(FASTCLUST_DEVICE_EMULATOR)
#include FASTCLUST_DEVICE_EMULATOR
#endif
#include "kmeans/kmeans_cuda.h"

#include <algorithm>
#include <limits>

#include "kmeans/kmeans_shared.h"

namespace fastclust::kmeans {
namespace {

constexpr int kThreads = 256;
constexpr int kPitch = kCudaTile + 4;  // of a row of a step in shared memory: fewer bank conflicts
constexpr int kFlags = kCudaTile * (kCudaTile / 2);  // pairs (row, restart) that can be doubtful
constexpr int64_t kInertiaRows = 256;
constexpr int kMaxHistogram = 2048;

// --- pieces -------------------------------------------------------------------------------------

// |a - b|^2 in float64, by one warp, on every lane.
template <typename T>
__device__ double warp_square_distance(const T* a, const T* b, int64_t width) {
  double sum = 0.0;
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
    const double diff = static_cast<double>(a[j]) - static_cast<double>(b[j]);
    sum += diff * diff;
  }
  return warp_sum(sum);
}

template <typename T>
struct Step {
  T a[kCudaStep][kPitch];
  T b[kCudaStep][kPitch];
};
template <typename T>
union alignas(16) TileStorage {  // steps are read 16 bytes at a time
  Step<T> step;
  T tile[kCudaTile][kCudaTile + 1];
};

// storage.tile[i][j] = a_i . b_j, where thread t supplies row t / 4 of both operands.
template <typename T>
__device__ void product_tile(const T* a_row, const T* b_row, int64_t width,
                             TileStorage<T>& storage) {
  struct alignas(16) Quad {
    T v[4];
  };
  const int line = threadIdx.x / 4, first = threadIdx.x % 4 * 4;
  const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
  T acc[4][4] = {};
  Quad a = *reinterpret_cast<const Quad*>(a_row + first);
  Quad b = *reinterpret_cast<const Quad*>(b_row + first);
  for (int64_t j = 0; j < width; j += kCudaStep) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      storage.step.a[first + i][line] = a.v[i];
      storage.step.b[first + i][line] = b.v[i];
    }
    __syncthreads();
    if (j + kCudaStep < width) {
      a = *reinterpret_cast<const Quad*>(a_row + j + kCudaStep + first);
      b = *reinterpret_cast<const Quad*>(b_row + j + kCudaStep + first);
    }
#pragma unroll
    for (int k = 0; k < kCudaStep; ++k) {
      const Quad av = *reinterpret_cast<const Quad*>(&storage.step.a[k][ty]);
      const Quad bv = *reinterpret_cast<const Quad*>(&storage.step.b[k][tx]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int l = 0; l < 4; ++l) acc[i][l] += av.v[i] * bv.v[l];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int l = 0; l < 4; ++l) storage.tile[ty + i][tx + l] = acc[i][l];
  }
  __syncthreads();
}

// --- centring -----------------------------------------------------------------------------------

// partial[chunk, j] = sum over the chunk's rows of x, or, where xc is given, of (x - mean)^2, which
// also writes xc = x - mean. (restrict: several rows are read before the first is written)
template <typename T>
__global__ void column_sums_kernel(const T* __restrict__ x, int64_t n, int64_t d, int64_t rows,
                                   const double* mean, T* __restrict__ xc, int64_t dp,
                                   double* partial) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t begin = blockIdx.y * rows, end = min(n, begin + rows);
  if (j >= (xc == nullptr ? d : dp)) return;
  const double m = xc != nullptr && j < d ? mean[j] : 0.0;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = begin; i < end; ++i) {
    const double value = j < d ? static_cast<double>(x[i * d + j]) - m : 0.0;
    if (xc == nullptr) {
      sum += value;
    } else {
      sum += value * value;
      xc[i * dp + j] = static_cast<T>(value);
    }
  }
  if (j < d) partial[blockIdx.y * d + j] = sum;
}

// out[j] = sum over chunks of partial[chunk, j] / n.
__global__ void column_means_kernel(const double* partial, int64_t n_chunks, int64_t d, int64_t n,
                                    double* out) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= d) return;
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) sum += partial[chunk * d + j];
  out[j] = sum / static_cast<double>(n);
}

__global__ void mean_kernel(const double* values, int64_t n, double* out) {
  __shared__ double scratch[32];
  double sum = 0.0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) sum += values[j];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *out = sum / static_cast<double>(n);
}

template <typename T>
__global__ void square_norms_kernel(const T* x, int64_t n, int64_t width, T* norms) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (i >= n) return;  // whole warps
  double sum = 0.0;
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
    const auto value = static_cast<double>(x[i * width + j]);
    sum += value * value;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) norms[i] = static_cast<T>(sum);
}

// --- starts -------------------------------------------------------------------------------------

// A block per restart: K distinct rows, the best of n_draws by the sum of their square norms.
template <typename T>
__global__ void sample_kernel(Problem<T> p, int n_draws, int64_t seed, const T* x_norms,
                              uint8_t* taken /* [R, N] zero */, int64_t* rows /* [R, 2, K] */,
                              T* centers) {
  __shared__ double scratch[32];
  const int64_t r = blockIdx.x, n_clusters = p.n_clusters;
  int64_t* drawn = rows + r * 2 * n_clusters;
  int64_t* best = drawn + n_clusters;
  double least = std::numeric_limits<double>::infinity();
  for (int draw = 0; draw < n_draws; ++draw) {
    __syncthreads();
    if (threadIdx.x == 0) {
      sample_distinct(p.n_points, n_clusters, seed, r, draw * n_clusters, taken + r * p.n_points,
                      drawn);
    }
    __syncthreads();
    double sum = 0.0;
    for (int64_t k = threadIdx.x; k < n_clusters; k += blockDim.x) {
      sum += static_cast<double>(x_norms[drawn[k]]);
    }
    sum = block_sum(sum, scratch);
    if (draw > 0 && !(sum < least)) continue;  // of infinite sums the first
    least = sum;
    for (int64_t k = threadIdx.x; k < n_clusters; k += blockDim.x) best[k] = drawn[k];
  }
  __syncthreads();
  for (int64_t k = 0; k < n_clusters; ++k) {
    for (int64_t j = threadIdx.x; j < p.width; j += blockDim.x) {
      centers[(r * n_clusters + k) * p.width + j] = p.x[best[k] * p.width + j];
    }
  }
}

// parts[t] = sum of the t-th part of the tile sums, for every thread; returns their total.
__device__ double part_sums(const double* sums, int64_t tiles, double* parts /* [kThreads] */) {
  __syncthreads();
  double sum = 0.0;
  const int64_t end = part_begin(tiles, kThreads, threadIdx.x + 1);
  for (int64_t t = part_begin(tiles, kThreads, threadIdx.x); t < end; ++t) sum += sums[t];
  parts[threadIdx.x] = sum;
  __syncthreads();
  double total = 0.0;
  for (int t = 0; t < kThreads; ++t) total += parts[t];
  return total;
}

// A block per restart of the group, a thread per trial: the points at which the running sum of
// squared distances passes u times their total.
template <typename T>
__global__ void draw_kernel(Problem<T> p, int64_t first_restart, int64_t step, int64_t trials,
                            int64_t seed, const T* current, const double* current_sums,
                            int64_t tiles, int64_t* candidates) {
  __shared__ double parts[kThreads];
  const int64_t g = blockIdx.x, t = threadIdx.x;
  const double* sums = current_sums + g * tiles;
  const T* distance = current + g * p.n_points;
  const int64_t drawn = step == 0 ? 1 : trials;
  const double total = step == 0 ? 0.0 : part_sums(sums, tiles, parts);
  if (t >= drawn) return;
  const double u = draw_uniform(seed, first_restart + g, step * trials + t);
  int64_t pick = pick_below(p.n_points, u);
  if (total > 0.0) {
    const double target = u * total;
    double before = 0.0;
    int64_t part = 0, tile = 0;
    for (int q = 0; q < kThreads; ++q) {
      if (parts[q] <= 0.0) continue;
      part = q;
      if (before + parts[q] > target) break;
      before += parts[q];
    }
    const int64_t end_tile = part_begin(tiles, kThreads, part + 1);
    for (int64_t q = part_begin(tiles, kThreads, part); q < end_tile; ++q) {
      if (sums[q] <= 0.0) continue;
      tile = q;
      if (before + sums[q] > target) break;
      before += sums[q];
    }
    const int64_t end = min(p.n_points, (tile + 1) * kCudaTile);
    for (int64_t i = tile * kCudaTile; i < end; ++i) {
      if (distance[i] <= T(0)) continue;
      pick = i;
      before += static_cast<double>(distance[i]);
      if (before > target) break;
    }
  }
  candidates[g * drawn + t] = pick;
}

// distance[c, i] = min(|x_i - x_candidate[c]|^2, current[c / trials, i]) and its sums by tile of
// rows; a block per tile.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(Problem<T> p, const T* x_norms, const int64_t* candidates, int64_t n_columns,
                   int64_t trials, bool first, const T* current, T doubtful, int64_t tiles,
                   T* distance, double* tile_sums) {
  __shared__ TileStorage<T> storage;
  const int64_t begin = int64_t{blockIdx.x} * kCudaTile;
  const int64_t n_rows = min(int64_t{kCudaTile}, p.n_points - begin);
  const int line = threadIdx.x / 4;
  product_tile(p.x + min(begin + line, p.n_points - 1) * p.width,
               p.x + candidates[min(int64_t{line}, n_columns - 1)] * p.width, p.width, storage);
  const int64_t i = threadIdx.x % kCudaTile;
  for (int64_t c = threadIdx.x / kCudaTile; c < n_columns; c += kThreads / kCudaTile) {
    if (i >= n_rows) continue;
    const T* row = p.x + (begin + i) * p.width;
    const T* candidate = p.x + candidates[c] * p.width;
    const T scale = x_norms[begin + i] + x_norms[candidates[c]];
    T d = scale - 2 * storage.tile[i][c];
    if (d <= doubtful * scale) {
      double sum = 0.0;
      for (int64_t j = 0; j < p.width; ++j) {
        const double diff = static_cast<double>(row[j]) - static_cast<double>(candidate[j]);
        sum += diff * diff;
      }
      d = static_cast<T>(sum);
    }
    if (!first) d = min(d, current[c / trials * p.n_points + begin + i]);
    storage.tile[i][c] = d;
    distance[c * p.n_points + begin + i] = d;
  }
  __syncthreads();
  if (threadIdx.x < n_columns) {
    double sum = 0.0;
    for (int64_t q = 0; q < n_rows; ++q) sum += static_cast<double>(storage.tile[q][threadIdx.x]);
    tile_sums[threadIdx.x * tiles + blockIdx.x] = sum;
  }
}

// Some blocks per restart of the group: the candidate that leaves the least sum becomes centre
// `step`, each block copies a share of its distances. (restrict and a constant stride: several are
// read before the first is written)
template <typename T>
__global__ void choose_kernel(Problem<T> p, int64_t first_restart, int64_t step, int64_t trials,
                              const int64_t* candidates, const T* __restrict__ distance,
                              const double* tile_sums, int64_t tiles, T* __restrict__ current,
                              double* current_sums, T* centers) {
  __shared__ double parts[kThreads];
  const int64_t g = blockIdx.x;
  int64_t best = g * trials;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t c = g * trials; c < (g + 1) * trials; ++c) {
    const double sum = part_sums(tile_sums + c * tiles, tiles, parts);
    if (sum < least) {
      least = sum;
      best = c;
    }
  }
  const int64_t share = ceil_div(p.n_points, gridDim.y);
  const int64_t end = min(p.n_points, (blockIdx.y + 1) * share);
#pragma unroll 8
  for (int64_t i = blockIdx.y * share + threadIdx.x; i < end; i += kThreads) {
    current[g * p.n_points + i] = distance[best * p.n_points + i];
  }
  if (blockIdx.y > 0) return;
  for (int64_t t = threadIdx.x; t < tiles; t += blockDim.x) {
    current_sums[g * tiles + t] = tile_sums[best * tiles + t];
  }
  T* center = centers + ((first_restart + g) * p.n_clusters + step) * p.width;
  for (int64_t j = threadIdx.x; j < p.width; j += blockDim.x) {
    center[j] = p.x[candidates[best] * p.width + j];
  }
}

// --- assignment ---------------------------------------------------------------------------------

template <typename T>
struct Least {
  T best = std::numeric_limits<T>::infinity();
  T second = std::numeric_limits<T>::infinity();
  T largest = 0;  // square norm of a centre
  int32_t arg = 0;

  __device__ void add(T score, T norm, int32_t k) {
    largest = max(largest, norm);
    if (score < best) {
      second = best;
      best = score;
      arg = k;
    } else {
      second = min(second, score);
    }
  }
};

// Labels of 64 rows in the restarts that share a tile; grid (tiles of rows, groups of restarts).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    assign_kernel(Problem<T> p, const T* x_norms, const T* centers, const T* norms,
                  const bool* done, T error, int32_t* labels) {
  __shared__ TileStorage<T> storage;
  __shared__ uint16_t doubtful[kFlags];
  __shared__ int n_doubtful;
  const int64_t n_clusters = p.n_clusters, group = restarts_per_tile(n_clusters);
  const int64_t r0 = blockIdx.y * group, n_restarts = min(group, p.n_restarts - r0);
  const int64_t begin = int64_t{blockIdx.x} * kCudaTile;
  if (done != nullptr) {
    bool all = true;
    for (int64_t r = 0; r < n_restarts; ++r) all = all && done[r0 + r];
    if (all) return;
  }
  if (threadIdx.x == 0) n_doubtful = 0;
  const T* c = centers + r0 * n_clusters * p.width;
  const T* c_norms = norms + r0 * n_clusters;
  const int64_t n_columns = n_restarts * n_clusters;
  const int line = threadIdx.x / 4;
  const T* a_row = p.x + min(begin + line, p.n_points - 1) * p.width;

  const auto decide = [&](int pair, const Least<T>& least) {
    const int64_t row = begin + pair % kCudaTile, r = r0 + pair / kCudaTile;
    if (row >= p.n_points) return;
    // Of one cluster nothing is doubtful, not even where a distance is no number.
    if (n_clusters == 1 ||
        least.second - least.best > 2 * error * (x_norms[row] + least.largest)) {
      labels[r * p.n_points + row] = least.arg;
    } else {
      doubtful[atomicAdd(&n_doubtful, 1)] = static_cast<uint16_t>(pair);  // order plays no part
    }
  };

  Least<T> running;  // of row threadIdx.x, where one restart takes several tiles
  for (int64_t first = 0; first < n_columns; first += kCudaTile) {
    product_tile(a_row, c + min(first + line, n_columns - 1) * p.width, p.width, storage);
    if (n_clusters <= kCudaTile) {
      for (int pair = threadIdx.x; pair < n_restarts * kCudaTile; pair += kThreads) {
        const int row = pair % kCudaTile, column = pair / kCudaTile * static_cast<int>(n_clusters);
        Least<T> least;
        for (int k = 0; k < n_clusters; ++k) {
          const T norm = c_norms[column + k];
          least.add(norm - 2 * storage.tile[row][column + k], norm, k);
        }
        decide(pair, least);
      }
    } else if (threadIdx.x < kCudaTile) {
      const int64_t end = min(int64_t{kCudaTile}, n_columns - first);
      for (int64_t k = 0; k < end; ++k) {
        const T norm = c_norms[first + k];
        running.add(norm - 2 * storage.tile[threadIdx.x][k], norm, static_cast<int32_t>(first + k));
      }
    }
  }
  if (n_clusters > kCudaTile && threadIdx.x < kCudaTile) decide(threadIdx.x, running);
  __syncthreads();
  // Near ties: all centres in float64, ties to the lowest index; a warp each.
  for (int q = threadIdx.x / 32; q < n_doubtful; q += kThreads / 32) {
    const int pair = doubtful[q];
    const int64_t row = begin + pair % kCudaTile, r = r0 + pair / kCudaTile;
    double least = std::numeric_limits<double>::infinity();
    int32_t arg = 0;
    for (int64_t k = 0; k < n_clusters; ++k) {
      const double d = warp_square_distance(
          p.x + row * p.width, centers + (r * n_clusters + k) * p.width, p.width);
      if (d < least) {
        least = d;
        arg = static_cast<int32_t>(k);
      }
    }
    if (threadIdx.x % 32 == 0) labels[r * p.n_points + row] = arg;
  }
}

// sums[r, block] = squared distances of kInertiaRows rows to their centres.
template <typename T>
__global__ void inertia_kernel(Problem<T> p, const T* centers, const int32_t* labels,
                               double* sums) {
  __shared__ double scratch[32];
  const int64_t r = blockIdx.y, begin = blockIdx.x * kInertiaRows;
  const int64_t end = min(p.n_points, begin + kInertiaRows);
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x / 32; i < end; i += blockDim.x / 32) {
    const int64_t k = labels[r * p.n_points + i];
    const double d = warp_square_distance(
        p.x + i * p.width, centers + (r * p.n_clusters + k) * p.width, p.width);
    if (threadIdx.x % 32 == 0) sum += d;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[r * gridDim.x + blockIdx.x] = sum;
}

__global__ void total_kernel(const double* sums, int64_t n, double* out) {
  __shared__ double parts[kThreads];
  const double total = part_sums(sums + blockIdx.x * n, n, parts);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// --- update -------------------------------------------------------------------------------------

// counts[r, k] += points of cluster k among the block's rows (integers: any order is the same).
template <typename T>
__global__ void count_kernel(Problem<T> p, const int32_t* __restrict__ labels, const bool* done,
                             int64_t rows, int32_t* __restrict__ counts) {
  __shared__ int32_t histogram[kMaxHistogram];
  const int64_t r = blockIdx.y, begin = blockIdx.x * rows, end = min(p.n_points, begin + rows);
  if (done[r]) return;
  const auto count = [&](int32_t* target) {
#pragma unroll 8
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      atomicAdd(target + labels[r * p.n_points + i], 1);
    }
  };
  if (p.n_clusters > kMaxHistogram) return count(counts + r * p.n_clusters);
  for (int k = threadIdx.x; k < p.n_clusters; k += blockDim.x) histogram[k] = 0;
  __syncthreads();
  count(histogram);
  __syncthreads();
  for (int k = threadIdx.x; k < p.n_clusters; k += blockDim.x) {
    if (histogram[k] > 0) atomicAdd(counts + r * p.n_clusters + k, histogram[k]);
  }
}

// A block per restart: moves the points farthest from their centres into empty clusters. Returns
// at once where there are none, which is nearly always.
template <typename T>
__global__ void repair_kernel(Problem<T> p, const T* centers, const bool* done, int32_t* labels,
                              int32_t* counts, double* distances /* [R, N] */, bool* repaired) {
  __shared__ double far_distance[kThreads];
  __shared__ int64_t far_row[kThreads];
  const int64_t r = blockIdx.x;
  if (done[r]) return;
  centers += r * p.n_clusters * p.width;
  labels += r * p.n_points;
  counts += r * p.n_clusters;
  double* distance = distances + r * p.n_points;
  bool empty = false;
  for (int64_t k = threadIdx.x; k < p.n_clusters; k += blockDim.x) empty = empty || counts[k] == 0;
  if (threadIdx.x == 0) repaired[r] = false;
  if (!__syncthreads_or(empty)) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t i = warp; i < p.n_points; i += kThreads / 32) {
    const double d =
        warp_square_distance(p.x + i * p.width, centers + labels[i] * p.width, p.width);
    if (lane == 0) distance[i] = d;
  }
  for (int64_t k = 0; k < p.n_clusters; ++k) {
    __syncthreads();
    if (counts[k] > 0) continue;
    double most = 0.0;
    int64_t row = p.n_points;
    for (int64_t i = threadIdx.x; i < p.n_points; i += kThreads) {
      if (distance[i] > most && counts[labels[i]] > 1) {
        most = distance[i];
        row = i;
      }
    }
    far_distance[threadIdx.x] = most;
    far_row[threadIdx.x] = row;
    __syncthreads();
    for (int t = 0; t < kThreads; ++t) {  // the farthest; ties to the lowest row
      if (far_distance[t] > most || (far_distance[t] == most && far_row[t] < row)) {
        most = far_distance[t];
        row = far_row[t];
      }
    }
    if (row == p.n_points) return;  // every point lies on a centre
    __syncthreads();
    if (threadIdx.x == 0) {
      --counts[labels[row]];
      counts[k] = 1;
      labels[row] = static_cast<int32_t>(k);
      repaired[r] = true;
    }
    for (int64_t i = warp; i < p.n_points; i += kThreads / 32) {
      const double d = warp_square_distance(p.x + i * p.width, p.x + row * p.width, p.width);
      if (lane == 0) distance[i] = min(distance[i], d);
    }
  }
}

// partial[r, chunk, k, j] = sum of column j over the chunk's rows with label k; a block owns 256
// columns and kClusterRange clusters, each thread one column. Of fewer columns, groups of warps take
// 32 rows in turn.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(Problem<T> p, const int32_t* labels, const bool* done, int64_t rows,
                int64_t n_chunks, double* partial) {
  constexpr int kAhead = 8;  // loads in flight
  __shared__ double acc[kClusterRange][kThreads];
  const int64_t column_blocks = ceil_div(p.width, kThreads);
  const int64_t ranges = ceil_div(p.n_clusters, kClusterRange);
  int64_t id = blockIdx.x;
  const int group_size = threads_per_row(p.width, kThreads);
  const int group = threadIdx.x / group_size, n_groups = kThreads / group_size;
  const int64_t column = id % column_blocks * kThreads + threadIdx.x % group_size;
  id /= column_blocks;
  const int64_t k0 = id % ranges * kClusterRange;
  id /= ranges;
  const int64_t chunk = id % n_chunks, r = id / n_chunks;
  if (done[r]) return;
  const int lane = threadIdx.x % 32;
  const bool inside = column < p.width;
#pragma unroll
  for (int k = 0; k < kClusterRange; ++k) acc[k][threadIdx.x] = 0.0;
  const int64_t end = min(p.n_points, (chunk + 1) * rows);
  for (int64_t base = chunk * rows + 32 * group; base < end; base += 32 * n_groups) {
    const int64_t mine = base + lane;
    const int64_t label = mine < end ? labels[r * p.n_points + mine] - k0 : -1;
    unsigned mask = __ballot_sync(~0u, label >= 0 && label < kClusterRange);
    while (mask != 0) {
      T value[kAhead];  // as it comes: to convert it is to wait for it
      int row[kAhead];
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        row[q] = __ffs(static_cast<int>(mask)) - 1;  // -1: no more
        mask &= mask - 1;
        value[q] = row[q] < 0 || !inside ? T(0) : p.x[(base + row[q]) * p.width + column];
      }
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        if (row[q] < 0) continue;  // the whole warp
        const int cluster = __shfl_sync(~0u, static_cast<int>(label), row[q]);
        acc[cluster][threadIdx.x] += static_cast<double>(value[q]);
      }
    }
  }
  __syncthreads();
  if (group > 0 || !inside) return;
  for (int64_t k = k0; k < min(p.n_clusters, k0 + kClusterRange); ++k) {
    double sum = acc[k - k0][threadIdx.x];
    for (int g = 1; g < n_groups; ++g) sum += acc[k - k0][threadIdx.x + g * group_size];
    partial[((r * n_chunks + chunk) * p.n_clusters + k) * p.width + column] = sum;
  }
}

// A block per (restart, cluster): the mean, its movement and its square norm.
template <typename T>
__global__ void means_kernel(Problem<T> p, const bool* done, const int32_t* counts,
                             int64_t n_chunks, const double* partial, T* centers, T* norms,
                             double* shift) {
  __shared__ double scratch[32];
  const int64_t c = blockIdx.x, r = c / p.n_clusters, k = c % p.n_clusters;
  if (done[r]) return;
  const double scale = counts[c] > 0 ? 1.0 / static_cast<double>(counts[c]) : 0.0;
  double moved = 0.0, norm = 0.0;
  for (int64_t j = threadIdx.x; j < p.width; j += blockDim.x) {
    T value = centers[c * p.width + j];
    if (counts[c] > 0) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        sum += partial[((r * n_chunks + chunk) * p.n_clusters + k) * p.width + j];
      }
      const T mean = static_cast<T>(sum * scale);
      const double diff = static_cast<double>(mean) - static_cast<double>(value);
      moved += diff * diff;
      centers[c * p.width + j] = value = mean;
    }
    norm += static_cast<double>(value) * static_cast<double>(value);
  }
  moved = block_sum(moved, scratch);
  norm = block_sum(norm, scratch);
  if (threadIdx.x == 0) {
    shift[c] = moved;
    norms[c] = static_cast<T>(norm);
  }
}

__global__ void converge_kernel(int64_t n_restarts, int64_t n_clusters, const double* shift,
                                const bool* repaired, const double* tolerance, bool norm_rule,
                                int64_t* n_iter, bool* done) {
  const int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (r >= n_restarts || done[r]) return;
  double sum = 0.0;
  for (int64_t k = 0; k < n_clusters; ++k) {
    const double moved = shift[r * n_clusters + k];
    sum += norm_rule ? sqrt(moved) : moved;
  }
  ++n_iter[r];
  done[r] = !repaired[r] && is_converged(sum, norm_rule, *tolerance);
}

// --- launchers ----------------------------------------------------------------------------------

template <typename T>
T rounding(const Problem<T>& p) {  // every product sums over the whole width in one register
  return static_cast<T>(
      rounding_error(std::numeric_limits<T>::epsilon(), static_cast<double>(p.width)));
}

template <typename T>
T* square_norms(const T* x, int64_t n, int64_t width, const Allocate& allocate,
                cudaStream_t stream) {
  T* norms = take<T>(allocate, n);
  enqueue(square_norms_kernel<T>, blocks(n, kThreads / 32), kThreads, stream, x, n, width, norms);
  return norms;
}

template <typename T>
void launch_assign(const Problem<T>& p, const T* x_norms, const T* centers, const T* norms,
                   const bool* done, int32_t* labels, cudaStream_t stream) {
  const dim3 grid(blocks(p.n_points, kCudaTile),
                  blocks(p.n_restarts, restarts_per_tile(p.n_clusters)));
  enqueue(assign_kernel<T>, grid, kThreads, stream, p, x_norms, centers, norms, done, rounding(p),
         labels);
}

template <typename T>
void initialize_plus_plus(const Problem<T>& p, int64_t seed, const T* x_norms, T* centers,
                          const Allocate& allocate, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.n_points, kCudaTile), trials = n_trials(p.n_clusters);
  const int64_t group = std::min<int64_t>(p.n_restarts, kCudaTile / trials);
  T* current = take<T>(allocate, group * p.n_points);
  double* current_sums = take<double>(allocate, group * tiles);
  T* distance = take<T>(allocate, group * trials * p.n_points);
  double* tile_sums = take<double>(allocate, group * trials * tiles);
  auto* candidates = take<int64_t>(allocate, group * trials);
  const T doubtful = static_cast<T>(doubtful_share(rounding(p)));
  // Few: each of them adds up all tiles again.
  const auto shares = static_cast<unsigned>(std::min<int64_t>(16, ceil_div(p.n_points, 512)));
  for (int64_t r = 0; r < p.n_restarts; r += group) {
    const int64_t n_group = std::min(group, p.n_restarts - r);
    const auto grid = static_cast<unsigned>(n_group);
    for (int64_t step = 0; step < p.n_clusters; ++step) {
      const int64_t drawn = step == 0 ? 1 : trials;
      enqueue(draw_kernel<T>, grid, kThreads, stream, p, r, step, trials, seed, current,
             current_sums, tiles, candidates);
      enqueue(measure_kernel<T>, static_cast<unsigned>(tiles), kThreads, stream, p, x_norms,
             candidates, n_group * drawn, drawn, step == 0, current, doubtful, tiles, distance,
             tile_sums);
      enqueue(choose_kernel<T>, dim3(grid, shares), kThreads, stream, p, r, step, drawn,
             candidates, distance, tile_sums, tiles, current, current_sums, centers);
    }
  }
}

}  // namespace

template <typename T>
cudaError_t center_cuda(const T* x, int64_t n, int64_t d, T* xc, int64_t dp, double* mean,
                        double* variance, const Allocate& allocate, cudaStream_t stream) {
  constexpr int64_t kChunks = 1024, kColumns = 128;
  const int64_t rows = std::max<int64_t>(256, ceil_div(n, kChunks));
  const int64_t n_chunks = ceil_div(n, rows);
  double* partial = take<double>(allocate, n_chunks * d);
  double* squares = take<double>(allocate, d);
  const dim3 grid(blocks(dp, kColumns), static_cast<unsigned>(n_chunks));
  enqueue(column_sums_kernel<T>, grid, kColumns, stream, x, n, d, rows, mean, nullptr, dp, partial);
  enqueue(column_means_kernel, blocks(d, kColumns), kColumns, stream, partial, n_chunks, d, n, mean);
  enqueue(column_sums_kernel<T>, grid, kColumns, stream, x, n, d, rows, mean, xc, dp, partial);
  enqueue(column_means_kernel, blocks(d, kColumns), kColumns, stream, partial, n_chunks, d, n,
         squares);
  enqueue(mean_kernel, 1, kThreads, stream, squares, d, variance);
  return cudaGetLastError();
}

template <typename T>
cudaError_t initialize_cuda(const Problem<T>& p, Init init, int64_t seed, T* centers,
                            const Allocate& allocate, cudaStream_t stream) {
  const T* x_norms = square_norms(p.x, p.n_points, p.width, allocate, stream);
  if (init == Init::kPlusPlus) {
    initialize_plus_plus(p, seed, x_norms, centers, allocate, stream);
    return cudaGetLastError();
  }
  auto* taken = take<uint8_t>(allocate, p.n_restarts * p.n_points);
  auto* rows = take<int64_t>(allocate, p.n_restarts * 2 * p.n_clusters);
  const cudaError_t status =
      cudaMemsetAsync(taken, 0, static_cast<size_t>(p.n_restarts * p.n_points), stream);
  if (status != cudaSuccess) return status;
  const int n_draws = init == Init::kCentral ? kCentralDraws : 1;
  enqueue(sample_kernel<T>, static_cast<unsigned>(p.n_restarts), kThreads, stream, p, n_draws, seed,
         x_norms, taken, rows, centers);
  return cudaGetLastError();
}

template <typename T>
cudaError_t lloyd_cuda(const Problem<T>& p, const double* tolerance, bool norm_rule,
                       int64_t max_iter, T* centers, int64_t* n_iter, bool* converged,
                       const Allocate& allocate, cudaStream_t stream) {
  constexpr int64_t kCountRows = 4096;
  const int64_t n_centers = p.n_restarts * p.n_clusters;
  const int64_t rows = rows_per_chunk(p.n_clusters), n_chunks = ceil_div(p.n_points, rows);
  const T* x_norms = square_norms(p.x, p.n_points, p.width, allocate, stream);
  T* norms = square_norms<T>(centers, n_centers, p.width, allocate, stream);
  auto* labels = take<int32_t>(allocate, p.n_restarts * p.n_points);
  auto* counts = take<int32_t>(allocate, n_centers);
  auto* repaired = take<bool>(allocate, p.n_restarts);
  auto* distances = take<double>(allocate, p.n_restarts * p.n_points);
  auto* partial = take<double>(allocate, n_chunks * n_centers * p.width);
  auto* shift = take<double>(allocate, n_centers);
  const auto restarts = static_cast<unsigned>(p.n_restarts);
  const dim3 count_grid(blocks(p.n_points, kCountRows), restarts);
  const int64_t sum_blocks = p.n_restarts * n_chunks * ceil_div(p.n_clusters, kClusterRange) *
                             ceil_div(p.width, kThreads);
  if (sum_blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;

  cudaError_t status =
      cudaMemsetAsync(n_iter, 0, static_cast<size_t>(p.n_restarts) * sizeof(int64_t), stream);
  if (status != cudaSuccess) return status;
  status = cudaMemsetAsync(converged, 0, static_cast<size_t>(p.n_restarts), stream);
  if (status != cudaSuccess) return status;
  for (int64_t iteration = 0; iteration < max_iter; ++iteration) {
    launch_assign<T>(p, x_norms, centers, norms, converged, labels, stream);
    status = cudaMemsetAsync(counts, 0, static_cast<size_t>(n_centers) * sizeof(int32_t), stream);
    if (status != cudaSuccess) return status;
    enqueue(count_kernel<T>, count_grid, kThreads, stream, p, labels, converged, kCountRows, counts);
    enqueue(repair_kernel<T>, restarts, kThreads, stream, p, centers, converged, labels, counts,
           distances, repaired);
    enqueue(sums_kernel<T>, static_cast<unsigned>(sum_blocks), kThreads, stream, p, labels,
           converged, rows, n_chunks, partial);
    enqueue(means_kernel<T>, static_cast<unsigned>(n_centers), 128, stream, p, converged, counts,
           n_chunks, partial, centers, norms, shift);
    enqueue(converge_kernel, blocks(p.n_restarts, 32), 32, stream, p.n_restarts, p.n_clusters, shift,
           repaired, tolerance, norm_rule, n_iter, converged);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t assign_cuda(const Problem<T>& p, const T* centers, int32_t* labels, double* inertia,
                        const Allocate& allocate, cudaStream_t stream) {
  const int64_t n_blocks = ceil_div(p.n_points, kInertiaRows);
  const T* x_norms = square_norms(p.x, p.n_points, p.width, allocate, stream);
  const T* norms =
      square_norms(centers, p.n_restarts * p.n_clusters, p.width, allocate, stream);
  auto* sums = take<double>(allocate, p.n_restarts * n_blocks);
  launch_assign<T>(p, x_norms, centers, norms, nullptr, labels, stream);
  const dim3 grid(static_cast<unsigned>(n_blocks), static_cast<unsigned>(p.n_restarts));
  enqueue(inertia_kernel<T>, grid, kThreads, stream, p, centers, labels, sums);
  enqueue(total_kernel, static_cast<unsigned>(p.n_restarts), kThreads, stream, sums, n_blocks,
         inertia);
  return cudaGetLastError();
}

#define FASTCLUST_INSTANTIATE(T)                                                                 \
  template cudaError_t center_cuda<T>(const T*, int64_t, int64_t, T*, int64_t, double*, double*, \
                                      const Allocate&, cudaStream_t);                            \
  template cudaError_t initialize_cuda<T>(const Problem<T>&, Init, int64_t, T*, const Allocate&, \
                                          cudaStream_t);                                         \
  template cudaError_t lloyd_cuda<T>(const Problem<T>&, const double*, bool, int64_t, T*,        \
                                     int64_t*, bool*, const Allocate&, cudaStream_t);            \
  template cudaError_t assign_cuda<T>(const Problem<T>&, const T*, int32_t*, double*,            \
                                      const Allocate&, cudaStream_t);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::kmeans
