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

// Overwrites entries of stored [P, kWeightTile, kWeightTile].
void update_stored_weights(Tensor stored, Tensor z, Tensor e, Tensor alpha, Tensor range,
                           Tensor labels, Tensor confident, double beta) {
  check_rows(z);
  const int64_t n = z.size(0) / 2;
  check_shape(stored, "stored", {weight_tiles(n), kWeightTile, kWeightTile});
  check_shape(alpha, "alpha", {});
  check_shape(range, "range", {2});
  check_shape(labels, "labels", {n});
  check_shape(confident, "confident", {n});
  check_dtype(stored, "stored", z.scalar_type());
  check_dtype(alpha, "alpha", z.scalar_type());
  check_dtype(range, "range", z.scalar_type());
  check_dtype(labels, "labels", ScalarType::Int);
  check_dtype(confident, "confident", ScalarType::Bool);
  STD_TORCH_CHECK(beta >= 0, "beta must be >= 0, got ", beta);
  dispatch(z, [&](auto element) {
    using T = decltype(element);
    UpdateParams<T> p{};
    p.n_nodes = n;
    p.views = views_from<T>(z, e, read_ptr<T>(alpha), 2 * n);
    p.range = read_ptr<T>(range);
    p.labels = read_ptr<int32_t>(labels);
    p.confident = read_ptr<bool>(confident);
    p.beta = beta;
    p.stored = write_ptr<T>(stored);
    update_stored_weights_cpu(p);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m) {
  m.impl("hard_infonce", TORCH_BOX(&hard_infonce<Cpu>));
  m.impl("hard_infonce_backward", TORCH_BOX(&hard_infonce_backward<Cpu>));
  m.impl("similarity_range", TORCH_BOX(&similarity_range<Cpu>));
  m.impl("update_stored_weights", TORCH_BOX(&update_stored_weights));
}

}  // namespace fastclust::infonce
