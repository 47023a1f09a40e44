// The batched randomised SVD on CUDA: what is not a plain matrix product. The products with X_c and
// with its Gram matrix are cuBLAS's, in fastclust/ops/lowrank_device.py; the algorithm is lowrank.py's.
//
// Work split: products with the sketch (Y^T Y by slots of rows, Y W) go by 32 x 32 tiles, summed in
// double; the small factorisations, one block per batch: a right-looking Cholesky that carries the
// inverse along, one barrier a step, and one-sided Jacobi with half a warp per pair of rows and the
// round-robin order that rotates l / 2 disjoint pairs at once. Their matrices (l (l + 1) doubles, 52 kB
// at l = 80) lie in shared memory up to l = 110, above it in device memory. Sums run in a fixed order,
// nothing is atomic, the host never waits: all of batched_svd can be captured in a CUDA graph.
//
// Bound, by arithmetic (no GPU was to be had), AMAC r = 70, l = 80, M = 14, B = 1024, H100: centring
// 4 passes x 84 MB = 0.11 ms; the Gram matrices 17 GF and five products 6.6 GF of fp32 at 40 TF/s =
// 0.6 ms; Y^T Y and Y W of eight orthonormalisations 1.7 GF of fp64 at 5 TF/s = 0.35 ms; eight Cholesky
// factors of 80 steps of about 250 cycles (a pivot's reciprocal, loads, a barrier) = 0.1 ms; the power
// iterations of the bound 0.05 ms; Jacobi 79 rounds x 7 sweeps x 600 cycles (two sums over half a warp,
// a rotation, a barrier) = 0.2 ms. In sum 1.4 ms and 70 launches (0.2 ms hidden in a graph), where 2 ms
// are aimed at. The factorisations, bound by latency on 14 of 132 multiprocessors, are no longer most
// of it: with 256 threads, quotients of 64-bit indices and matrices in device memory this reckoning
// gives 3 ms for them.
//
// Double data have no wider type to square into: Gram-Schmidt, twice, one block per batch; right, not
// fast.
#include "lowrank/lowrank_cuda.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/mma.cuh"
#include "common/rng.h"
#include "lowrank/lowrank_map.h"

