// Every operator schema of fastclust, in one place. Implementations register themselves from
// csrc/<op>/<op>_ops.cpp (CPU) and csrc/<op>/<op>_cuda_ops.cu (CUDA); shape functions and autograd
// live in fastclust/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastclust, m) {
  // The loss over 2N stacked rows (z [2N, dz], e [2N, de], alpha []) and its row sums float64 [2N].
  // Weights, see csrc/infonce/infonce.h: per snapshot s embeddings, alpha [S], range [S, 2], labels
  // int32 [S, N], membership int64 [N], order int32 [N]; empty lists and None: every weight is 1.
  // precision: 0 fp32, 1 tf32, 2 bf16x3, 3 bf16. window: [] or the share of a call, see infonce.h.
  // stored [P, 192, 192] (CPU): all weights as update_stored_weights leaves them, and no snapshots.
  m.def(
      "hard_infonce(Tensor z, Tensor e, Tensor alpha, Tensor[] snapshot_z, Tensor[] snapshot_e, "
      "Tensor? snapshot_alpha, Tensor? snapshot_range, Tensor? labels, Tensor? membership, "
      "Tensor? order, float beta, int precision, int[] window=[], Tensor? stored=None) "
      "-> (Tensor loss, Tensor row_sums)");
  // (grad_z [2N, dz], grad_e [2N, de], grad_alpha []); one that is not needed comes back as [0].
  m.def(
      "hard_infonce_backward(Tensor grad_loss, Tensor z, Tensor e, Tensor alpha, Tensor row_sums, "
      "Tensor[] snapshot_z, Tensor[] snapshot_e, Tensor? snapshot_alpha, Tensor? snapshot_range, "
      "Tensor? labels, Tensor? membership, Tensor? order, float beta, int precision, bool need_z, "
      "bool need_e, bool need_alpha, int[] window=[], Tensor? stored=None) "
      "-> (Tensor grad_z, Tensor grad_e, Tensor grad_alpha)");
  // [2]: least and greatest entry of S over all 2N x 2N pairs, diagonal included.
  m.def(
      "similarity_range(Tensor z, Tensor e, Tensor alpha, int precision, int[] window=[]) "
      "-> Tensor");
  // A refresh of stored weights [P, 192, 192], tiles of the upper triangle of W (infonce.h, CPU):
  // overwrites the entries whose nodes are both confident. range [2] as of similarity_range, labels
  // int32 [N], confident bool [N].
  m.def(
      "update_stored_weights(Tensor(a!) stored, Tensor z, Tensor e, Tensor alpha, Tensor range, "
      "Tensor labels, Tensor confident, float beta) -> ()");

  // k-means, R restarts at once; see csrc/kmeans/kmeans.h. x is centred and padded to dp columns by
  // kmeans_center -> (xc [N, dp], mean float64 [d], mean column variance float64 []).
  m.def("kmeans_center(Tensor x) -> (Tensor xc, Tensor mean, Tensor variance)");
  // method: 0 greedy k-means++, 1 random points, 2 the most central of 20 random draws. [R, K, dp]
  m.def(
      "kmeans_init(Tensor x, int n_clusters, int n_restarts, int method, int seed) -> Tensor");
  // (centers [R, K, dp], n_iter int64 [R], converged bool [R])
  m.def(
      "kmeans_lloyd(Tensor x, Tensor centers, Tensor tolerance, bool norm_rule, int max_iter) "
      "-> (Tensor centers, Tensor n_iter, Tensor converged)");
  // (labels int32 [R, N], inertia float64 [R])
  m.def("kmeans_assign(Tensor x, Tensor centers) -> (Tensor labels, Tensor inertia)");

  // act(Abar h + residual) over a graph (csrc/propagate/propagate.h): the first ten arguments are
  // what fastclust.Graph holds. h [N, d] and residual [N, d] may have any row stride; add_input adds
  // h in place of a residual. Returns out [N, d] and the activation's bit mask, int32
  // [N, ceil(d / 32)], or [N, 0] without want_mask.
  m.def(
      "propagate(Tensor indptr, Tensor indices, Tensor? values, Tensor? row_scale, "
      "Tensor? col_scale, bool self_loops, Tensor task_rows, Tensor segments, Tensor hubs, "
      "int hub_edges, Tensor h, Tensor? residual, bool add_input, bool relu, bool want_mask) "
      "-> (Tensor, Tensor)");
  // The gradients of h [N, d] and, with want_residual, of residual [N, d] (else [0, d]), in one
  // pass over grad [N, d], the gradient of out; mask as saved by propagate, absent without relu.
  m.def(
      "propagate_backward(Tensor indptr, Tensor indices, Tensor? values, Tensor? row_scale, "
      "Tensor? col_scale, bool self_loops, Tensor task_rows, Tensor segments, Tensor hubs, "
      "int hub_edges, Tensor grad, Tensor? mask, bool add_input, bool want_residual) "
      "-> (Tensor, Tensor)");
  // grad [N, d] where the bit of mask is set, else 0.
  m.def("mask_rows(Tensor grad, Tensor mask) -> Tensor");

  // a [m, k] b [k, n] + bias [n], any strides of a and b (csrc/common/gemm.h). matmul_out writes to
  // out [m, n], contiguous, which must not share memory with the factors.
  m.def("matmul(Tensor a, Tensor b, Tensor? bias) -> Tensor");
  m.def("matmul_out(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias) -> ()");

  // Batched randomised SVD, see csrc/lowrank/lowrank.h. X [N, D] is either dense `values` [N, D] or
  // CSR `values` [nnz], indptr int64 [N + 1], indices int32 [nnz]; M = ceil(N / batch_size) batches
  // of B rows. mean [M, D]: subtracted from the rows of each batch.
  // [M, D]
  m.def(
      "lowrank_mean(Tensor values, Tensor? indptr, Tensor? indices, int n_cols, int batch_size) "
      "-> Tensor");
  // [M, B, D]: X_c, rows past a short last batch are zero.
  m.def(
      "lowrank_center(Tensor values, Tensor? indptr, Tensor? indices, Tensor? mean, int n_cols, "
      "int batch_size) -> Tensor");
  // [M, D, D]: X_c^T X_c.
  m.def(
      "lowrank_gram(Tensor values, Tensor? indptr, Tensor? indices, Tensor? mean, int n_cols, "
      "int batch_size) -> Tensor");
  // [M, B, l]: X_c v, v [M, D, l]; rows past a short last batch are zero.
  m.def(
      "lowrank_project(Tensor values, Tensor? indptr, Tensor? indices, Tensor? mean, int n_cols, "
      "int batch_size, Tensor v) -> Tensor");
  // [M, D, l]: X_c^T q, q [M, B, l].
  m.def(
      "lowrank_project_transposed(Tensor values, Tensor? indptr, Tensor? indices, Tensor? mean, "
      "int n_cols, int batch_size, Tensor q) -> Tensor");
  // [M, m, n]: a [M, m, k] b [M, k, n].
  m.def("lowrank_multiply(Tensor a, Tensor b) -> Tensor");
  // y [M, n, l] -> orthonormal columns q [M, n, l]; dependent columns become 0. With v [M, n, l] and
  // y = X_c^T X_c v: one shifted step of the iteration, bound and new_bound float64 [M].
  m.def(
      "lowrank_orthonormalize(Tensor y, Tensor? v, Tensor? bound, float root, int passes) "
      "-> (Tensor q, Tensor new_bound)");
  // y [M, n, l] = u diag(s) vt: u [M, n, rank], float64 s [M, l] descending and vt [M, l, l].
  m.def("lowrank_thin_svd(Tensor y, int rank) -> (Tensor u, Tensor s, Tensor vt)");
  // [n_batches, n_rows, width] normal, spectral norm about 1, keyed by (seed, batch, i).
  m.def(
      "lowrank_normal(Tensor like, int n_batches, int first_batch, int n_rows, int width, int seed) "
      "-> Tensor");
}
