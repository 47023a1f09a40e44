// Hard-sample InfoNCE on CUDA, sm_80 and later: loss, gradients and the range of S (formulas in
// infonce.h). What runs is, with M = 2N rows of width D = dz + de:
//
//   pack        [Z | E] -> rows in the order of tiles.h, zero-padded, bf16 hi (+ lo), tf32 or as is;
//               of one panel of rows and one chunk of columns at a time, and so the snapshots
//   forward     one block per tile on or above the diagonal: S by cp.async + mma.sync, W from the
//               snapshots by the same product, exp, row and column sums to fixed slots; tiles with
//               and without weights are done by two launches
//   gradient    T of panel x chunk into a workspace that stays in L2, then T [Z | E] added to the
//               gradients of the panel's rows and T^T [Z | E] to those of the chunk's, in the fixed
//               order of launches; at the end one pass scales them and takes the dot products for
//               d alpha
//
// Bound: matrix throughput. 4 M^2 D flop: half of S forward by symmetry, half of T again, and
// 2 M^2 D for T [Z | E]; weights cost one more product on the tiles that need them. Chunks inside
// their panel are recomputed in full, a share of (panel rows / M) of the recomputation.
// Workspace: at most 64 MB beside inputs and outputs up to very wide problems (cut_patches), by
// packing panels and chunks anew: about M^2 / (2 panel rows) rows of traffic, a few percent of the
// time of the products.
//
// Precision: bf16 is one product of rounded operands; bf16x3 splits operands and T into hi + lo, 17
// bits, and adds lo*hi, hi*lo, hi*hi, which serves fp32, too; tf32 is one product of m16n8k8;
// float64 uses plain arithmetic (PlainPath), for exactness rather than speed.
// Snapshot products are bf16x3 in every float32 mode, since |Q - minmax(S)| near 0 magnifies their
// error; the range of S adds the lo*lo product, which the diagonal needs.
// A matrix unit cuts off what a product has below the last digit of the sum that it is added to,
// always towards zero. Over 1000 columns of rows that are alike that is 3e-6 to 7e-6 of a logit, ten
// times the error of bf16x3, whose sums are therefore made in short pieces and added up outside.
//
// No two threads of a launch add to one place, no host synchronisation, no allocation: results have
// the same bits every time, and the launches can be captured in a CUDA graph.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/mma.cuh"
#include "infonce/infonce.h"
#include "infonce/tiles.h"

namespace fastclust::infonce {

// ---- operands ---------------------------------------------------------------------------------

// Rows of [Z | E] in a path's format, in blocks as tiles.h lays them out. Z and E begin at whole
// blocks; steps count 64 bytes (one tile of shared memory) or whole blocks, as the path takes them.
struct Packed {
  unsigned char* hi;
  unsigned char* lo;        // used by paths with two parts
  int n_blocks;             // across
  int e_begin;              // step at which E starts
  int z_steps, e_steps;     // k steps of each part
};

// One snapshot as the kernels see it.
template <typename Acc>
struct Snapshot {
  Packed left, right;  // rows of the panel and of the chunk
  const Acc* alpha;    // []
  const Acc* range;    // [2]
};

// Part `part` (hi, lo) of a packed operand.
__device__ __forceinline__ const unsigned char* part_of(const Packed& x, int part) {
  return part ? x.lo : x.hi;
}

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
// operands have a hi and a lo part, and lo*hi + hi*lo + hi*hi of 16 k is summed, then added to the
// rest (four: lo*lo as well); both parts of a k step are staged together, so that three products cost
// twice the traffic of one.
template <typename Element_, int kProducts_>
struct MmaPath {
  using Element = Element_;
  using Acc = float;
  static constexpr int kProducts = kProducts_;
  static constexpr bool kBf16 = sizeof(Element) == 2;
  static constexpr int kParts = kProducts > 1 ? 2 : 1;
  static constexpr int kTile = 128, kMi = 4, kNj = 4, kWarpsM = 2, kWarpsN = 4;
  static constexpr int kStep = kRowBytes / sizeof(Element);  // columns per k step
  static constexpr int kStepsPerBlock = kBlockColumns / kRowBytes;
  static constexpr int kStages = kParts == 1 ? 4 : 3;
  static constexpr int kTileBytes = kTile * kRowBytes;         // one part of one operand
  static constexpr int kStageBytes = 2 * kParts * kTileBytes;  // left parts, right parts
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "a block of sm_86 and sm_89 has no more");
  // Blocks that share a multiprocessor. One with two parts takes all the shared memory of sm_8x. On sm_90
  // two would fit, with 128 registers a thread: the sums of products apart would spill.
  static constexpr int kBlocksEach = kParts == 1 ? 2 : 1;
  using Fragment = float[kMi][kNj][4];

  static __device__ __forceinline__ int row_of(int mi, int half) {
    return fragment_row(kWarpsM, kMi, threadIdx.x >> 5, threadIdx.x & 31, mi, half);
  }
  static __device__ __forceinline__ int column_of(int nj, int element) {
    return fragment_column(kWarpsM, kNj, threadIdx.x >> 5, threadIdx.x & 31, nj, element);
  }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  // Where operands are rounded to bf16 or tf32, an error of 2e-7 more does not show.
  static __device__ __forceinline__ float exponential(float x) {
    return kProducts == 1 ? fast_exp(x) : exp(x);
  }

