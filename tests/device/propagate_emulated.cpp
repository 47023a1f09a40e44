// The CUDA kernels of the propagation and their launchers, compiled for the CPU over cuda_emulator.h
// and called from tests/test_propagate_device.py through ctypes.
#define FASTCLUST_DEVICE_EMULATOR "device/cuda_emulator.h"
#include FASTCLUST_DEVICE_EMULATOR

#include "device/emulated_launch.h"
#include "propagate/propagate_cuda.cu"

using namespace fastclust;

extern "C" {

void set_warp_order(int order) { emulator::state().warp_order = order; }

#define FASTCLUST_ENTRIES(T)                                                                    \
  int propagate_##T(const PropagateParams<T>* p) { return propagate_cuda(*p, nullptr); }        \
  int mask_rows_##T(int64_t n_nodes, int64_t n_cols, const T* h, int64_t stride,                \
                    const uint32_t* mask, T* out) {                                             \
    return mask_rows_cuda(n_nodes, n_cols, h, stride, mask, out, nullptr);                      \
  }
FASTCLUST_ENTRIES(float)
FASTCLUST_ENTRIES(double)
FASTCLUST_ENTRIES(Bf16)

int64_t params_bytes() { return sizeof(PropagateParams<float>); }

// Every bf16 number through float and back; the number of those that change. NaN keeps being NaN.
int64_t bf16_changes() {
  int64_t changes = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    Bf16 back;
    const float value = widen(Bf16{static_cast<uint16_t>(bits)});
    narrow(value, &back);
    changes += value == value ? back.bits != bits : widen(back) == widen(back);
  }
  return changes;
}
int32_t to_bf16(float value) {
  Bf16 x;
  narrow(value, &x);
  return x.bits;
}

}  // extern "C"
