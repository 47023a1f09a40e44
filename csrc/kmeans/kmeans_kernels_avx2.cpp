// 16 registers: 4 x 3 accumulators, three centres, one row.
#define FASTCLUST_KMEANS_BYTES 32
#define FASTCLUST_KMEANS_CENTERS 3
#include "kmeans/kmeans_kernels.inl"

namespace fastclust::kmeans {
template <>
const Kernels<float>& avx2_kernels<float>() { return kTable<float>; }
template <>
const Kernels<double>& avx2_kernels<double>() { return kTable<double>; }
}  // namespace fastclust::kmeans
