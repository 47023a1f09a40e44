// What the CPU driver (infonce_cpu.cpp) asks of an instruction set: products and epilogues of one
// strip, the part of a tile that lies in one sliver of columns. See infonce_tile_impl.h.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace fastclust::infonce {

constexpr int64_t kTile = 192;    // rows and columns of a tile of S; a multiple of every sliver
constexpr int64_t kMaxSliver = 48;
constexpr int64_t kTileLd = 208;  // row stride of a stored tile of T: spreads columns over L1 sets

// Labels and lane masks have the width of the element.
template <typename T>
struct LaneInt;
template <>
struct LaneInt<float> {
  using type = int32_t;
};
template <>
struct LaneInt<double> {
  using type = int64_t;
};

// Where a strip lies and what is known of its rows and columns. Positions count from the first row
// of the tile; column j stands in the sliver.
template <typename T>
struct Strip {
  int64_t rows;         // rows that exist, at most kTile
  int64_t columns;      // columns that exist, at most nr
  int64_t first;        // position of column 0 among the rows of a diagonal tile; -1 off the diagonal
  T alpha, rest;        // S = alpha gz + rest ge, rest = 1 - alpha
  const T* gz;          // [rows, nr] Z Z^T
  const T* ge;          // [rows, nr] E E^T or nullptr
  const T* w;           // [rows, nr] weights, rows kTile apart, or nullptr: 1
};

// One snapshot's weights in a strip: w is overwritten where row and column are both members.
template <typename T>
struct WeightStrip {
  using Int = typename LaneInt<T>::type;
  int64_t rows;
  T alpha, rest;
  const T* gz;               // [rows, nr] products of the snapshot
  const T* ge;               // [rows, nr] or nullptr
  T least, per_width;        // scaled similarity (s - least) * per_width
  double beta;
  const Int* row_labels;     // [rows]
  const Int* column_labels;  // [nr]
  const Int* row_member;     // [rows] 0 or -1
  const Int* column_member;  // [nr] 0 or -1
  T* w;                      // [rows, nr], rows kTile apart
};

// A stored tile of T, ready to be read from both sides: [kTile, kTileLd] elements; in pairs of bf16
// [kTile, kTileLd / 2] pairs of columns, then [kTile / 2, kTileLd] pairs of rows.
constexpr int64_t kStoredTile = kTile * kTileLd;

// One product that adds to a block of gradient rows: T[rows, k] F[k, columns].
template <typename X>
struct Segment {
  const X* tile;
  int64_t k;   // rows of F
  const X* f;  // [k / terms, nr]
};

// Where the columns of a sliver of [dZ | dE] and of F = g/M [alpha Z | (1 - alpha) E] lie: one or two
// runs of columns.
template <typename T>
struct Target {
  T* base;         // element of the gradient at row 0 and the run's first column
  const T* from;   // the same element of Z or E
  T scale;         // g/M alpha or g/M (1 - alpha)
  int64_t ld;      // row stride of both
  int64_t offset;  // first column of the run within the sliver
  int64_t count;   // columns of the run; 0: there is none
};

// T: element of the embeddings and of all sums. X: operand of the products, T or Bf16Pair; one X
// holds `terms` elements that follow each other along the sum.
template <typename T, typename X>
struct TileKernels {
  int64_t nr;     // columns of a sliver, at most kMaxSliver
  int64_t lanes;  // of a vector
  int64_t terms;  // of an operand

  // [ceil(d / terms), nr] sliver of nr rows of a matrix; a null row is zeros.
  void (*pack_rows)(const T* const* rows, int64_t d, X* sliver);

  // [kTile / terms, nr] sliver of the factor F, of a block [kTile, nr].
  void (*pack_factor)(const T* block, X* sliver);

  // out[rows, nr] = A B^T: A the slivers [rows / nr][k, nr] of a tile, B one sliver [k, nr].
  void (*similarity)(int64_t rows, int64_t k, const X* a, const X* b, T* out);

  void (*weigh)(const WeightStrip<T>& strip);

  // P = exp(w S), 0 on the diagonal: row sums by lane (row_sums [kTile, lanes], added to) and
  // column sums [nr] (set). `positive` [rows] gets w S of each row's other view on diagonal tiles.
  void (*forward)(const Strip<T>& strip, T* row_sums, T* column_sums, T* positive);

  // P w (per_row + per_column), T without its positive pairs, into columns column to column + nr of
  // a stored tile (those that do not exist are 0). On diagonal tiles positive[i] is the weight of
  // row i's other view. Returns sum T (gz - ge), positive pairs included, each -2 w.
  double (*gradient)(const Strip<T>& strip, const T* per_row, const T* per_column, X* tile,
                     int64_t column, T* positive);

  void (*range)(const Strip<T>& strip, T* least, T* greatest);  // widens [least, greatest]

  // Adds sum over segments to rows of the gradient; `fresh` overwrites them instead. Tiles are read
  // transposed or as they stand.
  void (*accumulate)(int64_t rows, const int64_t* row_of, int64_t n_segments,
                     const Segment<X>* segments, bool transposed, const Target<T>* targets,
                     bool fresh);
};

const TileKernels<float, float>& tile_kernels_avx2(float);
const TileKernels<double, double>& tile_kernels_avx2(double);
const TileKernels<float, float>& tile_kernels_avx512(float);
const TileKernels<double, double>& tile_kernels_avx512(double);
const TileKernels<float, Bf16Pair>& tile_kernels_avx512bf16();

}  // namespace fastclust::infonce
