// Registers the InfoNCE operators on the CPU.
#include "infonce/infonce_args.h"

namespace fastclust::infonce {
namespace {

struct Cpu {
  template <typename T>
  static void run(const ForwardParams<T>& params, const Tensor&) {
    forward_cpu(params);
  }
  template <typename T>
  static void run(const BackwardParams<T>& params, const Tensor&) {
    backward_cpu(params);
  }
  template <typename T>
  static void run(const RangeParams<T>& params, const Tensor&) {
    range_cpu(params);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m) {
  m.impl("hard_infonce", TORCH_BOX(&hard_infonce<Cpu>));
  m.impl("hard_infonce_backward", TORCH_BOX(&hard_infonce_backward<Cpu>));
  m.impl("similarity_range", TORCH_BOX(&similarity_range<Cpu>));
}

}  // namespace fastclust::infonce
