// 32 registers: up to 4 x 6 accumulators, four rows, one centre.
#define FASTCLUST_KMEANS_BYTES 64
#define FASTCLUST_KMEANS_CENTERS 6
#include "kmeans/kmeans_kernels.inl"

namespace fastclust::kmeans {
template <>
const Kernels<float>& avx512_kernels<float>() { return kTable<float>; }
template <>
const Kernels<double>& avx512_kernels<double>() { return kTable<double>; }
}  // namespace fastclust::kmeans
