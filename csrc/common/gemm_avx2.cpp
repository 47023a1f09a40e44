#include "common/gemm_kernel_impl.h"

namespace fastclust::detail {

const GemmKernel<float>& gemm_kernel_avx2(float) { return kGemmKernel<float>; }
const GemmKernel<double>& gemm_kernel_avx2(double) { return kGemmKernel<double>; }

}  // namespace fastclust::detail
