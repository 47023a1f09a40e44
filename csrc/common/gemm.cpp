// Loops of the packed matrix product around the register tiles of microkernel.h, in the order of
// Goto and van de Geijn: a block of B stays in L3, a block of A in L2, slivers stream through L1.
//
// Bound by FMA: on Zen 4 the 8 x 48 AVX-512 tile runs at 94 to 97 % of the measured FMA rate from
// L2 for k of 128 to 1000, so kDepth is chosen for the size of the packed blocks alone.
#include "common/gemm.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "common/cpu.h"
#include "common/gemm_kernel_impl.h"
#include "common/parallel.h"

namespace fastclust {
namespace {

constexpr int64_t kRows = 192;     // rows of a block of A
constexpr int64_t kDepth = 256;    // terms of a block
constexpr int64_t kColumns = 1920; // columns of a block of B
constexpr int64_t kFewColumns = 192;  // up to here A is read in place where its rows are contiguous

template <typename T>
const detail::GemmKernel<T>& kernel() {
#if defined(FASTCLUST_X86_SIMD)
  if (cpu_level() == CpuLevel::kAvx512) return detail::gemm_kernel_avx512(T{});
  if (cpu_level() == CpuLevel::kAvx2) return detail::gemm_kernel_avx2(T{});
#endif
  return kGemmKernel<T>;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Scratch memory of this thread; grows, is never freed before the thread ends.
template <typename T, int kSlot>
T* scratch(int64_t size) {
  constexpr int64_t kAlign = 64 / sizeof(T);
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < size + kAlign) memory.resize(size + kAlign);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

template <typename T>
MatrixView<T> part(MatrixView<T> x, int64_t row, int64_t column) {
  return {x.data + row * x.row_stride + column * x.col_stride, x.row_stride, x.col_stride};
}

template <typename T>
void scale(int64_t m, int64_t n, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = beta == T(0) ? T(0) : beta * c[i * ldc + j];
  }
}

// One block of rows of A against a packed block of B.
template <typename T>
void block_product(const detail::GemmKernel<T>& kernel, int64_t m, int64_t n, int64_t k, T alpha,
                   MatrixView<T> a, const T* packed_b, T beta, T* c, int64_t ldc) {
  if (n <= kFewColumns && a.col_stride == 1) {
    kernel.direct(m, n, k, alpha, a, packed_b, beta, c, ldc);
    return;
  }
  T* packed_a = scratch<T, 0>(round_up(m, kernel.mr) * k);
  kernel.pack_a(m, k, a, packed_a);
  kernel.packed(m, n, k, alpha, packed_a, packed_b, beta, c, ldc);
}

}  // namespace

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b, T beta,
          T* c, int64_t ldc) {
  if (k == 0) return scale(m, n, beta, c, ldc);
  const auto& kern = kernel<T>();
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t columns = std::min(kColumns, n - j);
    for (int64_t p = 0; p < k; p += kDepth) {
      const int64_t depth = std::min(kDepth, k - p);
      T* packed_b = scratch<T, 1>(round_up(columns, kern.nr) * depth);
      kern.pack_b(depth, columns, part(b, p, j), packed_b);
      for (int64_t i = 0; i < m; i += kRows) {
        block_product(kern, std::min(kRows, m - i), columns, depth, alpha, part(a, i, p), packed_b,
                      p == 0 ? beta : T(1), c + i * ldc + j, ldc);
      }
    }
  }
}

template <typename T>
void parallel_gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b,
                   T beta, T* c, int64_t ldc) {
  if (k == 0 || m * n * k < 64 * 64 * 64) return gemm(m, n, k, alpha, a, b, beta, c, ldc);
  const auto& kern = kernel<T>();
  // Few blocks of rows: cut the columns as well, and pack those blocks of A again.
  const int64_t row_blocks = (m + kRows - 1) / kRows;
  const int64_t span = row_blocks >= 32 ? kColumns : round_up(kColumns / 5, kern.nr);
  std::vector<T> packed(round_up(std::min(n, kColumns), kern.nr) * std::min(k, kDepth));
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t columns = std::min(kColumns, n - j);
    const int64_t spans = (columns + span - 1) / span;
    for (int64_t p = 0; p < k; p += kDepth) {
      const int64_t depth = std::min(kDepth, k - p);
      parallel_for((columns + kern.nr - 1) / kern.nr, 4, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kern.nr, last = std::min(end * kern.nr, columns);
        kern.pack_b(depth, last - first, part(b, p, j + first), packed.data() + first * depth);
      });
      parallel_tasks(row_blocks * spans, [&](int64_t task, int) {
        const int64_t i = task / spans * kRows, first = task % spans * span;
        block_product(kern, std::min(kRows, m - i), std::min(span, columns - first), depth, alpha,
                      part(a, i, p), packed.data() + first * depth, p == 0 ? beta : T(1),
                      c + i * ldc + j + first, ldc);
      });
    }
  }
}

template <typename T>
double fma_peak_gflops() {
  using Clock = std::chrono::steady_clock;
  const auto& kern = kernel<T>();
  constexpr int64_t kRounds = 20000;
  double best = 0;
  for (int trial = 0; trial < 20; ++trial) {
    const auto start = Clock::now();
    kern.fma_loop(kRounds);
    const std::chrono::duration<double> seconds = Clock::now() - start;
    best = std::max(best, 1e-9 * static_cast<double>(kRounds * kern.fma_flops) / seconds.count());
  }
  return best;
}

#define FASTCLUST_INSTANTIATE(T)                                                               \
  template void gemm<T>(int64_t, int64_t, int64_t, T, MatrixView<T>, MatrixView<T>, T, T*,     \
                        int64_t);                                                              \
  template void parallel_gemm<T>(int64_t, int64_t, int64_t, T, MatrixView<T>, MatrixView<T>, T, \
                                 T*, int64_t);                                                 \
  template double fma_peak_gflops<T>();
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust
