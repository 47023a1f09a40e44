// Portable kernel, and the split of work over columns and threads for all instruction sets.
//
// h is copied, a panel of columns at a time, into rows that lie close together, and gathered from
// there. The copy applies the mask and the column scale once per node instead of once per edge, cuts
// the pages that a gather touches (4 kB pages of wide rows miss the TLB on every edge), and keeps a
// panel in L3 where h is in memory. Small matrices are gathered where they lie, and so are those of
// nodes with few neighbours, for which the copy costs more than it saves: there a panel is as wide as h,
// and the loops take it row by row. A task is one panel of one range of rows (about 4096 edges) or of
// one hub segment; ranges and segments are cut once, in fastclust/graph.py. Only the width of panels of
// h itself depends on the number of threads, and no bit depends on it.
//
// What bounds it: bytes gathered, E d sizeof(T). On a 2-core Zen 4 machine (1 MB of L2 a core, 32 MB
// of L3 shared with neighbours, 25 GB/s of copy, 30 GB/s of read) random rows of 128 to 256 bytes
// arrived at 75 to 87 GB/s per core at best while the matrix was in L2 or L3, at 8 to 10 from memory.
// N / stored entries / d = 13752 / 492k / 64 (B) and 600 (A), 200k / 10M / 128 (C). Least of six
// calls of a prototype of the inner loop, one thread, hot; variants one after the other, not
// interleaved, and the same variant differed by up to two times between runs, so that only gaps
// larger than that tell anything:
//   B  3.5 MB     in place 1.6 to 2.7 ms with panels of 32 or 64 columns; copied 1.6 to 3.2. The
//                 kernel itself took 2.5 to 3.4 ms; where the rest goes was not found
//   A  33 MB      in place 193, 79, 40, 35 ms with 16, 32, 64, 128 columns (fewer pages the wider);
//                 copied 36, 33, 40, 35
//   C  102 MB     in place 520 to 590; copied 233 to 499 with 16 columns, 323 to 551 with 32
//   prefetch      in place A gains (128 columns 49 -> 31 ms); copied A loses (16 columns 36 -> 57);
//                 copied C, 16 columns: 324, 276, 233 ms with none, 16 and 32 edges ahead in one run,
//                 433, 487, 429 in the next
// Stores around the cache are undecided: on C two threads the prototype went 157 -> 106 and 134 -> 99
// ms, this kernel 175 -> 196 (interleaved). kCopyDegree was never measured.
// In place with a scale or a mask, huge pages, narrow copies:
// benchmarks/results/2026-11-28-propagate-few-neighbours.md.
// The real AMAC graph, three interleaved runs of this kernel, one thread, nothing beside it, medians:
//   prefetch from 1 MB on instead of 4 MB     d 64 (3.5 MB, in place) 2.4 to 3.2 -> 1.8 to 2.6 ms,
//                                             d 600 (copied) 56 to 61 -> 50 to 52
//   in place up to 8 MB instead of 4 MB       d 128 (7 MB) 7.9 to 9.6 -> 5.7 to 6.1; all 33 MB of
//                                             d 600 in place 52 to 57: nothing gained
//   panels of 16 columns, copied, d 64        4.4 to 5.2, and of 32 3.4 to 4.5, where 64 in place took
//                                             2.7 to 3.2 (before the prefetch)
// In place for any number of columns, where it was for multiples of 16 alone (a copy is padded to
// them); AVX-512, one thread (Zen 5), least of many calls: 200k nodes on a path, d 1 2.8 ->
// 0.6 ms, d 8 3.7 -> 1.1, d 17 6.2 -> 1.9; a random graph of AMAC's size, alternating with the kernel
// before, d 1 0.61 -> 0.32, d 40 1.2 -> 0.93, d 60 1.7 -> 1.3, d 100 2.7 -> 2.5. Portable code has no
// loads of some lanes and copies as before.
// Rows in place gathered whole, where panels of 32 columns followed each other, and parts of vectors
// stored without vmaskmov (AVX2): benchmarks/results/2026-11-28-avx2.md.
// Tried and left out: passes over the rows that take the edges from one range of nodes each, so that
// its part of a panel stays near (C, one thread: ranges of 1, 2, 4 and 6.5 MB take 1435, 921, 880 and
// 894 ms, no ranges 521 and 553: sums that wait in the output, and no prefetch over rows, cost more
// than is saved); huge pages for the output (no difference); other orders of nodes (see
// fastclust/graph.py); two matrices side by side in one call, d 128 5.7 to 6.1 ms where two calls of
// 64 take 3.6 to 5.1, d 1200 83 to 94 where two of 600 take 99 to 104: 10 to 15 % at best, and only
// for wide matrices that already stand side by side.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu.h"
#include "common/parallel.h"
#include "propagate/propagate.h"
#include "propagate/propagate_kernel_impl.h"

namespace fastclust {
namespace {

template <typename T>
PropagateKernel<T> choose_kernel() {
#if defined(FASTCLUST_X86_SIMD)
  switch (cpu_level()) {
    case CpuLevel::kAvx512: return propagate_kernel_avx512<T>();
    case CpuLevel::kAvx2: return propagate_kernel_avx2<T>();
    case CpuLevel::kPortable: break;
  }
#endif
  return make_propagate_kernel<T>();
}

// Uninitialised memory from the start of a cache line, or of a huge page.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    if (size == 0) return;
    const size_t page = size_t{2} << 20;
    size_t bytes = size * sizeof(T);
    const size_t alignment = bytes >= 2 * page ? page : 64;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == page) madvise(data_, bytes, MADV_HUGEPAGE);  // fewer TLB misses; may fail
#endif
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// How h is cut into panels.
struct Plan {
  bool direct;         // gather from h itself
  bool few;            // few neighbours a node
  bool in_place;       // gather from h and apply the mask and the column scale to every row gathered
  int64_t panel_cols;  // a multiple of kGroupCols, of h itself one of the kernel's max_cols
  int64_t group_cols;  // columns copied at a time, a multiple of panel_cols
};

// Bytes of a panel that a core can expect to have at hand, bytes beyond which a gather is worth a
// prefetch, bytes up to which h is gathered where it lies, bytes copied at a time, and bytes of output
// that no cache holds.
constexpr int64_t kNearBytes = 4 << 20, kFarBytes = 1 << 20, kDirectBytes = 8 << 20;
constexpr int64_t kGroupBytes = 8 << 20, kStreamBytes = 64 << 20;
// Bytes of output from which on huge pages are asked for.
constexpr int64_t kHugeBytes = 4 << 20;
// Neighbours per node from which on a copy of h pays.
constexpr int64_t kCopyDegree = 8;
// Columns per neighbour of a node from which on its rows are better scaled and masked at every edge
// than once in a copy: an edge costs one or two cache lines more, the copy a pass over all columns.
constexpr int64_t kInPlaceCols = 8;

// Asks for huge pages under memory that is about to be written, as far as it covers whole ones.
// A result of 32 MB or more is fresh from the system on every call, and would cost a fault every 4 kB.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kHugeBytes) return;
  const uintptr_t page = uintptr_t{2} << 20, address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail
#endif
}

// The widest panels of a copy that are near; narrow ones where even those are not. A column's bits
// depend neither on the panel that it is in nor on the number of threads.
template <typename T>
Plan make_plan(const PropagateParams<T>& p, const PropagateKernel<T>& kernel) {
  const int64_t max_cols = kernel.max_cols;
  const int64_t n_inputs = p.n_nodes + p.n_halo;
  const int64_t column_bytes = n_inputs * static_cast<int64_t>(sizeof(T));
  const bool plain = p.h_mask == nullptr && p.col_scale == nullptr && p.masked_h == nullptr;
  const bool few = p.n_edges < kCopyDegree * n_inputs;
  if (plain ? (kernel.loads_lanes || p.n_cols % kGroupCols == 0) &&
                  (few || p.n_cols * column_bytes <= kDirectBytes)
            : kernel.loads_lanes && few && kInPlaceCols * p.n_edges <= p.n_cols * n_inputs) {
    // Rows are gathered whole, line after line as prefetchers expect, unless threads would be idle.
    const int64_t pieces = (p.n_cols + max_cols - 1) / max_cols;
    const int64_t row_tasks = p.n_tasks + p.hub.n_segments;
    const int64_t wanted = (2 * num_threads() + row_tasks - 1) / row_tasks;
    const int64_t panels = std::clamp<int64_t>(wanted, 1, pieces);
    return {true, few, !plain, (pieces + panels - 1) / panels * max_cols,
            (p.n_cols + kGroupCols - 1) / kGroupCols * kGroupCols};
  }
  int64_t cols = max_cols;
  while (cols > kGroupCols && cols * column_bytes > kNearBytes) cols /= 2;
  const int64_t panels = kGroupBytes / (cols * column_bytes);
  return {false, few, false, cols, cols * (panels < 1 ? 1 : panels)};
}

}  // namespace

template <typename T>
void propagate_cpu(PropagateParams<T> p) {
  if (p.n_nodes == 0 || p.n_cols == 0) return;
  const PropagateKernel<T> kernel = choose_kernel<T>();
  const Plan plan = make_plan(p, kernel);
  const std::unique_ptr<T[]> scratch(new T[p.hub.n_segments * p.n_cols]);
  p.scratch = scratch.get();
  const int64_t padded = (p.n_cols + kGroupCols - 1) / kGroupCols * kGroupCols;
  const int64_t group_cols = plan.group_cols < padded ? plan.group_cols : padded;
  const int64_t n_inputs = p.n_nodes + p.n_halo;
  // Narrow rows of a copy stand close together, none across two cache lines.
  int64_t narrow = kernel.loads_lanes ? 1 : kGroupCols;
  while (narrow < kGroupCols && narrow < p.n_cols) narrow *= 2;
  Buffer<T> packed(plan.direct ? 0 : n_inputs * (narrow < kGroupCols ? narrow : group_cols));
  constexpr int64_t kSize = sizeof(T);
  const int64_t out_bytes = p.n_nodes * p.n_cols * kSize;
  advise_huge_pages(p.out, out_bytes);
  if (p.masked_h != nullptr) advise_huge_pages(p.masked_h, out_bytes);
  const bool stream = out_bytes > kStreamBytes && p.n_cols % kGroupCols == 0 &&
                      reinterpret_cast<uintptr_t>(p.out) % 64 == 0;

  for (int64_t begin = 0; begin < padded; begin += group_cols) {
    std::vector<Panel<T>> panels;
    const int64_t end = begin + group_cols < padded ? begin + group_cols : padded;
    for (int64_t col = begin; col < end; col += plan.panel_cols) {
      const int64_t n_cols = end - col < plan.panel_cols ? end - col : plan.panel_cols;
      Panel<T> panel{packed.data() + (col - begin) * n_inputs, plan.in_place, n_cols, col, n_cols,
                     false, plan.few, stream};
      if (narrow < kGroupCols) panel.stride = narrow;
      if (plan.direct) panel.x = p.h + col, panel.stride = p.h_stride;
      const int64_t row_cols = plan.direct ? std::min(n_cols, p.n_cols - col) : panel.stride;
      panel.far = n_inputs * row_cols * kSize > kFarBytes;
      panels.push_back(panel);
    }
    const int64_t n_panels = static_cast<int64_t>(panels.size());
    if (!plan.direct) {
      parallel_for(n_inputs, 1 + 65536 / group_cols, [&](int64_t row_begin, int64_t row_end) {
        for (const Panel<T>& panel : panels) {
          kernel.pack(p, panel, const_cast<T*>(panel.x), row_begin, row_end);
        }
      });
    }
    // Panels are the slow index: threads move through one panel together.
    const int64_t per_panel = p.hub.n_segments + p.n_tasks;
    parallel_tasks(n_panels * per_panel, [&](int64_t task, int) {
      const Panel<T>& panel = panels[task / per_panel];
      const int64_t k = task % per_panel;
      if (k < p.hub.n_segments) {
        kernel.segment(p, panel, k);
      } else {
        const int64_t* rows = p.task_rows + (k - p.hub.n_segments);
        kernel.rows(p, panel, rows[0], rows[1]);
      }
    });
    parallel_tasks(n_panels * p.hub.n_hubs, [&](int64_t task, int) {
      kernel.combine(p, panels[task % n_panels], task / n_panels);
    });
  }
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
