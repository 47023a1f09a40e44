// Registers the InfoNCE operators on CUDA.
#include "common/cuda.cuh"
#include "infonce/infonce_args.h"
#include "infonce/infonce_cuda.h"

namespace fastclust::infonce {
namespace {

struct Cuda {
  template <typename Params>
  static void run(const Params& params, const Tensor& z) {
    // Keeps the number of tiles below what one launch can have; time grows with its square.
    STD_TORCH_CHECK(z.size(0) <= 4000000, "z must have at most 4,000,000 rows, got ", z.size(0));
    check_width(params.views);
    if constexpr (requires { params.weights; }) {
      STD_TORCH_CHECK(params.weights.stored == nullptr, "stored weights are for the CPU");
      for (int s = 0; s < params.weights.n_snapshots; ++s) check_width(params.weights.snapshots[s]);
    }
    const CudaScope scope(z);
    Tensor workspace =
        new_empty(z, {static_cast<int64_t>(workspace_bytes(params))}, ScalarType::Byte);
    STD_CUDA_CHECK(launch_cuda(params, workspace.mutable_data_ptr(), scope.stream()));
  }

 private:
  // Keeps a panel of packed rows, 1024 if they are wide, below the 4 GB that offsets reach.
  template <typename T>
  static void check_width(const Views<T>& views) {
    STD_TORCH_CHECK(views.dz + views.de <= 500000,
                    "z and e must have at most 500,000 columns together, got ",
                    views.dz + views.de);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CUDA, m) {
  m.impl("hard_infonce", TORCH_BOX(&hard_infonce<Cuda>));
  m.impl("hard_infonce_backward", TORCH_BOX(&hard_infonce_backward<Cuda>));
  m.impl("similarity_range", TORCH_BOX(&similarity_range<Cuda>));
}

}  // namespace fastclust::infonce