  // 128 rows from row0, a multiple of 128, and 64 bytes of k.
  static __device__ __forceinline__ void load_k_major(unsigned char* tile,
                                                      const unsigned char* source, int n_blocks,
                                                      int row0, int step) {
    const int chunk = threadIdx.x & 3;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int row = (threadIdx.x >> 2) + 64 * u;
      cp_async16(tile + k_major_offset(row, chunk),
                 source + packed_offset<uint32_t>(n_blocks, row0 + row,
                                                  step * kRowBytes + chunk * kChunk));
    }
  }
  // kStep rows of k from k0 and 128 columns from column0, a multiple of 128.
  static __device__ __forceinline__ void load_n_major(unsigned char* tile,
                                                      const unsigned char* source, int n_blocks,
                                                      int k0, int column0) {
    constexpr int chunks = kTile * sizeof(Element) / kChunk;  // per row of k
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int k = (threadIdx.x + kThreads * u) / chunks;
      const int chunk = threadIdx.x % chunks;
      const uint32_t byte = column0 * sizeof(Element) + chunk * kChunk;
      cp_async16(tile + n_major_offset<sizeof(Element)>(k, chunk),
                 source + packed_offset<uint32_t>(n_blocks, k0 + k, byte));
    }
  }

  // Left operand of one 32-byte step of k, the mi-th 16 rows of this warp.
  template <bool kMMajor>
  static __device__ __forceinline__ void load_left(const unsigned char* tile, int kk, int mi,
                                                   uint32_t (&a)[4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row0 = ((warp % kWarpsM) * kMi + mi) * 16;
    if constexpr (!kMMajor) {
      ldmatrix_x4(a, tile + k_major_offset(row0 + a_lane_row(lane), 2 * kk + a_lane_chunk(lane)));
    } else if constexpr (kBf16) {
      ldmatrix_x4_trans(a, tile + n_major_offset<2>(kk * 16 + at_lane_k(lane),
                                                    row0 / 8 + at_lane_chunk(lane)));
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int m = row0 + (lane >> 2) + 8 * (r & 1), k = kk * 8 + (lane & 3) + 4 * (r >> 1);
        a[r] = *reinterpret_cast<const uint32_t*>(tile + n_major_offset<4>(k, m >> 2) +
                                                  (m & 3) * 4);
      }
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

  // acc += left right^T for one k step. kNMajor: right is stored [k][n]; kMMajor: left [k][m].
  template <bool kNMajor, bool kMMajor>
  static __device__ __forceinline__ void compute(const unsigned char* stage, Fragment& acc) {
    const unsigned char* right = stage + kParts * kTileBytes;
    // Unrolled, three products, or the single words of a tf32 operand stored [k][m], take more registers
    // than there are.
#pragma unroll(kProducts > 1 || (kMMajor && !kBf16) ? 1 : 2)
    for (int kk = 0; kk < 2; ++kk) {  // 32 bytes of k: 16 bf16 or 8 tf32, one instruction deep
      uint32_t b[kParts][kNj][2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_right<kNMajor>(right + part * kTileBytes, kk, b[part]);
      }
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi) {
        uint32_t a[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          load_left<kMMajor>(stage + part * kTileBytes, kk, mi, a[part]);
        }
#pragma unroll
        for (int nj = 0; nj < kNj; ++nj) {
          if constexpr (!kBf16) {
            mma_tf32(acc[mi][nj], a[0], b[0][nj]);
          } else if constexpr (kProducts == 1) {
            mma_bf16(acc[mi][nj], a[0], b[0][nj]);
          } else {
            float sum[4] = {};
            if constexpr (kProducts == 4) mma_bf16(sum, a[1], b[1][nj]);
            mma_bf16(sum, a[1], b[0][nj]);
            mma_bf16(sum, a[0], b[1][nj]);
            mma_bf16(sum, a[0], b[0][nj]);
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[mi][nj][c] += sum[c];
          }
        }
      }
    }
  }

  // acc = tile of S = alpha Z Z^T + (1 - alpha) E E^T, rows row0.. of left, column0.. of right.
  static __device__ __forceinline__ void similarity(unsigned char* shared, const Packed& left,
                                                    const Packed& right, const float* alpha,
                                                    int row0, int column0, Fragment& acc) {
    const SimilaritySteps steps(left.z_steps, left.e_begin, left.e_steps, mix_of(*alpha).e_first);
    fill(acc, 0.f);
    pipeline<kStages>(
        steps.total(),
        [&](int step, int stage) {
          unsigned char* to = shared + stage * kStageBytes;
          const int column = steps.column_step(step);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            load_k_major(to + part * kTileBytes, part_of(left, part), left.n_blocks, row0, column);
            load_k_major(to + (kParts + part) * kTileBytes, part_of(right, part), right.n_blocks,
                         column0, column);
          }
        },
        [&](int step, int stage) {
          // The factors are read where they are used: kept in registers they would cost a spill.
          if (step == steps.first_count) scale(acc, mix_of(*alpha).ratio);
          compute<false, false>(shared + stage * kStageBytes, acc);
        });
    const Mix<float> mix = mix_of(*alpha);
    scale(acc, mix.second_steps(left.z_steps, left.e_steps) ? mix.scale : mix.ratio * mix.scale);
  }

  // acc += T X over k rows of X, or T^T X with kTransposed; T is packed like X.
  template <bool kTransposed>
  static __device__ __forceinline__ void product(unsigned char* shared, const Packed& t,
                                                 const Packed& x, int row0, int k_rows, int column0,
                                                 Fragment& acc) {
    pipeline<kStages>(
        k_rows / kStep,
        [&](int step, int stage) {
          unsigned char* to = shared + stage * kStageBytes;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            unsigned char* left = to + part * kTileBytes;
            if constexpr (kTransposed) {
              load_n_major(left, part_of(t, part), t.n_blocks, step * kStep, row0);
            } else {
              load_k_major(left, part_of(t, part), t.n_blocks, row0, step);
            }
            load_n_major(to + (kParts + part) * kTileBytes, part_of(x, part), x.n_blocks,
                         step * kStep, column0);
          }
        },
        [&](int, int stage) { compute<true, kTransposed>(shared + stage * kStageBytes, acc); });
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

  struct alignas(kChunk) Chunk {
    uint32_t words[4];
  };
  // Two neighbouring elements as a word of each part.
  static __device__ __forceinline__ void encode_pair(float a, float b, uint32_t* hi, uint32_t* lo) {
    *hi = to_bf16_pair(a, b);
    if constexpr (kParts == 2) {
      *lo = to_bf16_pair(a - bits_float(*hi << 16), b - bits_float(*hi & 0xffff0000u));
    }
  }
  // 16 bytes of a packed row, at byte `at` of both parts.
  static __device__ __forceinline__ void store_chunk(const Packed& x, int64_t at,
                                                     const float (&v)[kChunk / sizeof(Element)]) {
    Chunk hi, lo;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kBf16) {
        encode_pair(v[2 * w], v[2 * w + 1], &hi.words[w], &lo.words[w]);
      } else {
        hi.words[w] = float_bits(to_tf32(v[w]));
      }
    }
    *reinterpret_cast<Chunk*>(x.hi + at) = hi;
    if constexpr (kParts == 2) *reinterpret_cast<Chunk*>(x.lo + at) = lo;
  }
  // Two neighbouring elements of T in one store, at byte `at` of both parts.
  static __device__ __forceinline__ void store_pair(const Packed& t, uint32_t at, float a, float b) {
    if constexpr (kBf16) {
      uint32_t hi, lo;
      encode_pair(a, b, &hi, &lo);
      *reinterpret_cast<uint32_t*>(t.hi + at) = hi;
      if constexpr (kParts == 2) *reinterpret_cast<uint32_t*>(t.lo + at) = lo;
    } else {
      *reinterpret_cast<float2*>(t.hi + at) = make_float2(to_tf32(a), to_tf32(b));
    }
  }
};

