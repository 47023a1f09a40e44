// A CUDA block on the CPU, for tests: kernel sources compiled as ordinary C++ against this header
// run thread by thread, so that their index arithmetic, barriers and pipeline are executed and
// checked where there is no GPU. Written from the PTX manual, independent of the kernels' maps.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier or a warp-wide
// instruction; the scheduler takes blocks, warps and the lanes between two such instructions in an
// order the test chooses and runs each as far as it gets, the most uneven progress that barriers
// allow. Asynchronous copies happen either at once or as late as their wait permits. A result that
// depends on either choice is a race. Shared memory, static or dynamic, is NaN when a block begins.
// Of Hopper: barriers in shared memory with their byte counts, bulk copies (at once, or one by one when
// nothing else can move, in any order), and wgmma on descriptors (at once, or as late as its wait
// permits).
// Found and counted in emulator::report(): divergent warp instructions, barriers that not all
// threads reach, shared memory out of bounds or misaligned, copies never waited for, fences left out
// around wgmma and barriers, and bank conflicts of ldmatrix.
#pragma once

#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // together in the library's segment: see forget_shared
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FASTCLUST_DYNAMIC_SHARED(name) unsigned char* const name = emulator::state().shared
#define FASTCLUST_DYNAMIC_SHARED_1024(name) FASTCLUST_DYNAMIC_SHARED(name)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Report {
  int64_t launches = 0, blocks = 0, matrix_instructions = 0;
  int64_t ldmatrix_phases = 0, bank_conflicts = 0;
};

enum class Operation {
  kNone, kBarrier, kNamed, kPhase, kShuffle, kFromLane, kLoad, kLoadTransposed, kMmaBf16, kMmaTf32
};

struct Copy {
  unsigned char* to;
  const void* from;
};

// A barrier in shared memory; its own eight bytes only name it.
struct PhaseBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // still to come in this phase
  uint32_t phase = 0;
  bool fenced = false;  // known to the copy engine
};
struct BulkCopy {
  unsigned char* to;
  const void* from;
  size_t bytes;
  const void* barrier;
};
struct Wgmma {
  float* d;  // [16][4]
  uint64_t a, b;
  bool a_mn_major, b_mn_major, add;
};

struct Thread {
  ucontext_t start;  // first entry; later switches go by setjmp, without a system call
  jmp_buf resume;
  bool started = false;
  Operation waiting = Operation::kNone;
  bool done = false;
  int warp_argument = 0;         // lane mask or source lane of a shuffle
  const void* in[2] = {};        // operands, on this fiber's stack
  void* out = nullptr;
  size_t bytes = 0;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
  const void* barrier = nullptr;  // waited for, and the parity of its phase
  uint32_t parity = 0;
  int named = 0, named_count = 0;
  std::vector<std::vector<Wgmma>> products;  // committed, oldest first
  std::vector<Wgmma> open_products;
  bool fenced = false;  // wgmma.fence since the last group
};

struct State {
  dim3 thread_index, block_index, block_dim, grid_dim;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  ucontext_t scheduler_start;
  jmp_buf scheduler;
  int running = 0;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  int warp_order = 0;     // also of blocks and lanes: 0 ascending, 1 descending, 2 new each round
  bool late_copies = true;
  uint64_t random = 1;
  std::map<const void*, PhaseBarrier> barriers;  // of the block
  std::deque<BulkCopy> bulk;                     // started, not yet done
  int multiprocessors = 2;
  Report report;
};
inline State& state() {
  static State s;
  return s;
}

[[noreturn]] inline void fail(const char* what) {
  const State& s = state();
  std::fprintf(stderr, "device emulator: %s (block %u, %u, %u, thread %d)\n", what,
               s.block_index.x, s.block_index.y, s.block_index.z, s.running);
  std::abort();
}

inline Thread& self() { return state().threads[state().running]; }

