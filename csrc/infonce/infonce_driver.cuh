// Host side of the CUDA infonce kernels: how the work is cut, what the workspace holds, and the
// sequence of launches. All sizes follow from the problem, never from the device, so that results
// do not depend on which card runs them.
#pragma once

#include "infonce/infonce_kernels.cuh"

namespace fastclust::infonce {

// What a call may use beside the packed operands, and how finely it is cut. Tests shrink these to
// meet every seam in small problems.
struct Limits {
  int64_t band_bytes = int64_t{48} << 20;     // partial row sums of the forward pass
  int64_t panel_bytes = int64_t{32} << 20;    // T: stays in a 50 MB L2 beside its operands
  int64_t partial_bytes = int64_t{28} << 20;  // partial T [Z | E]
  int64_t panel_rows = 1024;
  int64_t blocks = 264;  // wanted in a product launch: two per multiprocessor of an H100
  int64_t min_split_columns = 512;
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

template <typename Path, typename T>
Packed<typename Path::Element> take_packed(Arena& arena, const Views<T>& views, int64_t rows) {
  using Element = typename Path::Element;
  Packed<Element> x{};
  x.z_steps = static_cast<int>(ceil_div(views.dz, Path::kStep));
  x.e_steps = static_cast<int>(ceil_div(views.de, Path::kStep));
  x.ld = round_up((x.z_steps + x.e_steps) * int64_t{Path::kStep}, 128);
  x.hi = arena.take<Element>(rows * x.ld);
  x.lo = Path::kParts == 2 ? arena.take<Element>(rows * x.ld) : nullptr;
  return x;
}

template <typename Path>
cudaError_t pack(const Views<typename Path::Acc>& views, int64_t n_nodes, int64_t rows,
                 const int32_t* order,
                 const Snapshot<typename Path::Element, typename Path::Acc>& snapshot,
                 Snapshot<typename Path::Element, typename Path::Acc>* table_entry,
                 cudaStream_t stream) {
  PackArgs<Path> args{views.z,  views.e, views.dz, views.de,   n_nodes,
                      rows,     order,   snapshot, table_entry};
  const unsigned grid = static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(rows * snapshot.x.ld, 4 * kThreads), 1, 65536));
  return launch(&pack_kernel<Path>, dim3(grid), kThreads, 0, stream, args);
}

// Everything the weights of a tile are computed from.
template <typename WPath>
class WeightPlan {
 public:
  using T = typename WPath::Acc;

  WeightPlan(Arena& arena, const Weights<T>& weights, int64_t n_nodes, int64_t rows)
      : weights_(weights), n_nodes_(n_nodes), rows_(rows) {
    const int count = weights.n_snapshots;
    if (count == 0) return;
    table_ = arena.take<Snapshot<typename WPath::Element, T>>(count);
    masks_ = arena.take<uint64_t>(rows / 2);
    tile_masks_ = arena.take<uint64_t>(rows / WPath::kTile);
    labels_ = arena.take<int32_t>(count * (rows / 2));
    for (int s = 0; s < count; ++s) {
      packed_[s] = take_packed<WPath>(arena, weights.snapshots[s], rows);
    }
  }

  const int32_t* order() const { return weights_.n_snapshots ? weights_.order : nullptr; }

  cudaError_t prepare(cudaStream_t stream) const {
    if (weights_.n_snapshots == 0) return cudaSuccess;
    const RankArgs ranks{n_nodes_,           rows_ / 2,       weights_.n_snapshots, order(),
                         weights_.membership, weights_.labels, masks_,               labels_};
    FASTCLUST_TRY(launch(&rank_kernel, dim3(blocks(rows_ / 2, kThreads)), kThreads, 0, stream,
                         ranks));
    const TileMaskArgs tiles{rows_ / WPath::kTile, WPath::kTile / 2, masks_, tile_masks_};
    FASTCLUST_TRY(launch(&tile_mask_kernel, dim3(blocks(tiles.n_tiles, kThreads)), kThreads, 0,
                         stream, tiles));
    for (int s = 0; s < weights_.n_snapshots; ++s) {
      const Views<T>& views = weights_.snapshots[s];
      FASTCLUST_TRY(pack<WPath>(views, n_nodes_, rows_, order(),
                                {packed_[s], views.alpha, weights_.range + 2 * s}, table_ + s,
                                stream));
    }
    return cudaSuccess;
  }

