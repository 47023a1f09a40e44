// The CUDA kernels of k-means and their launchers, compiled for the CPU over cuda_emulator.h and
// called from tests/test_kmeans.py through ctypes.
#define FASTCLUST_DEVICE_EMULATOR "device/cuda_emulator.h"
#include FASTCLUST_DEVICE_EMULATOR

#include <algorithm>

using std::max;
using std::min;

// What k-means needs beyond the emulator.
inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  if (emulator::state().running == 0) any = 0;
  __syncthreads();
  if (predicate) any = 1;
  __syncthreads();
  return any;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }

constexpr cudaError_t cudaErrorInvalidConfiguration = cudaErrorInvalidValue;

#include "device/emulated_launch.h"
#include "kmeans/kmeans_cuda.cu"

namespace {

using namespace fastclust::kmeans;
using fastclust::Allocate;

template <typename T>
void solve(const T* x, int64_t n, int64_t d, int64_t n_clusters, int64_t n_restarts, int init,
           int64_t seed, double tol, int64_t max_iter, T* xc, int64_t dp, double* mean,
           double* variance, T* centers, T* starts, int64_t* n_iter, bool* converged,
           int32_t* labels, double* inertia) {
  emulator::Memory memory;
  const Allocate allocate = memory.allocate();
  center_cuda(x, n, d, xc, dp, mean, variance, allocate, nullptr);
  const Problem<T> p{xc, n, dp, n_clusters, n_restarts};
  if (init >= 0) {
    initialize_cuda(p, static_cast<Init>(init), seed, centers, allocate, nullptr);
    std::copy_n(centers, n_restarts * n_clusters * dp, starts);
  } else {
    std::copy_n(starts, n_restarts * n_clusters * dp, centers);
  }
  const double tolerance = tol * *variance;
  lloyd_cuda(p, &tolerance, false, max_iter, centers, n_iter, converged, allocate, nullptr);
  assign_cuda(p, centers, labels, inertia, allocate, nullptr);
}

}  // namespace

extern "C" {

void set_warp_order(int order) { emulator::state().warp_order = order; }

#define FASTCLUST_SOLVE(name, T)                                                                 \
  void name(const T* x, int64_t n, int64_t d, int64_t n_clusters, int64_t n_restarts, int init,  \
            int64_t seed, double tol, int64_t max_iter, T* xc, int64_t dp, double* mean,         \
            double* variance, T* centers, T* starts, int64_t* n_iter, bool* converged,           \
            int32_t* labels, double* inertia) {                                                  \
    solve(x, n, d, n_clusters, n_restarts, init, seed, tol, max_iter, xc, dp, mean, variance,    \
          centers, starts, n_iter, converged, labels, inertia);                                  \
  }
FASTCLUST_SOLVE(kmeans_float, float)
FASTCLUST_SOLVE(kmeans_double, double)

int64_t group_of(int64_t n_clusters) { return restarts_per_tile(n_clusters); }
int64_t chunk_rows(int64_t n_clusters) { return rows_per_chunk(n_clusters); }
int64_t begin_of(int64_t n, int64_t parts, int64_t p) { return part_begin(n, parts, p); }

}  // extern "C"
