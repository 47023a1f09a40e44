// Registers the CUDA operators of k-means.
#include "common/scratch.cuh"
#include "kmeans/kmeans_args.h"
#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans {
namespace {

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
