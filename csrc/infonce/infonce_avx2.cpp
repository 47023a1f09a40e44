#include "infonce/infonce_tile_impl.h"

namespace fastclust::infonce {

const TileKernels<float, float>& tile_kernels_avx2(float) { return kTileKernels<float, float>; }
const TileKernels<double, double>& tile_kernels_avx2(double) {
  return kTileKernels<double, double>;
}

}  // namespace fastclust::infonce
