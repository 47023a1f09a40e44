// AVX-512 instance of the propagation kernel.
#include "propagate/propagate_kernel_impl.h"

namespace fastclust {

template <>
PropagateKernel<float> propagate_kernel_avx512<float>() {
  return make_propagate_kernel<float>();
}
template <>
PropagateKernel<double> propagate_kernel_avx512<double>() {
  return make_propagate_kernel<double>();
}

}  // namespace fastclust
