// Host side of the CUDA infonce kernels: how the work is cut, what the workspace holds, and the
// sequence of launches. All sizes follow from the problem, never from the device: between cards only the
// arithmetic of their matrix units differs.
#pragma once

#include <utility>

#include "infonce/infonce_kernels.cuh"

namespace fastclust::infonce {

// What a call may use and how it is cut. Tests shrink these to meet every seam in small problems.
struct Limits {
  int64_t workspace_bytes = 60'000'000;
  int64_t panel_rows = int64_t{1} << 40;
  int64_t chunk_rows = int64_t{1} << 40;
  int64_t least_panel_rows = 1024;  // however wide the rows: below this launches hold no work
  bool hopper = false;              // bf16 and bf16x3 by the kernels of infonce_sm90.cuh
};
constexpr int kReduceThreads = 1024;

#define FASTCLUST_TRY(call)                                          \
  do {                                                               \
    if (const cudaError_t error = (call); error != cudaSuccess) {    \
      return error;                                                  \
    }                                                                \
  } while (0)

// Hands out aligned pieces of a workspace. Without a base it only adds up: every driver below runs
// once that way, to learn the size, and returns before its first launch.
class Arena {
 public:
  explicit Arena(void* base, const Limits& limits = {})
      : limits(limits), base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    unsigned char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(static_cast<int64_t>(count * sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  bool measuring() const { return base_ == nullptr; }
  size_t used() const { return used_; }

  const Limits limits;

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline unsigned blocks(int64_t count, int64_t per_block) {
  return static_cast<unsigned>(ceil_div(count, per_block));
}

inline unsigned tile_count(const Patch& patch) {
  return static_cast<unsigned>(patch.row_tiles() * patch.column_tiles());
}
template <typename T>
unsigned product_tiles(const ProductArgs<T>& args) {
  const Patch& patch = args.patch;
  const int rows = patch.row_tiles() + (patch.inside() ? 0 : patch.column_tiles());
  return static_cast<unsigned>(rows * args.column_tiles);
}

// Launches of the three kernels that hold the matrix products.
template <typename Path, typename WPath>
struct Ampere {
  using T = typename Path::Acc;
  static constexpr size_t kWeightedShared = std::max(Path::kSharedBytes, WPath::kSharedBytes);

  static cudaError_t forward(const ForwardArgs<T>& args, bool weighted, cudaStream_t stream) {
    const dim3 grid(tile_count(args.patch));
    FASTCLUST_TRY(launch(&forward_kernel<Path, WPath, false>, grid, kThreads, Path::kSharedBytes,
                         stream, args));
    if (!weighted) return cudaSuccess;
    return launch(&forward_kernel<Path, WPath, true>, grid, kThreads, kWeightedShared, stream,
                  args);
  }
  static cudaError_t tiles(const TileArgs<T>& args, bool weighted, cudaStream_t stream) {
    const dim3 grid(tile_count(args.patch));
    FASTCLUST_TRY(launch(&tile_kernel<Path, WPath, false>, grid, kThreads, Path::kSharedBytes,
                         stream, args));
    if (!weighted) return cudaSuccess;
    return launch(&tile_kernel<Path, WPath, true>, grid, kThreads, kWeightedShared, stream, args);
  }
  static cudaError_t product(const ProductArgs<T>& args, cudaStream_t stream) {
    return launch(&product_kernel<Path>, dim3(product_tiles(args)), kThreads, Path::kSharedBytes,
                  stream, args);
  }
};

namespace sm90 {  // infonce_sm90.cu; on the host, declarations are all that is needed of it
template <int kProducts>
cudaError_t forward(const ForwardArgs<float>&, unsigned tiles, bool weighted, cudaStream_t);
template <int kProducts>
cudaError_t tiles(const TileArgs<float>&, unsigned tiles, bool weighted, cudaStream_t);
template <int kProducts>
cudaError_t product(const ProductArgs<float>&, unsigned tiles, cudaStream_t);
}  // namespace sm90

// The same launches on Hopper.
template <int kProducts>
struct Hopper {
  static cudaError_t forward(const ForwardArgs<float>& args, bool weighted, cudaStream_t stream) {
    return sm90::forward<kProducts>(args, tile_count(args.patch), weighted, stream);
  }
  static cudaError_t tiles(const TileArgs<float>& args, bool weighted, cudaStream_t stream) {
    return sm90::tiles<kProducts>(args, tile_count(args.patch), weighted, stream);
  }
  static cudaError_t product(const ProductArgs<float>& args, cudaStream_t stream) {
    return sm90::product<kProducts>(args, product_tiles(args), stream);
  }
};

// How a call is cut: rows of a panel, rows of a chunk.
struct Cut {
  int64_t panel, chunk;
};

// Largest panel and chunk whose packed rows (row_bytes each) and what a patch holds per entry
// (entry_bytes) fit beside fixed_bytes. A long panel saves packing, a long chunk launches; the chunk
// is at least the panel / chunks_a_panel. The gradient wants both alike (1): T X then sums
// over as many columns as T^T X over rows, and the blocks of that launch take equal time. Edges of 16
// tiles, or multiples, leave launches of whole waves on 132 multiprocessors. The result depends on
// the problem alone.
inline Cut cut_patches(const Limits& limits, int64_t rows, int64_t fixed_bytes, int64_t row_bytes,
                       double entry_bytes, int64_t chunks_a_panel) {
  const int64_t tiles = rows / kRowPad;
  const auto fits = [&](int64_t panel, int64_t chunk) {
    const double entries = static_cast<double>(panel * chunk) * kRowPad * kRowPad;
    return fixed_bytes + (panel + chunk) * kRowPad * row_bytes + entries * entry_bytes <=
           static_cast<double>(limits.workspace_bytes);
  };
  const int64_t least = std::clamp<int64_t>(limits.least_panel_rows / kRowPad, 1, tiles);
  int64_t panel = std::clamp<int64_t>(limits.panel_rows / kRowPad, 1, tiles);
  const auto shortest = [&] { return ceil_div(panel, chunks_a_panel); };
  while (panel > least && !fits(panel, shortest())) --panel;
  if (panel < tiles && panel > 16) panel = panel / 16 * 16;
  panel = ceil_div(tiles, ceil_div(tiles, panel));  // even
  int64_t chunk = std::min(panel, std::max<int64_t>(limits.chunk_rows / kRowPad, 1));
  while (chunk > shortest() && !fits(panel, chunk)) --chunk;
  chunk = ceil_div(panel, ceil_div(panel, chunk));
  return {panel * kRowPad, chunk * kRowPad};
}

// Calls run(patch, first_chunk) for every panel of the window and every chunk inside and beyond it,
// in order.
template <typename Run>
cudaError_t for_each_patch(const Cut& cut, const Window& window, int64_t rows, int64_t tile,
                           Run run) {
  static_assert(kWindowRows % kRowPad == 0);
  const int64_t row_end = window.whole ? rows : std::min(round_up(window.row_end, kRowPad), rows);
  for (int64_t row = window.whole ? 0 : window.row_begin; row < row_end; row += cut.panel) {
    const int64_t panel_end = std::min(row + cut.panel, row_end);
    const int64_t first = window.has_diagonal() ? row : window.column_begin;
    for (int64_t column = first; column < rows;) {
      const int64_t end = std::min(column + cut.chunk, column < panel_end ? panel_end : rows);
      const Patch patch{row, panel_end - row, column, end - column, tile};
      FASTCLUST_TRY(run(patch, column == first));
      column = end;
    }
  }
  return cudaSuccess;
}

// Sets what a window adds to, but need not reach, to zero.
template <typename T>
cudaError_t clear(T* values, int64_t count, cudaStream_t stream) {
  if (values == nullptr || count == 0) return cudaSuccess;
  return cudaMemsetAsync(values, 0, static_cast<size_t>(count) * sizeof(T), stream);
}

// Packed rows of views, without their memory.
template <typename Path, typename T>
Packed shape_of(const Views<T>& views) {
  const auto steps = [](int64_t width) { return static_cast<int>(ceil_div(width, Path::kStep)); };
  const auto blocks_of = [&](int64_t width) {
    return static_cast<int>(ceil_div(steps(width), Path::kStepsPerBlock));
  };
  Packed x{};
  x.z_steps = steps(views.dz);
  x.e_steps = steps(views.de);
  x.e_begin = blocks_of(views.dz) * Path::kStepsPerBlock;
  // A tile of T [Z | E] reads 128 columns of elements.
  const int across = 128 * sizeof(typename Path::Element) / kBlockColumns;
  x.n_blocks = static_cast<int>(
      round_up(blocks_of(views.dz) + blocks_of(views.de), std::max(across, 1)));
  return x;
}

template <typename Path>
int64_t packed_row_bytes(const Packed& x) {
  return int64_t{x.n_blocks} * kBlockColumns * Path::kParts;
}

template <typename Path>
Packed take_packed(Arena& arena, Packed x, int64_t rows) {
  x.hi = arena.take<unsigned char>(rows * x.n_blocks * kBlockColumns);
  x.lo = Path::kParts == 2 ? arena.take<unsigned char>(rows * x.n_blocks * kBlockColumns) : nullptr;
  return x;
}

template <typename Path>
cudaError_t pack(const Views<typename Path::Acc>& views, int64_t n_nodes, const int32_t* order,
                 int64_t row_begin, int64_t rows, const Packed& x, cudaStream_t stream,
                 const Snapshot<typename Path::Acc>& snapshot = {},
                 Snapshot<typename Path::Acc>* table_entry = nullptr) {
  PackArgs<Path> args{views.z,   views.e, views.dz, views.de, n_nodes, order,
                      row_begin, rows,    x,        snapshot, table_entry};
  return launch(&pack_kernel<Path>, dim3(blocks(rows, kWarps)), kThreads, 0, stream, args);
}

// Everything the weights of a patch are computed from.
template <typename WPath>
class WeightPlan {
 public:
  using T = typename WPath::Acc;

  WeightPlan(Arena& arena, const Weights<T>& weights, int64_t n_nodes, int64_t rows)
      : weights_(weights), n_nodes_(n_nodes), rows_(rows) {
    const int count = weights.n_snapshots;
    if (count == 0) return;
    table_ = arena.take<Snapshot<T>>(count);
    masks_ = arena.take<uint64_t>(rows / 2);
    tile_masks_ = arena.take<uint64_t>(rows / WPath::kTile);
    labels_ = arena.take<int32_t>(count * (rows / 2));
    for (int s = 0; s < count; ++s) left_[s] = shape_of<WPath>(weights.snapshots[s]);
  }

  const int32_t* order() const { return weights_.n_snapshots ? weights_.order : nullptr; }

  int64_t row_bytes() const {
    int64_t bytes = 0;
    for (int s = 0; s < weights_.n_snapshots; ++s) bytes += packed_row_bytes<WPath>(left_[s]);
    return bytes;
  }

  void take(Arena& arena, const Cut& cut) {
    for (int s = 0; s < weights_.n_snapshots; ++s) {
      right_[s] = take_packed<WPath>(arena, left_[s], cut.chunk);
      left_[s] = take_packed<WPath>(arena, left_[s], cut.panel);
    }
    if (weights_.n_snapshots > 1) {
      needed_ = arena.take<uint64_t>(cut.panel / WPath::kTile * (cut.chunk / WPath::kTile));
    }
  }

  cudaError_t prepare(cudaStream_t stream) const {
    if (weights_.n_snapshots == 0) return cudaSuccess;
    const RankArgs ranks{n_nodes_,           rows_ / 2,       weights_.n_snapshots, order(),
                         weights_.membership, weights_.labels, masks_,               labels_};
    FASTCLUST_TRY(launch(&rank_kernel, dim3(blocks(rows_ / 2, kThreads)), kThreads, 0, stream,
                         ranks));
    const TileMaskArgs tiles{rows_ / WPath::kTile, WPath::kTile / 2, masks_, tile_masks_};
    return launch(&tile_mask_kernel, dim3(blocks(tiles.n_tiles, kThreads)), kThreads, 0, stream,
                  tiles);
  }

  // Packs what a patch needs beyond the one before it.
  cudaError_t pack_patch(const Patch& patch, bool new_panel, cudaStream_t stream) const {
    for (int s = 0; s < weights_.n_snapshots; ++s) {
      const Views<T>& views = weights_.snapshots[s];
      if (new_panel) {
        const Snapshot<T> entry{left_[s], right_[s], views.alpha, weights_.range + 2 * s};
        FASTCLUST_TRY(pack<WPath>(views, n_nodes_, order(), patch.row_begin, patch.rows, left_[s],
                                  stream, entry, table_ + s));
      }
      FASTCLUST_TRY(pack<WPath>(views, n_nodes_, order(), patch.column_begin, patch.columns,
                                right_[s], stream));
    }
    if (weights_.n_snapshots < 2) return cudaSuccess;
    const NeededArgs needed{patch, masks_, needed_};
    return launch(&needed_kernel, dim3(patch.row_tiles() * patch.column_tiles()), kThreads, 0,
                  stream, needed);
  }

  WeightArgs<T> args() const {
    return {table_, masks_, tile_masks_, needed_, labels_, rows_ / 2, static_cast<T>(weights_.beta)};
  }

 private:
  Weights<T> weights_;
  int64_t n_nodes_, rows_;
  Snapshot<T>* table_ = nullptr;
  uint64_t* masks_ = nullptr;
  uint64_t* tile_masks_ = nullptr;
  uint64_t* needed_ = nullptr;
  int32_t* labels_ = nullptr;
  Packed left_[kMaxSnapshots] = {};
  Packed right_[kMaxSnapshots] = {};
};

template <typename Path, typename WPath, typename Backend = Ampere<Path, WPath>>
cudaError_t drive(const ForwardParams<typename Path::Acc>& p, Arena& arena,
                  cudaStream_t stream) {
  using T = typename Path::Acc;
  const int64_t m = 2 * p.n_nodes, rows = round_up(m, kRowPad);
  WeightPlan<WPath> weights(arena, p.weights, p.n_nodes, rows);
  T* positives = arena.take<T>(rows);
  const Packed shape = shape_of<Path>(p.views);
  const double slots = 2.0 * sizeof(T) / Path::kTile;
  const Cut cut = cut_patches(arena.limits, rows, arena.used(),
                              packed_row_bytes<Path>(shape) + weights.row_bytes(), slots, 4);
  weights.take(arena, cut);
  const Packed left = take_packed<Path>(arena, shape, cut.panel);
  const Packed right = take_packed<Path>(arena, shape, cut.chunk);
  T* row_sums = arena.take<T>(cut.chunk / Path::kTile * cut.panel);
  T* column_sums = arena.take<T>(cut.panel / Path::kTile * cut.chunk);
  if (arena.measuring()) return cudaSuccess;

  FASTCLUST_TRY(weights.prepare(stream));
  const Window& window = p.window;
  if (!window.whole) FASTCLUST_TRY(clear(p.row_sums, m, stream));
  FASTCLUST_TRY(for_each_patch(cut, window, rows, Path::kTile, [&](const Patch& patch,
                                                                   bool new_panel) {
    const auto pack_rows = [&](int64_t begin, int64_t count, const Packed& x) {
      return pack<Path>(p.views, p.n_nodes, weights.order(), begin, count, x, stream);
    };
    if (new_panel) FASTCLUST_TRY(pack_rows(patch.row_begin, patch.rows, left));
    FASTCLUST_TRY(pack_rows(patch.column_begin, patch.columns, right));
    FASTCLUST_TRY(weights.pack_patch(patch, new_panel, stream));
    const ForwardArgs<T> args{
        {patch, left, right, weights.args(), p.views.alpha, static_cast<int>(m)},
        row_sums, column_sums, positives};
    FASTCLUST_TRY(Backend::forward(args, p.weights.n_snapshots > 0, stream));
    const SumArgs<T> sums{patch,     row_sums,        column_sums,          p.n_nodes,
                          weights.order(), window.whole && patch.row_begin == 0, new_panel,
                          p.row_sums};
    const int64_t touched = patch.rows + (patch.inside() ? 0 : patch.columns);
    return launch(&sum_kernel<T>, dim3(blocks(touched, kThreads)), kThreads, 0, stream, sums);
  }));
  const int64_t begin = window.whole ? 0 : window.row_begin;
  const int64_t end = window.whole ? m : window.has_diagonal() ? window.row_end : begin;
  const LossArgs<T> loss{p.n_nodes, weights.order(), p.row_sums, positives,
                         p.loss,    begin,           end,        window.whole};
  return launch(&loss_kernel<T>, dim3(1), kReduceThreads, 0, stream, loss);
}

template <typename Path, typename WPath, typename Backend = Ampere<Path, WPath>>
cudaError_t drive(const BackwardParams<typename Path::Acc>& p, Arena& arena,
                  cudaStream_t stream) {
  using T = typename Path::Acc;
  const int64_t m = 2 * p.n_nodes, rows = round_up(m, kRowPad);
  const bool need_alpha = p.grad_alpha != nullptr;
  WeightPlan<WPath> weights(arena, p.weights, p.n_nodes, rows);
  T* inverse = arena.take<T>(rows);
  double* alpha_slots = need_alpha ? arena.take<double>(m) : nullptr;
  // d alpha takes T Z and T E whole, wanted or not.
  T* grad_z = need_alpha && !p.grad_z ? arena.take<T>(m * p.views.dz) : p.grad_z;
  T* grad_e = need_alpha && !p.grad_e ? arena.take<T>(m * p.views.de) : p.grad_e;
  const Packed shape = shape_of<Path>(p.views);
  const double t_bytes = static_cast<double>(Path::kParts * sizeof(typename Path::Element));
  const Cut cut = cut_patches(arena.limits, rows, arena.used(),
                              packed_row_bytes<Path>(shape) + weights.row_bytes(), t_bytes, 1);
  weights.take(arena, cut);
  const Packed left = take_packed<Path>(arena, shape, cut.panel);
  const Packed right = take_packed<Path>(arena, shape, cut.chunk);
  const auto blocks_across = [](int64_t columns) {
    return static_cast<int>(columns * sizeof(typename Path::Element) / kBlockColumns);
  };
  Packed t{};
  t.n_blocks = blocks_across(cut.chunk);
  t = take_packed<Path>(arena, t, cut.panel);
  if (arena.measuring()) return cudaSuccess;

  // Packed columns of what is wanted, in whole tiles.
  const int64_t e_column = int64_t{shape.e_begin} * Path::kStep;
  const int64_t begin = grad_z ? 0 : e_column / Path::kTile * Path::kTile;
  const int64_t end = grad_e && p.views.de ? e_column + p.views.de : grad_z ? p.views.dz : begin;
  const int column_tiles = static_cast<int>(ceil_div(std::max(end - begin, int64_t{0}), Path::kTile));

  FASTCLUST_TRY(weights.prepare(stream));
  const InverseArgs<T> inverses{p.n_nodes, rows, weights.order(), p.row_sums, inverse};
  FASTCLUST_TRY(
      launch(&inverse_kernel<T>, dim3(blocks(rows, kThreads)), kThreads, 0, stream, inverses));
  const Window& window = p.window;
  if (!window.whole) {
    FASTCLUST_TRY(clear(grad_z, m * p.views.dz, stream));
    FASTCLUST_TRY(clear(grad_e, m * p.views.de, stream));
  }
  if (column_tiles > 0) {
    FASTCLUST_TRY(for_each_patch(cut, window, rows, Path::kTile, [&](const Patch& patch,
                                                                     bool new_panel) {
      const auto pack_rows = [&](int64_t first, int64_t count, const Packed& x) {
        return pack<Path>(p.views, p.n_nodes, weights.order(), first, count, x, stream);
      };
      if (new_panel) FASTCLUST_TRY(pack_rows(patch.row_begin, patch.rows, left));
      FASTCLUST_TRY(pack_rows(patch.column_begin, patch.columns, right));
      FASTCLUST_TRY(weights.pack_patch(patch, new_panel, stream));
      Packed t_patch = t;
      t_patch.n_blocks = blocks_across(patch.columns);
      const TileArgs<T> tiles{
          {patch, left, right, weights.args(), p.views.alpha, static_cast<int>(m)},
          inverse, t_patch};
      FASTCLUST_TRY(Backend::tiles(tiles, p.weights.n_snapshots > 0, stream));
      const bool first = window.whole && patch.row_begin == 0;
      const ProductArgs<T> product{patch,        left,         right,
                                   t_patch,      static_cast<int>(begin),
                                   column_tiles, p.n_nodes,    weights.order(),
                                   p.views.dz,   p.views.de,   e_column,
                                   grad_z,       grad_e,       first && new_panel,
                                   first};
      return Backend::product(product, stream);
    }));
  }
  const FinishArgs<T> finish{p.views, p.n_nodes, p.grad_loss, grad_z, grad_e, alpha_slots};
  if (grad_z || grad_e) {
    FASTCLUST_TRY(launch(&finish_kernel<T>, dim3(static_cast<unsigned>(m)), kThreads, 0, stream,
                         finish));
  }
  if (!need_alpha) return cudaSuccess;
  const AlphaArgs<T> alpha{p.n_nodes, alpha_slots, p.grad_loss, p.grad_alpha};
  return launch(&alpha_kernel<T>, dim3(1), kReduceThreads, 0, stream, alpha);
}

template <typename Path, typename WPath>
cudaError_t drive(const RangeParams<typename Path::Acc>& p, Arena& arena,
                  cudaStream_t stream) {
  using T = typename Path::Acc;
  const int64_t m = 2 * p.n_nodes, rows = round_up(m, kRowPad);
  const Packed shape = shape_of<Path>(p.views);
  const double slots = 2.0 * sizeof(T) / (Path::kTile * Path::kTile);
  const Cut cut = cut_patches(arena.limits, rows, 0, packed_row_bytes<Path>(shape), slots, 4);
  const Packed left = take_packed<Path>(arena, shape, cut.panel);
  const Packed right = take_packed<Path>(arena, shape, cut.chunk);
  T* range_slots = arena.take<T>(2 * (cut.panel / Path::kTile) * (cut.chunk / Path::kTile));
  if (arena.measuring()) return cudaSuccess;

  bool fresh = true;
  return for_each_patch(cut, p.window, rows, Path::kTile, [&](const Patch& patch, bool new_panel) {
    if (new_panel) {
      FASTCLUST_TRY(pack<Path>(p.views, p.n_nodes, nullptr, patch.row_begin, patch.rows, left,
                               stream));
    }
    FASTCLUST_TRY(pack<Path>(p.views, p.n_nodes, nullptr, patch.column_begin, patch.columns, right,
                             stream));
    const RangeArgs<T> args{patch, left, right, p.views.alpha, static_cast<int>(m), range_slots};
    FASTCLUST_TRY(launch(&range_kernel<Path>, dim3(tile_count(patch)), kThreads,
                         Path::kSharedBytes, stream, args));
    const RangeFinishArgs<T> finish{tile_count(patch), range_slots, std::exchange(fresh, false),
                                    p.range};
    return launch(&range_finish_kernel<T>, dim3(1), kThreads, 0, stream, finish);
  });
}

using Float64Path = PlainPath<double>;
using Tf32Path = MmaPath<float, 1>;
using Bf16Path = MmaPath<uint16_t, 1>;
using Bf16x3Path = MmaPath<uint16_t, 3>;
using Bf16x4Path = MmaPath<uint16_t, 4>;

// The one table from precision to kernels: path of the main product, path of the snapshots'.
template <template <typename> class Params>
cudaError_t drive(const Params<double>& p, Arena& arena, cudaStream_t stream) {
  return drive<Float64Path, Float64Path>(p, arena, stream);
}
template <template <typename> class Params>
cudaError_t drive(const Params<float>& p, Arena& arena, cudaStream_t stream) {
  switch (p.precision) {
    case Precision::kFp32:
    case Precision::kBf16x3:
#if defined(FASTCLUST_SM90)
      if (arena.limits.hopper) return drive<Bf16x3Path, Bf16x3Path, Hopper<3>>(p, arena, stream);
#endif
      return drive<Bf16x3Path, Bf16x3Path>(p, arena, stream);
    case Precision::kTf32: return drive<Tf32Path, Bf16x3Path>(p, arena, stream);
    case Precision::kBf16:
#if defined(FASTCLUST_SM90)
      if (arena.limits.hopper) return drive<Bf16Path, Bf16x3Path, Hopper<1>>(p, arena, stream);
#endif
      return drive<Bf16Path, Bf16x3Path>(p, arena, stream);
  }
  return cudaErrorInvalidValue;
}
// Least and greatest entry: one arithmetic, whatever the precision of the loss.
inline cudaError_t drive(const RangeParams<float>& p, Arena& arena, cudaStream_t stream) {
  return drive<Bf16x4Path, Bf16x4Path>(p, arena, stream);
}

}  // namespace fastclust::infonce
