#define FASTCLUST_KMEANS_BYTES 16
#define FASTCLUST_KMEANS_ROWS(n) 2
#define FASTCLUST_KMEANS_CENTERS 4
#include "kmeans/kmeans_kernels.inl"

namespace fastclust::kmeans {
template <>
const Kernels<float>& portable_kernels<float>() { return kTable<float>; }
template <>
const Kernels<double>& portable_kernels<double>() { return kTable<double>; }
}  // namespace fastclust::kmeans
