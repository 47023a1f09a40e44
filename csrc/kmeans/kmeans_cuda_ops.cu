// Registers the CUDA operators of k-means.
#include <vector>

#include "common/cuda.cuh"
#include "kmeans/kmeans_args.h"
#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans {
namespace {

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

struct Cuda {
  template <typename... Args>
  static void center(const Tensor& x, Args... args) {
    on_device(x, [&](const Allocate& a, cudaStream_t s) { return center_cuda(args..., a, s); });
  }
  template <typename... Args>
  static void initialize(const Tensor& x, Args... args) {
    on_device(x, [&](const Allocate& a, cudaStream_t s) { return initialize_cuda(args..., a, s); });
  }
  template <typename... Args>
  static void lloyd(const Tensor& x, Args... args) {
    on_device(x, [&](const Allocate& a, cudaStream_t s) { return lloyd_cuda(args..., a, s); });
  }
  template <typename... Args>
  static void assign(const Tensor& x, Args... args) {
    on_device(x, [&](const Allocate& a, cudaStream_t s) { return assign_cuda(args..., a, s); });
  }
};

}  // namespace
}  // namespace fastclust::kmeans

STABLE_TORCH_LIBRARY_IMPL(fastclust, CUDA, m) {
  using fastclust::kmeans::Cuda;
  m.impl("kmeans_center", TORCH_BOX(&fastclust::kmeans::center_op<Cuda>));
  m.impl("kmeans_init", TORCH_BOX(&fastclust::kmeans::init_op<Cuda>));
  m.impl("kmeans_lloyd", TORCH_BOX(&fastclust::kmeans::lloyd_op<Cuda>));
  m.impl("kmeans_assign", TORCH_BOX(&fastclust::kmeans::assign_op<Cuda>));
}
