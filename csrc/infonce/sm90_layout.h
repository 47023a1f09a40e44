// Shared memory, descriptors and schedule of the Hopper kernels, free of CUDA for the CPU tests.
//
// A stage of the ring holds, for one step of 64 columns of k, the left and the right operand of a
// 128 x 128 tile, 16 KB each, hi and lo parts one after the other. Blocks of the packed format
// (tiles.h) are copied as they are: a whole block where its columns are k, 64 of the 128 rows of
// two neighbouring blocks where its rows are k.
#pragma once

#include "infonce/tiles.h"

namespace fastclust::infonce::sm90 {

constexpr int kTile = 128;
constexpr int kStepColumns = 64;              // k of a step
constexpr int kOperandBytes = kBlockBytes;    // one part of one operand in a stage
constexpr int kHalfBytes = kBlockBytes / 2;   // 64 rows of a block
constexpr int kConsumers = kThreads;         // two warpgroups, 64 rows of the tile each

// Ring of shared memory as one side goes round it. A barrier's phases alternate in parity; a
// consumer waits for the phase that fills the stage, the producer for the one that frees it, which
// in the first round counts as over.
struct Cursor {
  int stage = 0;
  uint32_t round = 0;

  FASTCLUST_HD void advance(int stages) {
    if (++stage == stages) stage = 0, ++round;
  }
  FASTCLUST_HD uint32_t filled() const { return round & 1; }
  FASTCLUST_HD uint32_t freed() const { return (round & 1) ^ 1; }
};

// Matrix descriptor of wgmma with the 128-byte swizzle: start, and the two strides of its groups of
// eight rows, in units of 16 bytes.
FASTCLUST_HD uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t swizzle_128 = 1;
  return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{leading_bytes >> 4} << 16 |
         uint64_t{stride_bytes >> 4} << 32 | swizzle_128 << 62;
}

constexpr uint32_t kGroupBytes = 8 * kBlockColumns;  // eight rows of 128 bytes

// Operand whose 128-byte rows run along k: [128 rows][64 k]; `kk` counts 16 k. The start moves
// inside the swizzle, which the unit applies to the final address.
FASTCLUST_HD uint64_t k_major(uint32_t address, int kk) {
  return descriptor(address + kk * 32, 16, kGroupBytes);
}
// Operand whose rows are k: [2 blocks of 64 columns][64 k][128 bytes].
FASTCLUST_HD uint64_t mn_major(uint32_t address, int kk) {
  return descriptor(address + kk * 2 * kGroupBytes, kHalfBytes, kGroupBytes);
}

// Offsets into a packed matrix of what a step copies. A block of 128 rows and the step-th 64 columns;
// or rows 64 step.. of the block of columns column0 + 64 half.
FASTCLUST_HD uint32_t whole_block(int n_blocks, int row0, int step) {
  return static_cast<uint32_t>(row0 / kBlockRows * n_blocks + step) * kBlockBytes;
}
FASTCLUST_HD uint32_t half_block(int n_blocks, int column0, int step, int half) {
  const int block = step / 2 * n_blocks + column0 / kStepColumns + half;
  return static_cast<uint32_t>(block) * kBlockBytes + (step & 1) * kHalfBytes;
}

// Blocks of a persistent launch walk the tiles with the stride of the grid: which block does a tile
// changes no result.
FASTCLUST_HD int grid_of(int tiles, int multiprocessors, int blocks_each) {
  const int resident = multiprocessors * blocks_each;
  return tiles < resident ? tiles : resident;
}

}  // namespace fastclust::infonce::sm90
