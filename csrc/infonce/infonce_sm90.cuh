// Hopper kernels of the loss (sm_90a): the same patches, packed operands, epilogues and results as
// infonce_kernels.cuh, with the products by wgmma on shared memory that one warp fills by bulk copies.
//
// Roles: two warpgroups multiply 64 x 128 of a tile each; one thread of a third runs ahead of them,
// through the ring of stages and into the next tile, so that an epilogue overlaps the copies for what
// follows. Blocks are persistent; with one product and no weights two of them share a
// multiprocessor and one's epilogue also overlaps the other's products.
// Precision: bf16 one product, bf16x3 three, summed per 64 k apart from the rest (consume_apart).
//
// Not yet run on a card: chosen only if FASTCLUST_SM90=1 (infonce_cuda.cu).
// Predictions to test there, H100 at 650 TFLOP/s of matrix rate, AMAC, D = 1000, no weights:
// bf16 4.7 ms and bf16x3 14 ms of products (4 M^2 D); T recomputed inside panels + 4 to 7 % of the
// recomputation; whole tiles leave 12 % of the block slots of the gradient idle; packing 0.1 ms.
#pragma once

#include "common/hopper.cuh"
#include "infonce/infonce_kernels.cuh"
#include "infonce/sm90_layout.h"

namespace fastclust::infonce::sm90 {

template <int kProducts_>
struct WgmmaPath {
  using Element = uint16_t;
  using Acc = float;
  static constexpr int kProducts = kProducts_;
  static constexpr int kParts = kProducts > 1 ? 2 : 1;
  static constexpr int kTile = sm90::kTile, kMi = 1, kNj = 16, kWarpsM = 8, kWarpsN = 1;
  using Fragment = float[kMi][kNj][4];

  static __device__ __forceinline__ int row_of(int mi, int half) {
    return fragment_row(kWarpsM, kMi, threadIdx.x >> 5, threadIdx.x & 31, mi, half);
  }
  static __device__ __forceinline__ int column_of(int nj, int element) {
    return fragment_column(kWarpsM, kNj, threadIdx.x >> 5, threadIdx.x & 31, nj, element);
  }
  static __device__ __forceinline__ void sync() { named_barrier<1, kConsumers>(); }
  static __device__ __forceinline__ float exponential(float x) {
    return MmaPath<uint16_t, kProducts>::exponential(x);
  }
  static __device__ __forceinline__ void fill(Fragment& acc, float value) {
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[0][nj][c] = value;
  }
  static __device__ __forceinline__ void scale(Fragment& acc, float factor) {
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[0][nj][c] *= factor;
  }
  static __device__ __forceinline__ void add(Fragment& acc, const Fragment& sum) {
#pragma unroll
    for (int nj = 0; nj < kNj; ++nj)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[0][nj][c] += sum[0][nj][c];
  }
  static __device__ __forceinline__ void store_pair(const Packed& t, uint32_t at, float a,
                                                    float b) {
    MmaPath<uint16_t, kProducts>::store_pair(t, at, a, b);
  }
};

// Shared memory of a block.
template <int kStages_, int kMostParts>
struct Ring {
  static constexpr int kStages = kStages_;
  static constexpr int kStageBytes = 2 * kMostParts * kOperandBytes;
  static constexpr int kScratchBytes = 9 * kTile * sizeof(float);  // of the forward epilogue
  static constexpr int kSharedBytes = kStages * kStageBytes + kScratchBytes + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  unsigned char* base;

  __device__ __forceinline__ unsigned char* stage(int s) const { return base + s * kStageBytes; }
  __device__ __forceinline__ unsigned char* scratch() const { return base + kStages * kStageBytes; }
  __device__ __forceinline__ uint64_t* full(int s) const {
    return reinterpret_cast<uint64_t*>(scratch() + kScratchBytes) + s;
  }
  __device__ __forceinline__ uint64_t* empty(int s) const { return full(kStages + s); }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(full(s), 1);
        mbarrier_init(empty(s), kConsumers / 32);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
  }
};

// ---- producer: one thread ------------------------------------------------------------------------

template <typename Ring, int kParts, typename Copy>
__device__ __forceinline__ void produce(const Ring& ring, Cursor& cursor, Copy copy) {
  mbarrier_wait(ring.empty(cursor.stage), cursor.freed());
  uint64_t* barrier = ring.full(cursor.stage);
  mbarrier_arrive_expect(barrier, 2 * kParts * kOperandBytes);
  copy(ring.stage(cursor.stage), barrier);
  cursor.advance(Ring::kStages);
}

