// Marks code that runs on both sides: index maps, schedulers and epilogue arithmetic carry
// FASTCLUST_HD so that ordinary CPU tests execute the very functions the device kernels use.
#pragma once

#if defined(__CUDACC__)
#define FASTCLUST_HD __host__ __device__ __forceinline__
#else
#define FASTCLUST_HD inline
#endif
