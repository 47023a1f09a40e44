// Loops of the packed matrix product around the register tiles of microkernel.h, in the order of
// Goto and van de Geijn: a packed panel of B stays in L3, a block of A and the block of C that it
// adds to in L2, slivers stream through L1.
//
// A task owns a block of rows of C and runs through all terms of the panel, so C leaves the cache
// once. How many tasks C is cut into follows the number of threads; the sum of an element does not.
// Bound by FMA; rates and what was tried: benchmarks/results/2026-11-22-ecnmf-epoch.md.
#include "common/gemm.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "common/cpu.h"
#include "common/gemm_kernel_impl.h"
#include "common/parallel.h"

namespace fastclust {
namespace {

constexpr int64_t kDepth = 256;       // terms of a block
constexpr int64_t kColumns = 1920;    // columns of a panel of B
constexpr int64_t kPanelBytes = 8 << 20;
constexpr int64_t kRows = 192;        // most and fewest rows of a block of A
constexpr int64_t kFewRows = 48;
constexpr int64_t kTasksPerThread = 4;  // wanted; how C is cut changes no sum
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

// Terms whose packed columns make a panel of at most kPanelBytes.
template <typename T>
int64_t panel_depth(int64_t columns, int64_t k) {
  const int64_t blocks = kPanelBytes / (columns * kDepth * static_cast<int64_t>(sizeof(T)));
  return std::min(k, std::max(blocks, int64_t{1}) * kDepth);
}

// One block of rows of A against columns [first, first + n) of a packed panel of B, `width` columns
// wide: blocks of kDepth terms, each [ceil(width / nr), terms, nr].
template <typename T>
void panel_product(const detail::GemmKernel<T>& kernel, int64_t m, int64_t first, int64_t n,
                   int64_t width, int64_t k, T alpha, MatrixView<T> a, const T* panel, T beta, T* c,
                   int64_t ldc) {
  const bool in_place = n <= kFewColumns && a.col_stride == 1;
  T* packed_a = in_place ? nullptr : scratch<T, 0>(round_up(m, kernel.mr) * std::min(k, kDepth));
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = std::min(kDepth, k - p);
    const T* packed_b = panel + p * width + first * depth;
    const T keep = p == 0 ? beta : T(1);
    if (in_place) {
      kernel.direct(m, n, depth, alpha, part(a, 0, p), packed_b, keep, c, ldc);
    } else {
      kernel.pack_a(m, depth, part(a, 0, p), packed_a);
      kernel.packed(m, n, depth, alpha, packed_a, packed_b, keep, c, ldc);
    }
  }
}

// y[m] = alpha A x + beta y, bound by the bytes of A: nothing is packed. Tasks own ranges of rows that
// start at multiples of a vector; the bits do not depend on them. False where neither rows nor
// columns of A are contiguous.
template <typename T>
bool times_vector(int64_t m, int64_t k, T alpha, MatrixView<T> a, const T* x, int64_t x_stride,
                  T beta, T* y, int64_t y_stride) {
  const bool by_rows = a.col_stride == 1 || k == 1;
  if (!by_rows && a.row_stride != 1 && m > 1) return false;
  std::vector<T> copy;
  if (x_stride != 1) {
    copy.resize(k);
    for (int64_t p = 0; p < k; ++p) copy[p] = x[p * x_stride];
    x = copy.data();
  }
  const auto& kern = kernel<T>();
  const int64_t least = by_rows ? 16 : 512;
  const int64_t rows = std::max(round_up((1 << 16) / (k + 1), int64_t{16}), least);
  parallel_for(m, rows, [&](int64_t begin, int64_t end) {
    if (by_rows) {
      kern.rows_times(end - begin, k, alpha, a.data + begin * a.row_stride, a.row_stride, x, beta,
                      y + begin * y_stride, y_stride);
    } else {
      kern.columns_times(end - begin, k, alpha, a.data + begin, a.col_stride, x, beta,
                         y + begin * y_stride, y_stride);
    }
  });
  return true;
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
      const int64_t width = round_up(columns, kern.nr);
      T* panel = scratch<T, 1>(width * depth);
      kern.pack_b(depth, columns, part(b, p, j), panel);
      for (int64_t i = 0; i < m; i += kRows) {
        panel_product(kern, std::min(kRows, m - i), int64_t{0}, columns, width, depth, alpha,
                      part(a, i, p), panel, p == 0 ? beta : T(1), c + i * ldc + j, ldc);
      }
    }
  }
}

template <typename T>
void parallel_gemm(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> a, MatrixView<T> b,
                   T beta, T* c, int64_t ldc) {
  if (k > 0 && n == 1 &&
      times_vector(m, k, alpha, a, b.data, b.row_stride, beta, c, ldc)) {
    return;
  }
  if (k > 0 && m == 1 &&
      times_vector(n, k, alpha, transposed(b), a.data, a.col_stride, beta, c, int64_t{1})) {
    return;
  }
  if (k == 0 || m * n * k < 64 * 64 * 64) return gemm(m, n, k, alpha, a, b, beta, c, ldc);
  const auto& kern = kernel<T>();
  const int64_t tasks = kTasksPerThread * num_threads();
  const int64_t rows = std::clamp(round_up((m + tasks - 1) / tasks, kern.mr), kFewRows, kRows);
  const int64_t row_blocks = (m + rows - 1) / rows;
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t columns = std::min(kColumns, n - j);
    const int64_t width = round_up(columns, kern.nr);
    // Few blocks of rows: cut the columns as well, and pack those blocks of A again.
    const int64_t wanted = (tasks + row_blocks - 1) / row_blocks;
    const int64_t span = std::max(round_up((columns + wanted - 1) / wanted, kern.nr), 2 * kern.nr);
    const int64_t spans = (columns + span - 1) / span;
    const int64_t panel_k = panel_depth<T>(width, k);
    T* panel = scratch<T, 2>(width * panel_k);
    for (int64_t p = 0; p < k; p += panel_k) {
      const int64_t depth = std::min(panel_k, k - p);
      const int64_t strip = 4 * kern.nr, strips = (columns + strip - 1) / strip;
      parallel_tasks((depth + kDepth - 1) / kDepth * strips, [&](int64_t task, int) {
        const int64_t q = task / strips * kDepth, first = task % strips * strip;
        const int64_t terms = std::min(kDepth, depth - q);
        kern.pack_b(terms, std::min(strip, columns - first), part(b, p + q, j + first),
                    panel + q * width + first * terms);
      });
      parallel_tasks(row_blocks * spans, [&](int64_t task, int) {
        const int64_t i = task / spans * rows, first = task % spans * span;
        panel_product(kern, std::min(rows, m - i), first, std::min(span, columns - first), width,
                      depth, alpha, part(a, i, p), panel, p == 0 ? beta : T(1),
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
