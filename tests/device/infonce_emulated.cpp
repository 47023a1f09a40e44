// The CUDA infonce kernels and their driver, compiled for the CPU over cuda_emulator.h and called
// from tests/test_infonce_device_math.py through ctypes.
#define FASTCLUST_DEVICE_EMULATOR "device/cuda_emulator.h"
#define FASTCLUST_SM90
#include "infonce/infonce_driver.cuh"
#include "infonce/infonce_sm90.cuh"

namespace {

using namespace fastclust::infonce;

// One call of any of the three operations; what an operation does not use is null.
template <typename T>
struct Problem {
  int64_t n_nodes, dz, de;
  const T *z, *e, *alpha;
  int32_t precision, n_snapshots;
  const T* const* snapshot_z;
  const T* const* snapshot_e;
  const T *snapshot_alpha, *range;
  const int64_t* snapshot_widths;  // [S, 2]
  const int32_t* labels;
  const int64_t* membership;
  const int32_t* order;
  double beta;
  T* loss;
  double* row_sums;
  const T* grad_loss;
  T *grad_z, *grad_e, *grad_alpha, *out_range;
  int64_t window[3];  // row_begin, row_end, column_begin; row_end == 0: no window
};

Limits limits;
bool only_measure = false;

template <typename Params>
int64_t execute(const Params& params) {
  constexpr size_t guard = 4096;
  Arena measure(nullptr, limits);
  if (drive(params, measure, nullptr) != cudaSuccess) return -1;
  const size_t bytes = measure.used();
  if (only_measure) return static_cast<int64_t>(bytes);
  // NaN in every format: a read of something never written poisons the result.
  auto* base = static_cast<unsigned char*>(
      std::aligned_alloc(256, (bytes + 2 * guard + 255) / 256 * 256));
  std::memset(base, 0xff, bytes + 2 * guard);
  Arena arena(base + guard, limits);
  const cudaError_t error = drive(params, arena, nullptr);
  bool clean = true;
  for (size_t i = 0; i < guard; ++i) {
    clean = clean && base[i] == 0xff && base[guard + bytes + i] == 0xff;
  }
  std::free(base);
  if (error != cudaSuccess) return -1;
  return clean ? static_cast<int64_t>(bytes) : -2;
}

template <typename T>
int64_t solve(const Problem<T>& p, int operation) {
  std::vector<Views<T>> snapshots(p.n_snapshots);
  for (int s = 0; s < p.n_snapshots; ++s) {
    snapshots[s] = {p.snapshot_z[s], p.snapshot_e[s], p.snapshot_widths[2 * s],
                    p.snapshot_widths[2 * s + 1], p.snapshot_alpha + s};
  }
  const Views<T> views{p.z, p.e, p.dz, p.de, p.alpha};
  const Weights<T> weights{p.n_snapshots, snapshots.data(), p.range, p.labels,
                           p.membership,  p.order,          p.beta};
  const auto precision = static_cast<Precision>(p.precision);
  const Window window{p.window[1] == 0, p.window[0], p.window[1], p.window[2]};
  if (operation == 0) {
    return execute(
        ForwardParams<T>{p.n_nodes, views, weights, precision, p.loss, p.row_sums, window});
  }
  if (operation == 1) {
    return execute(BackwardParams<T>{p.n_nodes, views, weights, precision, p.row_sums,
                                     p.grad_loss, p.grad_z, p.grad_e, p.grad_alpha, window});
  }
  return execute(RangeParams<T>{p.n_nodes, views, precision, p.out_range, window});
}

}  // namespace

extern "C" {

// Workspace bytes used, -1 for an error, -2 for a write outside the workspace.
int64_t infonce_float(const Problem<float>* p, int operation) { return solve(*p, operation); }
int64_t infonce_double(const Problem<double>* p, int operation) { return solve(*p, operation); }

void emulate(int warp_order, int late_copies) {
  emulator::state().warp_order = warp_order;
  emulator::state().late_copies = late_copies != 0;
}
// Small limits cut a small problem into bands, panels, chunks and splits; nullptr: the defaults.
void set_limits(const int64_t* v) {
  const bool hopper = limits.hopper;
  limits = v ? Limits{v[0], v[1], v[2], v[3]} : Limits{};
  limits.hopper = hopper;
}
void set_hopper(int on) { limits.hopper = on != 0; }
// From now on calls only return the workspace they would take.
void set_only_measure(int on) { only_measure = on != 0; }
// launches, blocks, matrix instructions, ldmatrix phases, bank conflicts; then starts at 0.
void take_report(int64_t* out) {
  const emulator::Report r = std::exchange(emulator::state().report, {});
  const int64_t values[] = {r.launches, r.blocks, r.matrix_instructions, r.ldmatrix_phases,
                            r.bank_conflicts};
  std::memcpy(out, values, sizeof values);
}

void tile_of(int index, int rows, int columns, int32_t* out) {
  const Tile tile = tile_at(index, rows, columns);
  out[0] = tile.i;
  out[1] = tile.j;
}
int64_t packed_byte(int64_t n_blocks, int64_t row, int64_t byte) {
  return packed_offset<int64_t>(n_blocks, row, byte);
}
// Patches of a cut in order, [count, 4]: row begin, rows, column begin, columns; returns the count.
int64_t patches_of(int64_t rows, int64_t panel, int64_t chunk, int64_t* out) {
  int64_t count = 0;
  (void)for_each_patch(Cut{panel, chunk}, Window{}, rows, 128, [&](const Patch& patch, bool) {
    const int64_t values[] = {patch.row_begin, patch.rows, patch.column_begin, patch.columns};
    if (out) std::memcpy(out + 4 * count, values, sizeof values);
    ++count;
    return cudaSuccess;
  });
  return count;
}
// Words that two of a warp's lanes fetch from one bank when reading tf32 operands of T [Z | E].
int32_t n_major_tf32_conflicts() {
  int32_t conflicts = 0;
  for (int column0 = 0; column0 < 128; column0 += 8)
    for (int k0 = 0; k0 < 16; k0 += 4) {
      uint32_t banks = 0;
      for (int lane = 0; lane < 32; ++lane) {
        const int k = k0 + (lane & 3), n = column0 + (lane >> 2);
        const int bank = (n_major_offset<4>(k, n >> 2) + (n & 3) * 4) / 4 % 32;
        conflicts += (banks >> bank) & 1;
        banks |= 1u << bank;
      }
    }
  return conflicts;
}
void cut_of(int64_t rows, int64_t fixed_bytes, int64_t row_bytes, double entry_bytes,
            int64_t chunks_a_panel, int64_t* out) {
  const Cut cut =
      cut_patches(limits, rows, fixed_bytes, row_bytes, entry_bytes, chunks_a_panel);
  out[0] = cut.panel;
  out[1] = cut.chunk;
}
// Formats: bf16 high and low part, tf32.
void formats(float value, float* out) {
  out[0] = bits_float(to_bf16_pair(value, 0.f) << 16);
  out[1] = bits_float(to_bf16_pair(0.f, value - out[0]) & 0xffff0000u);
  out[2] = to_tf32(value);
}

}  // extern "C"
