// Launchers of the CUDA infonce kernels, for T = float and double. Each needs a workspace of the
// stated size, 256-byte aligned, that nothing else uses until the work on `stream` is done; all
// other pointers are those of infonce.h, in device memory (the snapshot array itself on the host).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "infonce/infonce.h"

namespace fastclust::infonce {

template <typename T>
size_t workspace_bytes(const ForwardParams<T>& p);
template <typename T>
size_t workspace_bytes(const BackwardParams<T>& p);
template <typename T>
size_t workspace_bytes(const RangeParams<T>& p);

template <typename T>
cudaError_t launch_cuda(const ForwardParams<T>& p, void* workspace, cudaStream_t stream);
template <typename T>
cudaError_t launch_cuda(const BackwardParams<T>& p, void* workspace, cudaStream_t stream);
template <typename T>
cudaError_t launch_cuda(const RangeParams<T>& p, void* workspace, cudaStream_t stream);

}  // namespace fastclust::infonce
