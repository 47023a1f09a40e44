// Hard-sample InfoNCE on CUDA, sm_80 and later: loss, gradients and the range of S (formulas in
// infonce.h). What runs is, with M = 2N rows of width D = dz + de:
//
//   pack        [Z | E] -> rows in the order of tiles.h, zero-padded, bf16 hi (+ lo), tf32 or as is
//   forward     one block per tile (i <= j) of the upper triangle: S by cp.async + mma.sync, W from
//               the snapshots by the same product, exp, row and column sums to fixed slots; tiles
//               with and without weights are done by two launches
//   gradient    per panel of rows and chunk of columns: T recomputed into a workspace that stays
//               in L2, then T [Z | E] into fixed partial slots, then one pass that adds the
//               slots, scales, undoes the order and takes the dot products for d alpha
//
// Bound: matrix throughput. M^2 D flop forward (half of S, by symmetry), 2 M^2 D to recompute T by
// full rows and 2 M^2 D for T [Z | E]; weights cost one more product on the tiles that need them.
// Filling only half of T and using each tile for both sides would save M^2 D but adds a
// read-modify-write of the gradients per panel, about the same time at D = 1000 by arithmetic.
// The extra memory is one packed copy of [Z | E] (and of each snapshot) plus at most 64 MB.
//
// Precision: bf16 is one product of rounded operands; bf16x3 splits operands and T into hi + lo
// and adds lo*hi, hi*lo, hi*hi, which is float32 grade and therefore also serves fp32; tf32 is one
// product of m16n8k8; float64 uses plain arithmetic (PlainPath), for exactness rather than speed.
// Snapshot products are bf16x3 in every float32 mode, since |Q - minmax(S)| near 0 magnifies their
// error; the range of S adds the lo*lo product, which the diagonal needs.
//
// No atomics, no host synchronisation, no allocation: results have the same bits every time, and
// the launches can be captured in a CUDA graph.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/mma.cuh"
#include "infonce/infonce.h"
#include "infonce/tiles.h"

namespace fastclust::infonce {

// ---- operands ---------------------------------------------------------------------------------

// [Z | E] in a path's format; rows padded to kRowPad, both parts to whole k steps, ld to 128.
template <typename Element>
struct Packed {
  Element* hi;           // [rows, ld]
  Element* lo;           // [rows, ld], used by paths with two parts
  int64_t ld;            // elements
  int z_steps, e_steps;  // k steps of each part; E starts at column z_steps * step width
};

// One snapshot as the kernels see it.
template <typename Element, typename Acc>
struct Snapshot {
  Packed<Element> x;
  const Acc* alpha;  // []
  const Acc* range;  // [2]
};

// ---- pieces of a tile -------------------------------------------------------------------------

// Multi-stage cp.async pipeline over `total` k steps: load(step, stage) fills a stage of shared
// memory, compute(step, stage) finds it there. Ends with all of shared memory free for other use.
template <int kStages, typename Load, typename Compute>
__device__ __forceinline__ void pipeline(int total, Load load, Compute compute) {
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < total) load(stage, stage);
    cp_async_commit();
  }
  for (int step = 0; step < total; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // step's tile is visible to all; the stage below is no longer read by any
    const int next = step + kStages - 1;
    if (next < total) load(next, next % kStages);
    cp_async_commit();
    compute(step, step % kStages);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// Tensor-core path: Element is uint16_t (bf16) or float (tf32). With more than one product the
// operands have a hi and a lo part, and lo*hi + hi*lo + hi*hi is summed (four: lo*lo as well); both
// parts of a k step are staged together, so that three products cost twice the traffic of one.
template <typename Element_, int kProducts_>
struct MmaPath {
  using Element = Element_;
  using Acc = float;
  static constexpr int kProducts = kProducts_;
  static constexpr bool kBf16 = sizeof(Element) == 2;
  static constexpr int kParts = kProducts > 1 ? 2 : 1;
  static constexpr int kTile = 128, kMi = 4, kNj = 4;
  static constexpr int kStep = kRowBytes / sizeof(Element);  // columns per k step
  static constexpr int kStages = kParts == 1 ? 4 : 3;
  static constexpr int kTileBytes = kTile * kRowBytes;         // one part of one operand
  static constexpr int kStageBytes = 2 * kParts * kTileBytes;  // left parts, right parts
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "a block of sm_86 and sm_89 has no more");
  using Fragment = float[kMi][kNj][4];

  static __device__ __forceinline__ void load_k_major(unsigned char* tile, const Element* source,
                                                      int64_t ld) {
    const int chunk = threadIdx.x & 3;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int row = (threadIdx.x >> 2) + 64 * u;
      const unsigned char* bytes = reinterpret_cast<const unsigned char*>(source + row * ld);
      cp_async16(tile + k_major_offset(row, chunk), bytes + chunk * kChunk);
    }
  }
  static __device__ __forceinline__ void load_n_major(unsigned char* tile, const Element* source,
                                                      int64_t ld) {
    constexpr int chunks = kTile * sizeof(Element) / kChunk;  // per row of k
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int k = (threadIdx.x + kThreads * u) / chunks;
      const int chunk = threadIdx.x % chunks;
      const unsigned char* bytes = reinterpret_cast<const unsigned char*>(source + k * ld);
      cp_async16(tile + n_major_offset<sizeof(Element)>(k, chunk), bytes + chunk * kChunk);
    }
  }

  // Right operand of one 32-byte step of k, fragments of 8 columns each.
  template <bool kNMajor>
  static __device__ __forceinline__ void load_right(const unsigned char* tile, int kk,
                                                    uint32_t (&b)[kNj][2]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int column0 = (warp / kWarpsM) * kNj * 8;
    if constexpr (kNMajor && !kBf16) {
#pragma unroll
      for (int nj = 0; nj < kNj; ++nj) {
        const int n = column0 + nj * 8 + (lane >> 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = kk * 8 + (lane & 3) + 4 * half;
          b[nj][half] = *reinterpret_cast<const uint32_t*>(tile + n_major_offset<4>(k, n >> 2) +
                                                           (n & 3) * 4);
        }
      }
    } else {
#pragma unroll
      for (int nj = 0; nj < kNj; nj += 2) {
        uint32_t r[4];
        if constexpr (kNMajor) {
          ldmatrix_x4_trans(r, tile + n_major_offset<2>(kk * 16 + bt_lane_k(lane),
                                                        column0 / 8 + nj + bt_lane_chunk(lane)));
        } else {
          ldmatrix_x4(r, tile + k_major_offset(column0 + nj * 8 + b_lane_row(lane),
                                               2 * kk + b_lane_chunk(lane)));
        }
        b[nj][0] = r[0], b[nj][1] = r[1], b[nj + 1][0] = r[2], b[nj + 1][1] = r[3];
      }
    }
  }

  // acc += left right^T for one k step; kNMajor: acc += left right with right stored [k][n].
  template <bool kNMajor>
  static __device__ __forceinline__ void compute(const unsigned char* stage, Fragment& acc) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row0 = (warp % kWarpsM) * kMi * 16;
    const unsigned char* right = stage + kParts * kTileBytes;
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {  // 32 bytes of k: 16 bf16 or 8 tf32, one instruction deep
      uint32_t b[kParts][kNj][2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_right<kNMajor>(right + part * kTileBytes, kk, b[part]);
      }
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
        for (int left = kParts - 1; left >= 0; --left) {  // lo first
          uint32_t a[4];
          ldmatrix_x4(a, stage + left * kTileBytes +
                             k_major_offset(row0 + mi * 16 + a_lane_row(lane),
                                            2 * kk + a_lane_chunk(lane)));
#pragma unroll
          for (int part = kParts - 1; part >= 0; --part) {
            if (kProducts == 3 && left == 1 && part == 1) continue;
#pragma unroll
            for (int nj = 0; nj < kNj; ++nj) {
              if constexpr (kBf16) {
                mma_bf16(acc[mi][nj], a, b[part][nj]);
              } else {
                mma_tf32(acc[mi][nj], a, b[part][nj]);
              }
            }
          }
        }
    }
  }

  // acc = tile of S = alpha Z Z^T + (1 - alpha) E E^T, rows row0.. against rows column0.. .
  static __device__ __forceinline__ void similarity(unsigned char* shared,
                                                    const Packed<Element>& x,
                                                    const float* alpha, int row0, int column0,
                                                    Fragment& acc) {
    const SimilaritySteps steps(x.z_steps, x.e_steps, mix_of(*alpha).e_first);
    fill(acc, 0.f);
    pipeline<kStages>(
        steps.total(),
        [&](int step, int stage) {
          unsigned char* to = shared + stage * kStageBytes;
          const int64_t column = steps.column_step(step) * kStep;
          const int64_t left = row0 * x.ld + column, right = column0 * x.ld + column;
          load_k_major(to, x.hi + left, x.ld);
          load_k_major(to + kParts * kTileBytes, x.hi + right, x.ld);
          if constexpr (kParts == 2) {
            load_k_major(to + kTileBytes, x.lo + left, x.ld);
            load_k_major(to + 3 * kTileBytes, x.lo + right, x.ld);
          }
        },
        [&](int step, int stage) {
          // The factors are read where they are used: kept in registers they would cost a spill.
          if (step == steps.first_count) scale(acc, mix_of(*alpha).ratio);
          compute<false>(shared + stage * kStageBytes, acc);
        });
    const Mix<float> mix = mix_of(*alpha);
    scale(acc, mix.second_steps(x.z_steps, x.e_steps) ? mix.scale : mix.ratio * mix.scale);
  }

  // acc += T X for columns k_begin.. k_end of the panel T and rows k_offset + k of X.
  static __device__ __forceinline__ void product(unsigned char* shared, const Element* t_hi,
                                                 const Element* t_lo, int64_t t_ld,
                                                 const Packed<Element>& x, int64_t row0,
                                                 int64_t k_begin, int64_t k_end,
                                                 int64_t k_offset, int64_t column0,
                                                 Fragment& acc) {
    pipeline<kStages>(
        static_cast<int>((k_end - k_begin) / kStep),
        [&](int step, int stage) {
          unsigned char* to = shared + stage * kStageBytes;
          const int64_t k = k_begin + step * kStep;
          const int64_t left = row0 * t_ld + k, right = (k_offset + k) * x.ld + column0;
          load_k_major(to, t_hi + left, t_ld);
          load_n_major(to + kParts * kTileBytes, x.hi + right, x.ld);
          if constexpr (kParts == 2) {
            load_k_major(to + kTileBytes, t_lo + left, t_ld);
            load_n_major(to + 3 * kTileBytes, x.lo + right, x.ld);
          }
        },
        [&](int, int stage) { compute<true>(shared + stage * kStageBytes, acc); });
  }

  static __device__ __forceinline__ void fill(Fragment& acc, float value) {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mi][nj][c] = value;
  }
  static __device__ __forceinline__ void scale(Fragment& acc, float factor) {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mi][nj][c] *= factor;
  }

  static __device__ __forceinline__ void encode(float value, Element* hi, Element* lo) {
    if constexpr (kBf16) {
      *hi = to_bf16(value);
      if constexpr (kParts == 2) *lo = to_bf16(value - from_bf16(*hi));
    } else {
      *hi = to_tf32(value);
    }
  }
  // Two neighbouring elements of T in one store.
  static __device__ __forceinline__ void store_pair(Element* hi, Element* lo, float a, float b) {
    Element h[2], l[2];
    encode(a, &h[0], &l[0]);
    encode(b, &h[1], &l[1]);
    if constexpr (kBf16) {
      *reinterpret_cast<uint32_t*>(hi) = h[0] | uint32_t{h[1]} << 16;
      if constexpr (kParts == 2) *reinterpret_cast<uint32_t*>(lo) = l[0] | uint32_t{l[1]} << 16;
    } else {
      *reinterpret_cast<float2*>(hi) = make_float2(h[0], h[1]);
    }
  }
};

// Plain arithmetic, for float64: the same layout of elements over threads, no matrix instructions.
template <typename T>
struct PlainPath {
  using Element = T;
  using Acc = T;
  static constexpr int kParts = 1;
  static constexpr int kTile = 64, kMi = 2, kNj = 2;
  static constexpr int kStep = 16;
  static constexpr int kPitch = kTile + 1;  // [k][row], padded against bank conflicts
  static constexpr int kSharedBytes = 2 * kStep * kPitch * sizeof(T);
  using Fragment = T[kMi][kNj][4];

  static __device__ __forceinline__ void compute(const T* left, const T* right, Fragment& acc) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int k = 0; k < kStep; ++k) {
      T a[2 * kMi], b[2 * kNj];
#pragma unroll
      for (int i = 0; i < 2 * kMi; ++i) {
        a[i] = left[k * kPitch + fragment_row(kMi, warp, lane, i >> 1, i & 1)];
      }
#pragma unroll
      for (int j = 0; j < 2 * kNj; ++j) {
        b[j] = right[k * kPitch + fragment_column(kNj, warp, lane, j >> 1, j & 1)];
      }
#pragma unroll
      for (int i = 0; i < 2 * kMi; ++i)
#pragma unroll
        for (int j = 0; j < 2 * kNj; ++j) acc[i >> 1][j >> 1][(i & 1) * 2 + (j & 1)] += a[i] * b[j];
    }
  }
  // shared[k][row] = source[row * ld + k]
  static __device__ __forceinline__ void load_k_major(T* shared, const T* source, int64_t ld) {
    for (int u = threadIdx.x; u < kTile * kStep; u += kThreads) {
      shared[(u % kStep) * kPitch + u / kStep] = source[(u / kStep) * ld + u % kStep];
    }
  }
  // shared[k][column] = source[k * ld + column]
  static __device__ __forceinline__ void load_n_major(T* shared, const T* source, int64_t ld) {
    for (int u = threadIdx.x; u < kTile * kStep; u += kThreads) {
      shared[(u / kTile) * kPitch + u % kTile] = source[(u / kTile) * ld + u % kTile];
    }
  }

  static __device__ __forceinline__ void similarity(unsigned char* shared, const Packed<T>& x,
                                                    const T* alpha, int row0, int column0,
                                                    Fragment& acc) {
    T* left = reinterpret_cast<T*>(shared);
    T* right = left + kStep * kPitch;
    const Mix<T> mix = mix_of(*alpha);
    const SimilaritySteps steps(x.z_steps, x.e_steps, mix.e_first);
    fill(acc, T(0));
    for (int step = 0; step < steps.total(); ++step) {
      const int64_t column = steps.column_step(step) * kStep;
      load_k_major(left, x.hi + row0 * x.ld + column, x.ld);
      load_k_major(right, x.hi + column0 * x.ld + column, x.ld);
      __syncthreads();
      if (step == steps.first_count) scale(acc, mix.ratio);
      compute(left, right, acc);
      __syncthreads();
    }
    scale(acc, mix.second_steps(x.z_steps, x.e_steps) ? mix.scale : mix.ratio * mix.scale);
  }

  static __device__ __forceinline__ void product(unsigned char* shared, const T* t, const T*,
                                                 int64_t t_ld, const Packed<T>& x,
                                                 int64_t row0, int64_t k_begin, int64_t k_end,
                                                 int64_t k_offset, int64_t column0,
                                                 Fragment& acc) {
    T* left = reinterpret_cast<T*>(shared);
    T* right = left + kStep * kPitch;
    for (int64_t k = k_begin; k < k_end; k += kStep) {
      load_k_major(left, t + row0 * t_ld + k, t_ld);
      load_n_major(right, x.hi + (k_offset + k) * x.ld + column0, x.ld);
      __syncthreads();
      compute(left, right, acc);
      __syncthreads();
    }
  }

  static __device__ __forceinline__ void fill(Fragment& acc, T value) {
#pragma unroll
    for (int c = 0; c < kMi * kNj * 4; ++c) acc[c / (kNj * 4)][c / 4 % kNj][c % 4] = value;
  }
  static __device__ __forceinline__ void scale(Fragment& acc, T factor) {
#pragma unroll
    for (int c = 0; c < kMi * kNj * 4; ++c) acc[c / (kNj * 4)][c / 4 % kNj][c % 4] *= factor;
  }
  static __device__ __forceinline__ void encode(T value, T* hi, T*) { *hi = value; }
  static __device__ __forceinline__ void store_pair(T* hi, T*, T a, T b) { hi[0] = a, hi[1] = b; }
};