// Plain arithmetic, for float64: the same layout of elements over threads, no matrix instructions.
template <typename T>
struct PlainPath {
  using Element = T;
  using Acc = T;
  static constexpr int kParts = 1;
  static constexpr int kTile = 64, kMi = 2, kNj = 2, kWarpsM = 2, kWarpsN = 4;
  static constexpr int kStep = kBlockColumns / sizeof(T);
  static constexpr int kStepsPerBlock = 1;
  static constexpr int kPitch = kTile + 1;  // [k][row], padded against bank conflicts
  static constexpr int kSharedBytes = 2 * kStep * kPitch * sizeof(T);
  static constexpr int kBlocksEach = 2;
  using Fragment = T[kMi][kNj][4];

  static __device__ __forceinline__ int row_of(int mi, int half) {
    return fragment_row(kWarpsM, kMi, threadIdx.x >> 5, threadIdx.x & 31, mi, half);
  }
  static __device__ __forceinline__ int column_of(int nj, int element) {
    return fragment_column(kWarpsM, kNj, threadIdx.x >> 5, threadIdx.x & 31, nj, element);
  }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ T exponential(T x) { return exp(x); }

  static __device__ __forceinline__ void compute(const T* left, const T* right, Fragment& acc) {
    for (int k = 0; k < kStep; ++k) {
      T a[2 * kMi], b[2 * kNj];
#pragma unroll
      for (int i = 0; i < 2 * kMi; ++i) a[i] = left[k * kPitch + row_of(i >> 1, i & 1)];
#pragma unroll
      for (int j = 0; j < 2 * kNj; ++j) b[j] = right[k * kPitch + column_of(j >> 1, j & 1)];
#pragma unroll
      for (int i = 0; i < 2 * kMi; ++i)
#pragma unroll
        for (int j = 0; j < 2 * kNj; ++j) acc[i >> 1][j >> 1][(i & 1) * 2 + (j & 1)] += a[i] * b[j];
    }
  }
  static __device__ __forceinline__ T at(const Packed& x, int row, int column) {
    return *reinterpret_cast<const T*>(
        x.hi + packed_offset<uint32_t>(x.n_blocks, row, column * sizeof(T)));
  }
  // shared[k][r] = x[row0 + r][k0 + k]
  static __device__ __forceinline__ void load_k_major(T* shared, const Packed& x, int row0,
                                                      int k0) {
    for (int u = threadIdx.x; u < kTile * kStep; u += kThreads) {
      shared[(u % kStep) * kPitch + u / kStep] = at(x, row0 + u / kStep, k0 + u % kStep);
    }
  }
  // shared[k][c] = x[k0 + k][column0 + c]
  static __device__ __forceinline__ void load_n_major(T* shared, const Packed& x, int k0,
                                                      int column0) {
    for (int u = threadIdx.x; u < kTile * kStep; u += kThreads) {
      shared[(u / kTile) * kPitch + u % kTile] = at(x, k0 + u / kTile, column0 + u % kTile);
    }
  }

