// Batched randomised SVD on the CPU (Halko, Martinsson and Tropp, SIAM Review 53, 2011), in pieces.
//
// Work is split by batch, by row chunk, by tile of the Gram matrix or by block of columns of the
// sketch, always by size, so bits do not depend on the number of threads.
//
// Bound by: GEMM flops for dense rows (2 B D l a pass, B D^2 once for the Gram matrix), gathers for
// sparse rows. Sparse rows denser than 1/8 are scattered into dense panels and take the GEMM path:
// a sparse axpy runs at about an eighth of the speed of a packed product.
//
// Orthonormalisation is CholeskyQR with its Gram matrix in double: with float data the squared
// condition number then fits (Yamamoto et al., ETNA 44, 2015, on CholeskyQR2). Double data has no
// wider type to square into and takes Gram-Schmidt, twice.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/cpu.h"
#include "common/gemm.h"
#include "common/parallel.h"
#include "common/rng.h"
#include "lowrank/lowrank.h"
#include "lowrank/lowrank_kernel_impl.h"
#include "lowrank/lowrank_map.h"

namespace fastclust::lowrank {
namespace {

constexpr int64_t kPanel = 512;       // rows that one task centres or scatters at a time
constexpr int64_t kSlot = 1024;       // rows summed by one task of a reduction over rows
constexpr int64_t kMaxSlots = 16;     // partial results of one reduction
constexpr int64_t kGramTile = 192;
using detail::kColumnBlock;

const detail::Kernels& kernels() {
#if defined(FASTCLUST_X86_SIMD)
  if (cpu_level() == CpuLevel::kAvx512) return detail::kernels_avx512();
  if (cpu_level() == CpuLevel::kAvx2) return detail::kernels_avx2();
#endif
  return detail::kKernels;
}
const detail::SparseKernel<float>& sparse_kernel(float) { return kernels().sparse_float; }
const detail::SparseKernel<double>& sparse_kernel(double) { return kernels().sparse_double; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
int64_t batch_rows(const Rows<T>& x, int64_t batch) {
  return std::min(x.batch_size, x.n_rows - batch * x.batch_size);
}

template <typename T>
bool use_panels(const Rows<T>& x) {
  if (x.indptr == nullptr) return true;
  return (x.indptr[x.n_rows] - x.indptr[0]) * 8 > x.n_rows * x.n_cols;
}

// One task per batch when there are enough of them to keep every thread busy; otherwise one after
// the other, each parallel inside. The bits are the same either way.
template <typename F>
void for_batches(int64_t n_batches, const F& f) {
  if (n_batches >= 4 * num_threads()) {
    parallel_tasks(n_batches, [&](int64_t batch, int) { f(batch); });
  } else {
    for (int64_t batch = 0; batch < n_batches; ++batch) f(batch);
  }
}

// panel [rows, D] = rows begin.. of X minus the mean of their batch.
template <typename T>
void load_panel(const Rows<T>& x, int64_t begin, int64_t rows, T* panel) {
  const int64_t d = x.n_cols;
  const T* mean = x.mean == nullptr ? nullptr : x.mean + begin / x.batch_size * d;
  for (int64_t i = 0; i < rows; ++i) {
    T* out = panel + i * d;
    if (x.indptr == nullptr) {
      const T* row = x.values + (begin + i) * d;
      if (mean == nullptr) {
        std::copy(row, row + d, out);
      } else {
        for (int64_t j = 0; j < d; ++j) out[j] = row[j] - mean[j];
      }
      continue;
    }
    if (mean == nullptr) {
      std::fill(out, out + d, T(0));
    } else {
      for (int64_t j = 0; j < d; ++j) out[j] = -mean[j];
    }
    for (int64_t e = x.indptr[begin + i]; e < x.indptr[begin + i + 1]; ++e) {
      out[x.indices[e]] += x.values[e];
    }
  }
}

// Rows summed by one task of a reduction over n rows; depends on n alone.
int64_t slot_rows(int64_t n) { return std::max(kSlot, ceil_div(n, kMaxSlots)); }

// out [size] = sum of n_slots partial results, in order.
template <typename T>
void add_slots(const std::vector<T>& partial, int64_t n_slots, int64_t size, T* out) {
  parallel_for(size, 4096, [&](int64_t begin, int64_t end) {
    std::copy(partial.data() + begin, partial.data() + end, out + begin);
    for (int64_t s = 1; s < n_slots; ++s) {
      const T* p = partial.data() + s * size;
      for (int64_t i = begin; i < end; ++i) out[i] += p[i];
    }
  });
}

}  // namespace

template <typename T>
void column_means(const Rows<T>& x, T* out) {
  const int64_t d = x.n_cols;
  if (x.indptr != nullptr) {
    parallel_tasks(x.n_batches(), [&](int64_t batch, int) {
      const int64_t begin = batch * x.batch_size, rows = batch_rows(x, batch);
      std::vector<double> sum(d, 0.0);
      for (int64_t e = x.indptr[begin]; e < x.indptr[begin + rows]; ++e) {
        sum[x.indices[e]] += x.values[e];
      }
      for (int64_t j = 0; j < d; ++j) out[batch * d + j] = static_cast<T>(sum[j] / double(rows));
    });
    return;
  }
  constexpr int64_t kColumns = 256;
  const int64_t blocks = ceil_div(d, kColumns);
  parallel_tasks(x.n_batches() * blocks, [&](int64_t task, int) {
    const int64_t batch = task / blocks, j0 = task % blocks * kColumns;
    const int64_t n = std::min(kColumns, d - j0), rows = batch_rows(x, batch);
    const T* first = x.values + batch * x.batch_size * d + j0;
    double sum[kColumns] = {};
    for (int64_t i = 1; i < rows; ++i) {
      const T* row = first + i * d;
      for (int64_t j = 0; j < n; ++j) sum[j] += double(row[j]) - double(first[j]);
    }
    for (int64_t j = 0; j < n; ++j) {
      out[batch * d + j0 + j] = static_cast<T>(double(first[j]) + sum[j] / double(rows));
    }
  });
}

template <typename T>
void center(const Rows<T>& x, T* out) {
  const int64_t size = x.n_batches() * x.batch_size;
  parallel_for(size, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < x.n_rows) {
        load_panel(x, i, 1, out + i * x.n_cols);
      } else {
        std::fill_n(out + i * x.n_cols, x.n_cols, T(0));
      }
    }
  });
}