// ---- packing ----------------------------------------------------------------------------------

template <typename Path>
struct PackArgs {
  using Acc = typename Path::Acc;
  const Acc* z;  // [2N, dz]
  const Acc* e;  // [2N, de]
  int64_t dz, de, n_nodes, rows;
  const int32_t* order;  // [N] or nullptr
  Snapshot<typename Path::Element, Acc> snapshot;
  Snapshot<typename Path::Element, Acc>* table_entry;  // written with `snapshot`, or nullptr
};

template <typename Path>
__global__ void pack_kernel(PackArgs<Path> args) {
  const auto& x = args.snapshot.x;
  const int64_t e_begin = int64_t{x.z_steps} * Path::kStep;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t start = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (start == 0 && args.table_entry) *args.table_entry = args.snapshot;
  for (int64_t index = start; index < args.rows * x.ld; index += stride) {
    const int64_t q = index / x.ld, column = index % x.ld;
    typename Path::Acc value = 0;
    if (q < 2 * args.n_nodes) {
      const int64_t row = source_row(q, args.n_nodes, args.order);
      if (column < args.dz) {
        value = args.z[row * args.dz + column];
      } else if (column >= e_begin && column < e_begin + args.de) {
        value = args.e[row * args.de + column - e_begin];
      }
    }
    Path::encode(value, x.hi + index, Path::kParts == 2 ? x.lo + index : nullptr);
  }
}

// Membership and labels in rank order; ranks past N belong to no snapshot.
struct RankArgs {
  int64_t n_nodes, n_ranks;
  int n_snapshots;
  const int32_t* order;       // [N] or nullptr
  const int64_t* membership;  // [N]
  const int32_t* labels;      // [S, N]
  uint64_t* rank_masks;       // [n_ranks]
  int32_t* rank_labels;       // [S, n_ranks]
};

static __global__ void rank_kernel(RankArgs args) {
  const int64_t rank = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (rank >= args.n_ranks) return;
  const bool real = rank < args.n_nodes;
  const int64_t node = real && args.order ? args.order[rank] : rank;
  args.rank_masks[rank] = real ? static_cast<uint64_t>(args.membership[node]) : 0;
  for (int s = 0; s < args.n_snapshots; ++s) {
    args.rank_labels[s * args.n_ranks + rank] = real ? args.labels[s * args.n_nodes + node] : 0;
  }
}

// Or of the masks of each tile's rows: two tiles without a common bit need no weights.
struct TileMaskArgs {
  int64_t n_tiles, ranks_per_tile;
  const uint64_t* rank_masks;  // [n_ranks]
  uint64_t* tile_masks;        // [n_tiles]
};

static __global__ void tile_mask_kernel(TileMaskArgs args) {
  const int64_t tile = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (tile >= args.n_tiles) return;
  uint64_t mask = 0;
  for (int64_t r = 0; r < args.ranks_per_tile; ++r) {
    mask |= args.rank_masks[tile * args.ranks_per_tile + r];
  }
  args.tile_masks[tile] = mask;
}

// ---- weights of a tile ------------------------------------------------------------------------

