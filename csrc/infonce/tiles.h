// Index maps, schedule and element arithmetic of the CUDA infonce kernels, free of CUDA itself so
// that CPU tests execute the very functions the device runs.
//
// Rows. Inside the kernels row q = 2 * rank + view: both views of a node are neighbours, so every
// positive pair (q, q ^ 1) lies in a diagonal tile, and `order` (rank -> node) puts the nodes with
// weights first, so that most tiles either need the snapshot product for all entries or for none.
//
// Tiles. S, W and T are symmetric; the forward pass visits the tiles (i, j) with i <= j only. The
// tiles are numbered in groups of kGroup tile rows, column by column inside a group: the blocks in
// flight at one moment then cover a roughly square patch and share their operands in L2.
#pragma once

#include <math.h>  // overloads for float and double in the global namespace, as on the device
#include <string.h>

#include <cstdint>

#include "common/hd.h"

namespace fastclust::infonce {

// ---- rows ---------------------------------------------------------------------------------------

constexpr int64_t kRowPad = 128;  // packed operands have a multiple of this many rows

FASTCLUST_HD int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Row of z and e behind row q of the packed operands; order == nullptr is the identity.
FASTCLUST_HD int64_t source_row(int64_t q, int64_t n_nodes, const int32_t* order) {
  const int64_t rank = q >> 1;
  return (q & 1) * n_nodes + (order ? order[rank] : rank);
}

FASTCLUST_HD bool is_positive_pair(int i, int k) { return (i ^ 1) == k; }

// ---- schedule of the upper triangle -----------------------------------------------------------

constexpr int64_t kGroup = 16;  // tile rows per group

struct Tile {
  int64_t i, j;  // tile row <= tile column
};

// Tiles in the groups before group g of a triangle with n_tiles tile rows.
FASTCLUST_HD int64_t tiles_before_group(int64_t g, int64_t n_tiles) {
  const int64_t rows = g * kGroup < n_tiles ? g * kGroup : n_tiles;
  return rows * n_tiles - rows * (rows - 1) / 2;
}

FASTCLUST_HD int64_t n_groups(int64_t n_tiles) { return (n_tiles + kGroup - 1) / kGroup; }

// The index-th tile; integers only, so exact at any size.
FASTCLUST_HD Tile tile_at(int64_t index, int64_t n_tiles) {
  int64_t low = 0, high = n_groups(n_tiles) - 1;  // the group holding index
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (tiles_before_group(middle, n_tiles) <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t first = low * kGroup;
  const int64_t rows = n_tiles - first < kGroup ? n_tiles - first : kGroup;
  int64_t rest = index - tiles_before_group(low, n_tiles);
  // Columns first .. first + rows - 1 hold 1, 2, .., rows tiles; all later ones hold `rows`.
  for (int64_t c = 0; c < rows; ++c) {
    if (rest <= c) return {first + rest, first + c};
    rest -= c + 1;
  }
  return {first + rest % rows, first + rows + rest / rows};
}

// ---- fixed slots of the partial row sums ------------------------------------------------------
//
// One band is a run of whole groups whose partial sums are held at once. Tile (i, j) leaves the
// sums of its rows in row_slot, and for i < j the sums of its columns in column_slot; every slot
// has one writer.

struct Band {
  int64_t first_tile_row, end_tile_row;  // [first, end), tile rows of this band
  int64_t tile;                          // edge of a tile
  int64_t n_rows;                        // padded rows of the matrix
};

// rows: [n_rows / tile (tile column), band rows]
FASTCLUST_HD int64_t row_slot(const Band& band, int64_t j, int64_t row) {
  const int64_t band_rows = (band.end_tile_row - band.first_tile_row) * band.tile;
  return j * band_rows + (row - band.first_tile_row * band.tile);
}
// columns: [band tile rows, n_rows]
FASTCLUST_HD int64_t column_slot(const Band& band, int64_t i, int64_t column) {
  return (i - band.first_tile_row) * band.n_rows + column;
}

// Sum of exp(W S) of one row over everything this band has computed for it, in fixed order.
template <typename T>
FASTCLUST_HD double band_row_sum(const Band& band, const T* row_sums, const T* column_sums,
                                 int64_t row) {
  const int64_t block = row / band.tile;
  const int64_t above = block < band.end_tile_row ? block : band.end_tile_row;
  double sum = 0;
  for (int64_t i = band.first_tile_row; i < above; ++i) {
    sum += column_sums[column_slot(band, i, row)];
  }
  if (block >= band.first_tile_row && block < band.end_tile_row) {
    for (int64_t j = block; j < band.n_rows / band.tile; ++j) {
      sum += row_sums[row_slot(band, j, row)];
    }
  }
  return sum;
}

// ---- fragments --------------------------------------------------------------------------------
//
// Eight warps in 2 x 4 share a tile; a warp holds MI x NJ fragments of 16 x 8, laid out as the
// result of mma.sync.m16n8: lane = 4 g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
// The plain-arithmetic path owns the same elements, so all paths share one epilogue.

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpsM = 2;
constexpr int kWarpsN = 4;

FASTCLUST_HD int fragment_row(int mi_count, int warp, int lane, int mi, int half) {
  return ((warp % kWarpsM) * mi_count + mi) * 16 + (lane >> 2) + 8 * half;
}
FASTCLUST_HD int fragment_column(int nj_count, int warp, int lane, int nj, int element) {
  return ((warp / kWarpsM) * nj_count + nj) * 8 + 2 * (lane & 3) + element;
}

// ---- shared memory of the matrix path ---------------------------------------------------------
//
// K-major tile: 128 rows of 64 bytes (32 bf16 or 16 tf32), four 16-byte chunks per row. The chunk
// is XORed with row / 2 so that the eight rows one ldmatrix phase reads hit all 32 banks once.

constexpr int kChunk = 16;    // bytes per cp.async and per ldmatrix row
constexpr int kRowBytes = 64;  // bytes of K per stage

FASTCLUST_HD int k_major_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// N-major tile (the second operand of T [Z | E]): rows of 128 elements. bf16 is read by
// ldmatrix.trans, eight k at one chunk; tf32 by single words, four k times eight n.
template <int kElementBytes>
FASTCLUST_HD int n_major_offset(int k, int chunk) {
  constexpr int chunks = 128 * kElementBytes / kChunk;
  const int swizzle = kElementBytes == 2 ? (k & 7) : (k & 3) << 1;
  return k * chunks * kChunk + ((chunk ^ swizzle) << 4);
}

// Row and chunk whose address lane gives to ldmatrix.x4, relative to the fragment's first row and
// to the first chunk of a 32-byte step of k.
FASTCLUST_HD int a_lane_row(int lane) { return (lane & 7) + ((lane >> 3) & 1) * 8; }
FASTCLUST_HD int a_lane_chunk(int lane) { return lane >> 4; }
FASTCLUST_HD int b_lane_row(int lane) { return (lane & 7) + (lane >> 4) * 8; }
FASTCLUST_HD int b_lane_chunk(int lane) { return (lane >> 3) & 1; }
// The same for ldmatrix.x4.trans on the N-major tile: k within 16, chunk within two.
FASTCLUST_HD int bt_lane_k(int lane) { return (lane & 7) + ((lane >> 3) & 1) * 8; }
FASTCLUST_HD int bt_lane_chunk(int lane) { return lane >> 4; }

// ---- alpha Z Z^T + (1 - alpha) E E^T with one accumulator --------------------------------------
//
// The part with the smaller factor is summed first, scaled once by the ratio of the factors (never
// above 1 in magnitude, and the divisor never below 1/2), then the other part is added, and the
// larger factor multiplies the end result. One copy of unscaled operands serves both sides, and
// no square root of a factor is needed, which fails once alpha leaves [0, 1].

template <typename T>
struct Mix {
  bool e_first;
  T ratio;  // smaller factor / larger factor
  T scale;  // larger factor

  // k steps of the part that goes second; 0: the ratio is still due at the end.
  FASTCLUST_HD int second_steps(int z_steps, int e_steps) const {
    return e_first ? z_steps : e_steps;
  }
};
template <typename T>
FASTCLUST_HD Mix<T> mix_of(T alpha) {
  const T beta = T(1) - alpha;
  const T magnitude_z = alpha < T(0) ? -alpha : alpha;
  const T magnitude_e = beta < T(0) ? -beta : beta;
  if (magnitude_z >= magnitude_e) return {true, beta / alpha, alpha};
  return {false, alpha / beta, beta};
}

// Walks the k steps of a similarity tile: first the part that goes first, then the other.
struct SimilaritySteps {
  int first_begin, first_count;    // k steps of the part that goes first
  int second_begin, second_count;  // and of the other

  FASTCLUST_HD SimilaritySteps(int z_steps, int e_steps, bool e_first)
      : first_begin(e_first ? z_steps : 0),
        first_count(e_first ? e_steps : z_steps),
        second_begin(e_first ? 0 : z_steps),
        second_count(e_first ? z_steps : e_steps) {}
  FASTCLUST_HD int total() const { return first_count + second_count; }
  // Which step of the packed columns the step-th is.
  FASTCLUST_HD int column_step(int step) const {
    return step < first_count ? first_begin + step : second_begin + step - first_count;
  }
};

// ---- number formats ---------------------------------------------------------------------------

FASTCLUST_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
FASTCLUST_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// bf16 by round to nearest even; finite input.
FASTCLUST_HD uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FASTCLUST_HD float from_bf16(uint16_t value) { return bits_float(uint32_t{value} << 16); }

// tf32 (10 bits of mantissa) by round to nearest, ties away from zero.
FASTCLUST_HD float to_tf32(float value) {
  return bits_float((float_bits(value) + 0x1000u) & 0xffffe000u);
}

// ---- elements ---------------------------------------------------------------------------------

// Highest snapshot that both nodes belong to, -1 for none: its weight is the entry's latest.
FASTCLUST_HD int latest_common(uint64_t mask_i, uint64_t mask_k) {
  const uint64_t common = mask_i & mask_k;
#if defined(__CUDA_ARCH__)
  return 63 - __clzll(static_cast<long long>(common));
#else
  return common ? 63 - __builtin_clzll(common) : -1;
#endif
}

// |[same label] - (s - min) / (max - min)|, the hardness before its exponent (HSAN, Eq. 9).
template <typename T>
FASTCLUST_HD T hardness_base(T s, bool same_label, T s_min, T inverse_range) {
  const T x = (same_label ? T(1) : T(0)) - (s - s_min) * inverse_range;
  return x < T(0) ? -x : x;
}
template <typename T>
FASTCLUST_HD T hardness_power(T base, T beta) {
  if (beta == T(1)) return base;
  if (beta == T(2)) return base * base;
  if (base <= T(0)) return beta == T(0) ? T(1) : T(0);
  return exp2(beta * log2(base));
}

// exp(w s) off the diagonal of the true 2N x 2N matrix, 0 elsewhere.
template <typename T>
FASTCLUST_HD T pair_term(T logit, int i, int k, int n_rows) {
  return (i < n_rows && k < n_rows && i != k) ? exp(logit) : T(0);
}

// Entry of T without its factor 1 / (2N): (P W)(1/r_i + 1/r_k) - 2 Pi W.
template <typename T>
FASTCLUST_HD T gradient_term(T term, T weight, T inverse_i, T inverse_k, bool positive) {
  return weight * (term * (inverse_i + inverse_k) - (positive ? T(2) : T(0)));
}

}  // namespace fastclust::infonce
