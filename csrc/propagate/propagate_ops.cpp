// Registers the CPU operators of the propagation.
#include "propagate/propagate_args.h"

namespace fastclust {
namespace {

struct Cpu {
  static constexpr bool kBf16 = false;

  template <typename T>
  static void run(const PropagateParams<T>& p, const Tensor&) {
    propagate_cpu(p);
  }
  template <typename... Args>
  static void mask_rows(const Tensor&, Args... args) {
    mask_rows_cpu(args...);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m) {
  m.impl("propagate", TORCH_BOX(&propagate_op<Cpu>));
  m.impl("propagate_backward", TORCH_BOX(&backward_op<Cpu>));
  m.impl("mask_rows", TORCH_BOX(&mask_rows_op<Cpu>));
}

}  // namespace fastclust