namespace fastclust::lowrank {
namespace {

constexpr int kThreads = 256;
// Threads of the factorisations: many rows or pairs at a time. Pointers into device memory take more
// registers than 1024 threads have.
template <bool kShared>
constexpr int kFactorThreads = kShared ? 1024 : 512;
constexpr int kTile = kCudaTile;

// --- rows ---------------------------------------------------------------------------------------

// A block per (32 columns, batch), 8 rows at a time; sums of differences from the first row, so that
// constant columns come out exact.
template <typename T>
__global__ void column_means_kernel(Rows<T> x, T* out) {
  __shared__ double partial[kThreads];
  const int64_t j = int64_t{blockIdx.x} * 32 + threadIdx.x % 32, batch = blockIdx.y;
  const int64_t rows = min(x.batch_size, x.n_rows - batch * x.batch_size);
  const T* first = x.values + batch * x.batch_size * x.n_cols + j;
  double sum = 0.0;
  if (j < x.n_cols) {
#pragma unroll 16
    for (int64_t i = threadIdx.x / 32; i < rows; i += kThreads / 32) {
      sum += static_cast<double>(first[i * x.n_cols]) - static_cast<double>(*first);
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || j >= x.n_cols) return;
  for (int k = 1; k < kThreads / 32; ++k) sum += partial[k * 32 + threadIdx.x];
  out[batch * x.n_cols + j] =
      static_cast<T>(static_cast<double>(*first) + sum / static_cast<double>(rows));
}

// A block per row of the padded output.
template <typename T>
__global__ void center_kernel(Rows<T> x, T* out) {
  const int64_t row = blockIdx.x, batch = row / x.batch_size;
  T* to = out + row * x.n_cols;
  for (int64_t j = threadIdx.x; j < x.n_cols; j += blockDim.x) {
    T value = 0;
    if (row < x.n_rows) {
      if (x.indptr == nullptr) value = x.values[row * x.n_cols + j];
      if (x.mean != nullptr) value -= x.mean[batch * x.n_cols + j];
    }
    to[j] = value;
  }
  if (row >= x.n_rows || x.indptr == nullptr) return;
  __syncthreads();
  for (int64_t e = x.indptr[row] + threadIdx.x; e < x.indptr[row + 1]; e += blockDim.x) {
    to[x.indices[e]] += x.values[e];
  }
}

template <typename T>
__global__ void normal_kernel(int64_t size, int64_t first_batch, uint64_t seed, T scale, T* out) {
  const int64_t i = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x), batch = blockIdx.y;
  if (i >= size) return;
  T numbers[4];
  philox_normal4<T>(seed, static_cast<uint64_t>(first_batch + batch), static_cast<uint64_t>(i / 4),
                    numbers);
  for (int k = 0; k < 4 && i + k < size; ++k) out[batch * size + i + k] = scale * numbers[k];
}

// --- products with the sketch ------------------------------------------------------------------

// acc[q] = sum_k a[k, i0 + ..] b[k, j0 + ..] for k < depth: thread t has row t / 32 + 8 q of the tile
// and column t % 32. Strides in elements; nothing past m, n, depth is read.
template <typename A, typename B>
__device__ void tile_product(int64_t m, int64_t n, int64_t depth, int64_t i0, int64_t j0, const A* a,
                             int64_t a_k, int64_t a_i, const B* b, int64_t ldb, double (&acc)[4]) {
  __shared__ double left[kTile][kTile + 1], right[kTile][kTile + 1];
  const int column = threadIdx.x % kTile, line = threadIdx.x / kTile;
  for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
    __syncthreads();
    for (int q = 0; q < 4; ++q) {
      const int other = line + 8 * q;
      // The faster index of memory goes with the lane.
      const int k = a_i == 1 ? other : column, i = a_i == 1 ? column : other;
      left[k][i] = k0 + k < depth && i0 + i < m
                       ? static_cast<double>(a[(k0 + k) * a_k + (i0 + i) * a_i])
                       : 0.0;
      right[other][column] = k0 + other < depth && j0 + column < n
                                 ? static_cast<double>(b[(k0 + other) * ldb + j0 + column])
                                 : 0.0;
    }
    __syncthreads();
    for (int k = 0; k < kTile; ++k) {
      const double value = right[k][column];
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[q] += left[k][line + 8 * q] * value;
    }
  }
}

// partial [M, slots, l, l]: y^T y of kSlotRows rows, tiles on and above the diagonal.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(int64_t n, int64_t l, const T* y, double* partial) {
  int64_t ti, tj;
  tile_of(blockIdx.y, &ti, &tj);
  const int64_t slot = blockIdx.x, batch = blockIdx.z, row = slot * kSlotRows;
  const T* from = y + (batch * n + row) * l;
  double acc[4] = {};
  tile_product(l, l, min(int64_t{kSlotRows}, n - row), ti * kTile, tj * kTile, from, l, 1, from, l,
               acc);
  const int64_t j = tj * kTile + threadIdx.x % kTile;
  for (int q = 0; q < 4; ++q) {
    const int64_t i = ti * kTile + threadIdx.x / kTile + 8 * q;
    if (i < l && j < l) partial[((batch * gridDim.x + slot) * l + i) * l + j] = acc[q];
  }
}

// out [M, n, r] = y [M, n, l] factor [M, l, r].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(int64_t n, int64_t l, int64_t r, const T* y, const double* factor, T* out) {
  const int64_t i0 = int64_t{blockIdx.x} * kTile, j0 = int64_t{blockIdx.y} * kTile;
  const int64_t batch = blockIdx.z;
  double acc[4] = {};
  tile_product(n, r, l, i0, j0, y + batch * n * l, 1, l, factor + batch * l * r, r, acc);
  const int64_t j = j0 + threadIdx.x % kTile;
  for (int q = 0; q < 4; ++q) {
    const int64_t i = i0 + threadIdx.x / kTile + 8 * q;
    if (i < n && j < r) out[(batch * n + i) * r + j] = static_cast<T>(acc[q]);
  }
}

// shift [M] of lowrank.h; a block per batch. (a constant stride: several loads are under way)
constexpr int kShiftThreads = 1024;
template <typename T>
__global__ void __launch_bounds__(kShiftThreads)
    shift_kernel(int64_t size, const T* y, const double* bound, double root, double noise,
                 double* shift) {
  __shared__ double scratch[32];
  const int64_t batch = blockIdx.x;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < size; i += kShiftThreads) {
    const auto value = static_cast<double>(y[batch * size + i]);
    sum += value * value;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    shift[batch] = noise * sqrt(sum) - (bound == nullptr ? 0.0 : root * bound[batch]);
  }
}

