// The InfoNCE operators from tensors to parameter structs (infonce.h), for any backend: a type with
// run(params, z) for the three parameter structs, where z tells the device. Registered by
// infonce_ops.cpp and infonce_cuda_ops.cu.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "infonce/infonce.h"

namespace fastclust::infonce {
namespace {

// The weight arguments of a schema, kept alive while the kernel runs.
struct WeightTensors {
  std::vector<Tensor> z, e;                              // S times [2N, dz], [2N, de]
  std::optional<Tensor> alpha, range, labels, membership, order;
  double beta;
  std::optional<Tensor> stored;  // instead of all others
};

inline Precision precision_from(int64_t code, ScalarType dtype) {
  STD_TORCH_CHECK(code >= 0 && code <= 3, "precision must be 0 to 3, got ", code);
  STD_TORCH_CHECK(dtype == ScalarType::Float || code == 0, "float64 has one precision only");
  return static_cast<Precision>(code);
}

template <typename T>
Views<T> views_from(const Tensor& z, const Tensor& e, const T* alpha, int64_t rows) {
  check_shape(z, "z", {rows, -1});
  check_device(z, e);
  check_shape(e, "e", {rows, -1});
  check_dtype(e, "e", z.scalar_type());
  return {read_ptr<T>(z), read_ptr<T>(e), z.size(1), e.size(1), alpha};
}

template <typename T>
Weights<T> weights_from(const WeightTensors& w, const Tensor& z, std::vector<Views<T>>& views) {
  const auto n_snapshots = static_cast<int64_t>(w.z.size());
  const int64_t n = z.size(0) / 2;
  STD_TORCH_CHECK(w.e.size() == w.z.size(), "snapshot_z and snapshot_e must be equally long");
  STD_TORCH_CHECK(n_snapshots <= kMaxSnapshots, "at most ", kMaxSnapshots, " snapshots, got ",
                  n_snapshots);
  check_device(z, w.stored, w.alpha, w.range, w.labels, w.membership, w.order);
  if (w.stored) {
    STD_TORCH_CHECK(n_snapshots == 0, "stored weights leave no room for snapshots");
    check_shape(*w.stored, "stored", {weight_tiles(n), kWeightTile, kWeightTile});
    check_dtype(*w.stored, "stored", z.scalar_type());
    Weights<T> weights{};
    weights.stored = read_ptr<T>(*w.stored);
    return weights;
  }
  if (n_snapshots == 0) return {};
  STD_TORCH_CHECK(w.alpha && w.range && w.labels && w.membership && w.order,
                  "snapshots need snapshot_alpha, snapshot_range, labels, membership and order");
  STD_TORCH_CHECK(w.beta >= 0, "beta must be >= 0, got ", w.beta);
  check_shape(*w.alpha, "snapshot_alpha", {n_snapshots});
  check_shape(*w.range, "snapshot_range", {n_snapshots, 2});
  check_shape(*w.labels, "labels", {n_snapshots, n});
  check_shape(*w.membership, "membership", {n});
  check_shape(*w.order, "order", {n});
  check_dtype(*w.alpha, "snapshot_alpha", z.scalar_type());
  check_dtype(*w.range, "snapshot_range", z.scalar_type());
  check_dtype(*w.labels, "labels", ScalarType::Int);
  check_dtype(*w.membership, "membership", ScalarType::Long);
  check_dtype(*w.order, "order", ScalarType::Int);
  const T* alpha = read_ptr<T>(*w.alpha);
  for (int64_t s = 0; s < n_snapshots; ++s) {
    check_device(z, w.z[s]);
    check_dtype(w.z[s], "snapshot_z", z.scalar_type());
    views.push_back(views_from<T>(w.z[s], w.e[s], alpha + s, 2 * n));
  }
  return {static_cast<int>(n_snapshots), views.data(),
          read_ptr<T>(*w.range),         read_ptr<int32_t>(*w.labels),
          read_ptr<int64_t>(*w.membership), read_ptr<int32_t>(*w.order),
          w.beta};
}

// Calls f with a value of the element type of z.
template <typename F>
void dispatch(const Tensor& z, const F& f) {
  if (z.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(z.scalar_type() == ScalarType::Double, "z must be float32 or float64");
  f(double{});
}

// [] is everything, else row_begin, row_end, column_begin.
inline Window window_from(const std::vector<int64_t>& window, int64_t rows) {
  if (window.empty()) return {};
  STD_TORCH_CHECK(window.size() == 3, "window must hold 0 or 3 numbers, got ", window.size());
  const int64_t begin = window[0], end = window[1], column = window[2];
  STD_TORCH_CHECK(begin >= 0 && begin < end && end <= rows && column < rows &&
                      (column == begin || column >= end),
                  "window must be 0 <= row_begin < row_end <= 2N and column_begin = row_begin, or "
                  "row_end <= column_begin < 2N");
  STD_TORCH_CHECK(begin % kWindowRows == 0 && column % kWindowRows == 0 &&
                      (end % kWindowRows == 0 || end == rows),
                  "bounds of window must be multiples of ", kWindowRows, " or 2N");
  return {false, begin, end, column};
}

inline void check_rows(const Tensor& z) {
  STD_TORCH_CHECK(z.dim() == 2 && z.size(0) >= 2 && z.size(0) % 2 == 0,
                  "z must have shape [2N, dz] with N >= 1");
}

template <typename Backend>
std::tuple<Tensor, Tensor> hard_infonce(
    Tensor z, Tensor e, Tensor alpha, std::vector<Tensor> snapshot_z,
    std::vector<Tensor> snapshot_e, std::optional<Tensor> snapshot_alpha,
    std::optional<Tensor> snapshot_range, std::optional<Tensor> labels,
    std::optional<Tensor> membership, std::optional<Tensor> order, double beta,
    int64_t precision, std::vector<int64_t> window, std::optional<Tensor> stored) {
  check_rows(z);
  check_device(z, alpha);
  check_shape(alpha, "alpha", {});
  check_dtype(alpha, "alpha", z.scalar_type());
  const int64_t rows = z.size(0);
  const WeightTensors w{snapshot_z, snapshot_e, snapshot_alpha, snapshot_range,
                        labels,     membership, order,          beta,           stored};
  Tensor loss = new_empty(z, {});
  Tensor row_sums = new_empty(z, {rows}, ScalarType::Double);
  dispatch(z, [&](auto element) {
    using T = decltype(element);
    std::vector<Views<T>> views;
    ForwardParams<T> p{};
    p.n_nodes = rows / 2;
    p.views = views_from<T>(z, e, read_ptr<T>(alpha), rows);
    p.weights = weights_from<T>(w, z, views);
    p.precision = precision_from(precision, z.scalar_type());
    p.loss = write_ptr<T>(loss);
    p.row_sums = write_ptr<double>(row_sums);
    p.window = window_from(window, rows);
    Backend::run(p, z);
  });
  return {loss, row_sums};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> hard_infonce_backward(
    Tensor grad_loss, Tensor z, Tensor e, Tensor alpha, Tensor row_sums,
    std::vector<Tensor> snapshot_z, std::vector<Tensor> snapshot_e,
    std::optional<Tensor> snapshot_alpha, std::optional<Tensor> snapshot_range,
    std::optional<Tensor> labels, std::optional<Tensor> membership, std::optional<Tensor> order,
    double beta, int64_t precision, bool need_z, bool need_e, bool need_alpha,
    std::vector<int64_t> window, std::optional<Tensor> stored) {
  check_rows(z);
  const int64_t rows = z.size(0);
  for (const auto& [t, name] : {std::pair(&alpha, "alpha"), std::pair(&grad_loss, "grad_loss")}) {
    check_shape(*t, name, {});
    check_dtype(*t, name, z.scalar_type());
  }
  check_device(z, alpha, grad_loss, row_sums);
  check_shape(row_sums, "row_sums", {rows});
  check_dtype(row_sums, "row_sums", ScalarType::Double);
  const WeightTensors w{snapshot_z, snapshot_e, snapshot_alpha, snapshot_range,
                        labels,     membership, order,          beta,           stored};
  Tensor grad_z = need_z ? new_empty(z, {rows, z.size(1)}) : new_empty(z, {0});
  Tensor grad_e = need_e ? new_empty(z, {rows, e.size(1)}) : new_empty(z, {0});
  Tensor grad_alpha = need_alpha ? new_empty(z, {}) : new_empty(z, {0});
  dispatch(z, [&](auto element) {
    using T = decltype(element);
    std::vector<Views<T>> views;
    BackwardParams<T> p{};
    p.n_nodes = rows / 2;
    p.views = views_from<T>(z, e, read_ptr<T>(alpha), rows);
    p.weights = weights_from<T>(w, z, views);
    p.precision = precision_from(precision, z.scalar_type());
    p.row_sums = read_ptr<double>(row_sums);
    p.grad_loss = read_ptr<T>(grad_loss);
    p.grad_z = need_z ? write_ptr<T>(grad_z) : nullptr;
    p.grad_e = need_e ? write_ptr<T>(grad_e) : nullptr;
    p.grad_alpha = need_alpha ? write_ptr<T>(grad_alpha) : nullptr;
    p.window = window_from(window, rows);
    Backend::run(p, z);
  });
  return {grad_z, grad_e, grad_alpha};
}

template <typename Backend>
Tensor similarity_range(Tensor z, Tensor e, Tensor alpha, int64_t precision,
                        std::vector<int64_t> window) {
  check_rows(z);
  check_device(z, alpha);
  check_shape(alpha, "alpha", {});
  check_dtype(alpha, "alpha", z.scalar_type());
  Tensor range = new_empty(z, {2});
  dispatch(z, [&](auto element) {
    using T = decltype(element);
    RangeParams<T> p{};
    p.n_nodes = z.size(0) / 2;
    p.views = views_from<T>(z, e, read_ptr<T>(alpha), z.size(0));
    p.precision = precision_from(precision, z.scalar_type());
    p.range = write_ptr<T>(range);
    p.window = window_from(window, z.size(0));
    Backend::run(p, z);
  });
  return range;
}

}  // namespace

}  // namespace fastclust::infonce
