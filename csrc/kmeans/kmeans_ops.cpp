// Registers the CPU operators of k-means.
#include "kmeans/kmeans_args.h"

namespace fastclust::kmeans {
namespace {

struct Cpu {
  template <typename... Args>
  static void center(const Tensor&, Args... args) {
    kmeans::center(args...);
  }
  template <typename... Args>
  static void initialize(const Tensor&, Args... args) {
    kmeans::initialize(args...);
  }
  template <typename T, typename... Args>
  static void lloyd(const Tensor&, const Problem<T>& p, const double* tolerance, Args... args) {
    kmeans::lloyd(p, *tolerance, args...);
  }
  template <typename... Args>
  static void assign(const Tensor&, Args... args) {
    kmeans::assign(args...);
  }
};

}  // namespace
}  // namespace fastclust::kmeans

STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m) {
  using fastclust::kmeans::Cpu;
  m.impl("kmeans_center", TORCH_BOX(&fastclust::kmeans::center_op<Cpu>));
  m.impl("kmeans_init", TORCH_BOX(&fastclust::kmeans::init_op<Cpu>));
  m.impl("kmeans_lloyd", TORCH_BOX(&fastclust::kmeans::lloyd_op<Cpu>));
  m.impl("kmeans_assign", TORCH_BOX(&fastclust::kmeans::assign_op<Cpu>));
}