  static __device__ __forceinline__ void similarity(unsigned char* shared, const Packed& left,
                                                    const Packed& right, const T* alpha, int row0,
                                                    int column0, Fragment& acc) {
    T* a = reinterpret_cast<T*>(shared);
    T* b = a + kStep * kPitch;
    const Mix<T> mix = mix_of(*alpha);
    const SimilaritySteps steps(left.z_steps, left.e_begin, left.e_steps, mix.e_first);
    fill(acc, T(0));
    for (int step = 0; step < steps.total(); ++step) {
      const int column = steps.column_step(step) * kStep;
      load_k_major(a, left, row0, column);
      load_k_major(b, right, column0, column);
      __syncthreads();
      if (step == steps.first_count) scale(acc, mix.ratio);
      compute(a, b, acc);
      __syncthreads();
    }
    scale(acc, mix.second_steps(left.z_steps, left.e_steps) ? mix.scale : mix.ratio * mix.scale);
  }

  template <bool kTransposed>
  static __device__ __forceinline__ void product(unsigned char* shared, const Packed& t,
                                                 const Packed& x, int row0, int k_rows, int column0,
                                                 Fragment& acc) {
    T* a = reinterpret_cast<T*>(shared);
    T* b = a + kStep * kPitch;
    for (int k = 0; k < k_rows; k += kStep) {
      if constexpr (kTransposed) {
        load_n_major(a, t, k, row0);
      } else {
        load_k_major(a, t, row0, k);
      }
      load_n_major(b, x, k, column0);
      __syncthreads();
      compute(a, b, acc);
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
  static __device__ __forceinline__ void store_chunk(const Packed& x, int64_t at,
                                                     const T (&v)[kChunk / sizeof(T)]) {
    for (int c = 0; c < static_cast<int>(kChunk / sizeof(T)); ++c) {
      reinterpret_cast<T*>(x.hi + at)[c] = v[c];
    }
  }
  static __device__ __forceinline__ void store_pair(const Packed& t, uint32_t at, T a, T b) {
    T* to = reinterpret_cast<T*>(t.hi + at);
    to[0] = a, to[1] = b;
  }
};

// ---- packing ----------------------------------------------------------------------------------

template <typename Path>
struct PackArgs {
  using Acc = typename Path::Acc;
  const Acc* z;  // [2N, dz]
  const Acc* e;  // [2N, de]
  int64_t dz, de, n_nodes;
  const int32_t* order;      // [N] or nullptr
  int64_t row_begin, rows;   // of the whole matrix
  Packed x;                  // of these rows
  Snapshot<Acc> snapshot;
  Snapshot<Acc>* table_entry;  // written with `snapshot`, or nullptr
};

// v = kCount columns of a row of which `left` remain, zero beyond. With `quads` rows begin on 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load_columns(const T* from, int64_t left, bool quads, T (&v)[kCount]) {
  struct alignas(kChunk) Quad {
    T v[kChunk / sizeof(T)];
  };
  if (quads && left >= kCount) {
#pragma unroll
    for (int c = 0; c < kCount; c += kChunk / sizeof(T)) {
      const Quad quad = *reinterpret_cast<const Quad*>(from + c);
#pragma unroll
      for (int q = 0; q < static_cast<int>(kChunk / sizeof(T)); ++q) v[c + q] = quad.v[q];
    }
  } else {
#pragma unroll
    for (int c = 0; c < kCount; ++c) v[c] = c < left ? from[c] : T(0);
  }
}

template <typename T>
__device__ __forceinline__ bool begins_on_quads(const T* rows, int64_t width) {
  return (reinterpret_cast<uintptr_t>(rows) | width * sizeof(T)) % kChunk == 0;
}

// A warp per row, a lane per 16 bytes of it.
template <typename Path>
__global__ void pack_kernel(PackArgs<Path> args) {
  using Acc = typename Path::Acc;
  constexpr int kCount = kChunk / sizeof(typename Path::Element);
  const Packed& x = args.x;
  const int64_t e_begin = int64_t{x.e_begin} * Path::kStep;
  const bool z_quads = begins_on_quads(args.z, args.dz), e_quads = begins_on_quads(args.e, args.de);
  const int chunks = x.n_blocks * (kBlockColumns / kChunk);
  const int64_t local = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0 && args.table_entry) *args.table_entry = args.snapshot;
  if (local >= args.rows) return;
  const int64_t q = args.row_begin + local;
  const bool real = q < 2 * args.n_nodes;
  const int64_t row = real ? source_row(q, args.n_nodes, args.order) : 0;
  for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) {
    const int64_t column = int64_t{chunk} * kCount;
    Acc v[kCount];
    if (column < e_begin) {
      load_columns(args.z + row * args.dz + column, real ? args.dz - column : 0, z_quads, v);
    } else {
      const int64_t of_e = column - e_begin;
      load_columns(args.e + row * args.de + of_e, real ? args.de - of_e : 0, e_quads, v);
    }
    const auto to = packed_offset<int64_t>(x.n_blocks, local, int64_t{chunk} * kChunk);
    Path::store_chunk(x, to, v);
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

template <typename Acc>
struct WeightArgs {
  const Snapshot<Acc>* table;  // [S]
  const uint64_t* masks;       // [n_ranks]
  const uint64_t* tile_masks;  // [n_tiles] of the whole matrix; nullptr: no weights at all
  const uint64_t* needed;      // [row tiles, column tiles] of the patch, or nullptr: see needed_by
  const int32_t* labels;       // [S, n_ranks]
  int64_t n_ranks;
  Acc beta;
};

// Snapshots that some pair of tile t takes its weight from: the bits that both sides have if there
// is one snapshot, a table if there are several.
template <typename Acc>
FASTCLUST_HD uint64_t needed_by(const WeightArgs<Acc>& args, const Patch& patch, Tile t) {
  if (!args.tile_masks) return 0;
  if (args.needed) return args.needed[t.i * patch.column_tiles() + t.j];
  return args.tile_masks[patch.row_begin / patch.tile + t.i] &
         args.tile_masks[patch.column_begin / patch.tile + t.j];
}

// Bitwise or over the block; shared: kWarps words, free before and after.
__device__ __forceinline__ uint64_t block_or(uint64_t* words, uint64_t value) {
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

struct NeededArgs {
  Patch patch;
  const uint64_t* masks;  // [n_ranks]
  uint64_t* needed;       // [row tiles, column tiles]
};

// One block per tile: the newest common snapshots of its pairs of nodes.
static __global__ void needed_kernel(NeededArgs args) {
  __shared__ uint64_t words[kWarps];
  const int ranks = static_cast<int>(args.patch.tile / 2);
  const int i = blockIdx.x / args.patch.column_tiles(), j = blockIdx.x % args.patch.column_tiles();
  const uint64_t* rows = args.masks + args.patch.row_begin / 2 + i * ranks;
  const uint64_t* columns = args.masks + args.patch.column_begin / 2 + j * ranks;
  uint64_t found = 0;
  for (int u = threadIdx.x; u < ranks * ranks; u += kThreads) {
    const int s = latest_common(rows[u / ranks], columns[u % ranks]);
    if (s >= 0) found |= uint64_t{1} << s;
  }
  found = block_or(words, found);
  if (threadIdx.x == 0) args.needed[blockIdx.x] = found;
}

// w = weights from snapshot s where the pair takes its weight from it; acc is S of the snapshot.
template <typename WPath>
__device__ __forceinline__ void weigh(const WeightArgs<typename WPath::Acc>& args, int s, int row0,
                                      int column0, const typename WPath::Fragment& acc,
                                      typename WPath::Fragment& w) {
  using Acc = typename WPath::Acc;
  const Acc* bounds = args.table[s].range;
  const Acc s_min = bounds[0], range = bounds[1] - s_min;
  constexpr Acc kLeastNormal = sizeof(Acc) == 4 ? Acc(1.17549435e-38f) : Acc(2.2250738585072014e-308);
  const Acc inverse_range = range >= kLeastNormal ? Acc(1) / range : Acc(0);
  const int32_t* labels = args.labels + s * args.n_ranks;
#pragma unroll
  for (int mi = 0; mi < WPath::kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = (row0 + WPath::row_of(mi, half)) >> 1;
      const uint64_t mask = args.masks[i];
      const int32_t label = labels[i];
#pragma unroll
      for (int nj = 0; nj < WPath::kNj; ++nj) {
        // Columns 2t and 2t + 1 are the two views of one node, hence of one rank.
        const int k = (column0 + WPath::column_of(nj, 0)) >> 1;
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

// w = W on this tile: one product for each snapshot that some pair of it takes its weight from.
template <typename WPath>
__device__ __forceinline__ void tile_weights(unsigned char* shared,
                                             const WeightArgs<typename WPath::Acc>& args,
                                             uint64_t needed, const Patch& patch, Tile t,
                                             typename WPath::Fragment& w) {
  constexpr int kTile = WPath::kTile;
  const int row0 = static_cast<int>(patch.row_begin) + t.i * kTile;
  const int column0 = static_cast<int>(patch.column_begin) + t.j * kTile;
  WPath::fill(w, 1);
  while (needed) {
    const int s = latest_common(needed, needed);
    needed ^= uint64_t{1} << s;
    const auto snapshot = args.table[s];
    typename WPath::Fragment acc;
    WPath::similarity(shared, snapshot.left, snapshot.right, snapshot.alpha, t.i * kTile,
                      t.j * kTile, acc);
    weigh<WPath>(args, s, row0, column0, acc, w);
  }
}

// ---- forward ----------------------------------------------------------------------------------

// A panel of rows against a chunk of columns.
template <typename Acc>
struct PairArgs {
  Patch patch;
  Packed left, right;  // rows of the panel, rows of the chunk
  WeightArgs<Acc> weights;
  const Acc* alpha;
  int n_rows;  // 2N
};

template <typename Acc>
struct ForwardArgs : PairArgs<Acc> {
  Acc* row_sums;     // slots, see tiles.h
  Acc* column_sums;  // slots
  Acc* positives;    // [padded rows] W S of the positive pair
};

// Whether a tile holds pairs other than two different nodes of the graph: only there an element asks
// what it is, which would cost the others more instructions than their exponential. Where rows alone
// lie past the end, below the diagonal, nothing of them is kept.
template <typename Acc>
__device__ __forceinline__ bool is_edge(const PairArgs<Acc>& args, Tile tile, int edge) {
  return args.patch.on_diagonal(tile) ||
         args.patch.column_begin + (tile.j + 1) * edge > args.n_rows;
}

// Row and column sums of exp(W S) over one tile. w is not read without weights. shared: free, of
// (kWarpsM + kWarpsN) kTile words.
template <typename Path, bool kWeighted>
__device__ __forceinline__ void forward_epilogue(const ForwardArgs<typename Path::Acc>& args,
                                                 Tile tile, unsigned char* shared, int thread,
                                                 const typename Path::Fragment& w,
                                                 const typename Path::Fragment& acc) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  const int lane = thread & 31, warp = thread >> 5;
  const int row0 = static_cast<int>(args.patch.row_begin) + tile.i * kTile;
  const int column0 = static_cast<int>(args.patch.column_begin) + tile.j * kTile;
  Acc row_sum[kMi][2] = {}, column_sum[kNj][2] = {};
  const auto add_terms = [&](auto at_edge) {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const Acc logit = kWeighted ? w[mi][nj][c] * acc[mi][nj][c] : acc[mi][nj][c];
          Acc term;
          if constexpr (at_edge) {
            const int i = row0 + Path::row_of(mi, c >> 1), k = column0 + Path::column_of(nj, c & 1);
            term = is_pair(i, k, args.n_rows) ? Path::exponential(logit) : Acc(0);
            if (is_positive_pair(i, k)) args.positives[i] = logit;
          } else {
            term = Path::exponential(logit);
          }
          row_sum[mi][c >> 1] += term;
          column_sum[nj][c & 1] += term;
        }
  };
  is_edge(args, tile, kTile) ? add_terms(std::true_type{}) : add_terms(std::false_type{});

  // Lanes of equal g share a row, lanes of equal t a column; then one word per warp and row.
  Acc* rows = reinterpret_cast<Acc*>(shared);  // [kWarpsN, kTile]
  Acc* columns = rows + Path::kWarpsN * kTile;  // [kWarpsM, kTile]
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Acc sum = row_sum[mi][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if ((lane & 3) == 0) rows[warp / Path::kWarpsM * kTile + Path::row_of(mi, half)] = sum;
    }
#pragma unroll
  for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Acc sum = column_sum[nj][e];
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if ((lane >> 2) == 0) columns[warp % Path::kWarpsM * kTile + Path::column_of(nj, e)] = sum;
    }
  Path::sync();
  for (int r = thread; r < kTile; r += kThreads) {
    Acc sum = 0;
    for (int part = 0; part < Path::kWarpsN; ++part) sum += rows[part * kTile + r];
    args.row_sums[args.patch.row_slot(tile.j, int64_t{tile.i} * kTile + r)] = sum;
    if (args.patch.on_diagonal(tile)) continue;
    sum = 0;
    for (int part = 0; part < Path::kWarpsM; ++part) sum += columns[part * kTile + r];
    args.column_sums[args.patch.column_slot(tile.i, int64_t{tile.j} * kTile + r)] = sum;
  }
}

// Whether the kernel with or without weights has to do a tile. Both are launched over all tiles:
// the one without needs half the registers, so that two of its blocks share a multiprocessor, and
// rows in rank order leave most tiles to exactly one of them.
template <bool kWeighted, typename Acc>
__device__ __forceinline__ bool is_mine(uint64_t needed, const WeightArgs<Acc>& args) {
  return !args.tile_masks || (needed != 0) == kWeighted;
}

template <typename Path, typename WPath, bool kWeighted>
__global__ __launch_bounds__(kThreads, kWeighted ? 1 : Path::kBlocksEach) void forward_kernel(
    ForwardArgs<typename Path::Acc> args) {
  FASTCLUST_DYNAMIC_SHARED(shared);
  const Patch& patch = args.patch;
  const Tile tile = tile_at(blockIdx.x, patch.row_tiles(), patch.column_tiles());
  if (patch.skips(tile)) return;
  const uint64_t needed = needed_by(args.weights, patch, tile);
  if (!is_mine<kWeighted>(needed, args.weights)) return;
  typename Path::Fragment w, acc;
  if constexpr (kWeighted) tile_weights<WPath>(shared, args.weights, needed, patch, tile, w);
  Path::similarity(shared, args.left, args.right, args.alpha, tile.i * Path::kTile,
                   tile.j * Path::kTile, acc);
  forward_epilogue<Path, kWeighted>(args, tile, shared, threadIdx.x, w, acc);
}

template <typename Acc>
struct SumArgs {
  Patch patch;
  const Acc* row_slots;
  const Acc* column_slots;
  int64_t n_nodes;
  const int32_t* order;
  bool first_panel, first_chunk;
  double* row_sums;  // [2N] in the caller's order
};

// Adds the patch's part of every row's sum; rows meet their first patch while panel 0 is done.
template <typename Acc>
__global__ void sum_kernel(SumArgs<Acc> args) {
  const Patch& patch = args.patch;
  int64_t q = patch.row_begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const bool in_panel = q < patch.row_begin + patch.rows;
  if (!in_panel) {
    if (patch.inside()) return;
    q += patch.column_begin - (patch.row_begin + patch.rows);
    if (!patch.has_column(q)) return;
  }
  if (q >= 2 * args.n_nodes) return;
  const bool fresh = args.first_panel && (args.first_chunk || !in_panel);
  const double sum = patch_row_sum(patch, args.row_slots, args.column_slots, q);
  double& out = args.row_sums[source_row(q, args.n_nodes, args.order)];
  out = fresh ? sum : out + sum;
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
  int64_t begin, end;      // rows whose terms are taken
  bool with_logarithms;
};

template <typename Acc>
__global__ void loss_kernel(LossArgs<Acc> args) {
  __shared__ double words[32];
  double sum = 0;
  for (int64_t q = args.begin + threadIdx.x; q < args.end; q += blockDim.x) {
    const double r = args.row_sums[source_row(q, args.n_nodes, args.order)];
    sum += (args.with_logarithms ? log(r) : 0.0) - args.positives[q];
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

// T of a patch, without its factor 1 / (2N).
template <typename Acc>
struct TileArgs : PairArgs<Acc> {
  const Acc* inverse;  // [padded rows]
  Packed t;            // [panel, chunk]
};

template <typename Path, bool kWeighted>
__device__ __forceinline__ void tile_epilogue(const TileArgs<typename Path::Acc>& args, Tile tile,
                                              const typename Path::Fragment& w,
                                              const typename Path::Fragment& acc) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  const int row0 = static_cast<int>(args.patch.row_begin) + tile.i * kTile;
  const int column0 = static_cast<int>(args.patch.column_begin) + tile.j * kTile;
  struct alignas(2 * sizeof(Acc)) Two {
    Acc v[2];
  };
  // Few enough to keep only where a thread has two rows.
  const Acc inverse_rows[2] = {args.inverse[row0 + Path::row_of(0, 0)],
                               args.inverse[row0 + Path::row_of(0, 1)]};
  const auto store_terms = [&](auto at_edge) {
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj) {
      const int local_k = Path::column_of(nj, 0), k = column0 + local_k;
      const Two inverse_k = *reinterpret_cast<const Two*>(args.inverse + k);
      asm volatile("" ::: "memory");  // one column of fragments at a time: fewer live registers
      // Rows 8 and 16 further on lie in the same block, at the same place of the swizzle.
      const uint32_t first = packed_offset<uint32_t>(
          args.t.n_blocks, tile.i * kTile + Path::row_of(0, 0),
          (tile.j * kTile + local_k) * sizeof(typename Path::Element));
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = row0 + Path::row_of(mi, half);
          const Acc inverse_i = kMi == 1 ? inverse_rows[half] : args.inverse[i];
          Acc t[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Acc weight = kWeighted ? w[mi][nj][half * 2 + e] : Acc(1);
            const Acc logit = weight * acc[mi][nj][half * 2 + e];
            Acc term = Path::exponential(logit);
            bool positive = false;
            if constexpr (at_edge) {
              if (!is_pair(i, k + e, args.n_rows)) term = 0;
              positive = is_positive_pair(i, k + e) && i < args.n_rows;
            }
            t[e] = gradient_term(term, weight, inverse_i, inverse_k.v[e], positive);
          }
          Path::store_pair(args.t, first + (16 * mi + 8 * half) * kBlockColumns, t[0], t[1]);
        }
    }
  };
  is_edge(args, tile, kTile) ? store_terms(std::true_type{}) : store_terms(std::false_type{});
}

template <typename Path, typename WPath, bool kWeighted>
__global__ __launch_bounds__(kThreads, kWeighted ? 1 : Path::kBlocksEach) void tile_kernel(
    TileArgs<typename Path::Acc> args) {
  FASTCLUST_DYNAMIC_SHARED(shared);
  const Patch& patch = args.patch;
  const Tile tile = tile_at(blockIdx.x, patch.row_tiles(), patch.column_tiles());
  const uint64_t needed = needed_by(args.weights, patch, tile);
  if (!is_mine<kWeighted>(needed, args.weights)) return;
  typename Path::Fragment w, acc;
  if constexpr (kWeighted) tile_weights<WPath>(shared, args.weights, needed, patch, tile, w);
  Path::similarity(shared, args.left, args.right, args.alpha, tile.i * Path::kTile,
                   tile.j * Path::kTile, acc);
  tile_epilogue<Path, kWeighted>(args, tile, w, acc);
}

// Gradients before their scale, in the caller's rows: T X added to those of the panel and, if the
// chunk lies beyond it, T^T X to those of the chunk.
template <typename Acc>
struct ProductArgs {
  Patch patch;
  Packed left, right, t;
  int first_column;          // of [Z | E], a multiple of a tile
  int column_tiles;
  int64_t n_nodes;
  const int32_t* order;
  int64_t dz, de, e_column;  // e_column: where E starts in the packed columns
  Acc* grad_z;               // [2N, dz] or nullptr
  Acc* grad_e;               // [2N, de] or nullptr
  bool fresh_panel, fresh_chunk;
};

// Which product of a patch block `index` computes: column tile fastest, so that blocks in flight
// share T, then the panel's row tiles, then the chunk's.
struct ProductTile {
  bool transposed;
  int row0, column0;  // row within panel or chunk, packed column
};
template <typename Acc>
FASTCLUST_HD ProductTile product_tile(const ProductArgs<Acc>& args, int index) {
  const int edge = static_cast<int>(args.patch.tile);
  const int row = index / args.column_tiles, rows = args.patch.row_tiles();
  const bool transposed = row >= rows;
  return {transposed, (transposed ? row - rows : row) * edge,
          args.first_column + index % args.column_tiles * edge};
}

// Adds to the gradients where they are, without a word from memory to wait for. Every element has one
// thread in a launch, so that the order of the sums is that of the launches.
template <typename Path>
__device__ __forceinline__ void product_epilogue(const ProductArgs<typename Path::Acc>& args,
                                                 ProductTile tile,
                                                 const typename Path::Fragment& acc) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj;
  const bool fresh = tile.transposed ? args.fresh_chunk : args.fresh_panel;
  const int64_t first = (tile.transposed ? args.patch.column_begin : args.patch.row_begin) + tile.row0;
  int rows[kMi][2];
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t q = first + Path::row_of(mi, half);
      const bool real = q < 2 * args.n_nodes;
      rows[mi][half] = real ? static_cast<int>(source_row(q, args.n_nodes, args.order)) : -1;
    }
  // Columns of a group are all of Z or all of E, which begins at a whole block.
  constexpr int kGroup = kNj < 8 ? kNj : 8;
