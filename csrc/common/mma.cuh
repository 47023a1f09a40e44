// Matrix instructions and asynchronous copies of sm_80 and later, one function each, and the
// kernel launch. The CPU tests of the kernels compile the same kernel sources against a header of
// their own, named by FASTCLUST_DEVICE_EMULATOR, that has these functions and CUDA's keywords.
#pragma once

#if !defined(__CUDACC__)
#include FASTCLUST_DEVICE_EMULATOR
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "common/launch.cuh"

#define FASTCLUST_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FASTCLUST_DYNAMIC_SHARED_1024(name) extern __shared__ __align__(1024) unsigned char name[]

namespace fastclust {

// 16 bytes from global to shared memory; both addresses 16-byte aligned. Past L1, which would only
// keep what shared memory holds anyway.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b^T: a 16 x 16 and b 8 x 16 bf16.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b^T: a 16 x 8 and b 8 x 8 tf32.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sums by the memory itself: nothing waits for what is there. Pairs begin on twice their size.
__device__ __forceinline__ void add_one(float* to, float a) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(a) : "memory");
}
__device__ __forceinline__ void add_one(double* to, double a) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(to), "d"(a) : "memory");
}
template <typename T>
__device__ __forceinline__ void add_pair(T* to, T a, T b) {
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == sizeof(float)) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b)
                 : "memory");
    return;
  }
#endif
  add_one(to, a);
  add_one(to + 1, b);
}

// exp(x) by one product and the unit for powers of two: relative error about 2^-22, 0 below 2^-126.
__device__ __forceinline__ float fast_exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

// Launches kernel(args). Returns the launch's error; nothing waits for the device.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  if (shared_bytes > 0) {  // as much of it as there is: two blocks are to fit a multiprocessor
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastclust

#endif
