"""ECN-MF, the clustering network on a low-rank second view (Cheng et al., CMC 2024).

The second view of the attributes X is their low-rank reconstruction X_r. Two un-shared residual
graph convolutions encode X and X_r; their mean feeds a softmax head, trained by agreement of the
views, a sharpened target distribution and pseudo labels of the most probable nodes.

The published equations leave much open. Every open point is a keyword here; the default is the
reading that clustered best, named "as published" where it is also the literal one.

:mod:`fastclust.models.views` says how the views are computed.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastclust import ops
from fastclust.distributed import ONE, Ranks
from fastclust.graph import Graph
from fastclust.models.consensus import cluster_means, consensus_kmeans
from fastclust.models.inputs import (
    NORM_FLOOR,
    as_tensor,
    derive_seed,
    sample_rows,
    sampled_kmeans,
    uniform_parameter,
    unit_rows,
)
from fastclust.models.leading import leading_directions
from fastclust.models.views import DenseInput, LinearView, SparseInput, empty_like, second_view

__all__ = ["ECNMFModel", "choose_propagation", "target_distribution"]

_INITIALISE, _HEAD = range(2)  # what a derived seed is for

# :func:`choose_propagation` looks at so many columns and rows, and takes the mean of so many runs
# of k-means, of so many starts each: a single run may go either way (bat).
_PROBE_COLUMNS, _PROBE_ROWS, _PROBE_RUNS, _PROBE_STARTS = 256, 1 << 13, 5, 3

# Probabilities and cluster sizes are kept above this in logarithms and quotients.
EPSILON = 1e-8


def target_distribution(q: Tensor, ranks: Ranks = ONE) -> Tensor:
    """The sharpened assignment (Eq. 15): P_ij ~ Q_ij^2 / f_j with f_j = sum_i Q_ij, rows sum to 1.

    Parameters
    ----------
    q : Tensor [N, K]
        Soft assignment.
    ranks : Ranks
        The processes that hold its rows.

    Returns
    -------
    Tensor
        [N, K], constant for autograd.
    """
    q = q.detach()
    weight = q.square() / ranks.total(q.sum(0)).clamp_min(EPSILON)  # [N, K]
    return weight / weight.sum(1, keepdim=True).clamp_min(EPSILON)


def choose_propagation(x: Tensor, adjacency: sp.csr_array, n_clusters: int) -> str:
    """Whether attributes that encode degrees cluster more evenly under D^-1 (A + I) or A + I.

    The published D^-1 (A + I), and unit rows, divide by the degree, which is all that such
    attributes say: what is left may be a few small clusters and a large rest (bat, eat). A + I on
    the other hand may let the nodes of highest degree stand alone (uat). Either failure shows as
    uneven clusters, so the reading is taken whose k-means of Abar^2 X + Abar X, which is two linear
    layers with a residual, has the greater entropy of cluster sizes. No label is involved.

    Parameters
    ----------
    x : Tensor [N, D]
        Attributes, dense or sparse CSR; of many columns random combinations are looked at, of many
        rows a sample.
    adjacency : CSR matrix [N, N]
        Symmetric, no self loops.
    n_clusters : int
        K.

    Returns
    -------
    str
        ``"rw"`` or ``"none"``, the ``norm`` of a :class:`fastclust.Graph`; the head sees unit rows
        with ``"rw"``.
    """
    n, d = x.shape
    if d > _PROBE_COLUMNS:
        draws = np.random.default_rng(0).standard_normal((d, _PROBE_COLUMNS))
        x = x @ as_tensor(draws.astype(np.float32), x.device)
    elif x.layout == torch.sparse_csr:
        x = x.to_dense()
    rows = sample_rows(n, _PROBE_ROWS, 0).to(x.device)
    entropy = {}
    for norm in ("rw", "none"):
        graph = Graph(adjacency, norm=norm).to(x.device)
        first = ops.propagate(graph, x)
        z = ops.propagate(graph, first, residual=first)[rows]
        z = unit_rows(z) if norm == "rw" else z
        entropy[norm] = 0.0
        for run in range(_PROBE_RUNS):
            found = ops.kmeans(z, n_clusters, n_init=_PROBE_STARTS, seed=run).labels
            shares = torch.bincount(found, minlength=n_clusters).double() / len(z)
            entropy[norm] += float(torch.special.entr(shares).sum())
    return "rw" if entropy["rw"] >= entropy["none"] else "none"


class _Agreement(torch.autograd.Function):
    """sum (Z_1 - Z_2)^2 [] and U W [N, K], U the unit rows (if asked for) of (Z_1 + Z_2) / 2.

    Works in the memory of its inputs Z_1 and Z_2 [N, d], which nothing else may read: they become
    their difference and mean, and in the backward their own gradients. At N x d elements this takes
    a few passes through memory and no new page of it, where the separate operations touch fresh
    memory a dozen times.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, w: Tensor, row_normalise: bool
    ) -> tuple[Tensor, Tensor]:
        difference = first.sub_(second)
        mean = second.add_(difference, alpha=0.5)
        scores = ops.matmul(mean, w)
        along = None
        if row_normalise:
            norm = torch.linalg.vector_norm(mean, dim=1, keepdim=True)  # [N, 1]
            scale = 1.0 / norm.clamp_min(NORM_FLOOR)
            scores *= scale
            along = scores * scale * (norm > NORM_FLOOR)  # [N, K]
        else:
            scale = mean.new_ones(())
        ctx.save_for_backward(difference, mean, w, scale, along)
        squared = torch.linalg.vector_norm(difference, dim=1).square().sum()
        return squared, scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        difference, mean, w, scale, along = ctx.saved_tensors
        g_squared, g_scores = gradients
        g = g_scores * scale  # [N, K]
        g_w = ops.matmul(mean.t(), g)
        if along is None:
            mean.zero_()
        else:
            # d(z / |z|): the part of the gradient along the row itself drops out.
            mean.mul_((g * along).sum(1, keepdim=True).mul_(-0.5))
        mean.addmm_(g, w.t(), alpha=0.5)  # half the gradient of the mean
        difference.mul_(2.0 * g_squared)
        second = mean.sub_(difference)
        return torch.add(second, difference, alpha=2.0, out=difference), second, g_w, None