#pragma unroll
  for (int nj0 = 0; nj0 < kNj; nj0 += kGroup) {
    const int column = tile.column0 + Path::column_of(nj0, 0);
    const bool in_z = column < args.e_column;
    const int width = static_cast<int>(in_z ? args.dz : args.de);
    const int local = in_z ? column : column - static_cast<int>(args.e_column);
    Acc* out = in_z ? args.grad_z : args.grad_e;
    const int left = out == nullptr ? 0 : width - local;  // columns from this thread's first one on
    const bool plain = width % 2 == 0 && !fresh && left > 8 * (kGroup - 1);
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (rows[mi][half] < 0) continue;
        Acc* to = out + (int64_t{rows[mi][half]} * width + local);
        if (plain) {
#pragma unroll
          for (int nj = 0; nj < kGroup; ++nj) {
            const Acc* sum = &acc[mi][nj0 + nj][half * 2];
            add_pair(to + 8 * nj, sum[0], sum[1]);
          }
        } else {
#pragma unroll
          for (int nj = 0; nj < kGroup; ++nj)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (8 * nj + e >= left) continue;
              const Acc sum = acc[mi][nj0 + nj][half * 2 + e];
              fresh ? void(to[8 * nj + e] = sum) : add_one(to + 8 * nj + e, sum);
            }
        }
      }
  }
}

