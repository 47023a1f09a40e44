// Registers the CUDA implementation of the propagation operators: tensors in, parameter struct out.
#include "common/cuda.cuh"
#include "common/tensor.h"
#include "propagate/propagate_args.h"
#include "propagate/propagate_cuda.h"

namespace fastclust {
namespace {

template <typename T>
void run_on_stream(PropagateParams<T> p, const Tensor& like) {
  const CudaScope scope(like);
  Tensor scratch = new_empty(like, {p.hub.n_segments, p.n_cols});
  p.scratch = write_ptr<T>(scratch);
  STD_CUDA_CHECK(propagate_cuda(p, scope.stream()));
}

Tensors propagate(const Tensor& indptr, const Tensor& indices, const OptionalTensor& values,
                  const OptionalTensor& row_scale, const OptionalTensor& col_scale,
                  bool self_loops, const Tensor& task_rows, const Tensor& segments,
                  const Tensor& hubs, int64_t hub_edges, const Tensor& h,
                  const OptionalTensor& residual, bool add_input, bool relu, bool want_mask) {
  const GraphArgs graph{indptr,     indices,   values,   row_scale, col_scale,
                        self_loops, task_rows, segments, hubs,      hub_edges};
  return run_forward(graph, h, residual, add_input, relu, want_mask,
                     [&](const auto& p) { run_on_stream(p, h); });
}

Tensors propagate_backward(const Tensor& indptr, const Tensor& indices,
                           const OptionalTensor& values, const OptionalTensor& row_scale,
                           const OptionalTensor& col_scale, bool self_loops,
                           const Tensor& task_rows, const Tensor& segments, const Tensor& hubs,
                           int64_t hub_edges, const Tensor& grad, const OptionalTensor& mask,
                           bool add_input, bool want_residual) {
  // the transpose of Abar: the same A with the scales swapped
  const GraphArgs graph{indptr,     indices,   values,   col_scale, row_scale,
                        self_loops, task_rows, segments, hubs,      hub_edges};
  return run_backward(graph, grad, mask, add_input, want_residual,
                      [&](const auto& p) { run_on_stream(p, grad); });
}

Tensor mask_rows(const Tensor& grad, const Tensor& mask) {
  const CudaScope scope(grad);
  return run_mask_rows(grad, mask, [&](auto... args) {
    STD_CUDA_CHECK(mask_rows_cuda(args..., scope.stream()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclust, CUDA, m) {
  m.impl("propagate", TORCH_BOX(&propagate));
  m.impl("propagate_backward", TORCH_BOX(&propagate_backward));
  m.impl("mask_rows", TORCH_BOX(&mask_rows));
}

}  // namespace fastclust