  WeightArgs<WPath> args() const {
    return {table_, masks_, tile_masks_, labels_, rows_ / 2, static_cast<T>(weights_.beta)};
  }

 private:
  Weights<T> weights_;
  int64_t n_nodes_, rows_;
  Snapshot<typename WPath::Element, T>* table_ = nullptr;
  uint64_t* masks_ = nullptr;
  uint64_t* tile_masks_ = nullptr;
  int32_t* labels_ = nullptr;
  Packed<typename WPath::Element> packed_[kMaxSnapshots] = {};
};

template <typename Path, typename WPath>
cudaError_t drive(const ForwardParams<typename Path::Acc>& p, Arena& arena,
                  cudaStream_t stream) {
  using T = typename Path::Acc;
  const int64_t m = 2 * p.n_nodes, rows = round_up(m, kRowPad), n_tiles = rows / Path::kTile;
  const int64_t tile_row_bytes = 2 * rows * static_cast<int64_t>(sizeof(T));
  const int64_t band_tiles = std::min(
      n_tiles,
      std::max<int64_t>(arena.limits.band_bytes / tile_row_bytes / kGroup, 1) * kGroup);
  const auto x = take_packed<Path>(arena, p.views, rows);
  const WeightPlan<WPath> weights(arena, p.weights, p.n_nodes, rows);
  T* row_sums = arena.take<T>(band_tiles * Path::kTile * n_tiles);
  T* column_sums = arena.take<T>(band_tiles * rows);
  T* positives = arena.take<T>(rows);
  if (arena.measuring()) return cudaSuccess;

  FASTCLUST_TRY(pack<Path>(p.views, p.n_nodes, rows, weights.order(), {x, p.views.alpha, nullptr},
                           nullptr, stream));
  FASTCLUST_TRY(weights.prepare(stream));
  for (int64_t first = 0; first < n_tiles; first += band_tiles) {
    const Band band{first, std::min(first + band_tiles, n_tiles), Path::kTile, rows};
    const int64_t begin = tiles_before_group(first / kGroup, n_tiles);
    const int64_t end = tiles_before_group(ceil_div(band.end_tile_row, kGroup), n_tiles);
    const ForwardArgs<Path, WPath> args{
        x,     weights.args(), p.views.alpha, static_cast<int>(m), n_tiles,
        begin, band,           row_sums,      column_sums,         positives};
    const dim3 grid(static_cast<unsigned>(end - begin));
    FASTCLUST_TRY(launch(&forward_kernel<Path, WPath, false>, grid, kThreads, Path::kSharedBytes,
                         stream, args));
    if (p.weights.n_snapshots) {
      FASTCLUST_TRY(launch(&forward_kernel<Path, WPath, true>, grid, kThreads,
                           std::max(Path::kSharedBytes, WPath::kSharedBytes), stream, args));
    }
    const SumArgs<T> sums{band,           row_sums,  column_sums, p.n_nodes,
                          weights.order(), p.row_sums};
    FASTCLUST_TRY(
        launch(&sum_kernel<T>, dim3(blocks(m, kThreads)), kThreads, 0, stream, sums));
  }
  const LossArgs<T> loss{p.n_nodes, weights.order(), p.row_sums, positives, p.loss};
  return launch(&loss_kernel<T>, dim3(1), kReduceThreads, 0, stream, loss);
}

// How the gradient is cut: row panels of T, column chunks of a panel, splits of a product.
struct GradientCut {
  int64_t panel_rows, chunk, splits;
  int64_t first_column, column_tiles;  // of [Z | E], only what is wanted
};

