// Stream, device guard and launch check for the CUDA launchers, through torch's stable C interface.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

namespace fastclust {

// Makes the device of a tensor current for its lifetime and hands out torch's current stream
// there; launchers use this stream only, so that calls order with the caller's work and can be
// captured in a CUDA graph.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& t)
      : guard_(t.get_device_index()), stream_(nullptr) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastclust
