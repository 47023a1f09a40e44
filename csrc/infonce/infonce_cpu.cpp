// Hard-sample InfoNCE on the CPU: the driver of infonce.h, and its portable kernels.
//
// S, W and T are symmetric, so only tiles (I, J), J >= I, of 192 x 192 are computed: M^2 D flop for
// the row sums, M^2 D to recompute S in the backward pass and 2 M^2 D for T [Z | E], with
// D = dz + de: 4 M^2 D; a separate snapshot adds M^2 D to either pass on the tiles that hold a pair
// of confident nodes. Rows are taken in the weights' order, which gathers those tiles, and with the
// two views of a node side by side, so that every positive pair lies on a diagonal tile. Stored
// weights are read where they lie, in the order of the nodes: it must not change at a refresh.
//
// The backward pass runs over panels of up to 4 tile rows:
//   1. all tiles T(I, J) of the panel into one buffer (task: a tile),
//   2. every block row X of the gradient gets what the panel knows of it, sum_J T(X, J) F_J with
//      the stored tiles, those left of the diagonal read transposed (task: X, a group of columns).
// A task owns what it writes and adds its terms in a fixed order, so the bits do not depend on the
// number of threads. Memory: one packed copy of the rows for S, one for T F, the panel (at most
// 100 MB); nothing grows with M^2. A row-owning task without the panel would need 5 M^2 D flop
// (every S tile recomputed twice).
//
// Bound by FMA: the products run on the register tiles of common/microkernel.h; exp and weights are
// about 2 % at D = 1000. With bf16 operands they run on pairs of terms at twice the rate (AVX-512
// BF16); T is then stored twice, in pairs of columns and in pairs of rows, since either may be the
// sum's index. The weights' own products stay in float32, and so do the positive pairs.
//
// Measured on Zen 4 (N = 2708, D = 1000, one thread, float32, share of the FMA rate read before and
// after each step, medians of three alternating runs): with all weights 1, strip by strip 0.80,
// 0.81, 0.86 and with all products of Z before those of E 0.83, 0.82, 0.80; with a snapshot 0.75,
// 0.77, 0.81 and 0.79, 0.80, 0.77. The order was chosen so that one set of rows (384 KB) stays in
// L2 where four (1.5 MB) would not; its gain is within the noise. A register tile alone ran at 0.94
// to 1.00 out of caches; where the rest goes has not been measured (no hardware counters there).
// Lost: 2 MB pages for the buffers, 0.77, 0.77, 0.79 against 0.80 without.
#include "infonce/infonce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/cpu.h"
#include "common/parallel.h"
#include "infonce/infonce_tile_impl.h"

namespace fastclust::infonce {
namespace {

constexpr int64_t kPanelTiles = 4;           // tile rows of a panel
constexpr int64_t kPanelBytes = 100 << 20;   // fewer rows where they would not fit in this
constexpr int64_t kGroupSlivers = 5;         // slivers of gradient columns that one task writes

template <typename T>
const TileKernels<T, T>& kernels(T) {
#if defined(FASTCLUST_X86_SIMD)
  if (cpu_level() == CpuLevel::kAvx512) return tile_kernels_avx512(T{});
  if (cpu_level() == CpuLevel::kAvx2) return tile_kernels_avx2(T{});
#endif
  return kTileKernels<T, T>;
}
#if defined(FASTCLUST_X86_SIMD)
const TileKernels<float, Bf16Pair>& kernels(Bf16Pair) { return tile_kernels_avx512bf16(); }
#endif

// Calls f with the operand of the products that a precision asks for and this processor has.
template <typename T, typename F>
void with_operand(Precision precision, const F& f) {
#if defined(FASTCLUST_X86_SIMD)
  if constexpr (std::is_same_v<T, float>) {
    if (precision == Precision::kBf16 && has_avx512_bf16()) return f(Bf16Pair{});
  }
#endif
  f(T{});
}

int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Uninitialised memory on a 64-byte boundary.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : memory_(new char[size * sizeof(T) + 64]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  T* data() const { return data_; }

 private:
  std::unique_ptr<char[]> memory_;
  T* data_ = nullptr;
};

// The order in which rows are taken: position 2u + v is view v of the u-th node of the order. Tiles
// (i, j) with first <= i < end and j >= max(i, column) are computed.
struct Rows {
  int64_t n_nodes, m, tiles;
  int64_t first = 0, end, column = 0;
  std::vector<int64_t> row_of;  // [M] position -> row

  Rows(int64_t n, const int32_t* order, const Window& window)
      : n_nodes(n), m(2 * n), tiles(ceil_div(2 * n, kTile)), end(tiles), row_of(2 * n) {
    static_assert(kWindowRows % kTile == 0);
    if (!window.whole) {
      first = window.row_begin / kTile;
      end = ceil_div(window.row_end, kTile);
      column = window.column_begin / kTile;
    }
    for (int64_t u = 0; u < n; ++u) {
      const int64_t node = order == nullptr ? u : order[u];
      row_of[2 * u] = node;
      row_of[2 * u + 1] = n + node;
    }
  }
  int64_t in_tile(int64_t tile) const { return std::min(kTile, m - tile * kTile); }
  // Place of tile (i, j), j >= i, among those of the triangle.
  int64_t stored_tile(int64_t i, int64_t j) const { return i * tiles - i * (i - 1) / 2 + j - i; }
  bool has_diagonal() const { return column == first; }
};

// One matrix of rows, packed for S: slivers [ceil(M / nr)][k, nr], those of a window's tiles.
template <typename X>
struct PackedRows {
  Buffer<X> data;
  int64_t k, nr;  // operands of a row, rows of a sliver

  template <typename T>
  PackedRows(const TileKernels<T, X>& kern, const Rows& rows, const T* x, int64_t d)
      : k(ceil_div(d, kern.terms)), nr(kern.nr) {
    const int64_t slivers = rows.tiles * (kTile / nr);
    data = Buffer<X>(slivers * nr * k);
    const int64_t unused = rows.first * (kTile / nr);
    parallel_for(slivers - unused, 16, [&](int64_t begin, int64_t end) {
      const T* pointers[kMaxSliver];
      for (int64_t s = unused + begin; s < unused + end; ++s) {
        for (int64_t i = 0; i < nr; ++i) {
          const int64_t position = s * nr + i;
          pointers[i] = position < rows.m ? x + rows.row_of[position] * d : nullptr;
        }
        kern.pack_rows(pointers, d, data.data() + s * nr * k);
      }
    });
  }

  // out [slivers][n_rows, nr]: products of the rows of tile i with the first slivers of tile j.
  template <typename T>
  void products(const TileKernels<T, X>& kern, int64_t n_rows, int64_t i, int64_t j,
                int64_t slivers, T* out) const {
    const X* b = data.data() + j * kTile * k;
    for (int64_t s = 0; s < slivers; ++s) {
      kern.similarity(n_rows, k, data.data() + i * kTile * k, b + s * nr * k, out + s * kTile * nr);
    }
  }
};

// Z and E packed, with the mix of their similarities.
template <typename T, typename X>
struct PackedViews {
  const TileKernels<T, X>& kern;
  PackedRows<X> z, e;
  T alpha, rest;

  PackedViews(const Rows& rows, const Views<T>& v)
      : kern(kernels(X{})), z(kern, rows, v.z, v.dz), e(kern, rows, v.e, v.de), alpha(*v.alpha),
        rest(T(1) - *v.alpha) {}

  // Products of all rows of tile i with the first slivers of tile j, all of Z before E: then the
  // rows of one of them stay in L2.
  void products(int64_t n_rows, int64_t i, int64_t j, int64_t slivers, T* gz, T* ge) const {
    z.products(kern, n_rows, i, j, slivers, gz);
    if (e.k > 0) e.products(kern, n_rows, i, j, slivers, ge);
  }
};

template <typename T>
bool same_bits(const Views<T>& a, const Views<T>& b, int64_t m) {
  return a.dz == b.dz && a.de == b.de && std::memcmp(a.alpha, b.alpha, sizeof(T)) == 0 &&
         std::memcmp(a.z, b.z, m * a.dz * sizeof(T)) == 0 &&
         (a.de == 0 || std::memcmp(a.e, b.e, m * a.de * sizeof(T)) == 0);
}

// The weights in the order of the rows.
template <typename T>
struct PackedWeights {
  using Int = typename LaneInt<T>::type;
  int n = 0;
  double beta = 0;
  std::vector<std::unique_ptr<PackedViews<T, T>>> views;  // null: the current products serve
  std::vector<T> least, per_width;
  std::vector<Int> labels, member;              // [S, tiles * kTile]
  std::vector<std::vector<uint64_t>> distinct;  // [tiles] membership masks that occur
  int64_t padded = 0;

  // `current`: the embeddings whose products are at hand in full precision, or nullptr.
  PackedWeights(const Rows& rows, const Weights<T>& w, const Views<T>* current)
      : n(w.n_snapshots), beta(w.beta), padded(rows.tiles * kTile) {
    labels.assign(n * padded, 0);
    member.assign(n * padded, 0);
    for (int s = 0; s < n; ++s) {
      const T width = w.range[2 * s + 1] - w.range[2 * s];
      least.push_back(w.range[2 * s]);
      per_width.push_back(width >= std::numeric_limits<T>::min() ? 1 / width : T(0));
      const bool same = current != nullptr && same_bits(w.snapshots[s], *current, rows.m);
      views.push_back(same ? nullptr : std::make_unique<PackedViews<T, T>>(rows, w.snapshots[s]));
      for (int64_t p = 0; p < rows.m; ++p) {
        const int64_t node = rows.row_of[p] % rows.n_nodes;
        labels[s * padded + p] = w.labels[s * rows.n_nodes + node];
        member[s * padded + p] = (w.membership[node] >> s) & 1 ? Int(-1) : Int(0);
      }
    }
    distinct.resize(n > 0 ? rows.tiles : 0);
    for (int64_t p = 0; n > 0 && p < rows.m; ++p) {
      auto& masks = distinct[p / kTile];
      const auto mask = static_cast<uint64_t>(w.membership[rows.row_of[p] % rows.n_nodes]);
      if (std::find(masks.begin(), masks.end(), mask) == masks.end()) masks.push_back(mask);
    }
  }

  // Snapshots that decide the weight of some pair of the tile, as bits.
  uint64_t needed(int64_t i, int64_t j) const {
    uint64_t bits = 0;
    if (n == 0) return bits;
    for (const uint64_t a : distinct[i]) {
      for (const uint64_t b : distinct[j]) {
        if ((a & b) != 0) bits |= uint64_t{1} << (63 - __builtin_clzll(a & b));
      }
    }
    return bits;
  }
};

// Everything that the tiles of one pass need.
template <typename T, typename X>
struct Pass {
  Rows rows;
  PackedViews<T, X> views;
  PackedWeights<T> weights;
  const T* stored;
  const TileKernels<T, X>& kern;
  std::vector<Buffer<T>> scratch;  // per worker: tiles gz, ge, qz, qe, w; one more for its own use

  Pass(int64_t n, const Views<T>& v, const Weights<T>& w, const Window& window)
      : rows(n, w.n_snapshots > 0 ? w.order : nullptr, window), views(rows, v),
        weights(rows, w, std::is_same_v<T, X> ? &v : nullptr), stored(w.stored), kern(views.kern) {
    static_assert(kWeightTile == kTile);
    for (int i = 0; i < num_threads(); ++i) scratch.emplace_back(6 * kTile * kTile);
  }

  T* tile_memory(int worker, int which) const {
    return scratch[worker].data() + which * kTile * kTile;
  }

