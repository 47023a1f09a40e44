r"""HSAN and ECN-MF on batches of nodes: one optimiser step sees some rows, not all of them.

A pass over the nodes is cut into batches of equal size; every epoch of the training loop is one
step on one batch. ``"random"`` batches are random; ``"partition"`` batches are made of four parts
of the graph, drawn at random, that have more edges inside than across (Chiang et al., Cluster-GCN,
KDD 2019), so that hard pairs meet. Which nodes a step sees depends on the seed and the step alone.

**HSAN.** The loss of row i needs the sum over all 2N rows. With s the similarity times its weight,
p the other view of i and C the sampled rows without i and p,

.. math:: \hat R_i = e^{s_{ip}} + \frac{2N - 2}{|C|} \sum_{k \in C} e^{s_{ik}}

has the mean :math:`R_i` where C is drawn at random. Its logarithm does not: to second order it is
too small by :math:`v / (2 m)`, with v the squared coefficient of variation of :math:`e^{s_{ik}}`
over k and m the number of sampled nodes (the two views of a node are drawn together and are alike,
which makes of 2m rows hardly more than m draws), times (1 - m / N). With logits in [-1, 1] v is
below 1.4, and 0.05 is usual after training: less than 1e-4 for m = 512. The same holds for each
gradient's weights. ``docs/scale.md`` has it measured.

- ``n_negatives=None``: C is the batch itself, so the loss is that of
  :func:`~fastclust.ops.hard_infonce` on 2B rows plus log((N - 1) / (B - 1)). The pair's own term is
  then weighted as if N were B, which changes a softmax over 2B - 1 terms in one of them.
- ``n_negatives=M``: C is M random nodes, both views, whatever the rows are.

Structure embeddings are exact: rows of A V, for which only the edges of the sampled nodes are read.
Weights of hard pairs (Eq. 9) take the clusters and the confident nodes of the last refresh and the
similarities of the step itself, scaled by their range in the batch: nothing but N labels is kept.

**ECN-MF.** All that the graph does to a linear encoder is done once: rows of the precomputed
[Abar^L X | ... | Abar X] are rows of the exact views, in any batch. With ReLU the first layer
is exact and later ones see the edges inside the batch. Target distribution and pseudo labels are
those of the batch, taken anew at each step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from fastclust import ops
from fastclust.graph import Graph
from fastclust.interop import without_autocast
from fastclust.models.ecnmf import ECNMFModel
from fastclust.models.hsan import HSANModel, confident_nodes
from fastclust.models.inputs import (
    SAMPLE_ROWS,
    as_tensor,
    derive_seed,
    sampled_kmeans,
    stacked_unit_rows,
)
from fastclust.models.views import LinearView, SparseProduct
from fastclust.ops.propagate import propagate_any

__all__ = ["Batches", "Batching", "SampledECNMF", "SampledHSAN", "partition", "sampled_infonce"]

Batching = Literal["random", "partition"]

_BATCH, _NEGATIVES, _PARTITION = range(10, 13)  # what a derived seed is for
_PARTS_PER_BATCH = 4
_PARTITION_ROUNDS = 10
# A refresh of the pseudo labels takes centres from this many rows; results take them from more.
_REFRESH_ROWS = 1 << 14


class Batches:
    """The nodes of each step: every pass cuts all nodes into batches of equal size.

    Parameters
    ----------
    n_nodes, batch_size : int
        N and B; a pass has ceil(N / B) batches, whose sizes differ by one at most (by a few for
        partitions).
    seed : int
    order : array int64 [N], optional
        Nodes by part, from :func:`partition`; without it batches are random.
    """

    def __init__(
        self,
        n_nodes: int,
        batch_size: int,
        seed: int,
        order: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.n_nodes, self.seed = n_nodes, seed
        self.per_pass = -(-n_nodes // batch_size)
        self.parts = None
        if order is not None:
            self.parts = np.array_split(order, _count_parts(n_nodes, batch_size))
        self._pass: tuple[int, list[npt.NDArray[np.int64]]] | None = None

    def __call__(self, step: int) -> Tensor:
        """Nodes of a step (from 0), int64 [B], ascending."""
        number, position = divmod(step, self.per_pass)
        if self._pass is None or self._pass[0] != number:
            rng = np.random.default_rng(derive_seed(self.seed, _BATCH, number))
            if self.parts is None:
                cut = np.array_split(rng.permutation(self.n_nodes), self.per_pass)
            else:
                drawn = rng.permutation(len(self.parts)).reshape(self.per_pass, -1)
                cut = [np.concatenate([self.parts[p] for p in group]) for group in drawn]
            self._pass = number, [np.sort(nodes) for nodes in cut]
        return torch.from_numpy(self._pass[1][position])


def _count_parts(n_nodes: int, batch_size: int) -> int:
    """The same number for each batch, so few that no batch is made of empty ones only."""
    return -(-n_nodes // batch_size) * min(_PARTS_PER_BATCH, batch_size)


def partition(graph: Graph, n_parts: int, seed: int) -> npt.NDArray[np.int64]:
    """Nodes in an order of which equal stretches are parts of the graph, int64 [N].

    Labels spread from ``n_parts`` random nodes: in each of ten rounds a node takes the label that
    most of its neighbours have, where labels count for less the more nodes have them already. One
    round sorts the edges once.
    """
    n = graph.n_nodes
    rng = np.random.default_rng(derive_seed(seed, _PARTITION))
    indices = graph.indices.cpu().numpy()
    rows = np.repeat(np.arange(n), np.diff(graph.indptr.cpu().numpy()))
    label = np.full(n, -1, np.int64)
    n_parts = min(n_parts, n)
    label[rng.choice(n, n_parts, replace=False)] = np.arange(n_parts)
    room = 2.0 * n / n_parts
    for _ in range(_PARTITION_ROUNDS):
        near = label[indices]
        key = rows[near >= 0] * n_parts + near[near >= 0]
        key.sort()
        first = np.flatnonzero(np.diff(key, prepend=-1))
        votes = np.diff(first, append=key.size)
        node, choice = np.divmod(key[first], n_parts)
        size = np.bincount(label[label >= 0], minlength=n_parts)
        score = votes * np.maximum(1.0 - size[choice] / room, 0.01)
        by_score = np.lexsort((score, node))
        best = by_score[np.flatnonzero(np.diff(node[by_score], append=n))]
        label[node[best]] = choice[best]
    lost = label < 0  # in components without a start
    label[lost] = rng.integers(0, n_parts, int(lost.sum()))
    return np.argsort(label, kind="stable")


def _edges_of(
    graph: Graph, nodes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Row pointers [B + 1], neighbours [E'] and weights [E'] of some rows of a graph on the CPU."""
    indptr, indices = graph.indptr.numpy(), graph.indices.numpy()
    count = indptr[nodes + 1] - indptr[nodes]
    pointers = np.concatenate(([0], np.cumsum(count)))
    at = np.repeat(indptr[nodes] - pointers[:-1], count) + np.arange(pointers[-1])
    if graph.values is None:
        return pointers, indices[at], np.ones(at.size, np.float32)
    return pointers, indices[at], graph.values.numpy()[at]