__device__ __forceinline__ SimilaritySteps block_steps(const Packed& x, float alpha) {
  // Whole blocks: two steps of 64 bytes each.
  return SimilaritySteps((x.z_steps + 1) / 2, x.e_begin / 2, (x.e_steps + 1) / 2,
                         mix_of(alpha).e_first);
}

template <int kParts, typename Ring>
__device__ __forceinline__ void produce_similarity(const Ring& ring, Cursor& cursor,
                                                   const Packed& left, const Packed& right,
                                                   const float* alpha, int row0, int column0) {
  const SimilaritySteps steps = block_steps(left, *alpha);
  for (int step = 0; step < steps.total(); ++step) {
    const int block = steps.column_step(step);
    produce<Ring, kParts>(ring, cursor, [&](unsigned char* to, uint64_t* barrier) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        bulk_copy(to + part * kOperandBytes,
                  part_of(left, part) + whole_block(left.n_blocks, row0, block), kOperandBytes,
                  barrier);
        bulk_copy(to + (kParts + part) * kOperandBytes,
                  part_of(right, part) + whole_block(right.n_blocks, column0, block),
                  kOperandBytes, barrier);
      }
    });
  }
}

template <int kParts, typename Ring>
__device__ __forceinline__ void produce_product(const Ring& ring, Cursor& cursor, const Packed& t,
                                                const Packed& x, const ProductTile& tile,
                                                int steps) {
  for (int step = 0; step < steps; ++step) {
    produce<Ring, kParts>(ring, cursor, [&](unsigned char* to, uint64_t* barrier) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        unsigned char* left = to + part * kOperandBytes;
        unsigned char* right = to + (kParts + part) * kOperandBytes;
        if (!tile.transposed) {
          bulk_copy(left, part_of(t, part) + whole_block(t.n_blocks, tile.row0, step),
                    kOperandBytes, barrier);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (tile.transposed) {
            bulk_copy(left + half * kHalfBytes,
                      part_of(t, part) + half_block(t.n_blocks, tile.row0, step, half), kHalfBytes,
                      barrier);
          }
          bulk_copy(right + half * kHalfBytes,
                    part_of(x, part) + half_block(x.n_blocks, tile.column0, step, half), kHalfBytes,
                    barrier);
        }
      }
    });
  }
}

// ---- consumers: two warpgroups -------------------------------------------------------------------

// Products of one stage of 64 k: lo hi, hi lo, hi hi in this order, which replace what is in `acc`; a
// single product is added to it.
template <typename Path, int kMajorA, int kMajorB>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage,
                                               typename Path::Fragment& acc) {
  constexpr int kParts = Path::kParts;
  const uint32_t group = threadIdx.x >> 7;  // rows 64 group.. of the tile: 64 rows of 128 bytes
  const uint32_t left = shared_address(stage) + group * kHalfBytes;
  const uint32_t right = shared_address(stage) + kParts * kOperandBytes;
#pragma unroll
  for (int product = 0; product < Path::kProducts; ++product) {
    const int a = Path::kProducts == 3 && product == 0, b = product == 1;  // 1: the lo part
    const uint32_t from_a = left + a * kOperandBytes, from_b = right + b * kOperandBytes;
#pragma unroll
    for (int kk = 0; kk < kStepColumns / 16; ++kk) {
      const uint64_t of_a = kMajorA ? mn_major(from_a, kk) : k_major(from_a, kk);
      const uint64_t of_b = kMajorB ? mn_major(from_b, kk) : k_major(from_b, kk);
      if (Path::kProducts > 1 && product == 0 && kk == 0) {
        wgmma_m64n128k16<kMajorA, kMajorB, false>(acc, of_a, of_b);
      } else {
        wgmma_m64n128k16<kMajorA, kMajorB, true>(acc, of_a, of_b);
      }
    }
  }
}

