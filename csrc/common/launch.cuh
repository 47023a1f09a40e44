// What launchers of several CUDA operators share: memory, grids, launches, sums over a block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fastclust {

// Device memory that lives until the work on the stream is done.
using Allocate = std::function<void*(size_t bytes)>;

template <typename U>
U* take(const Allocate& allocate, int64_t count) {
  return static_cast<U*>(allocate(static_cast<size_t>(count) * sizeof(U)));
}

inline unsigned blocks(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

#if !defined(FASTCLUST_DEVICE_EMULATOR)
// Above 48 KB of shared memory, static and dynamic together, a kernel has to ask. It asks for all that
// there is, whatever one launch needs: threads that launch it with other sizes ask for the same.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 32 * 1024) return cudaSuccess;  // static memory is far below the rest
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  int device = 0, most = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(attributes.sharedSizeBytes));
}

// Launches; an error is the caller's cudaGetLastError.
template <typename... Parameters, typename... Args>
void enqueue_shared(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes,
                    cudaStream_t stream, Args... args) {
  if (allow_shared(kernel, bytes) != cudaSuccess) return;
  kernel<<<grid, threads, bytes, stream>>>(args...);
}
template <typename... Parameters, typename... Args>
void enqueue(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
             Args... args) {
  enqueue_shared(kernel, grid, threads, 0, stream, args...);
}
#endif

__device__ inline double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Sum over the block, on every thread, in an order that depends on the block's size alone.
__device__ inline double block_sum(double v, double* scratch /* [32] */) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  v = warp_sum(v);
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < n_warps; ++w) sum += scratch[w];
  return sum;
}

}  // namespace fastclust
