// 16 registers: 3 x 4 accumulators, three rows, one centre.
#define FASTCLUST_KMEANS_BYTES 32
#define FASTCLUST_KMEANS_ROWS(n) 3
#define FASTCLUST_KMEANS_CENTERS 4
#include "kmeans/kmeans_kernels.inl"

namespace fastclust::kmeans {
template <>
const Kernels<float>& avx2_kernels<float>() { return kTable<float>; }
template <>
const Kernels<double>& avx2_kernels<double>() { return kTable<double>; }
}  // namespace fastclust::kmeans
