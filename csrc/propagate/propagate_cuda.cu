// CUDA kernels of the propagation operator (formula in propagate.h).
//
// One warp sums one row, or one segment of a hub row, over one slice of up to 512 float columns:
// each lane holds the sums of its columns in registers and reads 16 bytes of every neighbour's row
// at a time, eight reads together. 32 edges are fetched by the 32 lanes at once and handed round by
// shuffles. Slices are the slow grid index, so that warps move through one slice of h together while
// it is in L2.
// Hub segments go first, into scratch memory; a second small kernel adds them in order. No atomics:
// the same bits in every run. What bounds it by arithmetic: the gather from L2, E d elements.
// bf16 storage halves those bytes; sums and scales stay float, the result is rounded once.
// Not measured: no GPU was at hand when this was written. tests/test_propagate_device.py runs these
// kernels over an emulated block.
#if defined(FASTCLUST_DEVICE_EMULATOR)
#include FASTCLUST_DEVICE_EMULATOR
#endif
#include "propagate/propagate_cuda.h"

#include "common/launch.cuh"
#include "propagate/propagate_map.h"

namespace fastclust {
namespace {

constexpr int kWarps = 8;  // warps per block
constexpr int kBlocksPerSm = 2;  // at least: 128 registers a thread, enough that nothing spills
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
using Sum = typename SumType<T>::type;

// VEC elements moved by one instruction, and as arithmetic takes them.
template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T x[VEC];
};
template <typename T, int VEC>
struct Values {
  Sum<T> x[VEC];
};

__device__ __forceinline__ float load_one(const float* p) { return __ldg(p); }
__device__ __forceinline__ double load_one(const double* p) { return __ldg(p); }
__device__ __forceinline__ Bf16 load_one(const Bf16* p) {
  return {__ldg(reinterpret_cast<const unsigned short*>(p))};
}

template <typename T, int VEC>
__device__ __forceinline__ Values<T, VEC> load_pack(const T* p) {
  Pack<T, VEC> r;
  if constexpr (VEC == 1) {
    r.x[0] = load_one(p);
  } else {
    static_assert(sizeof(r) == sizeof(uint4));
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&r, &words, sizeof(r));
  }
  Values<T, VEC> values;
#pragma unroll
  for (int v = 0; v < VEC; ++v) values.x[v] = widen(r.x[v]);
  return values;
}

template <typename T, int VEC>
__device__ __forceinline__ void store_pack(T* p, const Values<T, VEC>& values) {
  Pack<T, VEC> r;
#pragma unroll
  for (int v = 0; v < VEC; ++v) narrow(values.x[v], &r.x[v]);
  *reinterpret_cast<Pack<T, VEC>*>(p) = r;
}

// M h of a lane's columns.
template <typename T, int VEC, bool kMask>
__device__ __forceinline__ Values<T, VEC> load_h(const PropagateParams<T>& p, int64_t words,
                                                 int64_t node, int64_t col) {
  Values<T, VEC> r = load_pack<T, VEC>(p.h + node * p.h_stride + col);
  if constexpr (kMask) {
    const uint32_t bits = lane_bits(__ldg(p.h_mask + node * words + col / 32), col, VEC);
#pragma unroll
    for (int k = 0; k < VEC; ++k) r.x[k] = (bits >> k) & 1u ? r.x[k] : Sum<T>(0);
  }
  return r;
}

template <typename T, int VEC, int SLOTS, bool kMask>
struct Warp {
  const PropagateParams<T>& p;
  int64_t words;
  int64_t slice;
  int lane;

  static constexpr WarpShape kShape{VEC, SLOTS};

  __device__ int64_t column(int slot) const { return lane_column(slice, slot, lane, kShape); }

