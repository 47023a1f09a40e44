// Runs a launcher on the device and stream of a tensor, with scratch memory from torch's allocator.
#pragma once

#include <vector>

#include "common/cuda.cuh"
#include "common/launch.cuh"
#include "common/tensor.h"

namespace fastclust {

// Device memory from torch's allocator, which hands it out again in the order of the stream.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}
  void* operator()(size_t bytes) {
    pieces_.push_back(new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return pieces_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> pieces_;
};

// Runs launch(allocate, stream) on the device and the current stream of `x`.
template <typename F>
void on_device(const Tensor& x, const F& launch) {
  const CudaScope scope(x);
  Scratch scratch(x);
  const Allocate allocate = [&](size_t bytes) { return scratch(bytes); };
  STD_CUDA_CHECK(launch(allocate, scope.stream()));
}

}  // namespace fastclust