// acc += over `steps` stages, scaled by `ratio` before step `scale_at`. A stage is handed back once
// the products of the next one are under way and its own are done.
template <typename Path, int kMajorA, int kMajorB, typename Ring>
__device__ __forceinline__ void consume_in_place(const Ring& ring, Cursor& cursor, int steps,
                                                 int scale_at, float ratio,
                                                 typename Path::Fragment& acc) {
  const bool leader = (threadIdx.x & 31) == 0;
  int before = -1;
  wgmma_hold(acc);
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(ring.full(cursor.stage), cursor.filled());
    if (step == scale_at) {
      wgmma_wait<0>();
      wgmma_hold(acc);
      Path::scale(acc, ratio);
      wgmma_hold(acc);
    }
    wgmma_fence();
    multiply_stage<Path, kMajorA, kMajorB>(ring.stage(cursor.stage), acc);
    wgmma_commit();
    wgmma_wait<1>();
    if (before >= 0 && leader) mbarrier_arrive(ring.empty(before));
    before = cursor.stage;
    cursor.advance(Ring::kStages);
  }
  wgmma_wait<0>();
  wgmma_hold(acc);
  if (before >= 0 && leader) mbarrier_arrive(ring.empty(before));
}

// The same with the sum of each stage made apart and added by ordinary arithmetic: the matrix unit
// cuts off the digits of small products that are added to a large sum. With kInFlight 2 a stage's
// products run while those of the stage before are added.
template <typename Path, int kMajorA, int kMajorB, int kInFlight, typename Ring>
__device__ __forceinline__ void consume_apart(const Ring& ring, Cursor& cursor, int steps,
                                              int scale_at, float ratio,
                                              typename Path::Fragment& acc) {
  const bool leader = (threadIdx.x & 31) == 0;
  typename Path::Fragment sums[kInFlight];
  Cursor done = cursor;
  const auto begin = [&](typename Path::Fragment& sum) {
    mbarrier_wait(ring.full(cursor.stage), cursor.filled());
    wgmma_fence();
    multiply_stage<Path, kMajorA, kMajorB>(ring.stage(cursor.stage), sum);
    wgmma_commit();
    cursor.advance(Ring::kStages);
  };
  const auto end = [&](int step, typename Path::Fragment& sum) {
    wgmma_hold(sum);
    if (leader) mbarrier_arrive(ring.empty(done.stage));
    done.advance(Ring::kStages);
    if (step == scale_at) Path::scale(acc, ratio);
    Path::add(acc, sum);
  };
  if constexpr (kInFlight == 1) {
    for (int step = 0; step < steps; ++step) {
      begin(sums[0]);
      wgmma_wait<0>();
      end(step, sums[0]);
    }
  } else if (steps > 0) {
    // No condition in the loop: the assembler would wait for every product.
    int step = 0;
    begin(sums[0]);
    for (; step + 2 < steps; step += 2) {
      begin(sums[1]);
      wgmma_wait<1>();
      end(step, sums[0]);
      begin(sums[0]);
      wgmma_wait<1>();
      end(step + 1, sums[1]);
    }
    if (step + 1 < steps) {
      begin(sums[1]);
      wgmma_wait<1>();
      end(step, sums[0]);
      wgmma_wait<0>();
      end(step + 1, sums[1]);
    } else {
      wgmma_wait<0>();
      end(step, sums[0]);
    }
  }
}

template <typename Path, int kMajorA, int kMajorB, int kInFlight, typename Ring>
__device__ __forceinline__ void consume(const Ring& ring, Cursor& cursor, int steps, int scale_at,
                                        float ratio, typename Path::Fragment& acc) {
  if constexpr (Path::kProducts == 1) {
    consume_in_place<Path, kMajorA, kMajorB>(ring, cursor, steps, scale_at, ratio, acc);
  } else {
    consume_apart<Path, kMajorA, kMajorB, kInFlight>(ring, cursor, steps, scale_at, ratio, acc);
  }
}

// acc = tile of S, as in MmaPath::similarity.
template <typename Path, int kInFlight, typename Ring>
__device__ __forceinline__ void consume_similarity(const Ring& ring, Cursor& cursor,
                                                   const Packed& x, const float* alpha,
                                                   typename Path::Fragment& acc) {
  const SimilaritySteps steps = block_steps(x, *alpha);
  const Mix<float> mix = mix_of(*alpha);
  Path::fill(acc, 0.f);
  consume<Path, 0, 0, kInFlight>(ring, cursor, steps.total(), steps.first_count, mix.ratio, acc);
  Path::scale(acc, mix.second_steps(x.z_steps, x.e_steps) ? mix.scale : mix.ratio * mix.scale);
}

// ---- kernels --------------------------------------------------------------------------------------

