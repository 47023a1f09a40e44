"""What clusters an embedding: k-means, or the normalised cut of its neighbours and the edges.

k-means splits a large group sooner than a small one; a normalised cut (Shi and Malik, 2000) follows
links instead, and may merge what k-means tells apart. Which of them suits a graph is
judged without labels by :func:`compare_back_ends`. docs/beyond.md has the scores of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from scipy.linalg import eigh
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from sklearn.metrics import normalized_mutual_info_score

from fastclust.datasets import nearest_neighbor_graph
from fastclust.models.halves import Features, disjoint_halves
from fastclust.models.inputs import derive_seed, unit_rows

__all__ = [
    "choose_back_end",
    "compare_back_ends",
    "cut_vectors",
    "leading_eigenvectors",
    "no_comparison",
]

BackEnd = Literal["kmeans", "cut", "auto"]
Labels = npt.NDArray[np.int64]

# Neighbours are found by comparing all rows with all, 5 s for so many on one core.
MOST_NODES = 1 << 14
NEIGHBORS = 15
MARGIN = 1.05  # by how much the cut must agree better to be preferred
RULE = (
    "the cut where its clusterings of disjoint halves agree more than 5 % better than those by "
    "k-means, with each other and with the clustering of the whole"
)
_SPLITS = 2
_DENSE_UP_TO = 512  # rows of a matrix whose eigenvectors are found without ARPACK
_TOLERANCE = 1e-4
_DIGITS = 6  # of eigenvalues in [-1, 1], before they are compared


def cut_vectors(
    z: torch.Tensor, adjacency: sp.csr_array, n_clusters: int, *, seed: int = 0
) -> torch.Tensor:
    """Rows to cluster for a normalised cut of the embedding's neighbours and the edges.

    W = G / sum(G) + A / sum(A), where G joins each node with its 15 nearest in the embedding;
    the rows are those of the K leading eigenvectors of D^-1/2 W D^-1/2, at unit length
    (Ng, Jordan and Weiss, 2001).

    Parameters
    ----------
    z : Tensor [N, d]
        The embedding.
    adjacency : scipy.sparse.csr_array [N, N]
        A, as from :func:`fastclust.validation.check_adjacency`; it may hold no edge.
    n_clusters : int
        K.
    seed : int
        Of the vector that the iterations start from.

    Returns
    -------
    Tensor [N, K]
        float32, where z is.
    """
    near = nearest_neighbor_graph(z.cpu().numpy(), NEIGHBORS).astype(np.float64)
    w = near / near.sum()
    if adjacency.nnz:
        w = w + adjacency / adjacency.sum(dtype=np.float64)
    # Not zero: every node has a neighbour.
    scale = sp.diags_array(np.asarray(w.sum(axis=1)).reshape(-1) ** -0.5)
    vectors = leading_eigenvectors(sp.csr_array(scale @ w @ scale), n_clusters, seed)
    return unit_rows(torch.from_numpy(vectors.astype(np.float32)).to(z.device))


def leading_eigenvectors(s: sp.csr_array, k: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Eigenvectors [N, k] of the k largest eigenvalues of a symmetric S [N, N], descending.

    Each connected component has its own, zero elsewhere: Lanczos iterations on all of S would find
    only some copies of a multiple eigenvalue, such as the 1 of five components. Of equal
    eigenvalues those of larger components come first.
    """
    n_components, member = connected_components(s, directed=False)
    pairs: list[tuple[float, npt.NDArray[np.intp], npt.NDArray[np.float64]]] = []
    for component in np.argsort(-np.bincount(member), kind="stable"):
        nodes = np.flatnonzero(member == component)
        part = s if n_components == 1 else s[nodes][:, nodes]
        values, vectors = _eigenpairs(part, min(k, len(nodes)), seed)
        pairs += [
            (value, nodes, v) for value, v in zip(values.round(_DIGITS), vectors.T, strict=True)
        ]
    pairs.sort(key=lambda pair: -pair[0])
    result = np.zeros((s.shape[0], k))
    for column, (_, nodes, vector) in enumerate(pairs[:k]):
        result[nodes, column] = vector
    return result


def _eigenpairs(
    s: sp.csr_array, k: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The k largest eigenvalues [k], descending, and their eigenvectors [N, k]."""
    n = s.shape[0]
    if n <= max(_DENSE_UP_TO, 4 * k):  # ARPACK wants k < N, and gains nothing where it is near
        values, vectors = eigh(s.toarray(), subset_by_index=(n - k, n - 1))
    else:
        start = np.random.default_rng(seed).normal(size=n)
        values, vectors = eigsh(s, k=k, which="LA", v0=start, tol=_TOLERANCE)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]


def compare_back_ends(
    features: Features,
    adjacency: sp.csr_array,
    whole: Mapping[str, Labels],
    cluster: Callable[[Features, sp.csr_array], Mapping[str, Labels]],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether the cut suits a graph better than k-means, by what halves of the data agree on.

    Halves share no attribute and no edge, so what their clusterings have in common is structure. A
    back end that merges everything agrees with itself as well: so halves must also agree with the
    whole, of which they see different parts.

    Parameters
    ----------
    features, adjacency
        As of :func:`fastclust.models.ssgc.ssgc_embedding`.
    whole : mapping
        Clusters of all the data, int64 [N], by ``"kmeans"`` and by ``"cut"``.
    cluster : callable
        Gives the same of a half, from its attributes and adjacency.
    seed : int
        Of the two random splits.

    Returns
    -------
    dict
        ``rule`` in words, ``back_end``, ``between_halves`` and ``with_whole``: the mean NMI of the
        clusterings by each back end. Where there is nothing to split: ``rule``, ``back_end`` and
        ``reason``.
    """
    if features.shape[1] < 2 or adjacency.nnz < 4:
        return no_comparison("fewer than two attributes or edges: nothing to cut in half")
    between, with_whole = dict.fromkeys(whole, 0.0), dict.fromkeys(whole, 0.0)
    for split in range(_SPLITS):
        rng = np.random.default_rng(derive_seed(seed, split))
        first, second = (
            cluster(part, half) for part, half in disjoint_halves(features, adjacency, rng)
        )
        for name, labels in whole.items():
            between[name] += _nmi(first[name], second[name]) / _SPLITS
            for half_labels in (first[name], second[name]):
                with_whole[name] += _nmi(half_labels, labels) / (2 * _SPLITS)
    return {
        "rule": RULE,
        "back_end": choose_back_end(between, with_whole),
        "between_halves": {name: round(value, 4) for name, value in between.items()},
        "with_whole": {name: round(value, 4) for name, value in with_whole.items()},
    }


def no_comparison(reason: str) -> dict[str, Any]:
    """The evidence where there is none, and so k-means."""
    return {"rule": RULE, "back_end": "kmeans", "reason": reason}


def choose_back_end(
    between_halves: Mapping[str, float], with_whole: Mapping[str, float]
) -> Literal["kmeans", "cut"]:
    """The cut where both of its agreements are clearly better, else k-means."""
    clear = all(
        agreement["cut"] > MARGIN * agreement["kmeans"]
        for agreement in (between_halves, with_whole)
    )
    return "cut" if clear else "kmeans"


def _nmi(first: Labels, second: Labels) -> float:
    return float(normalized_mutual_info_score(first, second))
