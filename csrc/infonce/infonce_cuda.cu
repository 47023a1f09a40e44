// Compiles the kernels and gives them a plain entry; what they do stands in infonce_kernels.cuh.
#include "infonce/infonce_cuda.h"

#include <cstdlib>
#include <cstring>

#include "infonce/infonce_driver.cuh"

namespace fastclust::infonce {
namespace {

// Whether to take the Hopper kernels: compiled in, on such a card, and asked for by FASTCLUST_SM90=1,
// until they have been run on one.
Limits limits_here() {
  Limits limits;
  const char* wish = std::getenv("FASTCLUST_SM90");
  int device = 0, major = 0, minor = 0;
  limits.hopper =
      wish != nullptr && std::strcmp(wish, "1") == 0 && cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
      major == 9 && minor == 0;
  return limits;
}

template <typename Params>
size_t measure(const Params& p) {
  Arena arena(nullptr, limits_here());
  (void)drive(p, arena, nullptr);
  return arena.used();
}
template <typename Params>
cudaError_t run(const Params& p, void* workspace, cudaStream_t stream) {
  Arena arena(workspace, limits_here());
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
