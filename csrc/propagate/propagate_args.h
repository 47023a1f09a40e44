// The propagation operators between torch tensors and PropagateParams, for a backend that has
//   kBf16               whether it takes bf16,
//   run(p, like)        propagate_cpu or its like; `like` is a tensor on the device,
//   mask_rows(like, ..) mask_rows_cpu or its like.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/tensor.h"
#include "propagate/propagate.h"

namespace fastclust {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::tuple<Tensor, Tensor>;

// What fastclust.graph.Graph holds.
struct GraphArgs {
  const Tensor& indptr;             // int64 [N + 1]
  const Tensor& indices;            // int32 [E]
  const OptionalTensor& values;     // float32 [E]
  const OptionalTensor& row_scale;  // [N], dtype of h, float32 for bf16
  const OptionalTensor& col_scale;  // [rows of h], the same
  bool self_loops;
  const Tensor& task_rows;          // int64 [n_tasks + 1]
  const Tensor& segments;           // int64 [n_segments, 3]
  const Tensor& hubs;               // int64 [n_hubs, 3]
  int64_t hub_edges;
};

// `t` itself where its rows are dense (any distance apart), else a copy.
inline Tensor with_dense_rows(const Tensor& t) {
  if (t.size(1) <= 1 || t.stride(1) == 1) return t;
  Tensor copy = new_empty(t, {t.size(0), t.size(1)});
  torch::stable::copy_(copy, t);
  return copy;
}

template <typename T>
PropagateParams<T> graph_params(const GraphArgs& g, const Tensor& h) {
  const int64_t n = g.indptr.size(0) - 1;
  const int64_t n_edges = g.indices.size(0);
  // More rows of h than of the graph: nodes of other processes that its edges lead to.
  STD_TORCH_CHECK(h.dim() == 2 && h.size(0) >= n, "h must have shape [", n, ", d], got ", h.dim(),
                  " dimensions and ", h.dim() > 0 ? h.size(0) : 0, " rows");
  check_device(h, g.indptr, g.indices, g.values, g.row_scale, g.col_scale, g.task_rows, g.segments,
               g.hubs);
  check_dtype(g.indptr, "indptr", ScalarType::Long);
  check_shape(g.indptr, "indptr", {n + 1});
  check_dtype(g.indices, "indices", ScalarType::Int);
  check_shape(g.indices, "indices", {n_edges});
  if (g.values) {
    check_dtype(*g.values, "values", ScalarType::Float);
    check_shape(*g.values, "values", {n_edges});
  }
  for (const auto& [scale, length] : {std::pair(&g.row_scale, n), {&g.col_scale, h.size(0)}}) {
    if (!*scale) continue;
    check_dtype(**scale, "scale",
                std::is_same_v<T, Bf16> ? ScalarType::Float : h.scalar_type());
    check_shape(**scale, "scale", {length});
  }
  check_dtype(g.task_rows, "task_rows", ScalarType::Long);
  check_shape(g.task_rows, "task_rows", {-1});
  check_dtype(g.segments, "segments", ScalarType::Long);
  check_shape(g.segments, "segments", {-1, 3});
  check_dtype(g.hubs, "hubs", ScalarType::Long);
  check_shape(g.hubs, "hubs", {-1, 3});

  PropagateParams<T> p{};
  p.n_nodes = n;
  p.n_halo = h.size(0) - n;
  p.n_cols = h.size(1);
  p.n_edges = n_edges;
  p.indptr = read_ptr<int64_t>(g.indptr);
  p.indices = read_ptr<int32_t>(g.indices);
  p.values = read_ptr<float>(g.values);
  p.row_scale = read_ptr<typename PropagateParams<T>::Sum>(g.row_scale);
  p.col_scale = read_ptr<typename PropagateParams<T>::Sum>(g.col_scale);
  p.self_loops = g.self_loops;
  p.n_tasks = g.task_rows.size(0) - 1;
  p.task_rows = read_ptr<int64_t>(g.task_rows);
  p.hub = {g.hub_edges, g.segments.size(0), read_ptr<int64_t>(g.segments), g.hubs.size(0),
           read_ptr<int64_t>(g.hubs)};
  return p;
}

template <typename T>
void set_input(PropagateParams<T>& p, const Tensor& h) {
  p.h = read_ptr<T>(h);
  p.h_stride = h.stride(0);
}

template <typename Backend, typename T>
Tensors forward(const GraphArgs& g, const Tensor& h, const OptionalTensor& residual,
                bool add_input, bool relu, bool want_mask) {
  PropagateParams<T> p = graph_params<T>(g, h);
  const Tensor input = with_dense_rows(h);
  set_input(p, input);
  std::optional<Tensor> r;
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == p.n_nodes &&
                        residual->size(1) == p.n_cols && !add_input,
                    "residual must have the shape of h and excludes add_input");
    check_device(h, *residual);
    check_dtype(*residual, "residual", h.scalar_type());
    r = with_dense_rows(*residual);
    p.residual = read_ptr<T>(*r);
    p.residual_stride = r->stride(0);
  }
  p.add_input = add_input;
  p.relu = relu;
  Tensor out = new_empty(h, {p.n_nodes, p.n_cols});
  Tensor mask = new_empty(h, {p.n_nodes, want_mask ? mask_words(p.n_cols) : 0}, ScalarType::Int);
  p.out = write_ptr<T>(out);
  p.out_mask = want_mask ? write_ptr<uint32_t>(mask) : nullptr;
  Backend::run(p, h);
  return {out, mask};
}

