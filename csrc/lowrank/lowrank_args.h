// The operators of the batched SVD that CPU and CUDA share, between torch tensors and the kernels'
// pointers, for a backend that has functions like those of lowrank.h as static members taking a tensor
// of the device first.
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "lowrank/lowrank.h"

namespace fastclust::lowrank {

using OptionalTensor = std::optional<Tensor>;

template <typename F>
auto dispatch(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  check_dtype(t, "values", ScalarType::Float);
  return f(float{});
}

// values [N, D] (dense), or values [nnz] with indptr [N + 1] int64 and indices [nnz] int32;
// mean [M, D].
template <typename T>
Rows<T> rows_of(const Tensor& values, const OptionalTensor& indptr, const OptionalTensor& indices,
                const OptionalTensor& mean, int64_t n_cols, int64_t batch_size) {
  STD_TORCH_CHECK(batch_size > 0 && n_cols > 0, "batch_size and n_cols must be positive");
  STD_TORCH_CHECK(indptr.has_value() == indices.has_value(),
                  "indptr and indices must be given together");
  check_device(values, indptr, indices, mean);
  int64_t n_rows;
  if (indptr.has_value()) {
    check_shape(values, "values", {-1});
    check_shape(*indptr, "indptr", {-1});
    check_shape(*indices, "indices", {values.size(0)});
    check_dtype(*indptr, "indptr", ScalarType::Long);
    check_dtype(*indices, "indices", ScalarType::Int);
    n_rows = indptr->size(0) - 1;
  } else {
    check_shape(values, "values", {-1, n_cols});
    n_rows = values.size(0);
  }
  STD_TORCH_CHECK(n_rows > 0, "x must have rows");
  const Rows<T> x{read_ptr<T>(values), read_ptr<int64_t>(indptr), read_ptr<int32_t>(indices),
                  read_ptr<T>(mean), n_rows, n_cols, batch_size};
  if (mean.has_value()) {
    check_shape(*mean, "mean", {x.n_batches(), n_cols});
    check_dtype(*mean, "mean", values.scalar_type());
  }
  return x;
}

template <typename Backend>
Tensor mean_op(Tensor values, OptionalTensor indptr, OptionalTensor indices, int64_t n_cols,
               int64_t batch_size) {
  return dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const auto x = rows_of<T>(values, indptr, indices, std::nullopt, n_cols, batch_size);
    Tensor out = new_empty(values, {x.n_batches(), n_cols});
    Backend::column_means(values, x, write_ptr<T>(out));
    return out;
  });
}

template <typename Backend>
Tensor center_op(Tensor values, OptionalTensor indptr, OptionalTensor indices, OptionalTensor mean,
                 int64_t n_cols, int64_t batch_size) {
  return dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const auto x = rows_of<T>(values, indptr, indices, mean, n_cols, batch_size);
    Tensor out = new_empty(values, {x.n_batches(), batch_size, n_cols});
    Backend::center(values, x, write_ptr<T>(out));
    return out;
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor> orthonormalize_op(Tensor y, OptionalTensor v, OptionalTensor bound,
                                             double root, int64_t passes) {
  return dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    check_shape(y, "y", {-1, -1, -1});
    STD_TORCH_CHECK(passes == 1 || passes == 2, "passes must be 1 or 2, got ", passes);
    check_device(y, v, bound);
    const int64_t m = y.size(0), n = y.size(1), l = y.size(2);
    if (v.has_value()) {
      check_shape(*v, "v", {m, n, l});
      check_dtype(*v, "v", y.scalar_type());
    }
    if (bound.has_value()) {
      check_shape(*bound, "bound", {m});
      check_dtype(*bound, "bound", ScalarType::Double);
    }
    Tensor q = new_empty(y, {m, n, l});
    Tensor new_bound = new_empty(y, {m}, ScalarType::Double);
    Backend::orthonormalize(
        y, Orthonormalize<T>{m, n, l, static_cast<int>(passes), root, read_ptr<T>(y),
                             read_ptr<T>(v), read_ptr<double>(bound), write_ptr<T>(q),
                             write_ptr<double>(new_bound)});
    return std::make_tuple(q, new_bound);
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> thin_svd_op(Tensor y, int64_t rank) {
  return dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    check_shape(y, "y", {-1, -1, -1});
    const int64_t m = y.size(0), n = y.size(1), l = y.size(2);
    STD_TORCH_CHECK(rank >= 0 && rank <= l, "rank must be at most ", l, ", got ", rank);
    Tensor u = new_empty(y, {m, n, rank}), s = new_empty(y, {m, l}, ScalarType::Double);
    Tensor vt = new_empty(y, {m, l, l}, ScalarType::Double);
    Backend::thin_svd(y, ThinSvd<T>{m, n, l, rank, read_ptr<T>(y), write_ptr<T>(u),
                                    write_ptr<double>(s), write_ptr<double>(vt)});
    return std::make_tuple(u, s, vt);
  });
}

template <typename Backend>
Tensor normal_op(Tensor like, int64_t n_batches, int64_t first_batch, int64_t n_rows, int64_t width,
                 int64_t seed) {
  return dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    Tensor out = new_empty(like, {n_batches, n_rows, width});
    Backend::normal(like, n_batches, first_batch, n_rows, width, static_cast<uint64_t>(seed),
                    write_ptr<T>(out));
    return out;
  });
}

}  // namespace fastclust::lowrank
