// Instructions of sm_90a, one function each: bulk copies that report to a barrier in shared memory,
// those barriers, and the matrix unit that reads its operands from shared memory (wgmma). The CPU
// tests replace this header's functions by their emulator's, see mma.cuh.
#pragma once

#include "common/mma.cuh"

#if defined(__CUDACC__)

namespace fastclust {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- barriers in shared memory ------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the copy engine; a block barrier has to follow.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and lets the phase end only after that many bytes have been copied, too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra again;\n"
      "ended:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Barrier of some of the block's warps.
template <int kId, int kCount>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kCount) : "memory");
}

// Bytes (a multiple of 16) from global to shared memory, counted by the barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Registers of a thread from here on, for a whole warpgroup.
template <int kCount>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- matrix unit --------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Ties d to this place: a wait or a fence names no registers, and the compiler would be free to move a
// use of d across it.
__device__ __forceinline__ void wgmma_hold(float (&d)[1][16][4]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[0][i / 4][i % 4])::"memory");
}

// d += a b^T, or d = a b^T: a 64 x 16 and b 128 x 16 bf16 through descriptors; kMajor 1: stored [k][m]
// or [k][n].
template <int kMajorA, int kMajorB, bool kAdd>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[1][16][4], uint64_t a, uint64_t b) {
#define FASTCLUST_D4(i) "+f"(d[0][i][0]), "+f"(d[0][i][1]), "+f"(d[0][i][2]), "+f"(d[0][i][3])
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, %66, 1, 1, %67, %68;"
      : FASTCLUST_D4(0), FASTCLUST_D4(1), FASTCLUST_D4(2), FASTCLUST_D4(3), FASTCLUST_D4(4),
        FASTCLUST_D4(5), FASTCLUST_D4(6), FASTCLUST_D4(7), FASTCLUST_D4(8), FASTCLUST_D4(9),
        FASTCLUST_D4(10), FASTCLUST_D4(11), FASTCLUST_D4(12), FASTCLUST_D4(13), FASTCLUST_D4(14),
        FASTCLUST_D4(15)
      : "l"(a), "l"(b), "n"(int{kAdd}), "n"(kMajorA), "n"(kMajorB));
#undef FASTCLUST_D4
}

}  // namespace fastclust

#endif