  // Calls f(strip, sliver) for the slivers of tile (i, j).
  template <typename F>
  void for_each_strip(int64_t i, int64_t j, int worker, const F& f) const {
    T *gz = tile_memory(worker, 0), *ge = tile_memory(worker, 1);
    const int64_t n_rows = rows.in_tile(i), nr = kern.nr, slivers = ceil_div(rows.in_tile(j), nr);
    views.products(n_rows, i, j, slivers, gz, ge);
    const T* w = stored == nullptr ? nullptr : stored + rows.stored_tile(i, j) * kTile * kTile;
    if (const uint64_t needed = weights.needed(i, j); needed != 0) {
      T* made = tile_memory(worker, 4);
      std::fill(made, made + kTile * kTile, T(1));
      weigh(needed, n_rows, i, j, slivers, worker, made);
      w = made;
    }
    for (int64_t s = 0; s < slivers; ++s) {
      const int64_t at = s * kTile * nr;
      f(Strip<T>{n_rows, std::min(nr, rows.in_tile(j) - s * nr), i == j ? s * nr : -1, views.alpha,
                 views.rest, gz + at, views.e.k > 0 ? ge + at : nullptr,
                 w != nullptr ? w + s * nr : nullptr},
        s);
    }
  }

  // Overwrites w [kTile, kTile] where a needed snapshot has weights of tile (i, j), whose current
  // products are in the worker's memory.
  void weigh(uint64_t needed, int64_t n_rows, int64_t i, int64_t j, int64_t slivers, int worker,
             T* w) const {
    for (int k = 0; k < weights.n; ++k) {  // ascending: a later refresh overwrites
      if ((needed >> k & 1) == 0) continue;
      const PackedViews<T, T>* old = weights.views[k].get();
      const T *qz = tile_memory(worker, 0), *qe = views.e.k > 0 ? tile_memory(worker, 1) : nullptr;
      T alpha = views.alpha, rest = views.rest;
      if (old != nullptr) {
        T *to_z = tile_memory(worker, 2), *to_e = tile_memory(worker, 3);
        old->products(n_rows, i, j, slivers, to_z, to_e);
        qz = to_z, qe = old->e.k > 0 ? to_e : nullptr, alpha = old->alpha, rest = old->rest;
      }
      for (int64_t s = 0; s < slivers; ++s) {
        const int64_t row = k * weights.padded + i * kTile, at = s * kTile * kern.nr;
        const int64_t column = k * weights.padded + j * kTile + s * kern.nr;
        kern.weigh({n_rows, alpha, rest, qz + at, qe != nullptr ? qe + at : nullptr,
                    weights.least[k], weights.per_width[k], weights.beta,
                    weights.labels.data() + row, weights.labels.data() + column,
                    weights.member.data() + row, weights.member.data() + column,
                    w + s * kern.nr});
      }
    }
  }
};

// Calls body(first tile row, end) for one panel after the other.
template <typename F>
void for_each_panel(const Rows& rows, int64_t height, const F& body) {
  for (int64_t first = rows.first; first < rows.end; first += height) {
    body(first, std::min(first + height, rows.end));
  }
}

template <typename X, typename T>
void forward_in(const ForwardParams<T>& p) {
  const Pass<T, X> pass(p.n_nodes, p.views, p.weights, p.window);
  const Rows& rows = pass.rows;
  std::vector<double> sums(rows.tiles * kTile, 0.0);                          // [M] by position
  std::vector<T> positive(rows.m);                                            // [M] by position
  std::vector<double> from_row(kPanelTiles * rows.tiles * kTile);             // slots by tile
  std::vector<double> from_column(kPanelTiles * rows.tiles * kTile);
  for_each_panel(rows, kPanelTiles, [&](int64_t first, int64_t end) {
    const int64_t width = rows.tiles - first;
    parallel_tasks((end - first) * width, [&](int64_t task, int worker) {
      const int64_t i = first + task % (end - first), j = first + task / (end - first);
      if (j < i || j < rows.column) return;
      T* lanes = pass.tile_memory(worker, 5);  // [kTile, lanes of a vector]
      const int64_t n_lanes = pass.kern.lanes;
      std::fill(lanes, lanes + kTile * n_lanes, T(0));
      const int64_t slot = ((i - first) * rows.tiles + j) * kTile;
      pass.for_each_strip(i, j, worker, [&](const Strip<T>& strip, int64_t s) {
        T columns[kMaxSliver];
        pass.kern.forward(strip, lanes, columns, positive.data() + i * kTile);
        std::copy_n(columns, pass.kern.nr, from_column.data() + slot + s * pass.kern.nr);
      });
      for (int64_t r = 0; r < kTile; ++r) {
        double sum = 0;
        for (int64_t l = 0; l < n_lanes; ++l) sum += lanes[r * n_lanes + l];
        from_row[slot + r] = sum;
      }
    });
    parallel_tasks(rows.tiles - first, [&](int64_t task, int) {
      const int64_t x = first + task;
      double* to = sums.data() + x * kTile;
      const auto add = [&](const std::vector<double>& slots, int64_t i, int64_t j) {
        const double* from = slots.data() + ((i - first) * rows.tiles + j) * kTile;
        for (int64_t r = 0; r < rows.in_tile(x); ++r) to[r] += from[r];
      };
      for (int64_t i = first; x >= rows.column && i < std::min(end, x); ++i) add(from_column, i, x);
      for (int64_t j = std::max(x, rows.column); x < end && j < rows.tiles; ++j) add(from_row, x, j);
    });
  });
  // Logits beyond the limit of vec_exp have been taken for the limit: such a row is no number, nor are
  // the loss and the gradients. (The shares of a window may be small.)
  const double most = 0.999 * std::exp(double{MathTable<T>::limit});
  const double least =
      static_cast<double>(rows.m) / most / static_cast<double>(std::numeric_limits<T>::epsilon());
  double loss = 0;
  for (int64_t s = 0; s < rows.m; ++s) {
    if (!(sums[s] < most && (sums[s] > least || !p.window.whole))) {
      sums[s] = std::numeric_limits<double>::quiet_NaN();
    }
    p.row_sums[rows.row_of[s]] = sums[s];
    loss += (p.window.whole ? std::log(sums[s]) : 0.0) - static_cast<double>(positive[s]);
  }
  *p.loss = static_cast<T>(loss / static_cast<double>(rows.m));
}

template <typename X, typename T>
void backward_in(const BackwardParams<T>& p) {
  const Pass<T, X> pass(p.n_nodes, p.views, p.weights, p.window);
  const Rows& rows = pass.rows;
  const int64_t nr = pass.kern.nr;
  // c goes into the factor of the product, not into T: c / r_i may be no normal number.
  const double c = static_cast<double>(*p.grad_loss) / static_cast<double>(rows.m);
  std::vector<T> per_row(rows.tiles * kTile, T(0));  // [M] 1 / r_i by position
  for (int64_t s = 0; s < rows.m; ++s) {
    per_row[s] = static_cast<T>(1 / p.row_sums[rows.row_of[s]]);
  }

  // Columns of [dZ | dE] that are wanted, in slivers that may straddle the two.
  const int64_t dz = p.grad_z != nullptr ? p.views.dz : 0;
  const int64_t de = p.grad_e != nullptr ? p.views.de : 0;
  const int64_t column_slivers = ceil_div(dz + de, nr);
  std::vector<Target<T>> targets(2 * column_slivers, Target<T>{});
  for (int64_t s = 0; s < column_slivers; ++s) {
    Target<T>* to = targets.data() + 2 * s;
    const int64_t begin = s * nr, end = std::min(begin + nr, dz + de);
    if (begin < dz) {
      *to++ = {p.grad_z + begin, p.views.z + begin, static_cast<T>(c * pass.views.alpha), dz, 0,
               std::min(end, dz) - begin};
    }
    if (end > dz) {
      const int64_t from = std::max(begin, dz);
      *to = {p.grad_e + (from - dz), p.views.e + (from - dz),
             static_cast<T>(c * pass.views.rest), de, from - begin, end - from};
    }
  }
  // The factor c [alpha Z | (1 - alpha) E] of the gradient product, slivers [tile][sliver][row, nr].
  const int64_t factor_size = kTile * nr / pass.kern.terms;
  const Buffer<X> factor(rows.tiles * column_slivers * factor_size);
  const auto factor_at = [&](int64_t tile, int64_t sliver) {
    return factor.data() + (tile * column_slivers + sliver) * factor_size;
  };
  parallel_tasks((rows.tiles - rows.first) * column_slivers, [&](int64_t task, int worker) {
    const int64_t tile = rows.first + task / column_slivers, s = task % column_slivers;
    T* block = pass.tile_memory(worker, 0);  // [kTile, nr]
    std::fill(block, block + kTile * nr, T(0));
    for (const Target<T>* run = &targets[2 * s]; run < &targets[2 * s] + 2; ++run) {
      for (int64_t r = 0; run->count > 0 && r < rows.in_tile(tile); ++r) {
        const T* from = run->from + rows.row_of[tile * kTile + r] * run->ld;
        T* to = block + r * nr + run->offset;
        for (int64_t x = 0; x < run->count; ++x) to[x] = run->scale * from[x];
      }
    }
    pass.kern.pack_factor(block, factor_at(tile, s));
  });

  const int64_t tile_row_bytes = rows.tiles * kStoredTile * static_cast<int64_t>(sizeof(X));
  const int64_t height = std::clamp<int64_t>(kPanelBytes / tile_row_bytes, 1, kPanelTiles);
  const Buffer<X> panel(std::min(height, rows.tiles) * rows.tiles * kStoredTile);
  std::vector<double> slopes(height * rows.tiles);
  std::vector<T> partner(rows.tiles * kTile);  // [M] w_{i,p(i)}
  double slope = 0;
  if (!p.window.whole) {  // its rows need not meet every row of the gradient
    std::fill_n(p.grad_z, rows.m * dz, T(0));
    std::fill_n(p.grad_e, rows.m * de, T(0));
  }
  for_each_panel(rows, height, [&](int64_t first, int64_t end) {
    const int64_t width = rows.tiles - first;
    const auto tile_at = [&](int64_t i, int64_t j) {
      return panel.data() + ((i - first) * width + j - first) * kStoredTile;
    };
    parallel_tasks((end - first) * width, [&](int64_t task, int worker) {
      const int64_t i = first + task % (end - first), j = first + task / (end - first);
      if (j < i || j < rows.column) return;
      double sum = 0;
      pass.for_each_strip(i, j, worker, [&](const Strip<T>& strip, int64_t s) {
        sum += pass.kern.gradient(strip, per_row.data() + i * kTile,
                                  per_row.data() + j * kTile + s * nr, tile_at(i, j), s * nr,
                                  partner.data() + i * kTile);
      });
      slopes[(i - first) * rows.tiles + j] = i == j ? sum : 2 * sum;
    });
    for (int64_t i = first; i < end; ++i) {
      for (int64_t j = std::max(i, rows.column); j < rows.tiles; ++j) slope += slopes[(i - first) * rows.tiles + j];
    }
    const int64_t groups = ceil_div(column_slivers, kGroupSlivers);
    parallel_tasks(groups * width, [&](int64_t task, int) {
      const int64_t x = first + task / groups, group = task % groups;
      bool fresh = p.window.whole && first == 0;
      // Tiles of block row x that this panel holds: (y, x) for y above the diagonal, transposed,
      // then (x, y); taken a few at a time so that the gradient's rows are read and written less.
      const auto add = [&](int64_t from, int64_t to, bool transposed) {
        for (int64_t y0 = from; y0 < to; y0 += kPanelTiles) {
          const int64_t y1 = std::min(y0 + kPanelTiles, to);
          for (int64_t s = group * kGroupSlivers;
               s < std::min((group + 1) * kGroupSlivers, column_slivers); ++s) {
            Segment<X> segments[kPanelTiles];
            for (int64_t y = y0; y < y1; ++y) {
              segments[y - y0] = {transposed ? tile_at(y, x) : tile_at(x, y), rows.in_tile(y),
                                  factor_at(y, s)};
            }
            pass.kern.accumulate(rows.in_tile(x), rows.row_of.data() + x * kTile, y1 - y0,
                                 segments, transposed, targets.data() + 2 * s, fresh);
          }
          fresh = false;
        }
      };
      if (x >= rows.column) add(first, std::min(end, x), true);
      if (x >= end) return;
      add(std::max(x, rows.column), rows.tiles, false);
      if (!rows.has_diagonal()) return;
      // The positive pairs outweigh all other terms together: added last, the many small terms
      // are not rounded to their size (measured, float32, N = 300: error 5e-8 for 4e-7).
      const int64_t end_sliver = std::min((group + 1) * kGroupSlivers, column_slivers);
      for (int64_t r = x * kTile; r < x * kTile + rows.in_tile(x); ++r) {
        for (int64_t s = 2 * group * kGroupSlivers; s < 2 * end_sliver; ++s) {
          const Target<T>& run = targets[s];
          if (run.count == 0) continue;
          T* to = run.base + rows.row_of[r] * run.ld;
          const T* from = run.from + rows.row_of[r ^ 1] * run.ld;
          const T scale = -2 * partner[r] * run.scale;
          for (int64_t k = 0; k < run.count; ++k) to[k] += scale * from[k];
        }
      }
    });
  });
  if (p.grad_alpha != nullptr) *p.grad_alpha = static_cast<T>(c * slope / 2);
}

}  // namespace

template <typename T>
void forward_cpu(const ForwardParams<T>& p) {
  with_operand<T>(p.precision, [&](auto operand) { forward_in<decltype(operand)>(p); });
}

template <typename T>
void backward_cpu(const BackwardParams<T>& p) {
  if (p.grad_z == nullptr && p.grad_e == nullptr && p.grad_alpha == nullptr) return;
  with_operand<T>(p.precision, [&](auto operand) { backward_in<decltype(operand)>(p); });
}

template <typename T>
void range_cpu(const RangeParams<T>& p) {
  const Pass<T, T> pass(p.n_nodes, p.views, Weights<T>{}, p.window);
  const Rows& rows = pass.rows;
  std::vector<T> least(rows.tiles, std::numeric_limits<T>::infinity());
  std::vector<T> greatest(rows.tiles, -std::numeric_limits<T>::infinity());
  parallel_tasks(rows.end - rows.first, [&](int64_t task, int worker) {
    const int64_t i = rows.first + task;
    for (int64_t j = std::max(i, rows.column); j < rows.tiles; ++j) {
      pass.for_each_strip(i, j, worker, [&](const Strip<T>& strip, int64_t) {
        pass.kern.range(strip, &least[i], &greatest[i]);
      });
    }
  });
  p.range[0] = *std::min_element(least.begin(), least.end());
  p.range[1] = *std::max_element(greatest.begin(), greatest.end());
}

// A refresh of one snapshot, that of the views themselves, written to where the weights stay.
template <typename T>
void update_stored_weights_cpu(const UpdateParams<T>& p) {
  const std::vector<int64_t> membership(p.confident, p.confident + p.n_nodes);
  const Weights<T> refresh{1, &p.views, p.range, p.labels, membership.data(), nullptr, p.beta};
  const Pass<T, T> pass(p.n_nodes, p.views, refresh, {});
  const Rows& rows = pass.rows;
  parallel_tasks(rows.tiles * rows.tiles, [&](int64_t task, int worker) {
    const int64_t i = task % rows.tiles, j = task / rows.tiles;
    if (j < i || pass.weights.needed(i, j) == 0) return;
    const int64_t n_rows = rows.in_tile(i), slivers = ceil_div(rows.in_tile(j), pass.kern.nr);
    pass.views.products(n_rows, i, j, slivers, pass.tile_memory(worker, 0),
                        pass.tile_memory(worker, 1));
    pass.weigh(1, n_rows, i, j, slivers, worker,
               p.stored + rows.stored_tile(i, j) * kTile * kTile);
  });
}

#define FASTCLUST_INSTANTIATE(T)                           \
  template void forward_cpu<T>(const ForwardParams<T>&);   \
  template void backward_cpu<T>(const BackwardParams<T>&); \
  template void range_cpu<T>(const RangeParams<T>&);       \
  template void update_stored_weights_cpu<T>(const UpdateParams<T>&);
FASTCLUST_INSTANTIATE(float)
FASTCLUST_INSTANTIATE(double)
#undef FASTCLUST_INSTANTIATE

}  // namespace fastclust::infonce
