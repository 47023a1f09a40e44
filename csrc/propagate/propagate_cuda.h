// Launchers of the CUDA kernels, for T = float, double and Bf16: same contract as propagate.h, on a
// stream. They do not synchronise
// and allocate nothing (the caller provides scratch), so calls can be captured in a CUDA graph.
#pragma once

#if !defined(FASTCLUST_DEVICE_EMULATOR)
#include <cuda_runtime.h>
#endif

#include "propagate/propagate.h"

namespace fastclust {

template <typename T>
cudaError_t propagate_cuda(const PropagateParams<T>& p, cudaStream_t stream);

template <typename T>
cudaError_t mask_rows_cuda(int64_t n_nodes, int64_t n_cols, const T* h /* [N, d] */,
                           int64_t h_stride, const uint32_t* h_mask /* [N, mask_words(d)] */,
                           T* out /* [N, d] */, cudaStream_t stream);

}  // namespace fastclust
