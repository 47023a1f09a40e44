// Index maps, schedule and element arithmetic of the CUDA infonce kernels, free of CUDA itself so
// that CPU tests execute the very functions the device runs.
//
// Rows. Inside the kernels row q = 2 * rank + view: both views of a node are neighbours, so every
// positive pair (q, q ^ 1) lies in a diagonal tile, and `order` (rank -> node) puts the nodes with
// weights first, so that most tiles either need the snapshot product for all entries or for none.
//
// Tiles. S, W and T are symmetric. Rows are cut into panels and, for each panel, columns into chunks
// (tiles of 128 rows, the last may be partly padding); only these two are packed at a time. A chunk
// beyond its panel stands for both (i, k) and (k, i). Inside a panel the forward pass visits the
// tiles on and above the diagonal only.
#pragma once

#include <math.h>  // overloads for float and double in the global namespace, as on the device
#include <string.h>

#include <cstdint>

#include "common/hd.h"

namespace fastclust::infonce {

// ---- rows ---------------------------------------------------------------------------------------

constexpr int64_t kRowPad = 128;  // panels and chunks have a multiple of this many rows

FASTCLUST_HD int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Row of z and e behind row q of the packed operands; order == nullptr is the identity.
FASTCLUST_HD int64_t source_row(int64_t q, int64_t n_nodes, const int32_t* order) {
  const int64_t rank = q >> 1;
  return (q & 1) * n_nodes + (order ? order[rank] : rank);
}

FASTCLUST_HD bool is_positive_pair(int i, int k) { return (i ^ 1) == k; }

// ---- packed operands --------------------------------------------------------------------------
//
// A matrix is stored as blocks of 128 rows times 128 bytes, 16 KB each, blocks of the same rows one
// after the other. Inside a block the 16-byte chunk c of row r lies at chunk c ^ (r & 7): the order
// in which Hopper's matrix unit reads shared memory (128-byte swizzle), so that a block is copied
// there as it is, and eight rows of one chunk meet all banks once.

constexpr int kChunk = 16;  // bytes per copy, per ldmatrix row and per unit of the swizzle
constexpr int kBlockRows = 128;
constexpr int kBlockColumns = 128;  // bytes
constexpr int kBlockBytes = kBlockRows * kBlockColumns;

// Byte of a row, in a matrix of n_blocks blocks across. Patches stay below 4 GB, see check_width.
template <typename Int = uint32_t>
FASTCLUST_HD Int packed_offset(Int n_blocks, Int row, Int byte) {
  const Int block = row / kBlockRows * n_blocks + byte / kBlockColumns;
  const Int chunk = (byte % kBlockColumns / kChunk) ^ (row & 7);
  return block * kBlockBytes + row % kBlockRows * kBlockColumns + chunk * kChunk + byte % kChunk;
}

// ---- schedule -----------------------------------------------------------------------------------

struct Tile {
  int i, j;  // tile row within the panel, tile column within the chunk
};
constexpr int kGroup = 16;  // tile rows per group

// The index-th tile of a rectangle, in groups of kGroup tile rows, column by column inside a group:
// the blocks in flight at one moment cover a roughly square patch and share its operands in L2.
FASTCLUST_HD Tile tile_at(int index, int rows, int columns) {
  const int first = index / (kGroup * columns) * kGroup;
  const int height = rows - first < kGroup ? rows - first : kGroup;
  const int rest = index - first * columns;
  return {first + rest % height, rest / height};
}

// Sums over panel and chunk. Tile (i, j) leaves the sums of its rows in row_slot and, unless it is
// on the diagonal, the sums of its columns in column_slot; every slot has one writer.
struct Patch {
  int64_t row_begin, rows;        // panel, in packed rows of the whole matrix
  int64_t column_begin, columns;  // chunk
  int64_t tile;                   // edge of a tile

  FASTCLUST_HD int row_tiles() const { return static_cast<int>(rows / tile); }
  FASTCLUST_HD int column_tiles() const { return static_cast<int>(columns / tile); }
  FASTCLUST_HD bool has_row(int64_t q) const { return q >= row_begin && q < row_begin + rows; }
  FASTCLUST_HD bool has_column(int64_t q) const {
    return q >= column_begin && q < column_begin + columns;
  }
  // Below the diagonal, so done elsewhere by symmetry.
  FASTCLUST_HD bool skips(Tile t) const {
    return column_begin + t.j * tile < row_begin + t.i * tile;
  }
  FASTCLUST_HD bool on_diagonal(Tile t) const {
    return column_begin + t.j * tile == row_begin + t.i * tile;
  }
  // The chunk lies inside the panel or wholly beyond it.
  FASTCLUST_HD bool inside() const { return column_begin < row_begin + rows; }

