#include "lowrank/lowrank_kernel_impl.h"

namespace fastclust::lowrank::detail {

const Kernels& kernels_avx2() { return kKernels; }

}  // namespace fastclust::lowrank::detail
