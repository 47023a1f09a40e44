// Registers the CUDA operators of the propagation.
#include "common/cuda.cuh"
#include "propagate/propagate_args.h"
#include "propagate/propagate_cuda.h"

namespace fastclust {
namespace {

struct Cuda {
  static constexpr bool kBf16 = true;

  template <typename T>
  static void run(PropagateParams<T> p, const Tensor& like) {
    using Sum = typename PropagateParams<T>::Sum;
    const CudaScope scope(like);
    Tensor scratch =
        new_empty(like, {p.hub.n_segments, p.n_cols},
                  std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float);
    p.scratch = write_ptr<Sum>(scratch);
    STD_CUDA_CHECK(propagate_cuda(p, scope.stream()));
  }
  template <typename... Args>
  static void mask_rows(const Tensor& like, Args... args) {
    const CudaScope scope(like);
    STD_CUDA_CHECK(mask_rows_cuda(args..., scope.stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CUDA, m) {
  m.impl("propagate", TORCH_BOX(&propagate_op<Cuda>));
  m.impl("propagate_backward", TORCH_BOX(&backward_op<Cuda>));
  m.impl("mask_rows", TORCH_BOX(&mask_rows_op<Cuda>));
}

}  // namespace fastclust