namespace {

// A batch of zeros and ones as bits: columns [D, words], bit i of word w is row 64 w + i.
struct BitColumns {
  int64_t words;
  std::vector<uint64_t> bits;
};

// False, at the first entry seen that is neither 0 nor 1.
template <typename T>
bool pack_bits(const Rows<T>& x, int64_t batch, BitColumns& out) {
  const int64_t d = x.n_cols, begin = batch * x.batch_size, n = batch_rows(x, batch);
  out.words = ceil_div(n, 64);
  out.bits.assign(d * out.words, 0);
  std::atomic<bool> binary{true};
  parallel_for(out.words, 4, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> word(d);
    for (int64_t w = first; w < last && binary.load(std::memory_order_relaxed); ++w) {
      std::fill(word.begin(), word.end(), 0);
      bool good = true;
      for (int64_t i = begin + 64 * w; i < begin + std::min(n, 64 * (w + 1)); ++i) {
        const int64_t bit = i - begin - 64 * w;
        if (x.indptr == nullptr) {
          const T* row = x.values + i * d;
          for (int64_t j = 0; j < d; ++j) {
            word[j] |= uint64_t{row[j] == T(1)} << bit;
            good &= (row[j] == T(0)) | (row[j] == T(1));
          }
        } else {
          for (int64_t e = x.indptr[i]; e < x.indptr[i + 1]; ++e) {
            word[x.indices[e]] |= uint64_t{1} << bit;
            good &= x.values[e] == T(1);
          }
        }
      }
      if (!good) binary.store(false, std::memory_order_relaxed);
      for (int64_t j = 0; j < d; ++j) out.bits[j * out.words + w] = word[j];
    }
  });
  return binary.load();
}

