"""ECN-MF as a scikit-learn estimator."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch

from fastclust import distributed, ops
from fastclust.estimators.base import Count, Features, Fraction, Pair, Steps, Weight
from fastclust.estimators.trained import AXES, TrainedClusterer
from fastclust.graph import Graph
from fastclust.memory import require_memory
from fastclust.models.ecnmf import ECNMFModel, choose_propagation
from fastclust.models.inputs import (
    as_tensor,
    check_counts,
    inverse_document_frequency,
    project,
    unit_rows,
    weighted_rows,
)
from fastclust.models.minibatch import Batching, SampledECNMF
from fastclust.models.ssgc import encodes_degree
from fastclust.training import Trainable

# Sparse attributes with a larger share of entries than this are worked with as dense ones.
DENSE_FROM = 0.1


@dataclass(eq=False, repr=False, kw_only=True)
class ECNMF(TrainedClusterer):
    """Efficient Clustering Network based on Matrix Factorization (Cheng et al., CMC 2024).

    Residual graph convolutions on the attributes and on their low-rank reconstruction, trained to
    agree; the softmax head of their mean gives the clusters.

    Parameters
    ----------
    n_clusters : int or "auto", default 8
        K; ``"auto"`` estimates it without labels, see
        :func:`fastclust.models.n_clusters.estimate_n_clusters`.
    epochs : int, default 1000
        Full-batch steps.
    lr : float, optional
        Learning rate of Adam; default 1e-4.
    rank : int, float in (0, 1) or "gavish-donoho", optional
        Rank r of the reconstruction. Default: 50, or less where the data allow less. A fraction
        takes the smallest rank that leaves less than this share of the norm of X about its
        mean, "gavish-donoho" the singular values above the noise, see ``fastclust.ops.low_rank``.
    batch_size : int, optional
        Rows per batch of the decomposition; None takes all rows at once.
    recombine : {"merge", "block", "per_batch", "literal"}, default "merge"
        How batches make up X_r, see ``fastclust.ops.low_rank``; all the same for one batch.
    add_mean : bool, default False
        Whether the column means are added back to X_r.
    second_view : {"low-rank", "attributes"}, default "low-rank"
        ``"attributes"`` gives the second encoder X itself: the method without its SVD.
    width : int, default 600
        Columns of every layer.
    n_layers : int, default 2
        L; layers after the first are residual.
    norm : {"auto", "rw", "sym", "none"}, default "auto"
        Propagation D^-1 (A + I), D^-1/2 (A + I) D^-1/2 or A + I. ``"auto"`` takes D^-1 (A + I), as
        published, unless the attributes encode nothing but degrees (one attribute per node that
        explains 90 % of the variance of log(1 + degree)) and A + I clusters them more evenly, see
        :func:`fastclust.models.ecnmf.choose_propagation`.
    weighting : {"auto", "none", "l2", "tf-idf"}, default "auto"
        Attribute rows as they are, of unit length, or of unit length after smooth tf-idf.
        ``"auto"`` takes ``"tf-idf"``, or ``"l2"`` where some attribute is negative; ``"none"`` with
        ``"paper-code"``.
    row_normalise : bool, optional
        Whether the head sees unit rows; by default where ``"auto"`` would take D^-1 (A + I).
    activation, bias, head, view_loss, kl, bce, members, alpha, beta, tau, \
update_every, target_every, pseudo_start
        Readings of what the paper leaves open, see :class:`fastclust.models.ecnmf.ECNMFModel`.
    protocol : {"standard", "paper-code"}, default "standard"
        No code was published for this method; ``"paper-code"`` takes the text at its word where it
        speaks: random head, no row normalisation, D^-1 (A + I), ReLU (the first activation named).
        It does not reach the published numbers.
    optimizer : {"adam", "averaged", "accumulated"}, optional
        Default ``"adam"``.
    train_batch_size : int, optional
        Nodes per step; an epoch is then one step on one batch (``batch_size`` is that of the
        decomposition). None, or N and more, takes all nodes: the exact method. See
        :mod:`fastclust.models.minibatch`.
    batching : {"random", "partition"}, default "random"
        Batches at random, or of parts of the graph; without ReLU rows are exact either way.
    random_state, device, precision, selection, eval_every, n_init, n_neighbors, callbacks, \
