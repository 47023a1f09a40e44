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
// Above 48 KB of dynamic shared memory a kernel has to ask.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
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