// The Gram matrix of zeros and ones by counting common bits: exact before centring, and an order
// of magnitude faster than a float product.
template <typename T>
void gram_of_bits(const BitColumns& x, int64_t n_rows, int64_t d, const T* mean, T* out) {
  std::vector<double> count(d);
  parallel_for(d, 64, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const uint64_t* bits = &x.bits[j * x.words];
      int64_t common;
      kernels().common_bits(x.words, 1, bits, bits, &common);
      count[j] = double(common);
    }
  });
  constexpr int64_t kTile = 64;
  const int64_t tiles = ceil_div(d, kTile);
  parallel_tasks(tiles * tiles, [&](int64_t task, int) {
    const int64_t i0 = task / tiles * kTile, j0 = task % tiles * kTile;
    if (j0 < i0) return;
    int64_t common[kTile];
    for (int64_t i = i0; i < std::min(d, i0 + kTile); ++i) {
      const int64_t first = std::max(i, j0), last = std::min(d, j0 + kTile);
      kernels().common_bits(x.words, last - first, &x.bits[i * x.words], &x.bits[first * x.words],
                            common);
      for (int64_t j = first; j < last; ++j) {
        double c = double(common[j - first]);
        if (mean != nullptr) {
          const double a = mean[i], b = mean[j];
          c += double(n_rows) * a * b - count[i] * b - a * count[j];
        }
        out[i * d + j] = out[j * d + i] = static_cast<T>(c);
      }
    }
  });
}

}  // namespace

template <typename T>
void gram(const Rows<T>& x, T* out) {
  const int64_t d = x.n_cols, tiles = ceil_div(d, kGramTile);
  constexpr int64_t kRows = 2048;
  for_batches(x.n_batches(), [&](int64_t batch) {
    T* c = out + batch * d * d;
    const int64_t begin = batch * x.batch_size, n = batch_rows(x, batch);
    if (BitColumns bits; pack_bits(x, batch, bits)) {
      gram_of_bits(bits, n, d, x.mean == nullptr ? nullptr : x.mean + batch * d, c);
      return;
    }
    std::vector<T> panel(std::min(kRows, n) * d);
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row);
      parallel_for(rows, 64, [&](int64_t i, int64_t end) {
        load_panel(x, begin + row + i, end - i, panel.data() + i * d);
      });
      const T beta = row == 0 ? T(0) : T(1);
      parallel_tasks(tiles * (tiles + 1) / 2, [&](int64_t task, int) {
        // task = j (j + 1) / 2 + i, i <= j
        int64_t j = static_cast<int64_t>((std::sqrt(8.0 * double(task) + 1.0) - 1.0) / 2.0);
        while (j * (j + 1) / 2 > task) --j;
        while ((j + 1) * (j + 2) / 2 <= task) ++j;
        const int64_t i0 = (task - j * (j + 1) / 2) * kGramTile, j0 = j * kGramTile;
        gemm<T>(std::min(kGramTile, d - i0), std::min(kGramTile, d - j0), rows, T(1),
                transposed(row_major(panel.data() + i0, d)), row_major(panel.data() + j0, d), beta,
                c + i0 * d + j0, d);
      });
    }
    // The tiles below the diagonal.
    parallel_for(d, kGramTile, [&](int64_t i0, int64_t end) {
      for (int64_t i = i0; i < end; ++i) {
        for (int64_t j = 0; j < i0; ++j) c[i * d + j] = c[j * d + i];
      }
    });
  });
}

template <typename T>
void multiply(int64_t n_batches, int64_t m, int64_t k, int64_t n, const T* a, const T* b, T* out) {
  for_batches(n_batches, [&](int64_t batch) {
    parallel_gemm<T>(m, n, k, T(1), row_major(a + batch * m * k, k),
                     row_major(b + batch * k * n, n), T(0), out + batch * m * n, n);
  });
}

