"""ECN-MF, the clustering network on a low-rank second view (Cheng et al., CMC 2024).

The second view of the attributes X is their low-rank reconstruction X_r. Two un-shared residual
graph convolutions encode X and X_r; their mean feeds a softmax head, trained by agreement of the
views, a sharpened target distribution and pseudo labels of the most probable nodes.

The published equations leave much open. Every open point is a keyword here; the default is the
reading that clustered best, named "as published" where it is also the literal one.

How it is computed: Abar X of a dense constant X is taken once; a sparse X is multiplied first and
propagated after; the low-rank view is (Abar L)(R W) with X_r = L R, which never forms X_r.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastclust import ops
from fastclust.graph import Graph
from fastclust.models.inputs import derive_seed, uniform_parameter, unit_rows

__all__ = ["ECNMFModel", "target_distribution"]

_INITIALISE, _HEAD = range(2)  # what a derived seed is for

# Probabilities and cluster sizes are kept above this in logarithms and quotients.
EPSILON = 1e-8


def target_distribution(q: Tensor) -> Tensor:
    """The sharpened assignment (Eq. 15): P_ij ~ Q_ij^2 / f_j with f_j = sum_i Q_ij, rows sum to 1.

    Parameters
    ----------
    q : Tensor [N, K]
        Soft assignment.

    Returns
    -------
    Tensor
        [N, K], constant for autograd.
    """
    q = q.detach()
    weight = q.square() / q.sum(0).clamp_min(EPSILON)  # [N, K]
    return weight / weight.sum(1, keepdim=True).clamp_min(EPSILON)


def _product(a: Tensor, b: Tensor, bf16: bool, bias: Tensor | None = None) -> Tensor:
    """a b + bias in float32, or with the factors rounded to bfloat16."""
    if bf16:
        product = (a.bfloat16() @ b.bfloat16()).float()
        return product if bias is None else product + bias
    return a @ b if bias is None else torch.addmm(bias, a, b)


class _SparseProduct(torch.autograd.Function):
    """x w for a constant sparse CSR x [N, D]; its transpose is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_transposed: Tensor, w: Tensor) -> Tensor:
        ctx.x_transposed = x_transposed
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.x_transposed @ gradients[0]


class _DenseInput:
    """Abar X W for a dense X [N, D]: the constant Abar X is taken once."""

    def __init__(self, graph: Graph, x: Tensor) -> None:
        self.n_features = x.shape[1]
        self.propagated = ops.propagate(graph, x)  # [N, D]

    def __call__(self, w: Tensor, bf16: bool) -> Tensor:
        return _product(self.propagated, w, bf16)


class _SparseInput:
    """Abar (X W) for a sparse CSR X [N, D]: Abar X would have many more entries than X."""

    def __init__(self, graph: Graph, x: Tensor) -> None:
        self.n_features = x.shape[1]
        self.graph, self.x = graph, x
        self.x_transposed = x.t().to_sparse_csr()  # [D, N]

    def __call__(self, w: Tensor, bf16: bool) -> Tensor:
        return ops.propagate(self.graph, _SparseProduct.apply(self.x, self.x_transposed, w))


class _LowRankInput:
    """Abar X_r W = (Abar L)(R W) for X_r = L R; a mean to add back is one more column and row."""

    def __init__(self, graph: Graph, x: ops.LowRankMatrix) -> None:
        left, right = x.left, x.right
        if x.add_mean and x.mean is not None:
            left = torch.cat([left, left.new_ones(left.shape[0], 1)], dim=1)
            right = torch.cat([right, x.mean[None]])
        self.n_features = right.shape[1]
        self.left = ops.propagate(graph, left.contiguous())  # [N, R]
        self.right = right.contiguous()  # [R, D]

    def __call__(self, w: Tensor, bf16: bool) -> Tensor:
        return _product(self.left, _product(self.right, w, bf16), bf16)


def _second_view(graph: Graph, x: ops.LowRankMatrix) -> _LowRankInput | _DenseInput:
    """X_r in factors, or dense where these are no smaller or every batch has its own mean."""
    n, n_features = x.shape
    rank = x.right.shape[0]
    batch_means = x.add_mean and x.mean is not None and x.mean.dim() == 2
    if batch_means or rank * (n + n_features) >= n * n_features:
        return _DenseInput(graph, x.to_dense())
    return _LowRankInput(graph, x)