template <typename WPath>
struct WeightArgs {
  using Acc = typename WPath::Acc;
  const Snapshot<typename WPath::Element, Acc>* table;  // [S]
  const uint64_t* masks;                                // [n_ranks]
  const uint64_t* tile_masks;                           // [n_tiles], nullptr: no weights at all
  const int32_t* labels;                                // [S, n_ranks]
  int64_t n_ranks;
  Acc beta;
};

// Bitwise or over the block; shared: kWarps words, free before and after.
__device__ __forceinline__ uint64_t block_or(unsigned char* shared, uint64_t value) {
  uint64_t* words = reinterpret_cast<uint64_t*>(shared);
  for (int offset = 16; offset > 0; offset >>= 1) {
    value |= __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(value), offset);
  }
  if ((threadIdx.x & 31) == 0) words[threadIdx.x >> 5] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kWarps; ++warp) value |= words[warp];
  __syncthreads();
  return value;
}

// Whether the kernel with or without weights has to do tile (i, j). Both are launched over all
// tiles: the one without needs half the registers, so that two of its blocks share a
// multiprocessor, and rows in rank order leave most tiles to exactly one of them.
template <bool kWeighted, typename WPath>
__device__ __forceinline__ bool is_mine(const WeightArgs<WPath>& args, int64_t i, int64_t j) {
  if (!args.tile_masks) return true;
  return ((args.tile_masks[i] & args.tile_masks[j]) != 0) == kWeighted;
}

// w = W on this tile. Entries are grouped by the snapshot they take their weight from; each group
// that occurs costs one product, none when no pair of the tile shares a snapshot.
template <typename WPath>
__device__ __forceinline__ void tile_weights(unsigned char* shared,
                                             const WeightArgs<WPath>& args, int row0,
                                             int column0, typename WPath::Fragment& w) {
  using Acc = typename WPath::Acc;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr int kMi = WPath::kMi, kNj = WPath::kNj;
  WPath::fill(w, Acc(1));
  // Columns 2t and 2t + 1 are the two views of one node, hence of one rank.
  uint64_t needed = 0;
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t mask = args.masks[(row0 + fragment_row(kMi, warp, lane, mi, half)) >> 1];
#pragma unroll
      for (int nj = 0; nj < kNj; ++nj) {
        const int rank = (column0 + fragment_column(kNj, warp, lane, nj, 0)) >> 1;
        const int s = latest_common(mask, args.masks[rank]);
        if (s >= 0) needed |= uint64_t{1} << s;
      }
    }
  needed = block_or(shared, needed);
  while (needed) {
    const int s = latest_common(needed, needed);
    needed ^= uint64_t{1} << s;
    const auto snapshot = args.table[s];
    typename WPath::Fragment acc;
    WPath::similarity(shared, snapshot.x, snapshot.alpha, row0, column0, acc);
    const Acc s_min = snapshot.range[0], range = snapshot.range[1] - s_min;
    const Acc inverse_range = range > Acc(0) ? Acc(1) / range : Acc(0);
    const int32_t* labels = args.labels + s * args.n_ranks;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = (row0 + fragment_row(kMi, warp, lane, mi, half)) >> 1;
        const uint64_t mask = args.masks[i];
        const int32_t label = labels[i];
#pragma unroll
        for (int nj = 0; nj < kNj; ++nj) {
          const int k = (column0 + fragment_column(kNj, warp, lane, nj, 0)) >> 1;
          if (latest_common(mask, args.masks[k]) != s) continue;
          const bool same = label == labels[k];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = half * 2 + e;
            w[mi][nj][c] = hardness_power(
                hardness_base(acc[mi][nj][c], same, s_min, inverse_range), args.beta);
          }
        }
      }
  }
}

// ---- forward ----------------------------------------------------------------------------------

template <typename Path, typename WPath>
struct ForwardArgs {
  using Acc = typename Path::Acc;
  Packed<typename Path::Element> x;
  WeightArgs<WPath> weights;
  const Acc* alpha;
  int n_rows;  // 2N
  int64_t n_tiles;
  int64_t first_tile;
  Band band;
  Acc* row_sums;     // slots, see tiles.h
  Acc* column_sums;  // slots
  Acc* positives;    // [padded rows] W S of the positive pair
};