template <typename T>
void project(const Rows<T>& x, int64_t width, const T* v, T* out) {
  const int64_t d = x.n_cols, chunks = ceil_div(x.batch_size, kPanel);
  const bool panels = use_panels(x);
  const bool direct = x.indptr == nullptr && x.mean == nullptr;
  // Sparse rows: v [M, D, ldv] and mean^T v [M, ldv], padded to whole blocks of columns.
  const int64_t ldv = ceil_div(width, kColumnBlock) * kColumnBlock;
  std::vector<T> padded, shift;
  if (!panels) {
    padded.assign(x.n_batches() * d * ldv, T(0));
    shift.assign(x.n_batches() * ldv, T(0));
    parallel_for(x.n_batches() * d, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy(v + i * width, v + (i + 1) * width, padded.data() + i * ldv);
      }
    });
    parallel_tasks(x.mean == nullptr ? 0 : x.n_batches(), [&](int64_t batch, int) {
      std::vector<double> total(width, 0.0);
      for (int64_t j = 0; j < d; ++j) {
        const double mean = x.mean[batch * d + j];
        const T* row = v + (batch * d + j) * width;
        for (int64_t c = 0; c < width; ++c) total[c] += mean * double(row[c]);
      }
      std::copy(total.begin(), total.end(), shift.data() + batch * ldv);
    });
  }
  parallel_tasks(x.n_batches() * chunks, [&](int64_t task, int) {
    const int64_t batch = task / chunks, row = task % chunks * kPanel;
    const int64_t begin = batch * x.batch_size + row;
    const int64_t all = std::min(kPanel, x.batch_size - row);  // rows of the output
    const int64_t rows = std::clamp<int64_t>(batch_rows(x, batch) - row, 0, all);
    const T* vb = v + batch * d * width;
    T* w = out + (batch * x.batch_size + row) * width;
    std::fill(w + rows * width, w + all * width, T(0));
    if (rows == 0) return;
    if (panels) {
      std::vector<T> panel(direct ? 0 : rows * d);
      if (!direct) load_panel(x, begin, rows, panel.data());
      const T* a = direct ? x.values + begin * d : panel.data();
      gemm<T>(rows, width, d, T(1), row_major(a, d), row_major(vb, width), T(0), w, width);
      return;
    }
    sparse_kernel(T{}).project(rows, x.values, x.indptr + begin, x.indices, width,
                               padded.data() + batch * d * ldv, ldv, shift.data() + batch * ldv, w,
                               width);
  });
}

template <typename T>
void project_transposed(const Rows<T>& x, int64_t width, const T* q, T* out) {
  const int64_t d = x.n_cols, n_batches = x.n_batches(), size = d * width;
  if (!use_panels(x)) {
    const int64_t blocks = ceil_div(width, kColumnBlock);
    parallel_tasks(n_batches * blocks, [&](int64_t task, int) {
      const int64_t batch = task / blocks, c0 = task % blocks * kColumnBlock;
      const int64_t n = std::min(kColumnBlock, width - c0);
      const int64_t begin = batch * x.batch_size, rows = batch_rows(x, batch);
      std::vector<T> z(d * kColumnBlock, T(0));
      double total[kColumnBlock] = {};
      sparse_kernel(T{}).scatter(rows, x.values, x.indptr + begin, x.indices, n,
                                 q + begin * width + c0, width, z.data(), total);
      for (int64_t j = 0; j < d; ++j) {
        const double mean = x.mean == nullptr ? 0.0 : double(x.mean[batch * d + j]);
        for (int64_t c = 0; c < n; ++c) {
          out[batch * size + j * width + c0 + c] =
              static_cast<T>(double(z[j * kColumnBlock + c]) - mean * total[c]);
        }
      }
    });
    return;
  }
  const int64_t slot = slot_rows(x.batch_size), n_slots = ceil_div(x.batch_size, slot);
  std::vector<T> partial(n_slots > 1 ? n_batches * n_slots * size : 0);
  parallel_tasks(n_batches * n_slots, [&](int64_t task, int) {
    const int64_t batch = task / n_slots, s = task % n_slots;
    T* z = n_slots > 1 ? partial.data() + task * size : out + batch * size;
    const int64_t stop = std::min(batch_rows(x, batch), (s + 1) * slot);
    if (s * slot >= stop) std::fill(z, z + size, T(0));
    std::vector<T> panel(std::clamp<int64_t>(stop - s * slot, 0, kPanel) * d);
    for (int64_t row = s * slot; row < stop; row += kPanel) {
      const int64_t rows = std::min(kPanel, stop - row), begin = batch * x.batch_size + row;
      load_panel(x, begin, rows, panel.data());
      gemm<T>(d, width, rows, T(1), transposed(row_major(panel.data(), d)),
              row_major(q + begin * width, width), row == s * slot ? T(0) : T(1), z, width);
    }
  });
  if (n_slots == 1) return;
  for (int64_t batch = 0; batch < n_batches; ++batch) {
    const auto begin = partial.begin() + batch * n_slots * size;
    add_slots(std::vector<T>(begin, begin + n_slots * size), n_slots, size, out + batch * size);
  }
}