// A number below `count`: the first, the last or any, after the order of the warps.
inline size_t choose(size_t count) {
  State& s = state();
  if (s.warp_order != 2) return s.warp_order == 1 ? count - 1 : 0;
  s.random = s.random * 6364136223846793005ull + 1442695040888963407ull;
  return (s.random >> 33) % count;
}
// Numbers 0 .. count - 1 in that order.
inline std::vector<int> chosen_order(int count) {
  std::vector<int> left(count), order;
  std::iota(left.begin(), left.end(), 0);
  while (!left.empty()) {
    const auto at = left.begin() + static_cast<std::ptrdiff_t>(choose(left.size()));
    order.push_back(*at);
    left.erase(at);
  }
  return order;
}

// NaN as float, double and bf16, far out of any bounds as an integer.
inline void forget(void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(memory)[i] = i % 2 ? 0x7f : 0xff;
}
// What a block finds in the kernels' static shared memory.
inline void forget_shared() {
  static volatile thread_local char any;
  any = 0;  // before it is touched for the first time the segment does not exist
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* here) {
        const auto at = reinterpret_cast<uintptr_t>(here) - library->dlpi_addr;
        bool mine = false;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          mine |= part.p_type == PT_LOAD && at - part.p_vaddr < part.p_memsz;
        }
        for (int i = 0; mine && i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          if (part.p_type == PT_TLS && library->dlpi_tls_data != nullptr) {
            forget(library->dlpi_tls_data, part.p_memsz);
          }
        }
        return static_cast<int>(mine);
      },
      &state());
}

inline void wait_for(Operation operation) {
  State& s = state();
  Thread& thread = self();
  thread.waiting = operation;
  if (_setjmp(thread.resume) == 0) _longjmp(s.scheduler, 1);
}

