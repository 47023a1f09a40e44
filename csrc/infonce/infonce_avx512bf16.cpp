#include "infonce/infonce_tile_impl.h"

namespace fastclust::infonce {

const TileKernels<float, Bf16Pair>& tile_kernels_avx512bf16() {
  return kTileKernels<float, Bf16Pair>;
}

}  // namespace fastclust::infonce