template <typename Path>
__global__ __launch_bounds__(kThreads, Path::kBlocksEach) void product_kernel(
    ProductArgs<typename Path::Acc> args) {
  FASTCLUST_DYNAMIC_SHARED(shared);
  const ProductTile tile = product_tile(args, blockIdx.x);
  typename Path::Fragment acc;
  Path::fill(acc, 0);
  if (tile.transposed) {
    Path::template product<true>(shared, args.t, args.left, tile.row0,
                                 static_cast<int>(args.patch.rows), tile.column0, acc);
  } else {
    Path::template product<false>(shared, args.t, args.right, tile.row0,
                                  static_cast<int>(args.patch.columns), tile.column0, acc);
  }
  product_epilogue<Path>(args, tile, acc);
}

template <typename Acc>
struct FinishArgs {
  Views<Acc> views;
  int64_t n_nodes;
  const Acc* grad_loss;  // []
  Acc* grad_z;           // [2N, dz] T Z, or nullptr
  Acc* grad_e;           // [2N, de] T E, or nullptr
  double* alpha_slots;   // [2N] or nullptr
};

// One part of one row: out *= factor; returns this thread's share of (T X) . X.
template <typename Acc>
__device__ __forceinline__ double finish_part(Acc* out, const Acc* x, int64_t width, Acc factor) {
  double dot = 0;
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
    const Acc sum = out[column];
    dot += static_cast<double>(sum) * static_cast<double>(x[column]);
    out[column] = factor * sum;
  }
  return dot;
}