inline void run_thread(int index) {
  State& s = state();
  Thread& thread = s.threads[index];
  s.running = index;
  s.thread_index = dim3(static_cast<unsigned>(index), 0, 0);
  if (_setjmp(s.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  swapcontext(&s.scheduler_start, &thread.start);
}

inline void check_shared(const void* address, size_t bytes) {
  const State& s = state();
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < s.shared || p + bytes > s.shared + s.shared_bytes) fail("shared memory out of bounds");
  if ((p - s.shared) % bytes) fail("misaligned shared memory access");
}

// ---- warp-wide instructions: the whole warp has arrived ------------------------------------------

inline float bf16(uint32_t word, int half) {
  const uint32_t bits = (half ? word >> 16 : word & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float tf32(uint32_t word) {
  const uint32_t bits = word & 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// c + sum of products as the matrix units add them: so many products at a time, they and c aligned to
// the largest of them, cut off `kExtra` bits below its float32 mantissa, and the sum cut to float32.
// Measured on cards by Fasi et al. (PeerJ CS 330, 2021) and Khattak and Mikaitis (arXiv 2512.07004).
template <int kBlock, int kExtra>
float cut_off_sum(float c, const double* products, int count) {
  double sum = c;
  for (int begin = 0; begin < count; begin += kBlock) {
    const double* p = products + begin;
    double largest = fabs(sum);
    for (int k = 0; k < kBlock; ++k) largest = fmax(largest, fabs(p[k]));
    double exact = sum;
    for (int k = 0; k < kBlock; ++k) exact += p[k];
    if (largest == 0 || !isfinite(exact)) {
      sum = exact;
      continue;
    }
    const int last = ilogb(largest) - 23 - kExtra;
    const double unit = ldexp(1.0, last), per_unit = ldexp(1.0, -last);
    auto total = static_cast<int64_t>(sum * per_unit);
    for (int k = 0; k < kBlock; ++k) total += static_cast<int64_t>(p[k] * per_unit);
    sum = static_cast<double>(total) * unit;
    uint64_t bits;
    std::memcpy(&bits, &sum, 8);
    bits &= ~uint64_t{0x1fffffff};  // of 52 bits of mantissa, 23 stay
    std::memcpy(&sum, &bits, 8);
  }
  return static_cast<float>(sum);
}

inline void execute_load(Thread* lanes, bool transposed) {
  State& s = state();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const unsigned char* rows[8];
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<const unsigned char*>(lanes[8 * matrix + r].in[0]);
      check_shared(rows[r], 16);
      const unsigned bank = 1u << ((rows[r] - s.shared) / 16 % 8);
      s.report.bank_conflicts += (banks & bank) != 0;
      banks |= bank;
    }
    ++s.report.ldmatrix_phases;
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t& out = static_cast<uint32_t*>(lanes[lane].out)[matrix];
      if (!transposed) {
        std::memcpy(&out, rows[lane / 4] + lane % 4 * 4, 4);
      } else {
        uint16_t low, high;
        std::memcpy(&low, rows[lane % 4 * 2] + lane / 4 * 2, 2);
        std::memcpy(&high, rows[lane % 4 * 2 + 1] + lane / 4 * 2, 2);
        out = low | uint32_t{high} << 16;
      }
    }
  }
}

inline void execute_mma(Thread* lanes, bool is_bf16) {
  ++state().report.matrix_instructions;
  float a[16][16] = {}, b[16][8] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* ra = static_cast<const uint32_t*>(lanes[lane].in[0]);
    const auto* rb = static_cast<const uint32_t*>(lanes[lane].in[1]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r & 1);
      if (is_bf16) {
        for (int h = 0; h < 2; ++h) a[row][2 * t + h + 8 * (r >> 1)] = bf16(ra[r], h);
      } else {
        a[row][t + 4 * (r >> 1)] = tf32(ra[r]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      if (is_bf16) {
        for (int h = 0; h < 2; ++h) b[2 * t + h + 8 * r][g] = bf16(rb[r], h);
      } else {
        b[t + 4 * r][g] = tf32(rb[r]);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* c = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
      double products[16];
      for (int k = 0; k < (is_bf16 ? 16 : 8); ++k) products[k] = double{a[row][k]} * b[k][column];
      c[i] = is_bf16 ? cut_off_sum<8, 1>(c[i], products, 16)  // as on sm_80, the coarsest
                     : cut_off_sum<4, 1>(c[i], products, 8);
    }
  }
}

inline void execute_warp(Thread* lanes) {
  switch (lanes[0].waiting) {
    case Operation::kShuffle:
      for (int lane = 0; lane < kWarp; ++lane) {
        std::memcpy(lanes[lane].out, lanes[lane ^ lanes[lane].warp_argument].in[0],
                    lanes[lane].bytes);
      }
      break;
    case Operation::kFromLane:
      for (int lane = 0; lane < kWarp; ++lane) {
        const int source = lanes[lane].warp_argument % kWarp;
        std::memcpy(lanes[lane].out, lanes[source].in[0], lanes[lane].bytes);
      }
      break;
    case Operation::kLoad: execute_load(lanes, false); break;
    case Operation::kLoadTransposed: execute_load(lanes, true); break;
    case Operation::kMmaBf16: execute_mma(lanes, true); break;
    case Operation::kMmaTf32: execute_mma(lanes, false); break;
    default: fail("unexpected warp operation");
  }
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane].waiting = Operation::kNone;
}

// ---- barriers in shared memory, bulk copies, wgmma ------------------------------------------------

inline PhaseBarrier& phase_barrier(const void* at) {
  const auto found = state().barriers.find(at);
  if (found == state().barriers.end()) fail("a barrier that was never initialised");
  return found->second;
}
inline void settle(PhaseBarrier& b) {
  if (b.missing < 0 || b.bytes < 0) fail("a barrier got more than it expected");
  if (b.missing == 0 && b.bytes == 0) ++b.phase, b.missing = b.arrivals;
}
inline void perform(const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  PhaseBarrier& b = phase_barrier(copy.barrier);
  b.bytes -= static_cast<int64_t>(copy.bytes);
  settle(b);
}
inline bool phase_over(const Thread& thread) {
  return (phase_barrier(thread.barrier).phase & 1) != thread.parity;
}

// Element (mn, k) of an operand with the 128-byte swizzle, after the PTX manual's canonical layouts.
inline float operand(uint64_t descriptor, bool mn_major, int mn, int k) {
  if (descriptor >> 62 != 1) fail("wgmma descriptor without the 128-byte swizzle");
  if (descriptor & 0x3fffc000c000c000) fail("wgmma descriptor with more than start and strides");
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t at = mn_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                         : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  const State& s = state();
  if (at + 2 > s.shared_bytes) fail("wgmma reads beyond shared memory");
  uint16_t bits;
  std::memcpy(&bits, s.shared + at, 2);
  return bf16(bits, 0);
}
// This thread's 64 elements of d += a b^T, or of d = a b^T.
inline void perform(const Wgmma& product, int thread_index) {
  const int lane = thread_index % kWarp, warp = thread_index / kWarp % 4;
  float a[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      a[half][k] = operand(product.a, product.a_mn_major, 16 * warp + lane / 4 + 8 * half, k);
    }
  for (int n8 = 0; n8 < 16; ++n8)
    for (int e = 0; e < 2; ++e) {
      double products[2][16];
      for (int k = 0; k < 16; ++k) {
        const double b = operand(product.b, product.b_mn_major, 8 * n8 + lane % 4 * 2 + e, k);
        products[0][k] = a[0][k] * b;
        products[1][k] = a[1][k] * b;
      }
      for (int half = 0; half < 2; ++half) {
        float& d = product.d[4 * n8 + 2 * half + e];
        d = cut_off_sum<16, 2>(product.add ? d : 0.f, products[half], 16);
      }
    }
}

// ---- scheduler ----------------------------------------------------------------------------------

inline void fiber_main() {
  State& s = state();
  s.body(s.arguments);
  Thread& thread = self();
  for (const auto& group : thread.groups) {
    if (!group.empty()) fail("asynchronous copies never waited for");
  }
  if (!thread.products.empty() || !thread.open_products.empty()) {
    fail("matrix products never waited for");
  }
  thread.done = true;
  _longjmp(s.scheduler, 1);
}

// Runs a warp until every lane is done or at the barrier; false when it could not move.
inline bool run_warp(int first) {
  State& s = state();
  bool moved = false;
  for (;;) {
    bool ran = false;
    const int flip = static_cast<int>(choose(kWarp));
    for (int k = 0; k < kWarp; ++k) {
      const int lane = k ^ flip;
      Thread& thread = s.threads[first + lane];
      if (thread.done || thread.waiting != Operation::kNone) continue;
      run_thread(first + lane);
      ran = moved = true;
    }
    if (!ran) return moved;
    const Operation operation = s.threads[first].waiting;
    if (operation == Operation::kBarrier || operation == Operation::kNamed ||
        operation == Operation::kPhase || operation == Operation::kNone) {
      continue;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (s.threads[first + lane].waiting != operation) fail("divergent warp instruction");
    }
    execute_warp(&s.threads[first]);
  }
}

inline void run_block(int n_threads) {
  State& s = state();
  if (n_threads % kWarp) fail("block size must be whole warps");
  s.threads.clear();
  s.threads.resize(n_threads);
  if (s.stacks.size() < static_cast<size_t>(n_threads)) s.stacks.resize(n_threads);
  for (int i = 0; i < n_threads; ++i) {
    if (!s.stacks[i]) s.stacks[i].reset(new unsigned char[kStack]);
    getcontext(&s.threads[i].start);
    s.threads[i].start.uc_stack.ss_sp = s.stacks[i].get();
    s.threads[i].start.uc_stack.ss_size = kStack;
    s.threads[i].start.uc_link = nullptr;
    makecontext(&s.threads[i].start, fiber_main, 0);
  }
  for (;;) {
    bool moved = false;
    for (const int w : chosen_order(n_threads / kWarp)) moved |= run_warp(w * kWarp);
    int done = 0, at_barrier = 0;
    for (const Thread& thread : s.threads) {
      done += thread.done;
      at_barrier += thread.waiting == Operation::kBarrier;
    }
    if (done == n_threads) {
      if (!s.bulk.empty()) fail("bulk copies never waited for");
      return;
    }
    if (at_barrier == n_threads) {
      for (Thread& thread : s.threads) thread.waiting = Operation::kNone;
      continue;
    }
    std::map<int, int> at_named;
    for (Thread& thread : s.threads) {
      if (thread.waiting == Operation::kPhase && phase_over(thread)) {
        thread.waiting = Operation::kNone;
        moved = true;
      }
      if (thread.waiting == Operation::kNamed) ++at_named[thread.named];
    }
    for (Thread& thread : s.threads) {
      if (thread.waiting == Operation::kNamed && at_named[thread.named] == thread.named_count) {
        thread.waiting = Operation::kNone;
        moved = true;
      }
    }
    if (moved) continue;
    if (s.bulk.empty()) fail("a barrier that not all threads reach");
    const auto next = s.bulk.begin() + static_cast<std::ptrdiff_t>(choose(s.bulk.size()));
    perform(*next);
    s.bulk.erase(next);
  }
}

inline void shuffle(Operation operation, const void* in, void* out, size_t bytes, int argument) {
  Thread& thread = self();
  thread.in[0] = in;
  thread.out = out;
  thread.bytes = bytes;
  thread.warp_argument = argument;
  wait_for(operation);
}

inline void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, 16);
}

}  // namespace emulator