template <int kProducts, bool kWeighted>
struct Shape {
  using Path = WgmmaPath<kProducts>;
  using WPath = WgmmaPath<3>;
  static constexpr bool kTwo = kProducts == 1 && !kWeighted;  // blocks a multiprocessor
  static constexpr int kBlocksEach = kTwo ? 2 : 1;
  // Alone on a multiprocessor, a block has a whole warpgroup of which one thread starts the copies
  // and which gives its registers to the others: 384 threads start with 168 each, and
  // 128 * 40 + 256 * 232 = 384 * 168. Where two blocks share one, a single warp is enough.
  static constexpr int kThreads = kConsumers + (kTwo ? 32 : 128);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  using Buffers = Ring<3, kTwo ? 1 : 2>;
};

// The two roles of a block, each in a branch of its own, so that each has its own registers.
template <typename Shape, typename Produce, typename Consume>
__device__ __forceinline__ void run_roles(Produce produce_all, Consume consume_all) {
  if (threadIdx.x >= kConsumers) {
    if constexpr (!Shape::kTwo) registers_down<Shape::kProducerRegisters>();
    if (threadIdx.x == kConsumers) produce_all();
  } else {
    if constexpr (!Shape::kTwo) registers_up<Shape::kConsumerRegisters>();
    consume_all();
  }
}

// Calls body(tile, snapshots needed) for this block's tiles of a patch.
template <bool kWeighted, bool kTriangle, typename Body>
__device__ __forceinline__ void walk(const PairArgs<float>& args, Body body) {
  const Patch& patch = args.patch;
  const int count = patch.row_tiles() * patch.column_tiles();
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    const Tile tile = tile_at(index, patch.row_tiles(), patch.column_tiles());
    if (kTriangle && patch.skips(tile)) continue;
    body(tile, kWeighted ? needed_by(args.weights, patch, tile) : uint64_t{0});
  }
}

// Similarity tiles of a patch; epilogue(tile, w, acc) ends each.
template <int kProducts, bool kWeighted, bool kTriangle, typename Ring, typename Epilogue>
__device__ __forceinline__ void similarity_tiles(const PairArgs<float>& args, const Ring& ring,
                                                 Epilogue epilogue) {
  using Path = typename Shape<kProducts, kWeighted>::Path;
  using WPath = typename Shape<kProducts, kWeighted>::WPath;
  constexpr int kInFlight = kWeighted ? 1 : 2;  // the weights take the registers of one
  run_roles<Shape<kProducts, kWeighted>>(
      [&] {
        Cursor cursor;
        walk<kWeighted, kTriangle>(args, [&](Tile tile, uint64_t needed) {
          const int row0 = tile.i * kTile, column0 = tile.j * kTile;
          while (kWeighted && needed) {
            const int s = latest_common(needed, needed);
            needed ^= uint64_t{1} << s;
            const auto& snapshot = args.weights.table[s];
            produce_similarity<2>(ring, cursor, snapshot.left, snapshot.right, snapshot.alpha,
                                  row0, column0);
          }
          produce_similarity<Path::kParts>(ring, cursor, args.left, args.right, args.alpha, row0,
                                           column0);
        });
      },
      [&] {
        Cursor cursor;
        walk<kWeighted, kTriangle>(args, [&](Tile tile, uint64_t needed) {
          typename Path::Fragment w, acc;
          if constexpr (kWeighted) {
            WPath::fill(w, 1.f);
            while (needed) {
              const int s = latest_common(needed, needed);
              needed ^= uint64_t{1} << s;
              const auto& snapshot = args.weights.table[s];
              consume_similarity<WPath, kInFlight>(ring, cursor, snapshot.left, snapshot.alpha, acc);
              weigh<WPath>(args.weights, s, static_cast<int>(args.patch.row_begin) + tile.i * kTile,
                           static_cast<int>(args.patch.column_begin) + tile.j * kTile, acc, w);
            }
          }
          consume_similarity<Path, kInFlight>(ring, cursor, args.left, args.alpha, acc);
          epilogue(tile, w, acc);
        });
      });
}

template <int kProducts, bool kWeighted>
__global__ __launch_bounds__((Shape<kProducts, kWeighted>::kThreads),
                             (Shape<kProducts, kWeighted>::kBlocksEach)) void
