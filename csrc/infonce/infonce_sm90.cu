// Compiles the Hopper kernels, for sm_90a alone; what they do stands in infonce_sm90.cuh.
#include "infonce/infonce_sm90.cuh"

namespace fastclust::infonce::sm90 {

#define FASTCLUST_INSTANTIATE(kProducts)                                                         \
  template cudaError_t forward<kProducts>(const ForwardArgs<float>&, unsigned, bool, cudaStream_t); \
  template cudaError_t tiles<kProducts>(const TileArgs<float>&, unsigned, bool, cudaStream_t);   \
  template cudaError_t product<kProducts>(const ProductArgs<float>&, unsigned, cudaStream_t);
FASTCLUST_INSTANTIATE(1)
FASTCLUST_INSTANTIATE(3)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::infonce::sm90