checkpoint_dir, checkpoint_every, resume, verbose
        As for :class:`HSAN`; ``n_init`` is for the head's start.

    Attributes
    ----------
    labels_ : ndarray int64 [N]
    embedding_ : ndarray float32 [N, width]
        What the head sees.
    history_, n_iter_, selected_epoch_, n_clusters_, n_clusters_evidence_, parameters_, resolved_
        As for :class:`HSAN`.

    Examples
    --------
    >>> import fastclust as fc
    >>> ds = fc.load_dataset("digits")
    >>> model = fc.ECNMF(n_clusters=10, epochs=2, width=64)
    >>> model.fit(ds.features, adjacency=ds.adjacency).labels_.shape
    (1797,)
    """

    epochs: Count = 1000
    rank: Count | Fraction | Literal["gavish-donoho"] | None = None
    batch_size: Count | None = None
    second_view: Literal["low-rank", "attributes"] = "low-rank"
    recombine: Literal["merge", "block", "per_batch", "literal"] = "merge"
    add_mean: bool = False
    n_layers: Count = 2
    norm: Literal["auto", "rw", "sym", "none"] = "auto"
    activation: Literal["identity", "relu"] | None = None
    bias: bool = True
    weighting: Literal["auto", "none", "l2", "tf-idf"] = "auto"
    row_normalise: bool | None = None
    head: Literal["spectral", "kmeans", "random"] | None = None
    view_loss: Literal["elements", "nodes"] = "elements"
    kl: Literal["batchmean", "sum", "literal"] = "batchmean"
    bce: Literal["one-hot", "positive"] = "one-hot"
    members: Literal["all", "argmax"] = "all"
    alpha: Weight = 1.0
    beta: Weight = 0.1
    tau: Weight = 0.1
    update_every: Count = 10
    target_every: Count = 1
    pseudo_start: Steps = 0
    train_batch_size: Pair | None = None
    batching: Batching = "random"

    _name = "ecnmf"

    def _memory_needed(self, n_nodes: int, n_features: int) -> int:
        parameters = 2 * self.width * (n_features + (self.n_layers - 1) * self.width)
        rows = 2 * n_nodes  # both views of every node
        if self._samples(n_nodes):
            rows = n_nodes + 2 * (self.train_batch_size or 0)
        # value, gradient and two moments of each parameter
        return 4 * (4 * parameters + rows * self.width)

    def _check_settings(self, n_nodes: int, n_features: int) -> None:
        super()._check_settings(n_nodes, n_features)
        if self.second_view == "low-rank":
            self._rank(n_nodes, n_features)

    def _samples(self, n_nodes: int) -> bool:
        return self.train_batch_size is not None and self.train_batch_size < n_nodes

    def _build(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[Trainable, dict[str, torch.Tensor]]:
        literal = self.protocol == "paper-code"
        norm, unit = "rw", not literal
        if not literal and encodes_degree(features, graph):
            norm = choose_propagation(as_tensor(features, device), graph, self.n_clusters_)
            unit = norm == "rw"
        self.resolved_ = {
            "n_clusters": self.n_clusters_,
            "epochs": int(self.epochs),
            "lr": 1e-4 if self.lr is None else float(self.lr),
            "optimizer": self.optimizer or "adam",
            "rank": None if self.second_view == "attributes" else self._rank(*features.shape),
            "activation": self.activation or ("relu" if literal else "identity"),
            "norm": norm if self.norm == "auto" else self.norm,
            "row_normalise": unit if self.row_normalise is None else self.row_normalise,
            "head": self.head or ("random" if literal else "spectral"),
            "weighting": self._weighting(features),
        }
        idf = None
        if self.resolved_["weighting"] == "tf-idf":
            idf = inverse_document_frequency(features)
        if self.resolved_["weighting"] != "none":
            features = weighted_rows(features, idf)
        n, d = features.shape
        sampling: dict[str, Any] = {}
        if self._samples(n):
            sampling = {"batch_size": self.train_batch_size, "batching": self.batching}
            needed = 4 * n * d * (1 + self.n_layers)
            advice = "reduce the features first, or train on all nodes at once"
            require_memory(needed, f"the propagated attributes [{n}, {d}]", advice, device)
            if not isinstance(features, np.ndarray):
                features = features.toarray()
        x = as_tensor(_dense_unless_sparse(features), device)
        x_low_rank, basis = None, {}
        if self.second_view == "low-rank":
            x_low_rank = ops.low_rank(
                x,
                self.resolved_["rank"],
                batch_size=self.batch_size,
                recombine=self.recombine,
                add_mean=self.add_mean,
                seed=self.seed_,
            )
            self.resolved_["rank"] = x_low_rank.rank
            if x_low_rank.mean is not None and x_low_rank.mean.dim() == 1:
                # One projection for all rows: X_r = (X - mean) V^T V, V orthonormal.
                basis = {"components": unit_rows(x_low_rank.right), "mean": x_low_rank.mean}
        if idf is not None:
            basis["idf"] = torch.from_numpy(idf)
        ranks = distributed.current(len(x))
        return self._model(x, x_low_rank, graph, ranks, **sampling), basis

    def _model(
        self,
        x: torch.Tensor,
        x_low_rank: ops.LowRankMatrix | None,
        graph: sp.csr_array,
        ranks: distributed.Ranks = distributed.ONE,
        **sampling: Any,
    ) -> ECNMFModel:
        kind: Any = SampledECNMF if sampling else ECNMFModel
        return kind(
            x,
            x_low_rank,
            Graph(graph, norm=self.resolved_["norm"]).to(x.device),
            **self._keywords(ECNMFModel),
            ranks=ranks,
            **sampling,
        )

    def _predict(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.resolved_["weighting"] != "none":
            idf = self.parameters_.get("idf")
            features = weighted_rows(features, None if idf is None else idf.numpy())
        x = as_tensor(_dense_unless_sparse(features), device)
        low_rank = None
        if self.second_view == "low-rank":
            low_rank = self._project(x)
        model = self._model(x, low_rank, graph)
        self._restore(model)
        return model.assign(0)

    def _weighting(self, features: Features) -> str:
        if self.weighting == "tf-idf":
            check_counts(features)
        if self.weighting != "auto":
            return self.weighting
        if self.protocol == "paper-code":
            return "none"
        return "tf-idf" if features.min() >= 0 else "l2"

    def _project(self, x: torch.Tensor) -> ops.LowRankMatrix:
        """X_r of other nodes, by the projection of the training data."""
        if "components" not in self.parameters_:
            raise ValueError(
                f"transform and predict must have one low-rank projection for all nodes; with "
                f"recombine={self.recombine!r} and batch_size={self.batch_size} every batch of the "
                f"training data has its own. Fit with recombine='merge' or batch_size=None"
            )
        basis = {k: self.parameters_[k].to(x.device) for k in AXES}
        return ops.LowRankMatrix(
            project(x, basis)[None],
            basis["components"][None],
            x.shape[0],
            basis["mean"][None],
            add_mean=self.add_mean,
        )

    def _rank(self, n_nodes: int, n_features: int) -> int | float | str:
        rows = n_nodes if self.batch_size is None else min(self.batch_size, n_nodes)
        limit = min(rows, n_features)
        if self.rank is None:
            return min(50, limit)
        if isinstance(self.rank, Integral) and self.rank > limit:
            raise ValueError(
                f"rank must be at most {limit}, the smaller of the rows of a batch ({rows}) and "
                f"the columns of X ({n_features}), got {self.rank}; leave it None to have it chosen"
            )
        return self.rank


def _dense_unless_sparse(features: Features) -> Features:
    """CSR features that are hardly sparse, as a dense array."""
    if isinstance(features, np.ndarray):
        return features
    n, d = features.shape
    return np.asarray(features.toarray()) if features.nnz > DENSE_FROM * n * d else features