forward_kernel(ForwardArgs<float> args) {
  using Path = typename Shape<kProducts, kWeighted>::Path;
  FASTCLUST_DYNAMIC_SHARED_1024(shared);
  const typename Shape<kProducts, kWeighted>::Buffers ring{shared};
  ring.init();
  similarity_tiles<kProducts, kWeighted, true>(args, ring, [&](Tile tile, auto& w, auto& acc) {
    forward_epilogue<Path, kWeighted>(args, tile, ring.scratch(), threadIdx.x, w, acc);
    Path::sync();  // the next tile writes the scratch that this one has read
  });
}

template <int kProducts, bool kWeighted>
__global__ __launch_bounds__((Shape<kProducts, kWeighted>::kThreads),
                             (Shape<kProducts, kWeighted>::kBlocksEach)) void
tile_kernel(TileArgs<float> args) {
  using Path = typename Shape<kProducts, kWeighted>::Path;
  FASTCLUST_DYNAMIC_SHARED_1024(shared);
  const typename Shape<kProducts, kWeighted>::Buffers ring{shared};
  ring.init();
  similarity_tiles<kProducts, kWeighted, false>(args, ring, [&](Tile tile, auto& w, auto& acc) {
    tile_epilogue<Path, kWeighted>(args, tile, w, acc);
  });
}

template <int kProducts>
__global__ __launch_bounds__((Shape<kProducts, false>::kThreads),
                             (Shape<kProducts, false>::kBlocksEach)) void
product_kernel(ProductArgs<float> args) {
  using Path = typename Shape<kProducts, false>::Path;
  FASTCLUST_DYNAMIC_SHARED_1024(shared);
  const typename Shape<kProducts, false>::Buffers ring{shared};
  ring.init();
  const Patch& patch = args.patch;
  const int rows = patch.row_tiles() + (patch.inside() ? 0 : patch.column_tiles());
  const auto walk_products = [&](auto body) {
    for (int index = blockIdx.x; index < rows * args.column_tiles; index += gridDim.x) {
      const ProductTile tile = product_tile(args, index);
      const int64_t k = tile.transposed ? patch.rows : patch.columns;
      body(tile, static_cast<int>(k / kStepColumns));
    }
  };
  run_roles<Shape<kProducts, false>>(
      [&] {
        Cursor cursor;
        walk_products([&](const ProductTile& tile, int steps) {
          produce_product<Path::kParts>(ring, cursor, args.t,
                                        tile.transposed ? args.left : args.right, tile, steps);
        });
      },
      [&] {
        Cursor cursor;
        walk_products([&](const ProductTile& tile, int steps) {
          typename Path::Fragment acc;
          Path::fill(acc, 0.f);
          if (tile.transposed) {
            consume<Path, 1, 1, 2>(ring, cursor, steps, -1, 0.f, acc);
          } else {
            consume<Path, 0, 1, 2>(ring, cursor, steps, -1, 0.f, acc);
          }
          product_epilogue<Path>(args, tile, acc);
        });
      });
}

// ---- launches -------------------------------------------------------------------------------------

template <int kProducts, bool kWeighted, typename Args>
cudaError_t launch_tiles(void (*kernel)(Args), unsigned tiles, const Args& args,
                         cudaStream_t stream) {
  using Shape = sm90::Shape<kProducts, kWeighted>;
  const int grid = grid_of(static_cast<int>(tiles), multiprocessors(), Shape::kBlocksEach);
  return launch(kernel, dim3(static_cast<unsigned>(grid)), Shape::kThreads,
                Shape::Buffers::kSharedBytes, stream, args);
}

template <int kProducts>
cudaError_t forward(const ForwardArgs<float>& args, unsigned tiles, bool weighted,
                    cudaStream_t stream) {
  if (weighted) {
    return launch_tiles<kProducts, true>(&forward_kernel<kProducts, true>, tiles, args, stream);
  }
  return launch_tiles<kProducts, false>(&forward_kernel<kProducts, false>, tiles, args, stream);
}
template <int kProducts>
cudaError_t tiles(const TileArgs<float>& args, unsigned tiles, bool weighted,
                  cudaStream_t stream) {
  if (weighted) {
    return launch_tiles<kProducts, true>(&tile_kernel<kProducts, true>, tiles, args, stream);
  }
  return launch_tiles<kProducts, false>(&tile_kernel<kProducts, false>, tiles, args, stream);
}
template <int kProducts>
cudaError_t product(const ProductArgs<float>& args, unsigned tiles, cudaStream_t stream) {
  return launch_tiles<kProducts, false>(&product_kernel<kProducts>, tiles, args, stream);
}

}  // namespace fastclust::infonce::sm90