// q = y + shift v, or y without v.
template <typename T>
__global__ void shifted_kernel(int64_t size, const T* y, const T* v, const double* shift, T* q) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, batch = blockIdx.y;
  if (i >= size) return;
  const int64_t at = batch * size + i;
  q[at] = v == nullptr ? y[at] : y[at] + static_cast<T>(shift[batch]) * v[at];
}

// --- small factorisations, a block per batch ---------------------------------------------------

// w [l, pitch] = the transposed inverse of the upper triangle r [l, l], a thread per row; rows of zero
// columns are zero.
__device__ void invert(int64_t l, const double* r, double* w, int64_t pitch) {
  for (int64_t j = threadIdx.x; j < l; j += blockDim.x) {
    double* row = w + j * pitch;
    for (int64_t i = 0; i < l; ++i) row[i] = 0.0;
    if (r[j * l + j] == 0.0) continue;
    for (int64_t k = j; k >= 0; --k) {
      const double pivot = r[k * l + k];
      if (pivot == 0.0) continue;
      double sum = k == j ? 1.0 : 0.0;
      for (int64_t i = k + 1; i <= j; ++i) sum -= r[k * l + i] * row[i];
      row[k] = sum / pivot;
    }
  }
  __syncthreads();
}

// Smallest singular value of r from w, its transposed inverse, by power iteration. x [2, l] is scratch.
__device__ double smallest(int l, const double* w, int pitch, double* x, double* scratch) {
  constexpr int kSteps = 5;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  double* z = x + l;
  double zeros = 0.0;
  for (int j = threadIdx.x; j < l; j += blockDim.x) {
    zeros += w[j * pitch + j] == 0.0;
    x[j] = 1.0;
  }
  if (block_sum(zeros, scratch) > 0.0) return 0.0;
  double norm = 0.0;
  for (int step = 0; step < kSteps; ++step) {
    double square = 0.0;
    for (int j = warp; j < l; j += n_warps) {
      double sum = 0.0;
      for (int i = lane; i <= j; i += 32) sum += w[j * pitch + i] * x[i];
      sum = warp_sum(sum);
      if (lane == 0) {
        z[j] = sum;
        square += sum * sum;
      }
    }
    const double scale = 1.0 / sqrt(block_sum(square, scratch));
    square = 0.0;
    for (int i = threadIdx.x; i < l; i += blockDim.x) {
      double sum = 0.0;
      for (int j = i; j < l; ++j) sum += w[j * pitch + i] * z[j];
      x[i] = sum * scale;
      square += sum * sum * scale * scale;
    }
    norm = sqrt(block_sum(square, scratch));
  }
  return 1.0 / norm;
}

// What orthonormalize learns of the eigenvalues.
struct BoundRule {
  const double* bound;  // [M] or nullptr
  const double* shift;  // [M], or nullptr: keep the bound
  double* new_bound;    // [M], or nullptr: not wanted
};

// w [l, pitch]: the transposed inverse of r.
__device__ void update_bound(const BoundRule& rule, int64_t l, const double* w, int64_t pitch,
                             double* x, double* scratch) {
  if (rule.new_bound == nullptr) return;
  const double old = rule.bound == nullptr ? 0.0 : rule.bound[blockIdx.x];
  double value = old;
  if (rule.shift != nullptr) {
    const double least = smallest(static_cast<int>(l), w, static_cast<int>(pitch), x, scratch);
    value = max(old, least - rule.shift[blockIdx.x]);
  }
  if (threadIdx.x == 0) rule.new_bound[blockIdx.x] = value;
}