class ECNMFModel(nn.Module):
    """Encoders, clustering head and losses of ECN-MF on one graph.

    Parameters
    ----------
    x : Tensor [N, D]
        Attributes, dense or sparse CSR.
    x_low_rank : LowRankMatrix
        Their low-rank reconstruction X_r from ``ops.low_rank``, which also settles how batches are
        recombined and whether column means are added back.
    graph : Graph
        Abar: ``norm="rw"`` is D^-1 (A + I) (as published), ``"sym"`` D^-1/2 (A + I) D^-1/2,
        ``"none"`` A + I.
    n_clusters : int
        K.
    width : int
        d, columns of every layer.
    n_layers : int
        L; layers after the first are residual.
    activation : {"identity", "relu"}
        phi, in every layer.
    bias : bool
        Whether layers have biases: phi(Abar X W + b), phi(Abar (Z W + b) + Z).
    row_normalise : bool
        Whether the head sees unit rows of Z.
    head : {"kmeans", "random"}
        Start of the softmax head: from k-means centres C of the untrained Z, W = 2 C g and
        b = -|C|^2 g with g = 1 / within-cluster variance, or random (as published).
    view_loss : {"elements", "nodes"}
        Eq. 12 as a mean over all N d elements, or over nodes of squared distances.
    kl : {"batchmean", "sum", "literal"}
        Eq. 16 as KL(P || Q) / N, without the division, or the mean of log(P / Q) as printed
        (which lacks the weight P).
    bce : {"one-hot", "positive"}
        Eq. 18 as binary cross entropy of Q with one-hot pseudo labels, averaged over all entries,
        or of the pseudo label's own probability only.
    members : {"all", "argmax"}
        Whether the top nodes of a cluster are sought among all nodes (one that is sought by two
        clusters goes to the more probable) or among those that are most probable in it.
    alpha, beta : float
        Weights of the view loss and of KL (Eq. 19).
    tau : float
        Pseudo-labelled nodes per cluster as a fraction of N / K (at least one node).
    update_every : int
        Epochs between refreshes of the pseudo labels.
    target_every : int
        Epochs between refreshes of the target distribution.
    pseudo_start : int
        First epoch with pseudo labels.
    n_init : int
        k-means restarts for the head.
    precision : {"fp32", "tf32", "bf16x3", "bf16"}
        ``"bf16"`` rounds the factors of the encoders' dense products to bfloat16; the others run in
        float32. A sparse X and the head are float32 in any case.
    seed : int
        Of the initial weights and of k-means.
    """

    target: Tensor | None
    pseudo: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        x: Tensor,
        x_low_rank: ops.LowRankMatrix,
        graph: Graph,
        *,
        n_clusters: int,
        width: int = 600,
        n_layers: int = 2,
        activation: Literal["identity", "relu"] = "identity",
        bias: bool = True,
        row_normalise: bool = True,
        head: Literal["kmeans", "random"] = "kmeans",
        view_loss: Literal["elements", "nodes"] = "elements",
        kl: Literal["batchmean", "sum", "literal"] = "batchmean",
        bce: Literal["one-hot", "positive"] = "one-hot",
        members: Literal["all", "argmax"] = "all",
        alpha: float = 1.0,
        beta: float = 1.0,
        tau: float = 0.5,
        update_every: int = 10,
        target_every: int = 1,
        pseudo_start: int = 0,
        n_init: int = 10,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.graph, self.n_clusters = graph, n_clusters
        self.activation: Literal["none", "relu"] = "relu" if activation == "relu" else "none"
        self.row_normalise, self.head, self.n_init = row_normalise, head, n_init
        self.view_loss, self.kl, self.bce, self.members = view_loss, kl, bce, members
        self.loss_alpha, self.loss_beta, self.tau = alpha, beta, tau
        self.update_every, self.target_every = update_every, target_every
        self.pseudo_start, self.seed = pseudo_start, seed
        self.bf16 = precision == "bf16"
        self.epoch = 0
        self.target = None  # [N, K]
        self.pseudo = None  # nodes [n], labels [n]
        self._parts: dict[str, Tensor] = {}

        sparse = x.layout == torch.sparse_csr
        self.inputs = (
            _SparseInput(graph, x) if sparse else _DenseInput(graph, x),
            _second_view(graph, x_low_rank),
        )
        # Glorot's uniform initialisation for every matrix, zero for every bias.
        generator = torch.Generator().manual_seed(derive_seed(seed, _INITIALISE))
        self.n_layers = n_layers
        self.w, self.b = nn.ParameterList(), nn.ParameterList()  # by view, then by layer
        for view in self.inputs:
            for rows in (view.n_features, *[width] * (n_layers - 1)):
                self.w.append(_glorot((rows, width), generator))
                self.b.append(nn.Parameter(torch.zeros(width), requires_grad=bias))
        self.head_w = _glorot((width, n_clusters), generator)
        self.head_b = nn.Parameter(torch.zeros(n_clusters))
        self.to(x.device)

    # --- the network -----------------------------------------------------------------------------

    def views(self) -> tuple[Tensor, Tensor]:
        """The last embeddings of the two views (Eqs. 10-11), each [N, d]."""
        return self._encode(0), self._encode(1)

    def _encode(self, view: int) -> Tensor:
        layers = range(view * self.n_layers, (view + 1) * self.n_layers)
        first, *later = [(self.w[i], self.b[i]) for i in layers]
        z = self.inputs[view](first[0], self.bf16) + first[1]
        if self.activation == "relu":
            z = torch.relu(z)
        for w, b in later:
            h = _product(z, w, self.bf16, b)
            z = ops.propagate(self.graph, h, residual=z, activation=self.activation)
        return z

    def head_input(self, first: Tensor, second: Tensor) -> Tensor:
        """Z (Eq. 13): the mean of the views, with unit rows if asked for; [N, d]."""
        z = (first + second) / 2
        return unit_rows(z) if self.row_normalise else z

    def assignment(self, z: Tensor) -> Tensor:
        """log Q [N, K], Q = softmax(Z W_c + b_c) (Eq. 14)."""
        return torch.log_softmax(torch.addmm(self.head_b, z, self.head_w), dim=1)

    # --- what the training loop calls ------------------------------------------------------------

    @torch.no_grad()
    def begin(self) -> None:
        """Set the head from k-means centres of the untrained embedding, if asked for."""
        if self.head != "kmeans":
            return
        z = self.head_input(*self.views())
        result = ops.kmeans(
            z, self.n_clusters, n_init=self.n_init, seed=derive_seed(self.seed, _HEAD)
        )
        sharpness = z.shape[0] / max(float(result.inertia), EPSILON * z.shape[0])
        centers = result.centers.to(z)  # [K, d]
        self.head_w.copy_(2.0 * sharpness * centers.T)
        self.head_b.copy_(-sharpness * centers.square().sum(1))

    def loss(self) -> Tensor:
        """alpha MSE + beta KL + BCE (Eq. 19), a scalar."""
        first, second = self.views()
        log_q = self.assignment(self.head_input(first, second))
        q = log_q.exp()
        if self.target is None or self.epoch % self.target_every == 0:
            self.target = target_distribution(q)
        if self.epoch >= self.pseudo_start and (
            self.pseudo is None or self.epoch % self.update_every == 0
        ):
            self.pseudo = self._pseudo_labels(q.detach())

        view = nn.functional.mse_loss(first, second)
        if self.view_loss == "nodes":
            view = view * first.shape[1]
        self._parts = {"mse": view, "kl": self._divergence(self.target, log_q)}
        total = self.loss_alpha * view + self.loss_beta * self._parts["kl"]
        if self.pseudo is not None:
            self._parts["bce"] = self._pseudo_loss(q, *self.pseudo)
            total = total + self._parts["bce"]
        self._parts = {name: part.detach() for name, part in self._parts.items()}
        return total

    def after_step(self, epoch: int) -> None:
        """After the optimizer's step of this epoch (from 0)."""
        self.epoch = epoch + 1

    @torch.no_grad()
    def assign(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Clusters argmax Q, int64 [N], and the head's input [N, d] after this epoch."""
        z = self.head_input(*self.views())
        return self.assignment(z).argmax(1), z

    def diagnostics(self) -> dict[str, float]:
        """The three parts of the loss in the last epoch."""
        return {name: float(part) for name, part in self._parts.items()}

    def extra_state(self) -> dict[str, Tensor]:
        """Target distribution and pseudo labels, for a checkpoint."""
        state = {"epoch": torch.tensor(self.epoch)}
        if self.target is not None:
            state["target"] = self.target
        if self.pseudo is not None:
            state["pseudo_nodes"], state["pseudo_labels"] = self.pseudo
        return state

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`extra_state` gave."""
        self.epoch = int(state["epoch"])
        self.target = state.get("target")
        nodes = state.get("pseudo_nodes")
        self.pseudo = None if nodes is None else (nodes, state["pseudo_labels"])

    # --- losses ----------------------------------------------------------------------------------

    def _divergence(self, p: Tensor, log_q: Tensor) -> Tensor:
        """KL(P || Q) (Eq. 16) in the chosen reading; p and log_q [N, K]."""
        log_ratio = p.clamp_min(EPSILON).log() - log_q.clamp_min(_log(EPSILON))
        if self.kl == "literal":
            return log_ratio.mean()
        divergence = (p * log_ratio).sum()
        return divergence if self.kl == "sum" else divergence / p.shape[0]

    def _pseudo_labels(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 17: the most probable nodes of each cluster and their cluster, both int64 [n]."""
        n, k = q.shape
        n_top = min(n, max(1, round(self.tau * n / k)))
        best = q.argmax(1)
        if self.members == "argmax":
            q = torch.where(torch.nn.functional.one_hot(best, k).bool(), q, -1.0)
        rank = q.argsort(dim=0, descending=True, stable=True)[:n_top]  # [n_top, K]
        chosen = torch.zeros_like(q, dtype=torch.bool).scatter_(0, rank, True) & (q >= 0)
        nodes = chosen.any(1).nonzero()[:, 0]
        labels = torch.where(chosen, q, -1.0)[nodes].argmax(1)
        return nodes, labels

    def _pseudo_loss(self, q: Tensor, nodes: Tensor, labels: Tensor) -> Tensor:
        """Binary cross entropy of q [N, K] with the pseudo labels (Eq. 18)."""
        q = q[nodes].clamp(EPSILON, 1.0 - 1e-7)  # [n, K]
        if self.bce == "positive":
            return -q.gather(1, labels[:, None]).log().mean()
        one_hot = nn.functional.one_hot(labels, self.n_clusters).to(q)
        return nn.functional.binary_cross_entropy(q, one_hot)


def _glorot(shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    return uniform_parameter(shape, (6.0 / sum(shape)) ** 0.5, generator)


def _log(value: float) -> float:
    return float(torch.tensor(value).log())
