// Compiles the kernels and gives them a plain entry; what they do stands in infonce_kernels.cuh.
#include "infonce/infonce_cuda.h"

#include "infonce/infonce_driver.cuh"

namespace fastclust::infonce {
namespace {

template <typename Params>
size_t measure(const Params& p) {
  Arena arena(nullptr);
  (void)drive(p, arena, nullptr);
  return arena.used();
}
template <typename Params>
cudaError_t run(const Params& p, void* workspace, cudaStream_t stream) {
  Arena arena(workspace);
  return drive(p, arena, stream);
}

}  // namespace

#define FASTCLUST_INSTANTIATE(Params)                                                          \
  template <>                                                                                  \
  size_t workspace_bytes(const Params& p) {                                                    \
    return measure(p);                                                                         \
  }                                                                                            \
  template <>                                                                                  \
  cudaError_t launch_cuda(const Params& p, void* workspace, cudaStream_t stream) {             \
    return run(p, workspace, stream);                                                          \
  }
FASTCLUST_INSTANTIATE(ForwardParams<float>)
FASTCLUST_INSTANTIATE(ForwardParams<double>)
FASTCLUST_INSTANTIATE(BackwardParams<float>)
FASTCLUST_INSTANTIATE(BackwardParams<double>)
FASTCLUST_INSTANTIATE(RangeParams<float>)
FASTCLUST_INSTANTIATE(RangeParams<double>)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::infonce