  FASTCLUST_HD int64_t row_slot(int64_t j, int64_t local_row) const { return j * rows + local_row; }
  FASTCLUST_HD int64_t column_slot(int64_t i, int64_t local_column) const {
    return i * columns + local_column;
  }
};

// Sum of exp(W S) over the part of row q that this patch has computed, in fixed order.
template <typename T>
FASTCLUST_HD double patch_row_sum(const Patch& p, const T* row_sums, const T* column_sums,
                                  int64_t q) {
  double sum = 0;
  if (p.has_column(q)) {  // tiles above the diagonal in q's column
    for (int64_t i = 0; i < p.row_tiles() && p.row_begin + (i + 1) * p.tile <= q; ++i) {
      sum += column_sums[p.column_slot(i, q - p.column_begin)];
    }
  }
  if (p.has_row(q)) {  // tiles on and right of the diagonal in q's row
    const int64_t block = q / p.tile * p.tile;
    for (int64_t j = 0; j < p.column_tiles(); ++j) {
      if (p.column_begin + j * p.tile < block) continue;
      sum += row_sums[p.row_slot(j, q - p.row_begin)];
    }
  }
  return sum;
}

// ---- fragments --------------------------------------------------------------------------------
//
// Eight warps share a tile, warps_m of them along its rows; a warp holds MI x NJ fragments of
// 16 x 8, laid out as the result of mma.sync.m16n8 and, with warps_m = 8 and MI = 1, of wgmma:
// lane = 4 g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
// The plain-arithmetic path owns the same elements, so all paths share one epilogue.

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

FASTCLUST_HD int fragment_row(int warps_m, int mi_count, int warp, int lane, int mi, int half) {
  return ((warp % warps_m) * mi_count + mi) * 16 + (lane >> 2) + 8 * half;
}
FASTCLUST_HD int fragment_column(int warps_m, int nj_count, int warp, int lane, int nj,
                                 int element) {
  return ((warp / warps_m) * nj_count + nj) * 8 + 2 * (lane & 3) + element;
}

// ---- shared memory of the matrix path ---------------------------------------------------------
//
// K-major tile: 128 rows of 64 bytes (32 bf16 or 16 tf32), four 16-byte chunks per row. The chunk
// is XORed with row / 2 so that the eight rows one ldmatrix phase reads hit all 32 banks once.

constexpr int kRowBytes = 64;  // bytes of K per stage

FASTCLUST_HD int k_major_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// N-major tile (the second operand of T [Z | E], the first of T^T [Z | E]): rows of 128 elements.
// bf16 is read by ldmatrix.trans, eight k at one chunk; tf32 by single words, four k times eight n.
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
// The same for ldmatrix.x4.trans on the N-major tile: k within 16, chunk within two; as the second
// operand, then as the first.
FASTCLUST_HD int bt_lane_k(int lane) { return (lane & 7) + ((lane >> 3) & 1) * 8; }
FASTCLUST_HD int bt_lane_chunk(int lane) { return lane >> 4; }
FASTCLUST_HD int at_lane_k(int lane) { return (lane & 7) + (lane >> 4) * 8; }
FASTCLUST_HD int at_lane_chunk(int lane) { return (lane >> 3) & 1; }

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

  FASTCLUST_HD SimilaritySteps(int z_steps, int e_begin, int e_steps, bool e_first)
      : first_begin(e_first ? e_begin : 0),
        first_count(e_first ? e_steps : z_steps),
        second_begin(e_first ? 0 : e_begin),
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
// Two of them in a word, the first below: one instruction on the device.
FASTCLUST_HD uint32_t to_bf16_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return to_bf16(first) | uint32_t{to_bf16(second)} << 16;
#endif
}

// tf32 (10 bits of mantissa) by round to nearest, ties away from zero. NaN stays: that of a GPU is all
// ones, which would round to zero.
FASTCLUST_HD float to_tf32(float value) {
  return value == value ? bits_float((float_bits(value) + 0x1000u) & 0xffffe000u) : value;
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

// Whether two different rows of the true 2N x 2N matrix meet: only they have a term exp(w s).
FASTCLUST_HD bool is_pair(int i, int k, int n_rows) { return i < n_rows && k < n_rows && i != k; }

// Entry of T without its factor 1 / (2N): (P W)(1/r_i + 1/r_k) - 2 Pi W.
template <typename T>
FASTCLUST_HD T gradient_term(T term, T weight, T inverse_i, T inverse_k, bool positive) {
  return weight * (term * (inverse_i + inverse_k) - (positive ? T(2) : T(0)));
}

}  // namespace fastclust::infonce