#define threadIdx (emulator::state().thread_index)
#define blockIdx (emulator::state().block_index)
#define blockDim (emulator::state().block_dim)
#define gridDim (emulator::state().grid_dim)

inline void __syncthreads() { emulator::wait_for(emulator::Operation::kBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  T out;
  emulator::shuffle(emulator::Operation::kShuffle, &value, &out, sizeof(T), lane_mask);
  return out;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  T out;
  emulator::shuffle(emulator::Operation::kFromLane, &value, &out, sizeof(T), lane);
  return out;
}
inline void __syncwarp() { __shfl_xor_sync(~0u, 0, 0); }
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned bits = static_cast<unsigned>(predicate) << emulator::state().running % emulator::kWarp;
  for (int offset = 16; offset > 0; offset /= 2) bits |= __shfl_xor_sync(mask, bits, offset);
  return bits;
}
// Read-only loads: as large as they are aligned.
template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("misaligned load");
  return *p;
}

namespace fastclust {

inline void cp_async16(void* shared, const void* global) {
  emulator::check_shared(shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("misaligned asynchronous copy");
  auto* to = static_cast<unsigned char*>(shared);
  if (emulator::state().late_copies) {
    emulator::self().open.push_back({to, global});
  } else {
    std::memcpy(to, global, 16);
  }
}
inline void cp_async_commit() {
  auto& thread = emulator::self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::self().groups;
  while (groups.size() > static_cast<size_t>(kPending)) {
    emulator::perform(groups.front());
    groups.erase(groups.begin());
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  emulator::self().in[0] = shared;
  emulator::self().out = r;
  emulator::wait_for(emulator::Operation::kLoad);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  emulator::self().in[0] = shared;
  emulator::self().out = r;
  emulator::wait_for(emulator::Operation::kLoadTransposed);
}
inline void mma(emulator::Operation operation, float (&c)[4], const uint32_t (&a)[4],
                const uint32_t (&b)[2]) {
  auto& thread = emulator::self();
  thread.in[0] = a;
  thread.in[1] = b;
  thread.out = c;
  emulator::wait_for(operation);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(emulator::Operation::kMmaBf16, c, a, b);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(emulator::Operation::kMmaTf32, c, a, b);
}

template <typename T>
void add_one(T* to, T a) {
  *to += a;
}
template <typename T>
void add_pair(T* to, T a, T b) {
  if (reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T))) emulator::fail("misaligned pair");
  to[0] += a, to[1] += b;
}

inline float fast_exp(float x) { return exp2f(x * 1.4426950408889634f); }

// ---- Hopper ---------------------------------------------------------------------------------------

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) -
                               emulator::state().shared);
}
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::check_shared(barrier, 8);
  emulator::state().barriers[barrier] = {arrivals, arrivals, 0, 0, false};
}
inline void mbarrier_init_fence() {
  for (auto& [address, barrier] : emulator::state().barriers) barrier.fenced = true;
}
inline void mbarrier_arrive(uint64_t* barrier) {
  auto& b = emulator::phase_barrier(barrier);
  --b.missing;
  emulator::settle(b);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  auto& b = emulator::phase_barrier(barrier);
  b.bytes += bytes;
  --b.missing;
  emulator::settle(b);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  auto& thread = emulator::self();
  thread.barrier = barrier;
  thread.parity = parity;
  if (!emulator::phase_over(thread)) emulator::wait_for(emulator::Operation::kPhase);
}
template <int kId, int kCount>
void named_barrier() {
  emulator::self().named = kId;
  emulator::self().named_count = kCount;
  emulator::wait_for(emulator::Operation::kNamed);
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  auto* to = static_cast<unsigned char*>(shared);
  auto& s = emulator::state();
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16 || (to - s.shared) % 16) {
    emulator::fail("misaligned bulk copy");
  }
  if (to < s.shared || to + bytes > s.shared + s.shared_bytes) {
    emulator::fail("bulk copy out of bounds");
  }
  if (!emulator::phase_barrier(barrier).fenced) {
    emulator::fail("bulk copy to a barrier that the copy engine may not know");
  }
  // What is still in shared memory is lost from now on: a reader that is not done must show.
  std::memset(to, 0xff, bytes);
  const emulator::BulkCopy copy{to, global, bytes, barrier};
  if (s.late_copies) {
    s.bulk.push_back(copy);
  } else {
    emulator::perform(copy);
  }
}
template <int kCount>
void registers_up() {}
template <int kCount>
void registers_down() {}
// Before the first product of a group: the sums may have been touched since the last one.
inline void wgmma_fence() { emulator::self().fenced = true; }
// Where sums are about to be touched.
inline void wgmma_hold(float (&d)[1][16][4]) {
  const auto& thread = emulator::self();
  const auto check = [&](const std::vector<emulator::Wgmma>& group) {
    for (const auto& product : group) {
      if (product.d == &d[0][0][0]) emulator::fail("sums touched while products add to them");
    }
  };
  for (const auto& group : thread.products) check(group);
  check(thread.open_products);
}
inline void wgmma_commit() {
  auto& thread = emulator::self();
  thread.fenced = false;
  thread.products.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}