// g = the sum of the slots = r^T r; r, its inverse and the bound. A column whose pivot is rounding
// noise depends on earlier ones: its row of r and its column of the inverse are zero.
//
// Elimination without roots of [L^-1 | g], L = r^T: row i of the work space holds L^-1 up to its
// diagonal and g from there, l + 1 columns. Step k subtracts multiples of row k from the rows below
// it and writes nothing that it reads, so that one barrier a step is enough.
template <bool kShared>
__global__ void __launch_bounds__((kFactorThreads<kShared>), 1)
    cholesky_kernel(int64_t width, int64_t n_slots, const double* partial, double* work_all,
                    double* r, double* inverse, BoundRule rule) {
  FASTCLUST_DYNAMIC_SHARED(shared);
  __shared__ double scratch[32];
  const int64_t batch = blockIdx.x, size = width * width;
  const int l = static_cast<int>(width), pitch = static_cast<int>(pitch_of(width));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  double* const work =
      kShared ? reinterpret_cast<double*>(shared) : work_all + batch * work_size(width);
  partial += batch * n_slots * size;
  r += batch * size;
  inverse += batch * size;
  for (int i = warp; i < l; i += n_warps) {
    for (int j = lane; j <= l; j += 32) {
      double sum = j == i ? 1.0 : 0.0;
      if (j > i) {  // tiles below the diagonal were not written
        for (int64_t s = 0; s < n_slots; ++s) sum += partial[s * size + i * l + j - 1];
      }
      work[i * pitch + j] = sum;
    }
  }
  __syncthreads();
  double largest = 0.0;
  for (int j = 0; j < l; ++j) largest = max(largest, work[j * pitch + j + 1]);
  const double noise = kFloatNoise * largest;
  __syncthreads();
  for (int k = 0; k < l; ++k) {
    const double* __restrict__ source = work + k * pitch;
    const double pivot = source[k + 1];
    if (!(pivot > noise)) continue;
    const double scale = 1.0 / pivot;
    for (int i = k + 1 + warp; i < l; i += n_warps) {
      double* __restrict__ row = work + i * pitch;
      const double multiple = source[i + 1] * scale;
      for (int j = lane; j <= l; j += 32) {
        if (j <= k || j > i) row[j] -= multiple * source[j];
      }
    }
    __syncthreads();
  }
  const auto scale_of = [&](int i) {
    const double pivot = work[i * pitch + i + 1];
    return pivot > noise ? 1.0 / sqrt(pivot) : 0.0;
  };
  for (int i = warp; i < l; i += n_warps) {
    const double scale = scale_of(i);
    for (int j = lane; j < l; j += 32) {
      r[i * l + j] = j < i ? 0.0 : work[i * pitch + j + 1] * scale;
      if (j <= i) work[i * pitch + j] *= scale;
    }
  }
  __syncthreads();
  for (int i = warp; i < l; i += n_warps) {
    for (int j = lane; j < l; j += 32) inverse[i * l + j] = j < i ? 0.0 : work[j * pitch + i];
  }
  update_bound(rule, l, work, pitch, work + l * pitch, scratch);
}

// q [n, l] by Gram-Schmidt in place, twice over for every column, and r.
__global__ void __launch_bounds__(kThreads)
    gram_schmidt_kernel(int64_t n, int64_t l, double* q, double* r, double* work, BoundRule rule) {
  __shared__ double scratch[32];
  const int64_t batch = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  q += batch * n * l;
  r += batch * l * l;
  double* projection = work + batch * work_size(l) + l * pitch_of(l);
  for (int64_t i = threadIdx.x; i < l * l; i += blockDim.x) r[i] = 0.0;
  for (int64_t j = 0; j < l; ++j) {
    const auto length = [&] {
      double sum = 0.0;
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += q[i * l + j] * q[i * l + j];
      return sqrt(block_sum(sum, scratch));
    };
    __syncthreads();
    const double before = length();
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t k = warp; k < j; k += n_warps) {
        double sum = 0.0;
        for (int64_t i = lane; i < n; i += 32) sum += q[i * l + k] * q[i * l + j];
        sum = warp_sum(sum);
        if (lane == 0) {
          projection[k] = sum;
          r[k * l + j] += sum;
        }
      }
      __syncthreads();
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        double value = q[i * l + j];
        for (int64_t k = 0; k < j; ++k) value -= projection[k] * q[i * l + k];
        q[i * l + j] = value;
      }
      __syncthreads();
    }
    const double after = length();
    const bool dependent = !(after > 8 * std::numeric_limits<double>::epsilon() * before);
    const double scale = dependent ? 0.0 : 1.0 / after;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) q[i * l + j] *= scale;
    if (threadIdx.x == 0) r[j * l + j] = dependent ? 0.0 : after;
  }
  __syncthreads();
  if (rule.new_bound == nullptr) return;
  double* w = work + batch * work_size(l);
  invert(l, r, w, l);
  update_bound(rule, l, w, l, projection, scratch);
}