inline GradientCut cut_gradient(const Limits& limits, int64_t rows, int64_t tile, int64_t t_bytes,
                                int64_t acc_bytes, int64_t z_columns, int64_t e_columns,
                                bool need_z, bool need_e) {
  GradientCut cut{};
  const int64_t begin = need_z ? 0 : z_columns;
  const int64_t end = need_e ? z_columns + e_columns : z_columns;
  cut.first_column = begin / tile * tile;
  cut.column_tiles = end > begin ? ceil_div(end - cut.first_column, tile) : 0;
  const auto even = [&](int64_t total, int64_t most) {  // equal parts of whole tiles
    const int64_t parts = ceil_div(total, std::max(most / tile * tile, tile));
    return round_up(ceil_div(total, parts), tile);
  };
  for (int64_t limit = limits.panel_rows;; limit /= 2) {
    cut.panel_rows = even(rows, limit);
    cut.chunk = even(rows, limits.panel_bytes / (cut.panel_rows * t_bytes));
    const int64_t tiles = std::max<int64_t>(cut.panel_rows / tile * cut.column_tiles, 1);
    cut.splits = std::clamp<int64_t>(
        std::min(ceil_div(limits.blocks, tiles), cut.chunk / limits.min_split_columns), 1, 16);
    const int64_t bytes = cut.splits * cut.panel_rows * cut.column_tiles * tile * acc_bytes;
    if (bytes <= limits.partial_bytes || cut.panel_rows == tile) return cut;
  }
}

template <typename Path, typename WPath>
cudaError_t drive(const BackwardParams<typename Path::Acc>& p, Arena& arena,
                  cudaStream_t stream) {
  using T = typename Path::Acc;
  using Element = typename Path::Element;
  const int64_t m = 2 * p.n_nodes, rows = round_up(m, kRowPad);
  const bool need_alpha = p.grad_alpha != nullptr;
  const auto x = take_packed<Path>(arena, p.views, rows);
  const WeightPlan<WPath> weights(arena, p.weights, p.n_nodes, rows);
  const int64_t z_columns = int64_t{x.z_steps} * Path::kStep;
  const GradientCut cut = cut_gradient(
      arena.limits, rows, Path::kTile, Path::kParts * sizeof(Element), sizeof(T), z_columns,
      int64_t{x.e_steps} * Path::kStep, p.grad_z || need_alpha, p.grad_e || need_alpha);
  const int64_t partial_ld = cut.column_tiles * Path::kTile;
  T* inverse = arena.take<T>(rows);
  Element* t_hi = arena.take<Element>(cut.panel_rows * cut.chunk);
  Element* t_lo = Path::kParts == 2 ? arena.take<Element>(cut.panel_rows * cut.chunk) : nullptr;
  T* partial = arena.take<T>(cut.splits * cut.panel_rows * partial_ld);
  double* alpha_slots = arena.take<double>(rows);
  if (arena.measuring()) return cudaSuccess;

  FASTCLUST_TRY(pack<Path>(p.views, p.n_nodes, rows, weights.order(), {x, p.views.alpha, nullptr},
                           nullptr, stream));
  FASTCLUST_TRY(weights.prepare(stream));
  const InverseArgs<T> inverses{p.n_nodes, rows, weights.order(), p.row_sums, inverse};
  FASTCLUST_TRY(
      launch(&inverse_kernel<T>, dim3(blocks(rows, kThreads)), kThreads, 0, stream, inverses));
  for (int64_t row = 0; row < rows; row += cut.panel_rows) {
    const int64_t panel_rows = std::min(cut.panel_rows, rows - row);
    const int64_t panel_tiles = panel_rows / Path::kTile;
    for (int64_t column = 0; column < rows && cut.column_tiles; column += cut.chunk) {
      const int64_t chunk = std::min(cut.chunk, rows - column);
      const TileArgs<Path, WPath> tiles{x,
                                        weights.args(),
                                        p.views.alpha,
                                        static_cast<int>(m),
                                        inverse,
                                        static_cast<int>(row),
                                        static_cast<int>(column),
                                        t_hi,
                                        t_lo,
                                        static_cast<int>(cut.chunk)};
      const dim3 tile_grid(static_cast<unsigned>(panel_tiles),
                           static_cast<unsigned>(chunk / Path::kTile));
      FASTCLUST_TRY(launch(&tile_kernel<Path, WPath, false>, tile_grid, kThreads,
                           Path::kSharedBytes, stream, tiles));
      if (p.weights.n_snapshots) {
        FASTCLUST_TRY(launch(&tile_kernel<Path, WPath, true>, tile_grid, kThreads,
                             std::max(Path::kSharedBytes, WPath::kSharedBytes), stream, tiles));
      }
      const ProductArgs<Path> product{x,
                                      t_hi,
                                      t_lo,
                                      cut.chunk,
                                      column,
                                      chunk,
                                      cut.first_column,
                                      partial,
                                      cut.panel_rows,
                                      partial_ld,
                                      column > 0};
      const dim3 grid(static_cast<unsigned>(cut.column_tiles),
                      static_cast<unsigned>(panel_tiles), static_cast<unsigned>(cut.splits));
      FASTCLUST_TRY(launch(&product_kernel<Path>, grid, kThreads, Path::kSharedBytes, stream,
                           product));
    }
    const FinishArgs<T> finish{p.views,
                               p.n_nodes,
                               weights.order(),
                               partial,
                               static_cast<int>(cut.splits),
                               cut.panel_rows,
                               partial_ld,
                               row,
                               -cut.first_column,
                               z_columns - cut.first_column,
                               p.grad_loss,
                               p.grad_z,
                               p.grad_e,
                               need_alpha ? alpha_slots : nullptr};
    const int64_t real_rows = std::clamp<int64_t>(m - row, 0, panel_rows);
    FASTCLUST_TRY(launch(&finish_kernel<T>, dim3(static_cast<unsigned>(real_rows)), kThreads, 0,
                         stream, finish));
  }
  if (!need_alpha) return cudaSuccess;
  const AlphaArgs<T> alpha{p.n_nodes, alpha_slots, p.grad_loss, p.grad_alpha};
  return launch(&alpha_kernel<T>, dim3(1), kReduceThreads, 0, stream, alpha);
}

