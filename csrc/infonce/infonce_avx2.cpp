#include "infonce/infonce_tile_impl.h"

namespace fastclust::infonce {

const TileKernels<float>& tile_kernels_avx2(float) { return kTileKernels<float>; }
const TileKernels<double>& tile_kernels_avx2(double) { return kTileKernels<double>; }

}  // namespace fastclust::infonce
