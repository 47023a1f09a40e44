// 16 registers: 4 x 2 accumulators, two centres, one row, one product.
#define FASTCLUST_KMEANS_BYTES 16
#define FASTCLUST_KMEANS_CENTERS 2
#include "kmeans/kmeans_kernels.inl"

namespace fastclust::kmeans {
template <>
const Kernels<float>& portable_kernels<float>() { return kTable<float>; }
template <>
const Kernels<double>& portable_kernels<double>() { return kTable<double>; }
}  // namespace fastclust::kmeans