template <typename Backend, typename T>
Tensors backward(const GraphArgs& g, const Tensor& grad, const OptionalTensor& mask,
                 bool add_input, bool want_residual) {
  PropagateParams<T> p = graph_params<T>(g, grad);
  const Tensor input = with_dense_rows(grad);
  set_input(p, input);
  if (mask) {
    check_device(grad, *mask);
    check_dtype(*mask, "mask", ScalarType::Int);
    check_shape(*mask, "mask", {p.n_nodes, mask_words(p.n_cols)});
    p.h_mask = read_ptr<uint32_t>(*mask);
  }
  p.add_input = add_input;
  Tensor grad_h = new_empty(grad, {p.n_nodes, p.n_cols});
  Tensor grad_residual = new_empty(grad, {want_residual ? p.n_nodes : 0, p.n_cols});
  p.out = write_ptr<T>(grad_h);
  p.masked_h = want_residual ? write_ptr<T>(grad_residual) : nullptr;
  Backend::run(p, grad);
  return {grad_h, grad_residual};
}

template <typename Backend, typename F>
auto by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  if constexpr (Backend::kBf16) {
    if (t.scalar_type() == ScalarType::BFloat16) return f(Bf16{});
  }
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "h must be float32 or float64",
                  Backend::kBf16 ? " or bfloat16" : "", ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  return f(float{});
}

template <typename Backend>
Tensors propagate_op(const Tensor& indptr, const Tensor& indices, const OptionalTensor& values,
                     const OptionalTensor& row_scale, const OptionalTensor& col_scale,
                     bool self_loops, const Tensor& task_rows, const Tensor& segments,
                     const Tensor& hubs, int64_t hub_edges, const Tensor& h,
                     const OptionalTensor& residual, bool add_input, bool relu, bool want_mask) {
  const GraphArgs graph{indptr,     indices,   values,   row_scale, col_scale,
                        self_loops, task_rows, segments, hubs,      hub_edges};
  return by_dtype<Backend>(h, [&](auto t) {
    return forward<Backend, decltype(t)>(graph, h, residual, add_input, relu, want_mask);
  });
}

template <typename Backend>
Tensors backward_op(const Tensor& indptr, const Tensor& indices, const OptionalTensor& values,
                    const OptionalTensor& row_scale, const OptionalTensor& col_scale,
                    bool self_loops, const Tensor& task_rows, const Tensor& segments,
                    const Tensor& hubs, int64_t hub_edges, const Tensor& grad,
                    const OptionalTensor& mask, bool add_input, bool want_residual) {
  // the transpose of Abar: the same A with the scales swapped
  const GraphArgs graph{indptr,     indices,   values,   col_scale, row_scale,
                        self_loops, task_rows, segments, hubs,      hub_edges};
  return by_dtype<Backend>(grad, [&](auto t) {
    return backward<Backend, decltype(t)>(graph, grad, mask, add_input, want_residual);
  });
}

template <typename Backend>
Tensor mask_rows_op(const Tensor& grad, const Tensor& mask) {
  STD_TORCH_CHECK(grad.dim() == 2, "grad must have 2 dimensions, got ", grad.dim());
  check_device(grad, mask);
  check_dtype(mask, "mask", ScalarType::Int);
  check_shape(mask, "mask", {grad.size(0), mask_words(grad.size(1))});
  const Tensor input = with_dense_rows(grad);
  Tensor out = new_empty(grad, {grad.size(0), grad.size(1)});
  by_dtype<Backend>(grad, [&](auto t) {
    using T = decltype(t);
    Backend::mask_rows(grad, grad.size(0), grad.size(1), read_ptr<T>(input), input.stride(0),
                       read_ptr<uint32_t>(mask), write_ptr<T>(out));
  });
  return out;
}

}  // namespace
}  // namespace fastclust