// SVD of the triangle second first (second may be nullptr: first alone): s [l], vt [l, l], and the
// factor [l, rank] = first v / s that makes left vectors. order [l]: scratch. The rows that become
// s vt lie in the work space, half a warp rotates a pair of them.
template <bool kShared>
__global__ void __launch_bounds__((kFactorThreads<kShared>), 1)
    jacobi_kernel(int64_t width, int64_t rank, double tolerance, const double* first,
                  const double* second, double* work_all, int32_t* order, double* s, double* vt,
                  double* factor) {
  constexpr int kMaxSweeps = 40, kTeam = 16;
  FASTCLUST_DYNAMIC_SHARED(shared);
  __shared__ int rotated;
  const int64_t batch = blockIdx.x;
  const int l = static_cast<int>(width), pitch = static_cast<int>(pitch_of(width));
  const int member = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
  const int n_teams = blockDim.x / kTeam;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  double* const a =
      kShared ? reinterpret_cast<double*>(shared) : work_all + batch * work_size(width);
  double* const norm = a + l * pitch;
  first += batch * l * l;
  second = second == nullptr ? nullptr : second + batch * l * l;
  order += batch * l;
  s += batch * l;
  vt += batch * l * l;
  factor += batch * l * rank;
  for (int i = warp; i < l; i += n_warps) {
    for (int j = lane; j < l; j += 32) {
      double sum = 0.0;
      if (second == nullptr) {
        sum = first[i * l + j];
      } else {
        for (int k = i; k <= j; ++k) sum += second[i * l + k] * first[k * l + j];
      }
      a[i * pitch + j] = sum;
    }
  }
  __syncthreads();
  // Of a team, on its every lane; all teams of a warp must come, those without rows with length 0.
  const auto dot = [&](const double* x, const double* y, int length) {
    double sum = 0.0;
    for (int i = member; i < length; i += kTeam) sum += x[i] * y[i];
#pragma unroll
    for (int offset = kTeam / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    return sum;
  };
  const auto measure = [&] {
    for (int i0 = 0; i0 < l; i0 += n_teams) {
      const int i = i0 + team;
      const double square = dot(a + i * pitch, a + i * pitch, i < l ? l : 0);
      if (i < l && member == 0) norm[i] = square;
    }
    __syncthreads();
  };
  const int players = l + l % 2, n_pairs = players / 2;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    if (threadIdx.x == 0) rotated = 0;
    measure();
    double largest = 0.0;
    for (int i = 0; i < l; ++i) largest = max(largest, norm[i]);
    for (int round = 0; round + 1 < players; ++round) {
      __syncthreads();
      for (int pair0 = 0; pair0 < n_pairs; pair0 += n_teams) {
        int p, q;
        pair_of(players, round, pair0 + team, &p, &q);
        const bool real = pair0 + team < n_pairs && q < l;  // without the odd one out
        double* x = a + p * pitch;
        double* y = a + q * pitch;
        const double np = real ? norm[p] : 0.0, nq = real ? norm[q] : 0.0;
        const double cross = dot(x, y, real ? l : 0);
        __syncwarp();  // the team has read the norms that its first member is about to change
        if (!real || is_orthogonal(np, nq, cross, largest, tolerance)) continue;
        const Rotation rotation = rotation_of(np, nq, cross);
        for (int i = member; i < l; i += kTeam) {
          const double xi = x[i], yi = y[i];
          x[i] = rotation.c * xi - rotation.s * yi;
          y[i] = rotation.s * xi + rotation.c * yi;
        }
        if (member == 0) {
          rotated = 1;
          norm[p] = max(0.0, np - rotation.t * cross);
          norm[q] = nq + rotation.t * cross;
        }
      }
    }
    __syncthreads();
    const bool again = rotated != 0;
    __syncthreads();
    if (!again) break;
  }
  measure();
  for (int i = threadIdx.x; i < l; i += blockDim.x) order[place_of(norm, l, i)] = i;
  __syncthreads();
  for (int k = warp; k < l; k += n_warps) {
    const int row = order[k];
    const double length = sqrt(norm[row]);
    if (lane == 0) s[k] = length;
    for (int j = lane; j < l; j += 32) {
      vt[k * l + j] = length > 0.0 ? a[row * pitch + j] / length : 0.0;
    }
  }
  __syncthreads();
  for (int i = warp; i < l; i += n_warps) {
    for (int k = lane; k < rank; k += 32) {
      double sum = 0.0;
      for (int j = i; j < l; ++j) sum += first[i * l + j] * vt[k * l + j];
      factor[i * rank + k] = s[k] > 0.0 ? sum / s[k] : 0.0;
    }
  }
}