  // Adds so many edges, from k on, of those that the lanes hold. All are read before the first is
  // added; columns past the last read the last ones, in vain, so that no branch parts the loads.
  template <int EDGES>
  __device__ __forceinline__ void add(int k, int32_t j, Sum<T> c, Sum<T> (&acc)[SLOTS][VEC]) const {
    Values<T, VEC> h[EDGES][SLOTS];
    Sum<T> coef[EDGES];
#pragma unroll
    for (int e = 0; e < EDGES; ++e) {
      const int64_t node = __shfl_sync(kAll, j, k + e);
      coef[e] = __shfl_sync(kAll, c, k + e);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int64_t col = column(s), last = p.n_cols - VEC;
        h[e][s] = load_h<T, VEC, kMask>(p, words, node, col < last ? col : last);
      }
    }
#pragma unroll
    for (int e = 0; e < EDGES; ++e) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) acc[s][v] += coef[e] * h[e][s].x[v];
      }
    }
  }

  // Those from k to count, fewer than twice EDGES.
  template <int EDGES>
  __device__ __forceinline__ void add_rest(int k, int count, int32_t j, Sum<T> c,
                                           Sum<T> (&acc)[SLOTS][VEC]) const {
    const bool enough = k + EDGES <= count;
    if (enough) add<EDGES>(k, j, c, acc);
    if constexpr (EDGES > 1) add_rest<EDGES / 2>(enough ? k + EDGES : k, count, j, c, acc);
  }

  __device__ void gather(int64_t begin, int64_t end, Sum<T> (&acc)[SLOTS][VEC]) const {
    constexpr int kAhead = 8 / SLOTS;  // edges: eight loads
    for (int64_t base = begin; base < end; base += 32) {
      const int count = static_cast<int>(end - base < 32 ? end - base : 32);
      int32_t j = 0;
      Sum<T> c = 1;
      if (lane < count) {
        j = __ldg(p.indices + base + lane);
        if (p.values != nullptr) c = static_cast<Sum<T>>(__ldg(p.values + base + lane));
        if (p.col_scale != nullptr) c *= __ldg(p.col_scale + j);
      }
      int k = 0;
#pragma unroll 1
      for (; k + kAhead <= count; k += kAhead) add<kAhead>(k, j, c, acc);
      add_rest<kAhead / 2>(k, count, j, c, acc);
    }
  }

  static __device__ Sum<T> scale_of(const Sum<T>* scale, int64_t i) {
    return scale != nullptr ? __ldg(scale + i) : Sum<T>(1);
  }

  // All lanes take part, those past the last column too: they contribute zero bits.
  __device__ void finish(int64_t i, const Sum<T> (&acc)[SLOTS][VEC]) const {
    const Sum<T> self = p.self_loops ? scale_of(p.col_scale, i) : Sum<T>(0);
    const Sum<T> scale = scale_of(p.row_scale, i);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int64_t col = column(s);
      uint32_t bits = 0;
      if (col < p.n_cols) {
        // without self loop and residual h_i has no part in row i, not even as 0 * NaN
        const bool read_own = p.self_loops || p.add_input || p.masked_h != nullptr;
        Values<T, VEC> own{}, residual{}, out;
        if (read_own) own = load_h<T, VEC, kMask>(p, words, i, col);
        if (p.residual != nullptr) {
          residual = load_pack<T, VEC>(p.residual + i * p.residual_stride + col);
        } else if (p.add_input) {
          residual = own;
        }
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const Finished<Sum<T>> f = finish_element(
              acc[s][v], p.self_loops ? own.x[v] : Sum<T>(0), self, scale, residual.x[v], p.relu);
          out.x[v] = f.value;
          bits |= static_cast<uint32_t>(f.passed) << v;
        }
        store_pack<T, VEC>(p.out + i * p.n_cols + col, out);
        if (p.masked_h != nullptr) store_pack<T, VEC>(p.masked_h + i * p.n_cols + col, own);
      }
      if (p.out_mask != nullptr) store_bits(i, col, bits);
    }
  }

  // Joins the bits of the 32 / VEC lanes that share a word of the mask.
  __device__ void store_bits(int64_t i, int64_t col, uint32_t bits) const {
    uint32_t word;
    if constexpr (VEC == 1) {
      word = __ballot_sync(kAll, bits);
    } else {
      word = bits << (col % 32);
#pragma unroll
      for (int step = 1; step < 32 / VEC; step *= 2) word |= __shfl_xor_sync(kAll, word, step);
    }
    if (col % 32 == 0 && col < p.n_cols) p.out_mask[i * words + col / 32] = word;
  }
};

template <typename T, int VEC, int SLOTS, bool kMask>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm) propagate_rows(const PropagateParams<T> p) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Warp<T, VEC, SLOTS, kMask> warp{p, mask_words(p.n_cols), static_cast<int64_t>(blockIdx.y),
                                        static_cast<int>(threadIdx.x % 32)};
  const WarpWork work = warp_work(unit, p.n_nodes, p.indptr, p.hub);
  if (!work.any) return;  // the whole warp
  Sum<T> acc[SLOTS][VEC] = {};
  warp.gather(work.edge_begin, work.edge_end, acc);
  if (work.segment < 0) {
    warp.finish(work.row, acc);
    return;
  }
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    const int64_t col = warp.column(s);
    if (col >= p.n_cols) continue;
#pragma unroll
    for (int v = 0; v < VEC; ++v) p.scratch[work.segment * p.n_cols + col + v] = acc[s][v];
  }
}