class ECNMFModel(nn.Module):
    """Encoders, clustering head and losses of ECN-MF on one graph.

    Parameters
    ----------
    x : Tensor [N, D]
        Attributes, dense or sparse CSR.
    x_low_rank : LowRankMatrix or None
        Their low-rank reconstruction X_r from ``ops.low_rank``, which also settles how batches are
        recombined and whether column means are added back. None: the second view is X as well.
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
    head : {"spectral", "kmeans", "random"}
        Start of the softmax head: from cluster centres C of the untrained Z, W = 2 C g and
        ``b = -|C|^2 g`` with g = 1 / within-cluster variance, or random (as published).
        ``"kmeans"`` clusters Z as it is, ``"spectral"`` its leading 2 K singular vectors, by the
        consensus of many starts: :func:`fastclust.models.consensus.consensus_kmeans`.
    view_loss : {"elements", "nodes"}
        Eq. 12 as a mean over all N d elements, or over nodes of squared distances.
    kl : {"batchmean", "sum", "literal"}
        Eq. 16 as ``KL(P || Q) / N``, without the division, or the mean of log(P / Q) as printed
        (which lacks the weight P).
    bce : {"one-hot", "positive"}
        Eq. 18 as binary cross entropy of Q with one-hot pseudo labels, averaged over all entries,
        or of the pseudo label's own probability only.
    members : {"all", "argmax"}
        Whether the top nodes of a cluster are sought among all nodes (one that is sought by two
        clusters goes to the more probable) or among those that are most probable in it.
    alpha, beta : float
        Weights of the view loss and of KL (Eq. 19); the paper tries 0.1 to 1. Both KL and the
        pseudo labels, as many of every cluster, draw clusters to one size: where classes differ
        much (amap, amac), larger beta and tau lead away from a good start.
    tau : float
        Pseudo-labelled nodes per cluster as a fraction of N / K (at least one node).
    update_every : int
        Epochs between refreshes of the pseudo labels.
    target_every : int
        Epochs between refreshes of the target distribution.
    pseudo_start : int
        First epoch with pseudo labels.
    n_init : int
        k-means restarts for the head; ten times as many vote on the ``"spectral"`` one.
    precision : {"fp32", "tf32", "bf16x3", "bf16"}
        ``"bf16"`` rounds the factors of the encoders' dense products to bfloat16; the others run in
        float32. A sparse X and the head are float32 in any case.
    seed : int
        Of the initial weights and of k-means.
    ranks : Ranks
        The processes that share the graph by rows, see :mod:`fastclust.distributed`.
    """

    by_rows: frozenset[str] = frozenset()  # no parameter has a row per node
    target: Tensor | None
    pseudo: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        x: Tensor,
        x_low_rank: ops.LowRankMatrix | None,
        graph: Graph,
        *,
        n_clusters: int,
        width: int = 600,
        n_layers: int = 2,
        activation: Literal["identity", "relu"] = "identity",
        bias: bool = True,
        row_normalise: bool = True,
        head: Literal["spectral", "kmeans", "random"] = "spectral",
        view_loss: Literal["elements", "nodes"] = "elements",
        kl: Literal["batchmean", "sum", "literal"] = "batchmean",
        bce: Literal["one-hot", "positive"] = "one-hot",
        members: Literal["all", "argmax"] = "all",
        alpha: float = 1.0,
        beta: float = 0.1,
        tau: float = 0.1,
        update_every: int = 10,
        target_every: int = 1,
        pseudo_start: int = 0,
        n_init: int = 10,
        precision: str = "fp32",
        seed: int = 0,
        ranks: Ranks = ONE,
    ) -> None:
        super().__init__()
        self.ranks, self.graph, self.n_clusters = ranks, graph, n_clusters
        self.activation: Literal["none", "relu"] = "relu" if activation == "relu" else "none"
        self.row_normalise, self.head, self.n_init = row_normalise, head, n_init
        self.view_loss, self.kl, self.bce, self.members = view_loss, kl, bce, members
        self.loss_alpha, self.loss_beta, self.tau = alpha, beta, tau
        self.update_every, self.target_every = update_every, target_every
        self.pseudo_start, self.seed = pseudo_start, seed
        self.precision = precision
        self.epoch = 0
        self.target = None  # [N, K]
        self.pseudo = None  # nodes [n], labels [n]
        self._parts: dict[str, Tensor] = {}

        sparse = x.layout == torch.sparse_csr
        inputs = [SparseInput(graph, x) if sparse else DenseInput(graph, x)]
        if x_low_rank is not None:
            inputs.append(second_view(graph, x_low_rank))
        joined = [self._joined(view, width, n_layers) for view in inputs]
        self.graph = ranks.graph(graph)
        for view in joined:
            view.share(ranks)
        self.inputs = [joined[0], joined[-1]]
        self._memory: list[Tensor | None] = [None, None]  # [N, d] of the linear views
        # Glorot's uniform initialisation for every matrix, zero for every bias.
        generator = torch.Generator().manual_seed(derive_seed(seed, _INITIALISE))
        self.n_layers = n_layers
        self.w, self.b = nn.ParameterList(), nn.ParameterList()  # by view, then by layer
        for view in self.inputs:
            for rows in (view.n_features, *[width] * (n_layers - 1)):
                self.w.append(_glorot((rows, width), generator))
                zeros = torch.zeros(width, dtype=torch.float32)
                self.b.append(nn.Parameter(zeros, requires_grad=bias))
        self.head_w = _glorot((width, n_clusters), generator)
        self.head_b = nn.Parameter(torch.zeros(n_clusters, dtype=torch.float32))
        self.to(x.device)
        ranks.sum_gradients(self.parameters())

    # --- the network -----------------------------------------------------------------------------

    def views(self) -> tuple[Tensor, Tensor]:
        """The last embeddings of the two views (Eqs. 10-11), each [N, d]."""
        return self._encode(0), self._encode(1)

    def _joined(
        self, view: DenseInput | SparseInput, width: int, n_layers: int
    ) -> DenseInput | SparseInput | LinearView:
        """All layers of a view as one product, where phi allows and the sizes recommend it."""
        if self.activation == "relu" or isinstance(view, SparseInput):
            return view
        if not LinearView.pays(self.graph, view, n_layers, width):
            return view
        return LinearView(self.graph, view, n_layers)

    def _encode(self, view: int, *, reuse_memory: bool = False) -> Tensor:
        layers = slice(view * self.n_layers, (view + 1) * self.n_layers)
        weights, biases = list(self.w[layers]), list(self.b[layers])
        given = self.inputs[view]
        if isinstance(given, LinearView):
            if reuse_memory and self._memory[view] is None:
                self._memory[view] = empty_like(given.basis, len(given.basis), len(self.head_w))
            out = self._memory[view] if reuse_memory else None
            return given(weights, biases, out, self.precision)
        z = given(weights[0], self.precision) + biases[0]
        if self.activation == "relu":
            z = torch.relu(z)
        for w, b in zip(weights[1:], biases[1:], strict=True):
            h = ops.matmul(z, w, bias=b, precision=self.precision)
            z = self.ranks.propagate(self.graph, h, residual=z, activation=self.activation)
        return z

    def head_input(self, first: Tensor, second: Tensor) -> Tensor:
        """Z (Eq. 13): the mean of the views, with unit rows if asked for; [N, d]."""
        z = (first + second) / 2
        return unit_rows(z) if self.row_normalise else z

    def head_embedding(self) -> Tensor:
        """What the head sees of every node [N, d]; outside autograd."""
        return self.head_input(*self.views())

    def assignment(self, z: Tensor) -> Tensor:
        """log Q [N, K], Q = softmax(Z W_c + b_c) (Eq. 14)."""
        return torch.log_softmax(torch.addmm(self.head_b, z, self.head_w), dim=1)

    # --- what the training loop calls ------------------------------------------------------------

    @torch.no_grad()
    def begin(self) -> None:
        """Set the head from clusters of the untrained embedding, if asked for."""
        if self.head == "random":
            return
        z, k, seed = self.head_embedding(), self.n_clusters, derive_seed(self.seed, _HEAD)
        if self.head == "kmeans":
            kmeans = self.ranks.kmeans if self.ranks.size > 1 else sampled_kmeans
            result = kmeans(z, k, n_init=self.n_init, seed=seed)
            centers, inertia = result.centers.to(z), float(result.inertia)
        else:
            z = self.ranks.gather(z)  # every rank finds the same clusters
            y = ops.matmul(z, leading_directions(z, 2 * k, seed=seed))  # [N, 2 K]
            y = unit_rows(y) if self.row_normalise else y
            labels = consensus_kmeans(y, k, n_init=10 * self.n_init, seed=seed).labels
            centers = cluster_means(z, labels, k)
            # A sum by rows, then numpy's: torch's over all elements depends on the threads.
            errors = (z - centers[labels]).square().sum(1)  # [N]
            inertia = float(errors.cpu().numpy().sum(dtype=np.float64))
        n = self.ranks.n_rows(len(z))
        sharpness = n / max(inertia, EPSILON * n)
        self.head_w.copy_(2.0 * sharpness * centers.T)  # centers [K, d]
        self.head_b.copy_(-sharpness * centers.square().sum(1))

    def loss(self) -> Tensor:
        """alpha MSE + beta KL + BCE (Eq. 19), a scalar."""
        first, second = self._encode(0, reuse_memory=True), self._encode(1, reuse_memory=True)
        if self.activation == "relu" and self.n_layers == 1:
            first, second = first.clone(), second.clone()  # the gradient of relu needs its result
        n, d = self.ranks.n_rows(len(first)), first.shape[1]
        squared, scores = _Agreement.apply(first, second, self.head_w, self.row_normalise)
        log_q = torch.log_softmax(scores + self.head_b, dim=1)
        q = log_q.exp()
        if self.target is None or self.epoch % self.target_every == 0:
            self.target = target_distribution(q, self.ranks)
        if self.epoch >= self.pseudo_start and (
            self.pseudo is None or self.epoch % self.update_every == 0
        ):
            self.pseudo = self._pseudo_labels(self.ranks.gather(q.detach()))

        view = self.ranks.total(squared) / (n if self.view_loss == "nodes" else n * d)
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
        z = self.head_embedding()
        return self.ranks.gather(self.assignment(z).argmax(1)), self.ranks.gather(z)

    def diagnostics(self) -> dict[str, float]:
        """The three parts of the loss in the last epoch."""
        return {name: float(part) for name, part in self._parts.items()}

    def extra_state(self) -> dict[str, Tensor]:
        """Target distribution, pseudo labels and the parts of the loss, for a checkpoint."""
        state = {"epoch": torch.tensor(self.epoch)}
        state |= {f"part/{name}": part for name, part in self._parts.items()}
        if self.target is not None:
            state["target"] = self.ranks.gather(self.target)
        if self.pseudo is not None:
            state["pseudo_nodes"], state["pseudo_labels"] = self.pseudo
        return state

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`extra_state` gave."""
        self.epoch = int(state["epoch"])
        target = state.get("target")
        self.target = None if target is None else self.ranks.rows(target)
        nodes = state.get("pseudo_nodes")
        self.pseudo = None if nodes is None else (nodes, state["pseudo_labels"])
        self._parts = {
            name.removeprefix("part/"): part
            for name, part in state.items()
            if name.startswith("part/")
        }

    # --- losses ----------------------------------------------------------------------------------

    def _divergence(self, p: Tensor, log_q: Tensor) -> Tensor:
        """KL(P || Q) (Eq. 16) in the chosen reading; p and log_q [N, K]."""
        log_ratio = p.clamp_min(EPSILON).log() - log_q.clamp_min(math.log(EPSILON))
        n = self.ranks.n_rows(len(p))
        if self.kl == "literal":
            return self.ranks.total(log_ratio.mean() * (len(p) / n))
        divergence = self.ranks.total((p * log_ratio).sum())
        return divergence if self.kl == "sum" else divergence / n

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
        n_labelled = len(nodes)
        nodes, labels = self.ranks.own_nodes(nodes, labels)
        q = q[nodes].clamp(EPSILON, 1.0 - 1e-7)  # [n, K]
        if len(nodes) == 0:
            mean = q.sum()
        elif self.bce == "positive":
            mean = -q.gather(1, labels[:, None]).log().mean()
        else:
            one_hot = nn.functional.one_hot(labels, self.n_clusters).to(q)
            mean = nn.functional.binary_cross_entropy(q, one_hot)
        return self.ranks.total(mean * (len(nodes) / n_labelled))


def _glorot(shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    return uniform_parameter(shape, (6.0 / sum(shape)) ** 0.5, generator)