// --- launchers ----------------------------------------------------------------------------------

// Most dynamic shared memory of a block that every card from sm_80 on has.
constexpr size_t kSharedBytes = 98 * 1024;

// Runs one of the factorisations, a block per matrix, in shared memory where its work space fits.
template <typename... Parameters, typename... Args>
void factorise(void (*in_shared)(Parameters...), void (*in_memory)(Parameters...), int64_t m,
               int64_t l, cudaStream_t stream, Args... args) {
  const size_t bytes = static_cast<size_t>(work_size(l)) * sizeof(double);
  const bool fits = bytes <= kSharedBytes;
  enqueue_shared(fits ? in_shared : in_memory, static_cast<unsigned>(m),
                 fits ? kFactorThreads<true> : kFactorThreads<false>, fits ? bytes : 0, stream,
                 args...);
}

// The Cholesky factor r [M, l, l] of y^T y and its inverse [M, l, l].
void factor(int64_t m, int64_t n, int64_t l, const float* y, double* partial, double* work,
            double* r, double* inverse, const BoundRule& rule, cudaStream_t stream) {
  const int64_t tiles = (l + kTile - 1) / kTile, slots = slots_of(n);
  enqueue(gram_kernel<float>,
         dim3(static_cast<unsigned>(slots), static_cast<unsigned>(tiles * (tiles + 1) / 2),
              static_cast<unsigned>(m)),
         kThreads, stream, n, l, y, partial);
  factorise(cholesky_kernel<true>, cholesky_kernel<false>, m, l, stream, l, slots, partial, work, r,
            inverse, rule);
}

template <typename T>
void apply(int64_t m, int64_t n, int64_t l, int64_t r, const T* y, const double* factor, T* out,
           cudaStream_t stream) {
  if (r == 0) return;
  enqueue(apply_kernel<T>, dim3(blocks(n, kTile), blocks(r, kTile), static_cast<unsigned>(m)),
         kThreads, stream, n, l, r, y, factor, out);
}

constexpr BoundRule kNoBound{nullptr, nullptr, nullptr};

}  // namespace

template <typename T>
cudaError_t column_means_cuda(const Rows<T>& x, T* out, cudaStream_t stream) {
  enqueue(column_means_kernel<T>, dim3(blocks(x.n_cols, 32), static_cast<unsigned>(x.n_batches())),
         kThreads, stream, x, out);
  return cudaGetLastError();
}

template <typename T>
cudaError_t center_cuda(const Rows<T>& x, T* out, cudaStream_t stream) {
  enqueue(center_kernel<T>, static_cast<unsigned>(x.n_batches() * x.batch_size), kThreads, stream, x,
         out);
  return cudaGetLastError();
}

template <typename T>
cudaError_t normal_cuda(int64_t n_batches, int64_t first_batch, int64_t n, int64_t width,
                        uint64_t seed, T* out, cudaStream_t stream) {
  const int64_t size = n * width;
  const T scale = T(1) / (std::sqrt(T(n)) + std::sqrt(T(width)));
  enqueue(normal_kernel<T>, dim3(blocks((size + 3) / 4, kThreads), static_cast<unsigned>(n_batches)),
         kThreads, stream, size, first_batch, seed, scale, out);
  return cudaGetLastError();
}