namespace {

// The root of the sum of squares of y [n, l], added up in double by slots.
template <typename T>
double length(int64_t n, int64_t l, const T* y) {
  const int64_t slot = slot_rows(n), n_slots = ceil_div(n, slot);
  std::vector<double> partial(n_slots);
  parallel_tasks(n_slots, [&](int64_t s, int) {
    double sum[8] = {};
    const int64_t begin = s * slot * l, end = std::min(n, (s + 1) * slot) * l;
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int k = 0; k < 8; ++k) sum[k] += double(y[i + k]) * double(y[i + k]);
    }
    for (; i < end; ++i) sum[0] += double(y[i]) * double(y[i]);
    partial[s] = std::accumulate(sum, sum + 8, 0.0);
  });
  return std::sqrt(std::accumulate(partial.begin(), partial.end(), 0.0));
}

// A small triangular factor and its inverse.
struct Triangle {
  explicit Triangle(int64_t l) : r(l * l), inverse(l * l) {}
  std::vector<double> r, inverse;  // [l, l]

  double smallest(int64_t l) const {
    std::vector<double> x(2 * l);
    return kernels().small.smallest(l, inverse.data(), x.data());
  }
};

// y [n, l] = q r, by Cholesky of the Gram matrix in double; q = y r^-1.
Triangle gram_factor(int64_t n, int64_t l, const float* y) {
  constexpr int64_t kChunk = 256, kBlock = 32;
  const int64_t slot = slot_rows(n), n_slots = ceil_div(n, slot);
  std::vector<double> partial(n_slots * l * l), g(l * l);
  parallel_tasks(n_slots, [&](int64_t s, int) {
    std::vector<double> wide(kChunk * l);
    const int64_t stop = std::min(n, (s + 1) * slot);
    for (int64_t row = s * slot; row < stop; row += kChunk) {
      const int64_t rows = std::min(kChunk, stop - row);
      std::copy(y + row * l, y + (row + rows) * l, wide.begin());
      for (int64_t i = 0; i < l; i += kBlock) {  // of the upper triangle
        gemm<double>(std::min(kBlock, l - i), l - i, rows, 1.0,
                     transposed(row_major(wide.data() + i, l)), row_major(wide.data() + i, l),
                     row == s * slot ? 0.0 : 1.0, partial.data() + s * l * l + i * l + i, l);
      }
    }
  });
  add_slots(partial, n_slots, l * l, g.data());
  Triangle out(l);
  kernels().small.cholesky(l, kFloatNoise, g.data(), out.r.data(), out.inverse.data());
  return out;
}

// out [n, r] = y [n, l] factor [l, r] in the precision of `Wide`; out may be y.
template <typename Wide>
void times_small(int64_t n, int64_t l, int64_t r, const float* y, const std::vector<double>& factor,
                 float* out) {
  const std::vector<Wide> b(factor.begin(), factor.end());
  parallel_for(n, 256, [&](int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    const std::vector<Wide> wide(y + begin * l, y + end * l);
    std::vector<Wide> result(rows * r);
    gemm<Wide>(rows, r, l, Wide(1), row_major(wide.data(), l), row_major(b.data(), r), Wide(0),
               result.data(), r);
    std::copy(result.begin(), result.end(), out + begin * r);
  });
}

// q [n, l] to an orthonormal basis of its columns, in place; float: CholeskyQR, `passes` times. The
// factor of the first pass.
Triangle orthonormalize_one(int64_t n, int64_t l, int passes, float* q) {
  const Triangle first = gram_factor(n, l, q);
  if (passes == 1) {
    times_small<float>(n, l, l, q, first.inverse, q);
  } else {
    times_small<double>(n, l, l, q, first.inverse, q);
    times_small<double>(n, l, l, q, gram_factor(n, l, q).inverse, q);
  }
  return first;
}