template <typename Path, typename WPath, bool kWeighted>
__global__ __launch_bounds__(kThreads, kWeighted ? 1 : 2) void forward_kernel(
    ForwardArgs<Path, WPath> args) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  FASTCLUST_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Tile tile = tile_at(args.first_tile + blockIdx.x, args.n_tiles);
  if (!is_mine<kWeighted>(args.weights, tile.i, tile.j)) return;
  const int row0 = static_cast<int>(tile.i) * kTile, column0 = static_cast<int>(tile.j) * kTile;
  typename Path::Fragment w, acc;
  if constexpr (kWeighted) tile_weights<WPath>(shared, args.weights, row0, column0, w);
  Path::similarity(shared, args.x, args.alpha, row0, column0, acc);

  Acc row_sum[kMi][2] = {}, column_sum[kNj][2] = {};
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = row0 + fragment_row(kMi, warp, lane, mi, c >> 1);
        const int k = column0 + fragment_column(kNj, warp, lane, nj, c & 1);
        const Acc logit = kWeighted ? w[mi][nj][c] * acc[mi][nj][c] : acc[mi][nj][c];
        const Acc term = pair_term(logit, i, k, args.n_rows);
        row_sum[mi][c >> 1] += term;
        column_sum[nj][c & 1] += term;
        if (is_positive_pair(i, k)) args.positives[i] = logit;
      }

  // Lanes of equal g share a row, lanes of equal t a column; then one word per warp and row.
  Acc* rows = reinterpret_cast<Acc*>(shared);  // [kWarpsN, kTile]
  Acc* columns = rows + kWarpsN * kTile;       // [kWarpsM, kTile]
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Acc sum = row_sum[mi][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if ((lane & 3) == 0) {
        rows[warp / kWarpsM * kTile + fragment_row(kMi, warp, lane, mi, half)] = sum;
      }
    }
#pragma unroll
  for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Acc sum = column_sum[nj][e];
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if ((lane >> 2) == 0) {
        columns[warp % kWarpsM * kTile + fragment_column(kNj, warp, lane, nj, e)] = sum;
      }
    }
  __syncthreads();
  for (int r = threadIdx.x; r < kTile; r += kThreads) {
    Acc sum = 0;
    for (int part = 0; part < kWarpsN; ++part) sum += rows[part * kTile + r];
    args.row_sums[row_slot(args.band, tile.j, row0 + r)] = sum;
    if (tile.i == tile.j) continue;
    sum = 0;
    for (int part = 0; part < kWarpsM; ++part) sum += columns[part * kTile + r];
    args.column_sums[column_slot(args.band, tile.i, column0 + r)] = sum;
  }
}

template <typename Acc>
struct SumArgs {
  Band band;
  const Acc* band_row_sums;
  const Acc* band_column_sums;
  int64_t n_nodes;
  const int32_t* order;
  double* row_sums;  // [2N] in the caller's order
};

template <typename Acc>
__global__ void sum_kernel(SumArgs<Acc> args) {
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (q >= 2 * args.n_nodes) return;
  const double sum = band_row_sum(args.band, args.band_row_sums, args.band_column_sums, q);
  double& out = args.row_sums[source_row(q, args.n_nodes, args.order)];
  out = args.band.first_tile_row == 0 ? sum : out + sum;
}

// Sum over the block in a fixed tree; shared: one word per warp. Valid in thread 0.
__device__ __forceinline__ double block_sum(double* shared, double value) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
  __syncthreads();
  value = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) value += shared[warp];
  __syncthreads();
  return value;
}

template <typename Acc>
struct LossArgs {
  int64_t n_nodes;
  const int32_t* order;
  const double* row_sums;  // [2N]
  const Acc* positives;    // [padded rows]
  Acc* loss;               // []
};

template <typename Acc>
__global__ void loss_kernel(LossArgs<Acc> args) {
  __shared__ double words[32];
  double sum = 0;
  for (int64_t q = threadIdx.x; q < 2 * args.n_nodes; q += blockDim.x) {
    sum += log(args.row_sums[source_row(q, args.n_nodes, args.order)]) - args.positives[q];
  }
  sum = block_sum(words, sum);
  if (threadIdx.x == 0) *args.loss = static_cast<Acc>(sum / (2 * args.n_nodes));
}

// ---- gradient ---------------------------------------------------------------------------------

template <typename Acc>
struct InverseArgs {
  int64_t n_nodes, rows;
  const int32_t* order;
  const double* row_sums;  // [2N]
  Acc* inverse;            // [rows] 1 / r in packed order, 0 in the padding
};

template <typename Acc>
__global__ void inverse_kernel(InverseArgs<Acc> args) {
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (q >= args.rows) return;
  args.inverse[q] = q < 2 * args.n_nodes
                        ? static_cast<Acc>(
                              1.0 / args.row_sums[source_row(q, args.n_nodes, args.order)])
                        : Acc(0);
}

// T on rows [row_begin, row_begin + panel) and columns [column_begin, column_begin + t_ld).
template <typename Path, typename WPath>
struct TileArgs {
  using Acc = typename Path::Acc;
  Packed<typename Path::Element> x;
  WeightArgs<WPath> weights;
  const Acc* alpha;
  int n_rows;
  const Acc* inverse;                 // [padded rows]
  int row_begin, column_begin;        // of the panel
  typename Path::Element* t_hi;       // [panel, t_ld]
  typename Path::Element* t_lo;       // [panel, t_ld] or nullptr
  int t_ld;
};