template <typename T>
cudaError_t orthonormalize_cuda(const Orthonormalize<T>& p, const Allocate& allocate,
                                cudaStream_t stream) {
  const int64_t m = p.n_batches, n = p.n_rows, l = p.width, size = n * l;
  double* work = take<double>(allocate, m * work_size(l));
  double* r = take<double>(allocate, m * l * l);
  double* shift = take<double>(allocate, m);
  if (p.v != nullptr) {
    enqueue(shift_kernel<T>, static_cast<unsigned>(m), kShiftThreads, stream, size, p.y, p.bound,
           p.root, 32.0 * std::numeric_limits<T>::epsilon(), shift);
  }
  const dim3 grid(blocks(size, kThreads), static_cast<unsigned>(m));
  const BoundRule rule{p.bound, p.v == nullptr || p.root > 0.5 ? nullptr : shift, p.new_bound};
  if constexpr (std::is_same_v<T, float>) {
    float* t = take<float>(allocate, m * size);
    double* partial = take<double>(allocate, m * slots_of(n) * l * l);
    double* inverse = take<double>(allocate, m * l * l);
    float* from = p.passes == 1 ? t : p.q;  // every pass writes to the other one of t and q
    enqueue(shifted_kernel<T>, grid, kThreads, stream, size, p.y, p.v, shift, from);
    factor(m, n, l, from, partial, work, r, inverse, rule, stream);
    float* to = p.passes == 1 ? p.q : t;
    apply(m, n, l, l, from, inverse, to, stream);
    if (p.passes == 2) {
      factor(m, n, l, t, partial, work, r, inverse, kNoBound, stream);
      apply(m, n, l, l, t, inverse, p.q, stream);
    }
  } else {
    enqueue(shifted_kernel<T>, grid, kThreads, stream, size, p.y, p.v, shift, p.q);
    enqueue(gram_schmidt_kernel, static_cast<unsigned>(m), kThreads, stream, n, l, p.q, r, work,
            rule);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t thin_svd_cuda(const ThinSvd<T>& p, const Allocate& allocate, cudaStream_t stream) {
  const int64_t m = p.n_batches, n = p.n_rows, l = p.width, size = n * l;
  double* work = take<double>(allocate, m * work_size(l));
  double* first = take<double>(allocate, m * l * l);
  double* left = take<double>(allocate, m * l * std::max<int64_t>(p.rank, 1));
  auto* order = take<int32_t>(allocate, m * l);
  T* q = take<T>(allocate, m * size);
  double* second = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    double* partial = take<double>(allocate, m * slots_of(n) * l * l);
    double* inverse = take<double>(allocate, m * l * l);
    second = take<double>(allocate, m * l * l);
    factor(m, n, l, p.y, partial, work, first, inverse, kNoBound, stream);
    apply(m, n, l, l, p.y, inverse, q, stream);
    factor(m, n, l, q, partial, work, second, inverse, kNoBound, stream);
  } else {
    enqueue(shifted_kernel<T>, dim3(blocks(size, kThreads), static_cast<unsigned>(m)), kThreads,
           stream, size, p.y, nullptr, nullptr, q);
    enqueue(gram_schmidt_kernel, static_cast<unsigned>(m), kThreads, stream, n, l, q, first, work,
            kNoBound);
  }
  constexpr double kTolerance =
      std::is_same_v<T, float> ? 0.01 * std::numeric_limits<float>::epsilon() : 1e-15;
  factorise(jacobi_kernel<true>, jacobi_kernel<false>, m, l, stream, l, p.rank, kTolerance, first,
            second, work, order, p.s, p.vt, left);
  apply(m, n, l, p.rank, q, left, p.u, stream);
  if constexpr (std::is_same_v<T, double>) {  // short columns come out of a cancellation: once more
    enqueue(gram_schmidt_kernel, static_cast<unsigned>(m), kThreads, stream, n, p.rank, p.u, first,
            work, kNoBound);
  }
  return cudaGetLastError();
}

#define FASTCLUST_INSTANTIATE(T)                                                                 \
  template cudaError_t column_means_cuda<T>(const Rows<T>&, T*, cudaStream_t);                   \
  template cudaError_t center_cuda<T>(const Rows<T>&, T*, cudaStream_t);                         \
  template cudaError_t normal_cuda<T>(int64_t, int64_t, int64_t, int64_t, uint64_t, T*,          \
                                      cudaStream_t);                                             \
  template cudaError_t orthonormalize_cuda<T>(const Orthonormalize<T>&, const Allocate&,         \
                                              cudaStream_t);                                     \
  template cudaError_t thin_svd_cuda<T>(const ThinSvd<T>&, const Allocate&, cudaStream_t);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::lowrank
