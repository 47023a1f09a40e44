// Launchers of the CUDA kernels of the batched SVD, for T = float and double. Pointers are those of
// lowrank.h in device memory; `allocate` gives device memory that lives until the work on `stream` is
// done. None looks at the device; all can be captured in a CUDA graph.
#pragma once

#if !defined(FASTCLUST_DEVICE_EMULATOR)
#include <cuda_runtime.h>
#endif

#include "common/launch.cuh"
#include "lowrank/lowrank.h"

namespace fastclust::lowrank {

// out [M, D]: column means; dense rows only.
template <typename T>
cudaError_t column_means_cuda(const Rows<T>& x, T* out, cudaStream_t stream);

// out [M, B, D]: the centred rows, zero past a short last batch. Columns of a CSR row are distinct.
template <typename T>
cudaError_t center_cuda(const Rows<T>& x, T* out, cudaStream_t stream);

template <typename T>
cudaError_t orthonormalize_cuda(const Orthonormalize<T>& p, const Allocate& allocate,
                                cudaStream_t stream);

template <typename T>
cudaError_t thin_svd_cuda(const ThinSvd<T>& p, const Allocate& allocate, cudaStream_t stream);

template <typename T>
cudaError_t normal_cuda(int64_t n_batches, int64_t first_batch, int64_t n_rows, int64_t width,
                        uint64_t seed, T* out, cudaStream_t stream);

}  // namespace fastclust::lowrank