template <typename Path, typename WPath, bool kWeighted>
__global__ __launch_bounds__(kThreads, kWeighted ? 1 : 2) void tile_kernel(
    TileArgs<Path, WPath> args) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  FASTCLUST_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int local_row0 = static_cast<int>(blockIdx.x) * kTile;
  const int local_column0 = static_cast<int>(blockIdx.y) * kTile;
  const int row0 = args.row_begin + local_row0, column0 = args.column_begin + local_column0;
  if (!is_mine<kWeighted>(args.weights, row0 / kTile, column0 / kTile)) return;
  typename Path::Fragment w, acc;
  if constexpr (kWeighted) tile_weights<WPath>(shared, args.weights, row0, column0, w);
  Path::similarity(shared, args.x, args.alpha, row0, column0, acc);
#pragma unroll
  for (int nj = 0; nj < kNj; ++nj) {
    const int local_k = fragment_column(kNj, warp, lane, nj, 0), k = column0 + local_k;
    const Acc inverse_k[2] = {args.inverse[k], args.inverse[k + 1]};
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int local_i = fragment_row(kMi, warp, lane, mi, half), i = row0 + local_i;
        const Acc inverse_i = args.inverse[i];
        Acc t[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Acc weight = kWeighted ? w[mi][nj][half * 2 + e] : Acc(1);
          const Acc term = pair_term(weight * acc[mi][nj][half * 2 + e], i, k + e, args.n_rows);
          const bool positive = is_positive_pair(i, k + e) && i < args.n_rows;
          t[e] = gradient_term(term, weight, inverse_i, inverse_k[e], positive);
        }
        const int at = (local_row0 + local_i) * args.t_ld + local_column0 + local_k;
        Path::store_pair(args.t_hi + at, Path::kParts == 2 ? args.t_lo + at : nullptr, t[0], t[1]);
      }
  }
}

// One split of T [Z | E]: partial[split, row, column] (+)= sum over its columns of T.
template <typename Path>
struct ProductArgs {
  using Acc = typename Path::Acc;
  Packed<typename Path::Element> x;
  const typename Path::Element* t_hi;
  const typename Path::Element* t_lo;
  int64_t t_ld;
  int64_t column_begin;     // of T within the whole matrix: row of x
  int64_t chunk;            // columns of T here
  int64_t first_column;     // of [Z | E]
  Acc* partial;             // [splits, panel rows, partial_ld]
  int64_t panel_rows, partial_ld;
  bool accumulate;          // a chunk after the first
};

template <typename Path>
__global__ __launch_bounds__(kThreads, 2) void product_kernel(ProductArgs<Path> args) {
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  FASTCLUST_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row0 = int64_t{blockIdx.y} * kTile, column0 = int64_t{blockIdx.x} * kTile;
  const int64_t steps = args.chunk / Path::kStep;
  const int64_t k_begin = steps * blockIdx.z / gridDim.z * Path::kStep;
  const int64_t k_end = steps * (blockIdx.z + 1) / gridDim.z * Path::kStep;
  typename Path::Acc* out =
      args.partial + (int64_t{blockIdx.z} * args.panel_rows + row0) * args.partial_ld + column0;
  typename Path::Fragment acc;
  Path::fill(acc, 0);
  Path::product(shared, args.t_hi, args.t_lo, args.t_ld, args.x, row0, k_begin, k_end,
                args.column_begin, args.first_column + column0, acc);
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        auto& target = out[fragment_row(kMi, warp, lane, mi, c >> 1) * args.partial_ld +
                           fragment_column(kNj, warp, lane, nj, c & 1)];
        target = args.accumulate ? target + acc[mi][nj][c] : acc[mi][nj][c];
      }
}

template <typename Acc>
struct FinishArgs {
  Views<Acc> views;
  int64_t n_nodes;
  const int32_t* order;
  const Acc* partial;  // [splits, panel rows, partial_ld]
  int splits;
  int64_t panel_rows, partial_ld;
  int64_t row_begin;               // packed row of the panel's first
  int64_t z_column, e_column;      // first column of each part within partial
  const Acc* grad_loss;            // []
  Acc* grad_z;                     // [2N, dz] or nullptr
  Acc* grad_e;                     // [2N, de] or nullptr
  double* alpha_slots;             // [2N] or nullptr
};

// One part of one row: out = factor * sum of slots; returns this thread's share of (T X) . X.
template <typename Acc>
__device__ __forceinline__ double finish_part(const FinishArgs<Acc>& args, const Acc* partial,
                                              const Acc* x, int64_t width, Acc factor, Acc* out) {
  double dot = 0;
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
    Acc sum = 0;
    for (int split = 0; split < args.splits; ++split) {
      sum += partial[split * args.panel_rows * args.partial_ld + column];
    }
    if (out) out[column] = factor * sum;
    if (args.alpha_slots) dot += static_cast<double>(sum) * static_cast<double>(x[column]);
  }
  return dot;
}

