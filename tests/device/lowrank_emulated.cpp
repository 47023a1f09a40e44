// The CUDA kernels of the batched SVD and their launchers, compiled for the CPU over cuda_emulator.h
// and called from tests/test_lowrank.py through ctypes.
#define FASTCLUST_DEVICE_EMULATOR "device/cuda_emulator.h"
#include FASTCLUST_DEVICE_EMULATOR

#include <algorithm>

using std::max;
using std::min;

#include "device/emulated_launch.h"
#include "lowrank/lowrank_cuda.cu"

namespace {

using namespace fastclust::lowrank;

template <typename T>
void orthonormalize(int64_t m, int64_t n, int64_t l, int passes, double root, const T* y, const T* v,
                    const double* bound, T* q, double* new_bound) {
  emulator::Memory memory;
  orthonormalize_cuda(Orthonormalize<T>{m, n, l, passes, root, y, v, bound, q, new_bound},
                      memory.allocate(), nullptr);
}

template <typename T>
void thin_svd(int64_t m, int64_t n, int64_t l, int64_t rank, const T* y, T* u, double* s,
              double* vt) {
  emulator::Memory memory;
  thin_svd_cuda(ThinSvd<T>{m, n, l, rank, y, u, s, vt}, memory.allocate(), nullptr);
}

}  // namespace

extern "C" {

void set_warp_order(int order) { emulator::state().warp_order = order; }

#define FASTCLUST_ENTRIES(T)                                                                      \
  void mean_##T(const T* values, int64_t n, int64_t d, int64_t batch_size, T* out) {              \
    column_means_cuda(Rows<T>{values, nullptr, nullptr, nullptr, n, d, batch_size}, out, nullptr); \
  }                                                                                               \
  void center_##T(const T* values, const int64_t* indptr, const int32_t* indices, const T* mean,  \
                  int64_t n, int64_t d, int64_t batch_size, T* out) {                             \
    center_cuda(Rows<T>{values, indptr, indices, mean, n, d, batch_size}, out, nullptr);          \
  }                                                                                               \
  void normal_##T(int64_t m, int64_t first, int64_t n, int64_t width, int64_t seed, T* out) {     \
    normal_cuda(m, first, n, width, static_cast<uint64_t>(seed), out, nullptr);                   \
  }                                                                                               \
  void orthonormalize_##T(int64_t m, int64_t n, int64_t l, int passes, double root, const T* y,   \
                          const T* v, const double* bound, T* q, double* new_bound) {             \
    orthonormalize(m, n, l, passes, root, y, v, bound, q, new_bound);                             \
  }                                                                                               \
  void thin_svd_##T(int64_t m, int64_t n, int64_t l, int64_t rank, const T* y, T* u, double* s,   \
                    double* vt) {                                                                 \
    thin_svd(m, n, l, rank, y, u, s, vt);                                                         \
  }
FASTCLUST_ENTRIES(float)
FASTCLUST_ENTRIES(double)

int64_t tile_row(int64_t index) {
  int64_t i, j;
  tile_of(index, &i, &j);
  return i * 1000000 + j;
}
int64_t place(const double* norm, int64_t l, int64_t i) {
  return place_of(norm, static_cast<int>(l), static_cast<int>(i));
}
int64_t pair(int64_t players, int64_t round, int64_t index) {
  int p, q;
  pair_of(static_cast<int>(players), static_cast<int>(round), static_cast<int>(index), &p, &q);
  return p * int64_t{1000000} + q;
}

}  // extern "C"