@without_autocast
def sampled_infonce(
    z: Tensor,
    e: Tensor | None,
    z_columns: Tensor,
    e_columns: Tensor | None,
    alpha: Tensor,
    own: Tensor,
    n_nodes: int,
    hard: tuple[Tensor, Tensor, Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The loss of HSAN (Eqs. 8, 10, 11) for some rows against sampled columns.

    Takes some 24 B M floats of memory.

    Parameters
    ----------
    z : Tensor [2B, dz]
        Attribute embeddings of the batch, view 1 above view 2.
    e : Tensor [2B, de] or None
        Structure embeddings.
    z_columns, e_columns : Tensor [2M, dz], [2M, de] or None
        The same of the sampled nodes.
    alpha : Tensor
        0-d.
    own : Tensor bool [B, M]
        Where a sampled node is the row's own.
    n_nodes : int
        N.
    hard : tuple, optional
        Clusters int64 [B] and [M], confident bool [B] and [M], and beta; without it all weights
        are 1.

    Returns
    -------
    Tensor
        Scalar; the mean over the rows of log R_i - s_ip with R_i as at the module's head.
    """

    def mixed(zs: Tensor, es: Tensor | None) -> Tensor:
        return alpha * zs if es is None else alpha * zs + (1 - alpha) * es

    similarity = mixed(z @ z_columns.t(), None if e is None else e @ _given(e_columns).t())
    partners = mixed(_other_view(z), None if e is None else _other_view(e))  # [2B]
    logits, positive = similarity, partners
    if hard is not None:
        labels, column_labels, confident, column_confident, beta = hard
        with torch.no_grad():
            low = torch.minimum(similarity.min(), partners.min())
            high = torch.maximum(similarity.max(), similarity.new_ones(()))  # the diagonal's
            width = (high - low).clamp_min(1e-12)
            same = (labels[:, None] == column_labels[None, :]).to(z).repeat(2, 2)  # [2B, 2M]
            both = (confident[:, None] & column_confident[None, :]).repeat(2, 2)
            weight = (same - (similarity - low) / width).abs_().pow_(beta)
            weight = torch.where(both, weight, 1.0)
            partner_weight = (1.0 - (partners - low) / width).abs().pow(beta)
            partner_weight = torch.where(confident.repeat(2), partner_weight, 1.0)
        logits, positive = similarity * weight, partners * partner_weight
    own_rows = own.repeat(2, 2)  # [2B, 2M]
    logits = logits.masked_fill(own_rows, -math.inf)
    count = own_rows.shape[1] - own_rows.sum(1)  # [2B]
    rest = torch.logsumexp(logits, dim=1) + torch.log((2 * n_nodes - 2) / count.to(z))
    return (torch.logaddexp(positive, rest) - positive).mean()


def _other_view(x: Tensor) -> Tensor:
    """Products of every row [2B, d] with the row of the other view: [2B]."""
    first, second = x.chunk(2)
    return torch.linalg.vecdot(first, second).repeat(2)


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("e_columns must be given where e is")
    return x


class SampledHSAN(HSANModel):
    """HSAN on batches; see the module's head.

    Parameters
    ----------
    x, graph, **keywords
        As for :class:`fastclust.models.hsan.HSANModel`; ``stale_weights`` has no meaning here.
    batch_size : int
        B, nodes per step.
    n_negatives : int or None
        M, sampled nodes whose views are the columns; None takes the batch itself.
    batching : {"random", "partition"}
        How nodes are batched.
    """

    def __init__(
        self,
        x: Tensor,
        graph: Graph,
        *,
        batch_size: int,
        n_negatives: int | None = None,
        batching: Batching = "random",
        **keywords: Any,
    ) -> None:
        super().__init__(x, graph, **keywords)
        n = x.shape[0]
        self.n_negatives = None if n_negatives is None else min(n_negatives, n)
        self.host_graph = graph.to("cpu")  # edges of a batch are picked by numpy
        self.batches = _batches(self.host_graph, batch_size, batching, self.seed)
        self.step = 0
        # Clusters int64 [N] and confident nodes bool [N] of the last refresh.
        self.refreshed: tuple[Tensor, Tensor] | None = None

    def _rows(self, nodes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both views of some nodes: Z and E, each [2B, d]."""
        z = self.attribute_views(self.x[nodes.to(self.x.device)])
        if not self.structure:
            return z, None
        pointers, neighbors, values = _edges_of(self.host_graph, nodes.numpy())
        # Of the N rows of V only those of neighbours take part, in the gradient's product as well.
        used, column = np.unique(neighbors, return_inverse=True)
        rows = sp.csr_array((values, column, pointers), shape=(len(nodes), len(used)))
        a, transposed = (as_tensor(m, self.x.device) for m in (rows, sp.csr_array(rows.T)))
        at = torch.from_numpy(used.astype(np.int64)).to(self.x.device)
        first, second = (
            SparseProduct.apply(a, transposed, v.index_select(0, at)) + c
            for v, c in zip(self.v, self.c, strict=True)
        )
        return z, stacked_unit_rows(first, second)

    def embedding(self) -> Tensor:
        """Z [N, d], made in blocks of rows."""
        out = self.x.new_empty(self.x.shape[0], self.centers.shape[1])
        step = max(1, SAMPLE_ROWS // 4)
        for begin in range(0, len(out), step):
            views = self.attribute_views(self.x[begin : begin + step]).chunk(2)
            torch.add(*views, out=out[begin : begin + step]).div_(2)
        return out

    def loss(self) -> Tensor:
        """The loss of this step's batch, an estimate of the loss of all rows."""
        self._clustered = None
        nodes = self.batches(self.step)
        n, size = self.x.shape[0], len(nodes)
        z, e = self._rows(nodes)
        at = nodes.to(self.x.device)
        if self.n_negatives is not None:
            rng = np.random.default_rng(derive_seed(self.seed, _NEGATIVES, self.step))
            drawn = torch.from_numpy(np.sort(rng.choice(n, self.n_negatives, replace=False)))
            z_columns, e_columns = self._rows(drawn)
            to = drawn.to(at.device)
            hard = None
            if self.refreshed is not None:
                clusters, confident = self.refreshed
                hard = (clusters[at], clusters[to], confident[at], confident[to], self.beta)
            own = at[:, None] == to[None, :]
            return sampled_infonce(z, e, z_columns, e_columns, self.alpha, own, n, hard)
        weights = None
        if self.refreshed is not None:
            clusters, confident = (x[at] for x in self.refreshed)
            weights = ops.hardness(z, e, self.alpha, clusters, confident, self.beta)
        loss = ops.hard_infonce(z, e, self.alpha, weights=weights, precision=self.precision)
        return loss + math.log((n - 1) / max(1, size - 1))

    @torch.no_grad()
    def after_step(self, epoch: int) -> None:
        """After the step of this epoch (from 0): refresh clusters and confident nodes in time."""
        self.step = epoch + 1
        if self.clamp_alpha and self.structure:
            self.alpha.clamp_(0.0, 1.0)
        if not self.use_weights or epoch % self.refresh_every != 0:
            return
        z = self.embedding()
        seed = derive_seed(self.seed, 1, epoch)
        result = sampled_kmeans(
            z, self.n_clusters, n_init=self.n_init, seed=seed, rows=_REFRESH_ROWS, max_iter=1
        )
        self.refreshed = result.labels, confident_nodes(z, result.centers, self.tau)

    def extra_state(self) -> dict[str, Tensor]:
        """Clusters and confident nodes of the last refresh, for a checkpoint."""
        state = {"step": torch.tensor(self.step)}
        if self.refreshed is not None:
            state["clusters"], state["confident"] = self.refreshed
        return state

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`extra_state` gave."""
        self.step = int(state["step"])
        known = "clusters" in state
        self.refreshed = (state["clusters"], state["confident"]) if known else None


class SampledECNMF(ECNMFModel):
    """ECN-MF on batches; see the module's head.

    Parameters
    ----------
    x : Tensor [N, D]
        Attributes, dense: their propagation is kept.
    x_low_rank, graph, **keywords
        As for :class:`fastclust.models.ecnmf.ECNMFModel`; ``update_every`` and ``target_every``
        are 1.
    batch_size : int
        B, nodes per step.
    batching : {"random", "partition"}
        How nodes are batched.
    """

    def __init__(
        self,
        x: Tensor,
        x_low_rank: ops.LowRankMatrix | None,
        graph: Graph,
        *,
        batch_size: int,
        batching: Batching = "random",
        **keywords: Any,
    ) -> None:
        super().__init__(x, x_low_rank, graph, **keywords)
        self.host_graph = graph.to("cpu")  # edges of a batch are picked by numpy
        self.batches = _batches(self.host_graph, batch_size, batching, self.seed)
        self._nodes: Tensor | None = None
        self._local: Graph | None = None  # edges inside the batch

    def _joined(self, view: Any, width: int, n_layers: int) -> Any:
        # Not a question of time here: rows of the joined form need no neighbours.
        return view if self.activation == "relu" else LinearView(self.graph, view, n_layers)

    def _encode(self, view: int, *, reuse_memory: bool = False) -> Tensor:
        if self._nodes is None:
            return super()._encode(view)
        given: Any = self.inputs[view]  # never sparse
        layers = slice(view * self.n_layers, (view + 1) * self.n_layers)
        weights, biases = list(self.w[layers]), list(self.b[layers])
        if isinstance(given, LinearView):
            return given.rows(self._nodes, weights, biases, self.precision)
        first = weights[0] if given.right is None else ops.matmul(given.right, weights[0])
        rows = given.left[self._nodes]
        z = torch.relu(ops.matmul(rows, first, bias=biases[0], precision=self.precision))
        for w, b in zip(weights[1:], biases[1:], strict=True):
            h = ops.matmul(z, w, bias=b, precision=self.precision)
            if self._local is None:
                self._local = self._inside(self._nodes.cpu().numpy())
            z = propagate_any(self._local, h, residual=z, activation="relu")
        return z

    def _inside(self, nodes: npt.NDArray[np.int64]) -> Graph:
        """The graph of the edges inside a batch, normalised as the whole."""
        pointers, neighbors, values = _edges_of(self.host_graph, nodes)
        place = np.searchsorted(nodes, neighbors).clip(max=nodes.size - 1)
        inside = nodes[place] == neighbors
        rows = np.repeat(np.arange(nodes.size), np.diff(pointers))[inside]
        shape = (nodes.size, nodes.size)
        local = sp.csr_array((values[inside], (rows, place[inside])), shape=shape)
        return Graph(local, norm=self.graph.norm).to(self.graph.device)

    def head_embedding(self) -> Tensor:
        """What the head sees of every node [N, d], made in blocks of rows where layers allow."""
        if self.activation == "relu" and self.n_layers > 1:
            return super().head_embedding()
        n = self.graph.n_nodes
        out = self.head_w.new_empty(n, self.head_w.shape[0])
        for nodes in torch.arange(n, device=out.device).split(max(1, SAMPLE_ROWS // 4)):
            self._nodes = nodes
            out[nodes] = self.head_input(*self.views())
        self._nodes = None
        return out

    def loss(self) -> Tensor:
        """alpha MSE + beta KL + BCE (Eq. 19) of this step's batch, a scalar."""
        self._nodes = self.batches(self.epoch).to(self.head_w.device)
        try:
            return super().loss()
        finally:
            self._nodes = self._local = self.target = self.pseudo = None

    def _divergence(self, p: Tensor, log_q: Tensor) -> Tensor:
        scale = self.graph.n_nodes / p.shape[0] if self.kl == "sum" else 1.0
        return scale * super()._divergence(p, log_q)


def _batches(graph: Graph, batch_size: int, batching: Batching, seed: int) -> Batches:
    n = graph.n_nodes
    order = None
    if batching == "partition":
        order = partition(graph, _count_parts(n, batch_size), seed)
    return Batches(n, batch_size, seed, order)
