// Launchers of the CUDA kernels of k-means, for T = float and double. Pointers are those of kmeans.h
// in device memory; `allocate` gives device memory that lives until the work on `stream` is done.
#pragma once

#if !defined(FASTCLUST_DEVICE_EMULATOR)
#include <cuda_runtime.h>
#endif

#include "common/launch.cuh"
#include "kmeans/kmeans.h"

namespace fastclust::kmeans {

template <typename T>
cudaError_t center_cuda(const T* x, int64_t n, int64_t d, T* xc, int64_t dp, double* mean,
                        double* variance, const Allocate& allocate, cudaStream_t stream);

template <typename T>
cudaError_t initialize_cuda(const Problem<T>& p, Init init, int64_t seed, T* centers,
                            const Allocate& allocate, cudaStream_t stream);

// All max_iter iterations are enqueued without looking at the device; those of a converged restart
// return at once. `tolerance` is in device memory.
template <typename T>
cudaError_t lloyd_cuda(const Problem<T>& p, const double* tolerance, bool norm_rule,
                       int64_t max_iter, T* centers, int64_t* n_iter, bool* converged,
                       const Allocate& allocate, cudaStream_t stream);

template <typename T>
cudaError_t assign_cuda(const Problem<T>& p, const T* centers, int32_t* labels, double* inertia,
                        const Allocate& allocate, cudaStream_t stream);

}  // namespace fastclust::kmeans
