"""How many clusters a graph holds, judged by what two disjoint halves of the data agree on.

Attributes and edges are cut at random into two halves that share neither a column nor an edge. Each
half is embedded and clustered on its own with K = 2, 3, ...; what the two clusterings have in
common is structure, not noise (stability as in Lange et al., Neural Computation 16, 2004). With too
few clusters the halves merge different groups, with too many they split at random: the agreement
peaks at the number that the data support.

Above 16384 nodes a sample of 8192 is clustered, the same in both halves; all are embedded.

Agreement is the mean of the adjusted Rand index and the adjusted mutual information, neither of
which chance raises with K. Alone, the first stops at the split of one large group from the rest
(amac: 2 of 10), the second goes on rising with the parts of groups (cora: 14 of 7). Eigengaps of
the normalised Laplacian of the graph or of the embedding's neighbours, modularity, silhouette and
Davies-Bouldin were tried as well and do worse; docs/your-data.md has the table.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from fastclust import ops
from fastclust.graph import Graph
from fastclust.models.consensus import AGREEMENT_ROWS, SAMPLED_FROM
from fastclust.models.halves import disjoint_halves
from fastclust.models.inputs import kmeans_labels, sample_rows, unit_rows
from fastclust.models.ssgc import smoothed_basis
from fastclust.validation import DataWarning

__all__ = ["estimate_n_clusters"]

_LARGEST = 20
_NODES_PER_CLUSTER = 10  # fewer say nothing about stability
_SPLITS = 6
_RESTARTS = 4
_STEPS = 4  # propagation steps of the embedding
_NEAR_BEST = 0.95  # of the best agreement: the smallest K with as much is taken
_SUPPORTED = 0.1  # agreement below which the halves have next to nothing in common


def estimate_n_clusters(
    features: Any,
    adjacency: sp.csr_array,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[int, dict[str, Any]]:
    """Estimate K without labels.

    Parameters
    ----------
    features : numpy.ndarray or scipy.sparse.csr_array
        [N, D], as from :func:`fastclust.validation.check_features`.
    adjacency : scipy.sparse.csr_array
        [N, N], as from :func:`fastclust.validation.check_adjacency`.
    seed : int
        Of the splits and of k-means.
    device : torch.device or str
        Where to compute.

    Returns
    -------
    n_clusters : int
        The smallest K from 2 to min(20, N / 10) with at least 95 % of the best agreement.
    evidence : dict
        ``rule`` in words; ``n_clusters``, the K tried; ``agreement``, that of the halves for each
        (mean of adjusted Rand index and adjusted mutual information, over six splits).

    Warns
    -----
    DataWarning
        The best agreement is below 0.1: no K gives clusters that both halves show, and the result
        is a guess. So it is with a handful of attributes, of which half say little.

    Raises
    ------
    ValueError
        Fewer than two attributes or edges: there is nothing to cut in half.
    """
    n, d = features.shape
    if d < 2 or adjacency.nnz < 4:
        raise ValueError(
            f"n_clusters='auto' must have at least 2 attributes and 2 edges to judge by, got {d} "
            f"attributes and {adjacency.nnz // 2} edges; give the number of clusters"
        )
    candidates = range(2, max(2, min(_LARGEST, n // _NODES_PER_CLUSTER)) + 1)
    rng = np.random.default_rng(seed)
    scores = np.zeros((_SPLITS, len(candidates)))
    sample = None
    if n > SAMPLED_FROM:
        sample = sample_rows(n, AGREEMENT_ROWS, seed).to(device)
    for split in range(_SPLITS):
        halves = []
        for part, half in disjoint_halves(features, adjacency, rng):
            graph = Graph(half, norm="sym").to(device)
            smooth, basis = smoothed_basis(part, graph, _STEPS, candidates[-1], seed + split)
            smooth = smooth if sample is None else smooth[sample]
            halves.append(
                [
                    kmeans_labels(
                        ops.kmeans(
                            unit_rows(smooth @ basis[:, :k]),
                            k,
                            n_init=_RESTARTS,
                            seed=seed + split,
                        )
                    )
                    for k in candidates
                ]
            )
        scores[split] = [_agreement(*pair) for pair in zip(*halves, strict=True)]
    agreement = scores.mean(axis=0)
    enough = agreement >= _NEAR_BEST * agreement.max()
    best = candidates[int(enough.argmax())]
    if agreement.max() < _SUPPORTED:
        warnings.warn(
            f"n_clusters='auto' found no number of clusters that two halves of the data agree on "
            f"(agreement {agreement.max():.2f} at best): {best} is a guess; give n_clusters",
            DataWarning,
            stacklevel=4,
        )
    return best, {
        "rule": f"smallest K with {_NEAR_BEST:.0%} of the best agreement between disjoint halves",
        "n_clusters": list(candidates),
        "agreement": [round(float(value), 4) for value in agreement],
    }


def _agreement(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> float:
    """What two clusterings have in common; nothing where one of them does not split the nodes."""
    if min(np.unique(first).size, np.unique(second).size) < 2:
        return 0.0  # both scores call two such clusterings equal
    rand = adjusted_rand_score(first, second)
    return float(rand + adjusted_mutual_info_score(first, second)) / 2
