// The operators of k-means between torch tensors and the kernels' pointers, for a backend that has
// the functions of kmeans.h as static members taking a tensor of the device first.
#pragma once

#include "common/tensor.h"
#include "kmeans/kmeans.h"

#include <tuple>

namespace fastclust::kmeans {

template <typename F>
void dispatch(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  check_dtype(x, "x", ScalarType::Float);
  f(float{});
}

template <typename T>
Problem<T> problem(const Tensor& x, int64_t n_clusters, int64_t n_restarts) {
  return {read_ptr<T>(x), x.size(0), x.size(1), n_clusters, n_restarts};
}

inline void check_points(const Tensor& x) {
  check_shape(x, "x", {-1, -1});
  STD_TORCH_CHECK(x.size(0) > 0 && x.size(0) < (int64_t{1} << 31) && x.size(1) > 0 &&
                      x.size(1) % kPad == 0,
                  "x must be a result of kmeans_center, got shape [", x.size(0), ", ", x.size(1),
                  "]");
}

inline void check_centers(const Tensor& x, const Tensor& centers) {
  check_points(x);
  check_device(x, centers);
  check_shape(centers, "centers", {-1, -1, x.size(1)});
  check_dtype(centers, "centers", x.scalar_type());
  STD_TORCH_CHECK(centers.size(1) >= 1 && centers.size(1) <= x.size(0),
                  "centers must hold between 1 and N clusters, got ", centers.size(1));
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> center_op(const Tensor& x) {
  check_shape(x, "x", {-1, -1});
  const int64_t n = x.size(0), d = x.size(1), dp = (d + kPad - 1) / kPad * kPad;
  STD_TORCH_CHECK(n > 0 && d > 0, "x must not be empty");
  Tensor xc = new_empty(x, {n, dp});
  Tensor mean = new_empty(x, {d}, ScalarType::Double);
  Tensor variance = new_empty(x, {}, ScalarType::Double);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    Backend::center(x, read_ptr<T>(x), n, d, write_ptr<T>(xc), dp, write_ptr<double>(mean),
                    write_ptr<double>(variance));
  });
  return {xc, mean, variance};
}

template <typename Backend>
Tensor init_op(const Tensor& x, int64_t n_clusters, int64_t n_restarts, int64_t method,
               int64_t seed) {
  check_points(x);
  STD_TORCH_CHECK(n_clusters >= 1 && n_clusters <= x.size(0) && n_restarts >= 1 && method >= 0 &&
                      method <= 2,
                  "kmeans_init: n_clusters, n_restarts or method out of range");
  Tensor centers = new_empty(x, {n_restarts, n_clusters, x.size(1)});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    Backend::initialize(x, problem<T>(x, n_clusters, n_restarts), static_cast<Init>(method), seed,
                        write_ptr<T>(centers));
  });
  return centers;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> lloyd_op(const Tensor& x, const Tensor& centers,
                                            const Tensor& tolerance, bool norm_rule,
                                            int64_t max_iter) {
  check_centers(x, centers);
  check_device(x, tolerance);
  check_shape(tolerance, "tolerance", {});
  check_dtype(tolerance, "tolerance", ScalarType::Double);
  const int64_t n_restarts = centers.size(0);
  Tensor out = torch::stable::clone(centers);
  Tensor n_iter = new_empty(x, {n_restarts}, ScalarType::Long);
  Tensor converged = new_empty(x, {n_restarts}, ScalarType::Bool);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    Backend::lloyd(x, problem<T>(x, centers.size(1), n_restarts), read_ptr<double>(tolerance),
                   norm_rule, max_iter, write_ptr<T>(out), write_ptr<int64_t>(n_iter),
                   write_ptr<bool>(converged));
  });
  return {out, n_iter, converged};
}

template <typename Backend>
std::tuple<Tensor, Tensor> assign_op(const Tensor& x, const Tensor& centers) {
  check_centers(x, centers);
  const int64_t n_restarts = centers.size(0);
  Tensor labels = new_empty(x, {n_restarts, x.size(0)}, ScalarType::Int);
  Tensor inertia = new_empty(x, {n_restarts}, ScalarType::Double);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    Backend::assign(x, problem<T>(x, centers.size(1), n_restarts), read_ptr<T>(centers),
                    write_ptr<int32_t>(labels), write_ptr<double>(inertia));
  });
  return {labels, inertia};
}

}  // namespace fastclust::kmeans