template <typename Path, typename WPath>
cudaError_t drive(const RangeParams<typename Path::Acc>& p, Arena& arena,
                  cudaStream_t stream) {
  using T = typename Path::Acc;
  const int64_t m = 2 * p.n_nodes, rows = round_up(m, kRowPad), n_tiles = rows / Path::kTile;
  const int64_t count = tiles_before_group(n_groups(n_tiles), n_tiles);
  const auto x = take_packed<Path>(arena, p.views, rows);
  T* slots = arena.take<T>(2 * count);
  if (arena.measuring()) return cudaSuccess;

  FASTCLUST_TRY(pack<Path>(p.views, p.n_nodes, rows, nullptr, {x, p.views.alpha, nullptr}, nullptr,
                           stream));
  const RangeArgs<Path> args{x, p.views.alpha, static_cast<int>(m), n_tiles, slots};
  FASTCLUST_TRY(launch(&range_kernel<Path>, dim3(static_cast<unsigned>(count)), kThreads,
                       Path::kSharedBytes, stream, args));
  const RangeFinishArgs<T> finish{count, slots, p.range};
  return launch(&range_finish_kernel<T>, dim3(1), kThreads, 0, stream, finish);
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
    case Precision::kBf16x3: return drive<Bf16x3Path, Bf16x3Path>(p, arena, stream);
    case Precision::kTf32: return drive<Tf32Path, Bf16x3Path>(p, arena, stream);
    case Precision::kBf16: return drive<Bf16Path, Bf16x3Path>(p, arena, stream);
  }
  return cudaErrorInvalidValue;
}
// Least and greatest entry: one arithmetic, whatever the precision of the loss.
inline cudaError_t drive(const RangeParams<float>& p, Arena& arena, cudaStream_t stream) {
  return drive<Bf16x4Path, Bf16x4Path>(p, arena, stream);
}

}  // namespace fastclust::infonce
