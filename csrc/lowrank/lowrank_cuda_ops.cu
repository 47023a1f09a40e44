// Registers the CUDA operators of the batched SVD; its products are in fastclust/ops/lowrank_device.py.
#include "common/scratch.cuh"
#include "lowrank/lowrank_args.h"
#include "lowrank/lowrank_cuda.h"

namespace fastclust::lowrank {
namespace {

struct Cuda {
  template <typename T>
  static void column_means(const Tensor& t, Rows<T> x, T* out) {
    on_device(t, [&](const Allocate& allocate, cudaStream_t s) {
      if (x.indptr != nullptr) {
        T* dense = take<T>(allocate, x.n_batches() * x.batch_size * x.n_cols);
        const cudaError_t status = center_cuda(x, dense, s);
        if (status != cudaSuccess) return status;
        x.values = dense;
        x.indptr = nullptr;
      }
      return column_means_cuda(x, out, s);
    });
  }
  template <typename T>
  static void center(const Tensor& t, const Rows<T>& x, T* out) {
    on_device(t, [&](const Allocate&, cudaStream_t s) { return center_cuda(x, out, s); });
  }
  template <typename Params>
  static void orthonormalize(const Tensor& t, const Params& p) {
    on_device(t, [&](const Allocate& a, cudaStream_t s) { return orthonormalize_cuda(p, a, s); });
  }
  template <typename Params>
  static void thin_svd(const Tensor& t, const Params& p) {
    on_device(t, [&](const Allocate& a, cudaStream_t s) { return thin_svd_cuda(p, a, s); });
  }
  template <typename... Args>
  static void normal(const Tensor& t, Args... args) {
    on_device(t, [&](const Allocate&, cudaStream_t s) { return normal_cuda(args..., s); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CUDA, m) {
  m.impl("lowrank_mean", TORCH_BOX(&mean_op<Cuda>));
  m.impl("lowrank_center", TORCH_BOX(&center_op<Cuda>));
  m.impl("lowrank_orthonormalize", TORCH_BOX(&orthonormalize_op<Cuda>));
  m.impl("lowrank_thin_svd", TORCH_BOX(&thin_svd_op<Cuda>));
  m.impl("lowrank_normal", TORCH_BOX(&normal_op<Cuda>));
}

}  // namespace fastclust::lowrank
