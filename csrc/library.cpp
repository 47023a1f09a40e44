// Every operator schema of fastclust, in one place. Implementations register themselves from
// csrc/<op>/<op>_ops.cpp (CPU) and csrc/<op>/<op>_cuda_ops.cu (CUDA); shape functions and autograd
// live in fastclust/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastclust, m) {
  // The loss over 2N stacked rows (z [2N, dz], e [2N, de], alpha []) and its row sums float64 [2N].
  // Weights, see csrc/infonce/infonce.h: per snapshot s embeddings, alpha [S], range [S, 2], labels
  // int32 [S, N], membership int64 [N], order int32 [N]; empty lists and None: every weight is 1.
  // precision: 0 fp32, 1 tf32, 2 bf16x3, 3 bf16.
  m.def(
      "hard_infonce(Tensor z, Tensor e, Tensor alpha, Tensor[] snapshot_z, Tensor[] snapshot_e, "
      "Tensor? snapshot_alpha, Tensor? snapshot_range, Tensor? labels, Tensor? membership, "
      "Tensor? order, float beta, int precision) -> (Tensor loss, Tensor row_sums)");
  // (grad_z [2N, dz], grad_e [2N, de], grad_alpha []); one that is not needed comes back as [0].
  m.def(
      "hard_infonce_backward(Tensor grad_loss, Tensor z, Tensor e, Tensor alpha, Tensor row_sums, "
      "Tensor[] snapshot_z, Tensor[] snapshot_e, Tensor? snapshot_alpha, Tensor? snapshot_range, "
      "Tensor? labels, Tensor? membership, Tensor? order, float beta, int precision, bool need_z, "
      "bool need_e, bool need_alpha) -> (Tensor grad_z, Tensor grad_e, Tensor grad_alpha)");
  // [2]: least and greatest entry of S over all 2N x 2N pairs, diagonal included.
  m.def("similarity_range(Tensor z, Tensor e, Tensor alpha, int precision) -> Tensor");
}
