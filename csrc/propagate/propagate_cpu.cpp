// Portable kernel, and the split of work over threads for all instruction sets.
//
// A task is one block of columns of one range of rows (about 4096 edges) or of one hub segment;
// ranges and segments are cut once, in fastclust/graph.py, and never depend on the thread count.
#include <cstdint>
#include <memory>

#include "common/cpu.h"
#include "common/parallel.h"
#include "propagate/propagate.h"
#include "propagate/propagate_kernel.h"

namespace fastclust {
namespace {

// 32 columns in plain arrays, which any compiler turns into its baseline vectors.
template <typename Scalar>
struct PortableVec {
  using T = Scalar;
  static constexpr int kWidth = 8;
  static constexpr int kMaxVecs = 4;
  struct Reg {
    T x[kWidth];
  };
  using Mask = uint32_t;

  static Mask mask(uint32_t bits) { return bits; }
  // Bits of vector v in a row of a bit mask; the same in every instance of the kernel.
  static Mask mask_at(const uint32_t* words, int v) {
    return (words[v * kWidth / 32] >> (v * kWidth % 32)) & ((1u << kWidth) - 1u);
  }
  static Reg zero() { return broadcast(T(0)); }
  static Reg broadcast(T value) {
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = value;
    return r;
  }
  static Reg load(const T* p) {
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = p[i];
    return r;
  }
  static Reg load_masked(const T* p, Mask m) {
    if (m == (1u << kWidth) - 1u) return load(p);
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = (m >> i) & 1u ? p[i] : T(0);
    return r;
  }
  static void store(T* p, const Reg& r) {
    for (int i = 0; i < kWidth; ++i) p[i] = r.x[i];
  }
  static void store_masked(T* p, Mask m, const Reg& r) {
    for (int i = 0; i < kWidth; ++i) {
      if ((m >> i) & 1u) p[i] = r.x[i];
    }
  }
  static Reg add(const Reg& a, const Reg& b) {
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = a.x[i] + b.x[i];
    return r;
  }
  static Reg mul(const Reg& a, const Reg& b) {
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = a.x[i] * b.x[i];
    return r;
  }
  static Reg fma(const Reg& a, const Reg& b, const Reg& c) {
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = a.x[i] * b.x[i] + c.x[i];
    return r;
  }
  // NaN passes, as in torch.relu and its gradient.
  static Reg relu(const Reg& a) {
    Reg r;
    for (int i = 0; i < kWidth; ++i) r.x[i] = a.x[i] <= T(0) ? T(0) : a.x[i];
    return r;
  }
  static uint32_t not_below_or_zero(const Reg& a) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(!(a.x[i] <= T(0))) << i;
    return bits;
  }
};

// Width of a block: the widest, or a narrower one where that brings a block of h down to what a
// core can expect to keep in cache.
int64_t choose_block_cols(int64_t n_nodes, int64_t max_cols, int64_t element_size) {
  constexpr int64_t kCacheBytes = 4 << 20;
  for (int64_t cols = max_cols; cols >= 32; cols -= 32) {
    if (n_nodes * cols * element_size <= kCacheBytes) return cols;
  }
  return max_cols;
}

template <typename T>
PropagateKernel<T> choose_kernel() {
#if defined(FASTCLUST_X86_SIMD)
  switch (cpu_level()) {
    case CpuLevel::kAvx512: return propagate_kernel_avx512<T>();
    case CpuLevel::kAvx2: return propagate_kernel_avx2<T>();
    case CpuLevel::kPortable: break;
  }
#endif
  return make_propagate_kernel<PortableVec<T>>();
}

}  // namespace

template <typename T>
void propagate_cpu(PropagateParams<T> p) {
  if (p.n_nodes == 0 || p.n_cols == 0) return;
  const PropagateKernel<T> kernel = choose_kernel<T>();
  p.block_cols = choose_block_cols(p.n_nodes, kernel.max_block_cols, sizeof(T));
  const int64_t n_blocks = (p.n_cols + p.block_cols - 1) / p.block_cols;
  const std::unique_ptr<T[]> scratch(new T[p.hub.n_segments * p.n_cols]);
  p.scratch = scratch.get();

  // Blocks are the slow index: threads move through one block of columns together.
  const int64_t per_block = p.hub.n_segments + p.n_tasks;
  parallel_tasks(n_blocks * per_block, [&](int64_t task, int) {
    const int64_t col = task / per_block * p.block_cols;
    const int64_t k = task % per_block;
    if (k < p.hub.n_segments) {
      kernel.segment(p, k, col);
    } else {
      const int64_t* rows = p.task_rows + (k - p.hub.n_segments);
      kernel.rows(p, rows[0], rows[1], col);
    }
  });
  parallel_tasks(n_blocks * p.hub.n_hubs, [&](int64_t task, int) {
    kernel.combine(p, task / n_blocks, task % n_blocks * p.block_cols);
  });
}

template <typename T>
void mask_rows_cpu(int64_t n_nodes, int64_t n_cols, const T* h, int64_t h_stride,
                   const uint32_t* h_mask, T* out) {
  const int64_t words = mask_words(n_cols);
  const int64_t grain = 1 + 65536 / (n_cols + 1);
  parallel_for(n_nodes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t w = 0; w < words; ++w) {
        const uint32_t word = h_mask[i * words + w];
        const int64_t first = 32 * w;
        const int64_t last = first + 32 < n_cols ? first + 32 : n_cols;
        for (int64_t c = first; c < last; ++c) {
          out[i * n_cols + c] = (word >> (c - first)) & 1u ? h[i * h_stride + c] : T(0);
        }
      }
    }
  });
}

template void propagate_cpu(PropagateParams<float>);
template void propagate_cpu(PropagateParams<double>);
template void mask_rows_cpu(int64_t, int64_t, const float*, int64_t, const uint32_t*, float*);
template void mask_rows_cpu(int64_t, int64_t, const double*, int64_t, const uint32_t*, double*);

}  // namespace fastclust
