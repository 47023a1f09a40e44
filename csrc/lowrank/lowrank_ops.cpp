// Registers the CPU operators of the batched randomised SVD; schemas in csrc/library.cpp.
#include "lowrank/lowrank_args.h"

namespace fastclust::lowrank {
namespace {

Tensor gram_op(Tensor values, OptionalTensor indptr, OptionalTensor indices, OptionalTensor mean,
               int64_t n_cols, int64_t batch_size) {
  return dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const auto x = rows_of<T>(values, indptr, indices, mean, n_cols, batch_size);
    Tensor out = new_empty(values, {x.n_batches(), n_cols, n_cols});
    gram(x, write_ptr<T>(out));
    return out;
  });
}

Tensor project_op(Tensor values, OptionalTensor indptr, OptionalTensor indices, OptionalTensor mean,
                  int64_t n_cols, int64_t batch_size, Tensor v) {
  return dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const auto x = rows_of<T>(values, indptr, indices, mean, n_cols, batch_size);
    check_shape(v, "v", {x.n_batches(), n_cols, -1});
    check_dtype(v, "v", values.scalar_type());
    Tensor out = new_empty(values, {x.n_batches(), batch_size, v.size(2)});
    project(x, v.size(2), read_ptr<T>(v), write_ptr<T>(out));
    return out;
  });
}

Tensor project_transposed_op(Tensor values, OptionalTensor indptr, OptionalTensor indices,
                             OptionalTensor mean, int64_t n_cols, int64_t batch_size, Tensor q) {
  return dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const auto x = rows_of<T>(values, indptr, indices, mean, n_cols, batch_size);
    check_shape(q, "q", {x.n_batches(), batch_size, -1});
    check_dtype(q, "q", values.scalar_type());
    Tensor out = new_empty(values, {x.n_batches(), n_cols, q.size(2)});
    project_transposed(x, q.size(2), read_ptr<T>(q), write_ptr<T>(out));
    return out;
  });
}

Tensor multiply_op(Tensor a, Tensor b) {
  return dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    check_shape(a, "a", {-1, -1, -1});
    check_shape(b, "b", {a.size(0), a.size(2), -1});
    check_dtype(b, "b", a.scalar_type());
    Tensor out = new_empty(a, {a.size(0), a.size(1), b.size(2)});
    multiply(a.size(0), a.size(1), a.size(2), b.size(2), read_ptr<T>(a), read_ptr<T>(b),
             write_ptr<T>(out));
    return out;
  });
}

struct Cpu {
#define FASTCLUST_FORWARD(name)                                 \
  template <typename... Args>                                   \
  static void name(const Tensor&, const Args&... args) {        \
    lowrank::name(args...);                                     \
  }
  FASTCLUST_FORWARD(column_means)
  FASTCLUST_FORWARD(center)
  FASTCLUST_FORWARD(orthonormalize)
  FASTCLUST_FORWARD(thin_svd)
  FASTCLUST_FORWARD(normal)
#undef FASTCLUST_FORWARD
};

STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m) {
  m.impl("lowrank_mean", TORCH_BOX(&mean_op<Cpu>));
  m.impl("lowrank_center", TORCH_BOX(&center_op<Cpu>));
  m.impl("lowrank_gram", TORCH_BOX(&gram_op));
  m.impl("lowrank_project", TORCH_BOX(&project_op));
  m.impl("lowrank_project_transposed", TORCH_BOX(&project_transposed_op));
  m.impl("lowrank_multiply", TORCH_BOX(&multiply_op));
  m.impl("lowrank_orthonormalize", TORCH_BOX(&orthonormalize_op<Cpu>));
  m.impl("lowrank_thin_svd", TORCH_BOX(&thin_svd_op<Cpu>));
  m.impl("lowrank_normal", TORCH_BOX(&normal_op<Cpu>));
}

}  // namespace
}  // namespace fastclust::lowrank