// Double: Gram-Schmidt twice over, column by column, on the transpose.
Triangle orthonormalize_one(int64_t n, int64_t l, int /*passes*/, double* q) {
  std::vector<double> columns(l * n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < l; ++j) columns[j * n + i] = q[i * l + j];
  }
  Triangle out(l);
  const auto dot = [n](const double* a, const double* b) {
    double sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      for (int k = 0; k < 8; ++k) sum[k] += a[i + k] * b[i + k];
    }
    for (; i < n; ++i) sum[0] += a[i] * b[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  };
  std::vector<double> projection(l);
  for (int64_t j = 0; j < l; ++j) {
    double* column = &columns[j * n];
    const double before = std::sqrt(dot(column, column));
    for (int pass = 0; pass < 2; ++pass) {
      parallel_for(j, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) projection[i] = dot(&columns[i * n], column);
      });
      parallel_for(n, 2048, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < j; ++i) {
          const double* other = &columns[i * n];
          for (int64_t k = begin; k < end; ++k) column[k] -= projection[i] * other[k];
        }
      });
      for (int64_t i = 0; i < j; ++i) out.r[i * l + j] += projection[i];
    }
    const double after = std::sqrt(dot(column, column));
    const bool dependent = !(after > 8 * std::numeric_limits<double>::epsilon() * before);
    out.r[j * l + j] = dependent ? 0.0 : after;
    const double scale = dependent ? 0.0 : 1.0 / after;
    for (int64_t k = 0; k < n; ++k) column[k] *= scale;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < l; ++j) q[i * l + j] = columns[j * n + i];
  }
  kernels().small.invert(l, out.r.data(), out.inverse.data());
  return out;
}

// Singular values s [l] in descending order and right vectors vt [l, l] of a [l, l].
void small_svd(int64_t l, double tolerance, const std::vector<double>& a, double* s, double* vt) {
  const int64_t ld = ceil_div(l, 8) * 8;
  std::vector<double> rows(l * ld, 0.0), value(l);
  for (int64_t i = 0; i < l; ++i) std::copy(&a[i * l], &a[i * l] + l, &rows[i * ld]);
  kernels().small.jacobi(l, ld, rows.data(), value.data(), tolerance);
  for (int64_t i = 0; i < l; ++i) {
    value[i] =
        std::sqrt(std::inner_product(&rows[i * ld], &rows[i * ld] + l, &rows[i * ld], 0.0));
  }
  std::vector<int64_t> order(l);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return value[x] > value[y]; });
  for (int64_t k = 0; k < l; ++k) {
    s[k] = value[order[k]];
    const double scale = s[k] > 0.0 ? 1.0 / s[k] : 0.0;
    for (int64_t j = 0; j < l; ++j) vt[k * l + j] = rows[order[k] * ld + j] * scale;
  }
}

// r [l, l] v diag(1 / s), the leading `rank` columns: left vectors of r.
std::vector<double> left_vectors(int64_t l, int64_t rank, const std::vector<double>& r,
                                 const double* s, const double* vt) {
  std::vector<double> scaled(l * rank), out(l * rank);
  for (int64_t k = 0; k < rank; ++k) {
    const double scale = s[k] > 0.0 ? 1.0 / s[k] : 0.0;
    for (int64_t j = 0; j < l; ++j) scaled[j * rank + k] = vt[k * l + j] * scale;
  }
  if (r.empty()) return scaled;
  gemm<double>(l, rank, l, 1.0, row_major(r.data(), l), row_major(scaled.data(), rank), 0.0,
               out.data(), rank);
  return out;
}

void thin_svd_one(int64_t n, int64_t l, int64_t rank, const float* y, float* u, double* s,
                  double* vt) {
  constexpr double kTolerance = 0.01 * std::numeric_limits<float>::epsilon();
  const Triangle first = gram_factor(n, l, y);
  double largest = 0.0, least = std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < l; ++j) {
    largest = std::max(largest, first.r[j * l + j]);
    least = std::min(least, first.r[j * l + j]);
  }
  if (least * 1e3 > largest) {  // one pass is orthonormal to rounding: u = y v / s
    small_svd(l, kTolerance, first.r, s, vt);
    times_small<double>(n, l, rank, y, left_vectors(l, rank, {}, s, vt), u);
    return;
  }
  std::vector<float> q(n * l);
  times_small<double>(n, l, l, y, first.inverse, q.data());
  const Triangle second = gram_factor(n, l, q.data());
  std::vector<double> r(l * l);  // second.r first.r, both upper triangular
  gemm<double>(l, l, l, 1.0, row_major(second.r.data(), l), row_major(first.r.data(), l), 0.0,
               r.data(), l);
  small_svd(l, kTolerance, r, s, vt);
  times_small<double>(n, l, rank, q.data(), left_vectors(l, rank, first.r, s, vt), u);
}