template <typename T, int VEC, int SLOTS, bool kMask>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm) propagate_hubs(const PropagateParams<T> p) {
  const int64_t hub = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Warp<T, VEC, SLOTS, kMask> warp{p, mask_words(p.n_cols), static_cast<int64_t>(blockIdx.y),
                                        static_cast<int>(threadIdx.x % 32)};
  if (hub >= p.hub.n_hubs) return;
  const int64_t* entry = p.hub.hubs + 3 * hub;
  Sum<T> acc[SLOTS][VEC] = {};
  for (int64_t segment = entry[1]; segment < entry[2]; ++segment) {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int64_t col = warp.column(s);
      if (col >= p.n_cols) continue;
#pragma unroll
      for (int v = 0; v < VEC; ++v) acc[s][v] += p.scratch[segment * p.n_cols + col + v];
    }
  }
  warp.finish(entry[0], acc);
}

template <typename T, int VEC, int SLOTS, bool kMask>
cudaError_t launch_rows(const PropagateParams<T>& p, cudaStream_t stream) {
  const unsigned slices = static_cast<unsigned>(warp_slices(p.n_cols, {VEC, SLOTS}));
  const int64_t units = n_warp_units(p.n_nodes, p.hub);
  enqueue(propagate_rows<T, VEC, SLOTS, kMask>, dim3(blocks(units, kWarps), slices), 32 * kWarps,
          stream, p);
  if (p.hub.n_hubs > 0) {
    enqueue(propagate_hubs<T, VEC, SLOTS, kMask>, dim3(blocks(p.hub.n_hubs, kWarps), slices),
            32 * kWarps, stream, p);
  }
  return cudaGetLastError();
}

template <typename T, int VEC, int SLOTS>
cudaError_t launch_masked(const PropagateParams<T>& p, cudaStream_t stream) {
  if (p.h_mask != nullptr) return launch_rows<T, VEC, SLOTS, true>(p, stream);
  return launch_rows<T, VEC, SLOTS, false>(p, stream);
}

template <typename T, int VEC>
cudaError_t launch_slots(const PropagateParams<T>& p, int slots, cudaStream_t stream) {
  if (slots == 1) return launch_masked<T, VEC, 1>(p, stream);
  if constexpr (VEC < 8) {
    if (slots == 4) return launch_masked<T, VEC, 4>(p, stream);
  }
  return launch_masked<T, VEC, 2>(p, stream);
}

template <typename T>
bool rows_aligned(const T* p, int64_t stride) {
  return p == nullptr || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * sizeof(T) % 16 == 0);
}

// A warp per row.
template <typename T>
__global__ void mask_rows_kernel(int64_t n_nodes, int64_t n_cols, const T* h, int64_t h_stride,
                                 const uint32_t* h_mask, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= n_nodes) return;
  const uint32_t* words = h_mask + i * mask_words(n_cols);
  for (int64_t col = threadIdx.x % 32; col < n_cols; col += 32) {
    out[i * n_cols + col] = lane_bits(words[col / 32], col, 1) ? h[i * h_stride + col] : T{};
  }
}

}  // namespace

template <typename T>
cudaError_t propagate_cuda(const PropagateParams<T>& p, cudaStream_t stream) {
  if (p.n_nodes == 0 || p.n_cols == 0) return cudaSuccess;
  const bool aligned = rows_aligned(p.h, p.h_stride) &&
                       rows_aligned(p.residual, p.residual_stride) &&
                       rows_aligned(p.out, p.n_cols) && rows_aligned(p.masked_h, p.n_cols);
  const WarpShape shape = warp_shape(p.n_cols, aligned, sizeof(T));
  if (shape.vec == 1) return launch_slots<T, 1>(p, shape.slots, stream);
  return launch_slots<T, 16 / sizeof(T)>(p, shape.slots, stream);
}

template <typename T>
cudaError_t mask_rows_cuda(int64_t n_nodes, int64_t n_cols, const T* h, int64_t h_stride,
                           const uint32_t* h_mask, T* out, cudaStream_t stream) {
  if (n_nodes == 0 || n_cols == 0) return cudaSuccess;
  enqueue(mask_rows_kernel<T>, dim3(blocks(n_nodes, kWarps)), 32 * kWarps, stream, n_nodes, n_cols, h,
          h_stride, h_mask, out);
  return cudaGetLastError();
}

#define FASTCLUST_INSTANTIATE(T)                                                              \
  template cudaError_t propagate_cuda(const PropagateParams<T>&, cudaStream_t);               \
  template cudaError_t mask_rows_cuda(int64_t, int64_t, const T*, int64_t, const uint32_t*, T*, \
                                      cudaStream_t);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
FASTCLUST_INSTANTIATE(Bf16)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust
