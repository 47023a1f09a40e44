#include "infonce/infonce_tile_impl.h"

namespace fastclust::infonce {

const TileKernels<float>& tile_kernels_avx512(float) { return kTileKernels<float>; }
const TileKernels<double>& tile_kernels_avx512(double) { return kTileKernels<double>; }

}  // namespace fastclust::infonce