void thin_svd_one(int64_t n, int64_t l, int64_t rank, const double* y, double* u, double* s,
                  double* vt) {
  std::vector<double> q(y, y + n * l);
  const Triangle triangle = orthonormalize_one(n, l, 2, q.data());
  small_svd(l, 1e-15, triangle.r, s, vt);
  const std::vector<double> factor = left_vectors(l, rank, triangle.r, s, vt);
  parallel_gemm<double>(n, rank, l, 1.0, row_major(q.data(), l), row_major(factor.data(), rank),
                        0.0, u, rank);
  // Short columns come out of a cancellation: once more.
  orthonormalize_one(n, rank, 2, u);
}

}  // namespace

template <typename T>
void orthonormalize(const Orthonormalize<T>& p) {
  const int64_t n = p.n_rows, l = p.width, size = n * l;
  for_batches(p.n_batches, [&](int64_t batch) {
    const T* y = p.y + batch * size;
    T* q = p.q + batch * size;
    const double bound = p.bound == nullptr ? 0.0 : p.bound[batch];
    double shift = 0.0;
    if (p.v == nullptr) {
      std::copy(y, y + size, q);
    } else {
      const T* v = p.v + batch * size;
      shift = 32 * std::numeric_limits<T>::epsilon() * length(n, l, y) - p.root * bound;
      parallel_for(size, 1 << 16, [&](int64_t begin, int64_t end) {
        const T factor = static_cast<T>(shift);
        for (int64_t i = begin; i < end; ++i) q[i] = y[i] + factor * v[i];
      });
    }
    const Triangle triangle = orthonormalize_one(n, l, p.passes, q);
    p.new_bound[batch] =
        p.v == nullptr || p.root > 0.5 ? bound : std::max(bound, triangle.smallest(l) - shift);
  });
}

template <typename T>
void thin_svd(const ThinSvd<T>& p) {
  for_batches(p.n_batches, [&](int64_t batch) {
    thin_svd_one(p.n_rows, p.width, p.rank, p.y + batch * p.n_rows * p.width,
                 p.u + batch * p.n_rows * p.rank, p.s + batch * p.width,
                 p.vt + batch * p.width * p.width);
  });
}

template <typename T>
void normal(int64_t n_batches, int64_t first_batch, int64_t n, int64_t width, uint64_t seed,
            T* out) {
  const int64_t size = n * width;
  const T scale = T(1) / (std::sqrt(T(n)) + std::sqrt(T(width)));
  constexpr int64_t kGrain = 4096;  // a multiple of 4
  const int64_t chunks = ceil_div(size, kGrain);
  parallel_tasks(n_batches * chunks, [&](int64_t task, int) {
    const int64_t batch = task / chunks, begin = task % chunks * kGrain;
    const int64_t end = std::min(size, begin + kGrain);
    for (int64_t i = begin; i < end; i += 4) {
      T numbers[4];
      philox_normal4<T>(seed, first_batch + batch, i / 4, numbers);
      for (int64_t k = 0; k < std::min<int64_t>(4, end - i); ++k) {
        out[batch * size + i + k] = scale * numbers[k];
      }
    }
  });
}

#define FASTCLUST_INSTANTIATE(T)                                                                 \
  template void column_means<T>(const Rows<T>&, T*);                                             \
  template void center<T>(const Rows<T>&, T*);                                                   \
  template void gram<T>(const Rows<T>&, T*);                                                     \
  template void multiply<T>(int64_t, int64_t, int64_t, int64_t, const T*, const T*, T*);         \
  template void project<T>(const Rows<T>&, int64_t, const T*, T*);                               \
  template void project_transposed<T>(const Rows<T>&, int64_t, const T*, T*);                    \
  template void orthonormalize<T>(const Orthonormalize<T>&);                                     \
  template void thin_svd<T>(const ThinSvd<T>&);                                                  \
  template void normal<T>(int64_t, int64_t, int64_t, int64_t, uint64_t, T*);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::lowrank