template <typename Acc>
__global__ void finish_kernel(FinishArgs<Acc> args) {
  __shared__ double words[32];
  const int64_t q = args.row_begin + blockIdx.x;
  const int64_t row = source_row(q, args.n_nodes, args.order);
  const Acc* partial = args.partial + int64_t{blockIdx.x} * args.partial_ld;
  const Acc alpha = *args.views.alpha;
  const Acc factor = *args.grad_loss / static_cast<Acc>(2 * args.n_nodes);
  const int64_t dz = args.views.dz, de = args.views.de;
  double dot = 0;
  if (args.grad_z || args.alpha_slots) {
    dot += finish_part(args, partial + args.z_column, args.views.z + row * dz, dz, factor * alpha,
                       args.grad_z ? args.grad_z + row * dz : nullptr);
  }
  if (args.grad_e || args.alpha_slots) {
    dot -= finish_part(args, partial + args.e_column, args.views.e + row * de, de,
                       factor * (Acc(1) - alpha), args.grad_e ? args.grad_e + row * de : nullptr);
  }
  if (!args.alpha_slots) return;
  dot = block_sum(words, dot);
  if (threadIdx.x == 0) args.alpha_slots[q] = dot / 2;
}

template <typename Acc>
struct AlphaArgs {
  int64_t n_nodes;
  const double* slots;   // [2N]
  const Acc* grad_loss;  // []
  Acc* grad_alpha;       // []
};

template <typename Acc>
__global__ void alpha_kernel(AlphaArgs<Acc> args) {
  __shared__ double words[32];
  double sum = 0;
  for (int64_t q = threadIdx.x; q < 2 * args.n_nodes; q += blockDim.x) sum += args.slots[q];
  sum = block_sum(words, sum);
  if (threadIdx.x == 0) {
    *args.grad_alpha =
        static_cast<Acc>(sum * static_cast<double>(*args.grad_loss) / (2 * args.n_nodes));
  }
}

// ---- range of S -------------------------------------------------------------------------------

template <typename Path>
struct RangeArgs {
  using Acc = typename Path::Acc;
  Packed<typename Path::Element> x;
  const Acc* alpha;
  int n_rows;
  int64_t n_tiles;
  Acc* slots;  // [tiles of the triangle, 2]
};

// Keeps a NaN, unlike fmin and fmax: a range over poisoned entries must show it.
template <typename T>
__device__ __forceinline__ T least(T a, T b) {
  return a < b || a != a ? a : b;
}
template <typename T>
__device__ __forceinline__ T greatest(T a, T b) {
  return a > b || a != a ? a : b;
}

// Least and greatest over the block; shared: two words per warp.
template <typename Acc>
__device__ __forceinline__ void block_range(Acc* shared, Acc& low, Acc& high) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    low = least(low, __shfl_xor_sync(0xffffffffu, low, offset));
    high = greatest(high, __shfl_xor_sync(0xffffffffu, high, offset));
  }
  if ((threadIdx.x & 31) == 0) {
    shared[threadIdx.x >> 5] = low;
    shared[kWarps + (threadIdx.x >> 5)] = high;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    low = least(low, shared[warp]);
    high = greatest(high, shared[kWarps + warp]);
  }
}

template <typename Path>
__global__ __launch_bounds__(kThreads, 2) void range_kernel(RangeArgs<Path> args) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  FASTCLUST_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Tile tile = tile_at(blockIdx.x, args.n_tiles);
  const int row0 = static_cast<int>(tile.i) * kTile, column0 = static_cast<int>(tile.j) * kTile;
  typename Path::Fragment acc;
  Path::similarity(shared, args.x, args.alpha, row0, column0, acc);
  Acc low = Acc(INFINITY), high = Acc(-INFINITY);
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = row0 + fragment_row(kMi, warp, lane, mi, c >> 1);
        const int k = column0 + fragment_column(kNj, warp, lane, nj, c & 1);
        if (i >= args.n_rows || k >= args.n_rows) continue;
        low = least(low, acc[mi][nj][c]);
        high = greatest(high, acc[mi][nj][c]);
      }
  block_range(reinterpret_cast<Acc*>(shared), low, high);
  if (threadIdx.x == 0) {
    args.slots[2 * int64_t{blockIdx.x}] = low;
    args.slots[2 * int64_t{blockIdx.x} + 1] = high;
  }
}

template <typename Acc>
struct RangeFinishArgs {
  int64_t n_slots;
  const Acc* slots;
  Acc* range;  // [2]
};

template <typename Acc>
__global__ void range_finish_kernel(RangeFinishArgs<Acc> args) {
  __shared__ Acc words[2 * kWarps];
  Acc low = Acc(INFINITY), high = Acc(-INFINITY);
  for (int64_t slot = threadIdx.x; slot < args.n_slots; slot += kThreads) {
    low = least(low, args.slots[2 * slot]);
    high = greatest(high, args.slots[2 * slot + 1]);
  }
  block_range(words, low, high);
  if (threadIdx.x == 0) args.range[0] = low, args.range[1] = high;
}

}  // namespace fastclust::infonce