template <typename Acc>
__global__ void finish_kernel(FinishArgs<Acc> args) {
  __shared__ double words[32];
  const int64_t row = blockIdx.x;
  const Acc alpha = *args.views.alpha;
  const Acc factor = *args.grad_loss / static_cast<Acc>(2 * args.n_nodes);
  const int64_t dz = args.views.dz, de = args.views.de;
  double dot = 0;
  if (args.grad_z) {
    dot += finish_part(args.grad_z + row * dz, args.views.z + row * dz, dz, factor * alpha);
  }
  if (args.grad_e) {
    dot -= finish_part(args.grad_e + row * de, args.views.e + row * de, de,
                       factor * (Acc(1) - alpha));
  }
  if (!args.alpha_slots) return;
  dot = block_sum(words, dot);
  if (threadIdx.x == 0) args.alpha_slots[row] = dot / 2;
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

template <typename Acc>
struct RangeArgs {
  Patch patch;
  Packed left, right;
  const Acc* alpha;
  int n_rows;
  Acc* slots;  // [tiles of the patch, 2]
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
__global__ __launch_bounds__(kThreads, Path::kBlocksEach) void range_kernel(RangeArgs<typename Path::Acc> args) {
  using Acc = typename Path::Acc;
  constexpr int kMi = Path::kMi, kNj = Path::kNj, kTile = Path::kTile;
  FASTCLUST_DYNAMIC_SHARED(shared);
  const Patch& patch = args.patch;
  const Tile tile = tile_at(blockIdx.x, patch.row_tiles(), patch.column_tiles());
  Acc low = Acc(INFINITY), high = Acc(-INFINITY);
  if (!patch.skips(tile)) {
    const int row0 = static_cast<int>(patch.row_begin) + tile.i * kTile;
    const int column0 = static_cast<int>(patch.column_begin) + tile.j * kTile;
    typename Path::Fragment acc;
    Path::similarity(shared, args.left, args.right, args.alpha, tile.i * kTile, tile.j * kTile,
                     acc);
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int i = row0 + Path::row_of(mi, c >> 1), k = column0 + Path::column_of(nj, c & 1);
          if (i >= args.n_rows || k >= args.n_rows) continue;
          low = least(low, acc[mi][nj][c]);
          high = greatest(high, acc[mi][nj][c]);
        }
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
  bool fresh;
  Acc* range;  // [2], widened unless fresh
};

template <typename Acc>
__global__ void range_finish_kernel(RangeFinishArgs<Acc> args) {
  __shared__ Acc words[2 * kWarps];
  Acc low = args.fresh ? Acc(INFINITY) : args.range[0];
  Acc high = args.fresh ? Acc(-INFINITY) : args.range[1];
  for (int64_t slot = threadIdx.x; slot < args.n_slots; slot += kThreads) {
    low = least(low, args.slots[2 * slot]);
    high = greatest(high, args.slots[2 * slot + 1]);
  }
  block_range(words, low, high);
  if (threadIdx.x == 0) args.range[0] = low, args.range[1] = high;
}

}  // namespace fastclust::infonce
