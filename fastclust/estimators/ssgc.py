"""SSGC as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from fastclust import ops
from fastclust.estimators.base import Count, Features, GraphClusterer, Steps
from fastclust.interop import trains
from fastclust.models.back_ends import (
    MOST_NODES,
    BackEnd,
    compare_back_ends,
    cut_vectors,
    no_comparison,
)
from fastclust.models.consensus import cluster_means, consensus_kmeans
from fastclust.models.inputs import kmeans_labels, nearest_center, sampled_kmeans
from fastclust.models.ssgc import (
    LEADING_PAIRS,
    Recipe,
    Weighting,
    ssgc_embedding,
    ssgc_projection,
)

# Starts of k-means on the rows of a cut: they lie apart, and more find the same.
CUT_STARTS = 20
# A coordinate that no row of an embedding comes near: rows have unit length.
FAR = 1e3


@dataclass(eq=False, repr=False, kw_only=True)
class SSGC(GraphClusterer):
    """Simple spectral graph clustering: smooth the attributes, truncate, k-means. No training.

    The attributes are averaged over the first T powers of the symmetric propagation
    (Zhu and Koniusz, ICLR 2021) and cut to leading singular vectors; unit rows of these are
    clustered. By default several views are joined and T is chosen without labels, see
    :func:`fastclust.models.ssgc.ssgc_embedding`, which ``fit`` calls.

    Parameters
    ----------
    n_clusters : int or "auto", default 8
        K; ``"auto"`` estimates it without labels, see
        :func:`fastclust.models.n_clusters.estimate_n_clusters`.
    recipe : {"multiview", "plain"}, default "multiview"
        Eight views of the attributes joined, or one.
    n_steps : int, optional
        T; by default 8, or fewer where ``"multiview"`` finds that they agree better.
    n_components : int, optional
        Singular vectors kept; default 2 K (``"multiview"``) or 20, or less where the data
        allow less.
    weighting : {"auto", "l2", "tf-idf"}, default "auto"
        How attribute rows are weighted.
    n_init : int, default 100
        k-means starts. Their better half votes, see
        :func:`fastclust.models.consensus.consensus_kmeans`; with ``consensus=False`` the best is
        taken.
    consensus : bool, default True
        Whether starts vote, a third of them each on the embeddings with T / 2, T and 2 T steps
        (only T above 16384 nodes): where k-means has several minima of nearly one inertia, the
        best of few starts is chance (cora, amac).
    back_end : {"kmeans", "cut", "auto"}, default "kmeans"
        What clusters the embedding. ``"cut"``: the normalised cut of each node's 15 nearest in the
        embedding plus the edges, see :func:`fastclust.models.back_ends.cut_vectors`; at most 16384
        nodes. ``"auto"``: the cut where clusterings by it of disjoint halves of attributes
        and edges agree clearly better, see
        :func:`fastclust.models.back_ends.compare_back_ends`; it takes three to five
        times as long. k-means all the same of more than 16384 nodes (``"auto"``), and where
        attributes only encode degrees.
    random_state, device, n_neighbors
        As for :class:`HSAN`.

    Attributes
    ----------
    labels_ : ndarray int64 [N]
    embedding_ : ndarray float32 [N, n_components]
        Or [N, 3], ranks of degree, PageRank and eigenvector centrality, where the attributes
        encode nothing but degrees.
    recipe_ : str
        ``"multiview"``, ``"plain"`` or ``"degree"``.
    n_steps_ : int
        The T used.
    n_iter_ : int
        Always 0.
    back_end_evidence_ : dict or None
        What ``back_end="auto"`` judged by; None unless it was asked for. ``resolved_["back_end"]``
        is the one used.
    n_clusters_, n_clusters_evidence_, parameters_, resolved_
        As for :class:`HSAN`.

    Notes
    -----
    ``predict`` takes the nearest mean of the embedding's rows by cluster. A cut need not put
    every node with its nearest mean: after one, ``predict`` of the training nodes may differ from
    ``labels_``.
    """

    recipe: Recipe = "multiview"
    n_steps: Steps | None = None
    n_components: Count | None = None
    weighting: Weighting = "auto"
    n_init: Count = 100
    consensus: bool = True
    back_end: BackEnd = "kmeans"

    _name = "ssgc"

    def _memory_needed(self, n_nodes: int, n_features: int) -> int:
        # the attributes' sketch and its orthonormal basis
        return 2 * 4 * n_nodes * min(LEADING_PAIRS, n_nodes, n_features)

    def _check_settings(self, n_nodes: int, n_features: int) -> None:
        limit = min(n_nodes, n_features)
        if self.n_components is not None and self.n_components > limit:
            raise ValueError(
                f"n_components must be at most min(N, D) = {limit}, got {self.n_components}"
            )
        if self.back_end == "cut" and n_nodes > MOST_NODES:
            raise ValueError(
                f"back_end='cut' must be given at most {MOST_NODES} nodes, got {n_nodes}; use "
                f"back_end='kmeans', or take a subgraph"
            )

    @trains
    def fit(self, X: Any, y: Any = None, *, adjacency: Any = None) -> SSGC:
        """Cluster the nodes of an attributed graph; arguments as for :meth:`HSAN.fit`."""
        features, graph, device = self._prepare(X, adjacency)
        z, info = self._embed(features, graph, self.n_steps, device)
        self.recipe_, self.n_steps_ = info["recipe"], info["n_steps"]
        result, back_end = self._result(features, graph, z, info["scales"], device)
        self.labels_ = kmeans_labels(result)
        self.embedding_ = z.cpu().numpy()
        self.resolved_ = {
            "n_clusters": self.n_clusters_,
            "recipe": self.recipe_,
            "n_steps": self.n_steps_,
            "back_end": back_end,
        }
        self.history_, self.n_iter_ = [], 0
        self.parameters_ = {"centers": result.centers.cpu(), **info["projection"]}
        self._tell_of_one_cluster()
        return self

    def _embed(
        self, features: Features, graph: sp.csr_array, n_steps: int | None, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return ssgc_embedding(
            features,
            graph,
            self.n_clusters_,
            recipe=self.recipe,
            n_steps=n_steps,
            n_components=self.n_components,
            weighting=self.weighting,
            seed=self.seed_,
            device=device,
            scales=self.consensus,
        )

    def _result(
        self,
        features: Features,
        graph: sp.csr_array,
        z: torch.Tensor,
        scales: list[torch.Tensor],
        device: torch.device,
    ) -> tuple[ops.KMeansResult, str]:
        """Clusters of the embedding, and the back end that gave them; sets its evidence."""
        self.back_end_evidence_ = None
        back_end: str = self.back_end
        if back_end == "auto" and self.recipe_ != "degree" and len(z) <= MOST_NODES:
            each = self._by_each_back_end(graph, z, scales)

            def cluster(part: Features, half: sp.csr_array) -> dict[str, npt.NDArray[np.int64]]:
                z, info = self._embed(part, half, self.n_steps_, device)
                results = self._by_each_back_end(half, z, info["scales"])
                return {name: kmeans_labels(result) for name, result in results.items()}

            self.back_end_evidence_ = compare_back_ends(
                features,
                graph,
                {name: kmeans_labels(result) for name, result in each.items()},
                cluster,
                seed=self.seed_,
            )
            back_end = self.back_end_evidence_["back_end"]
            return each[back_end], back_end
        if back_end == "auto":
            self.back_end_evidence_ = no_comparison(
                "attributes only encode degrees"
                if self.recipe_ == "degree"
                else f"more than {MOST_NODES} nodes"
            )
        if back_end == "cut" and self.recipe_ != "degree":
            return self._by_cut(graph, z), "cut"
        return self._by_kmeans(z, self.n_init, scales), "kmeans"

    def _by_each_back_end(
        self, graph: sp.csr_array, z: torch.Tensor, scales: list[torch.Tensor]
    ) -> dict[str, ops.KMeansResult]:
        return {"kmeans": self._by_kmeans(z, self.n_init, scales), "cut": self._by_cut(graph, z)}

    def _by_cut(self, graph: sp.csr_array, z: torch.Tensor) -> ops.KMeansResult:
        """Clusters of the cut; centres are the means of the embedding's rows."""
        rows = cut_vectors(z, graph, self.n_clusters_, seed=self.seed_)
        result = self._by_kmeans(rows, min(self.n_init, CUT_STARTS))
        means = cluster_means(z, result.labels, self.n_clusters_)
        means[torch.bincount(result.labels, minlength=len(means)) == 0] = FAR  # of none the nearest
        return replace(result, centers=means)

    def _by_kmeans(
        self, z: torch.Tensor, n_init: int, others: Sequence[torch.Tensor] = ()
    ) -> ops.KMeansResult:
        if self.consensus:
            return consensus_kmeans(
                z, self.n_clusters_, n_init=n_init, seed=self.seed_, others=others
            )
        return sampled_kmeans(z, self.n_clusters_, n_init=n_init, seed=self.seed_)

    def _predict(
        self, features: Features, graph: sp.csr_array, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.recipe_ == "degree":
            raise ValueError(
                "transform and predict must have attributes to project: those of the training data "
                "only encode degrees, whose ranks do not carry over to other nodes. Fit with "
                "recipe='plain' or a weighting to use the attributes all the same"
            )
        z = ssgc_projection(features, graph, self.parameters_, n_steps=self.n_steps_, device=device)
        return nearest_center(z, self.parameters_["centers"].to(device)), z