template <int kPending>
void wgmma_wait() {
  auto& thread = emulator::self();
  while (thread.products.size() > static_cast<size_t>(kPending)) {
    for (const auto& product : thread.products.front()) {
      emulator::perform(product, emulator::state().running);
    }
    thread.products.erase(thread.products.begin());
  }
}
template <int kMajorA, int kMajorB, bool kAdd>
void wgmma_m64n128k16(float (&d)[1][16][4], uint64_t a, uint64_t b) {
  auto& s = emulator::state();
  if (!emulator::self().fenced) emulator::fail("matrix product without a fence before its group");
  if (s.running % 128 == 0) ++s.report.matrix_instructions;
  const emulator::Wgmma product{&d[0][0][0], a, b, kMajorA == 1, kMajorB == 1, kAdd};
  if (s.late_copies) {
    emulator::self().open_products.push_back(product);
  } else {
    emulator::perform(product, s.running);
  }
}
inline int multiprocessors() { return emulator::state().multiprocessors; }

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   const Args& args) {
  using namespace emulator;
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  State& s = state();
  // Shared memory starts as NaN in every format, so that what was never written shows.
  std::vector<unsigned char> memory(shared_bytes + 1024);
  s.shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
  s.shared_bytes = shared_bytes;
  s.body = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    c.kernel(*c.args);
  };
  s.arguments = &call;
  s.grid_dim = grid;
  s.block_dim = dim3(static_cast<unsigned>(threads));
  ++s.report.launches;
  for (const int block : chosen_order(static_cast<int>(grid.x * grid.y * grid.z))) {
    const auto index = static_cast<unsigned>(block);
    forget(s.shared, shared_bytes);
    forget_shared();
    s.barriers.clear();
    s.block_index = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    ++s.report.blocks;
    run_block(threads);
  }
  return cudaSuccess;
}

}  // namespace fastclust
