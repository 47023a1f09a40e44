"""Scores of a clustering: against known classes, and internal ones that need no class.

Scores against classes: :func:`clustering_scores` (ACC, NMI, ARI, macro F1),
:func:`adjusted_mutual_info`, :func:`purity`. Cluster and class names are free; the two may differ
in number.

Internal scores of an embedding: :func:`inertia`, :func:`calinski_harabasz`, :func:`silhouette`,
:func:`davies_bouldin`; of a graph: :func:`modularity`, :func:`conductance`. A clustering for which
such a score is not defined (a single cluster, every node its own) gets the worst value, so that a
collapsed clustering is never preferred; so does an embedding whose rows are all the same.

Where a clustering is good and where it is not: :func:`per_cluster`, :func:`node_margin`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as _sklearn
from sklearn.metrics.pairwise import euclidean_distances

from fastclust.validation import check_adjacency, check_features, check_labels

__all__ = [
    "adjusted_mutual_info",
    "best_map",
    "calinski_harabasz",
    "clustering_scores",
    "conductance",
    "davies_bouldin",
    "inertia",
    "modularity",
    "node_margin",
    "per_cluster",
    "purity",
    "silhouette",
]

_SILHOUETTE_SAMPLE = 5000
_ROWS_AT_ONCE = 4096


def clustering_scores(y_true: Any, y_pred: Any) -> dict[str, float]:
    """Score a clustering against known classes.

    ACC is the share of nodes in the right class under the best one-to-one map of clusters to
    classes (Hungarian method, rectangular where their numbers differ). F1 is the mean over the
    classes of the F1 of each class and its cluster under that map; a class without a cluster
    scores 0, and the nodes of a cluster without a class count as missed in their own classes. With
    as many clusters as classes that is the macro F1 of the relabelled prediction. Of several maps
    with the same ACC the one with the greatest F1 is used, so that no score depends on how
    clusters are numbered. NMI is normalised by the arithmetic mean of the entropies.

    Parameters
    ----------
    y_true, y_pred : array of shape [N]
        Class and cluster of each node: integers or strings, not necessarily contiguous.

    Returns
    -------
    dict
        ``acc``, ``nmi``, ``ari``, ``f1``. All lie in [0, 1], except that ARI falls
        below 0 for a clustering worse than chance.

    Raises
    ------
    ValueError
        Different lengths, not one-dimensional, empty, or NaN.

    Examples
    --------
    >>> clustering_scores([0, 0, 1, 1], [7, 7, 3, 3])
    {'acc': 1.0, 'nmi': 1.0, 'ari': 1.0, 'f1': 1.0}
    """
    true, pred, counts = _contingency(y_true, y_pred)
    rows, cols, f1 = _best_match(counts)
    return {
        "acc": float(counts[rows, cols].sum() / true.size),
        "nmi": float(_sklearn.normalized_mutual_info_score(true, pred)),
        "ari": float(_sklearn.adjusted_rand_score(true, pred)),
        "f1": float(f1[rows, cols].sum() / counts.shape[0]),
    }


def best_map(y_true: Any, y_pred: Any) -> npt.NDArray[np.int64]:
    """Number clusters like the classes they match best.

    The map is that of :func:`clustering_scores`.

    Parameters
    ----------
    y_true, y_pred : array of shape [N]
        Class and cluster of each node.

    Returns
    -------
    numpy.ndarray
        int64 [N]: for each node the class of its cluster, as a position among the sorted classes
        (the class itself where classes are 0..C-1); -1 for clusters without a class.

    Examples
    --------
    >>> best_map([0, 0, 1, 1, 1], [5, 5, 2, 2, 9])
    array([ 0,  0,  1,  1, -1])
    """
    _, pred, counts = _contingency(y_true, y_pred)
    rows, cols, _ = _best_match(counts)
    class_of_cluster = np.full(counts.shape[1], -1, np.int64)
    class_of_cluster[cols] = rows
    return class_of_cluster[pred]


def adjusted_mutual_info(y_true: Any, y_pred: Any) -> float:
    """Mutual information corrected for chance (Vinh et al., 2010); 1 for equal partitions."""
    true, pred, _ = _contingency(y_true, y_pred)
    return float(_sklearn.adjusted_mutual_info_score(true, pred))


def purity(y_true: Any, y_pred: Any) -> float:
    """Share of nodes whose class is the most frequent one of their cluster, in (0, 1]."""
    true, _, counts = _contingency(y_true, y_pred)
    return float(counts.max(axis=0).sum() / true.size)


def inertia(x: Any, labels: Any, *, relative: bool = False) -> float:
    """Sum of squared distances to the mean of the own cluster.

    Parameters
    ----------
    x : array or tensor of shape [N, d]
        Embedding.
    labels : array of shape [N]
        Cluster of each node.
    relative : bool, default False
        Divide by the sum of squared distances to the overall mean, which makes embeddings of
        different scale comparable: 0 is best and 1 is worst.
    """
    x, labels = _embedding(x, labels)
    within = _scatter(x, labels)
    if not relative:
        return within
    total = _scatter(x, np.zeros_like(labels))
    return within / total if total > 0 else 1.0


def calinski_harabasz(x: Any, labels: Any) -> float:
    """Between-cluster over within-cluster variance (Calinski & Harabasz, 1974); more is better.

    Parameters as for :func:`inertia`. 0 where it is not defined.
    """
    x, labels = _embedding(x, labels)
    x = _unit_scale(x)
    return float(_sklearn.calinski_harabasz_score(x, labels)) if _scorable(x, labels) else 0.0


def silhouette(x: Any, labels: Any) -> float:
    """Mean silhouette (Rousseeuw, 1987), in [-1, 1]; more is better.

    Parameters as for :func:`inertia`. Above 5000 nodes it is taken over 5000 of them, always the
    same ones for the same N. -1 where it is not defined.
    """
    x, labels = _embedding(x, labels)
    if labels.size > _SILHOUETTE_SAMPLE:
        rng = np.random.default_rng(0)
        sample = np.sort(rng.choice(labels.size, _SILHOUETTE_SAMPLE, replace=False))
        x, labels = x[sample], check_labels(labels[sample])
    x = _unit_scale(x)
    return float(_sklearn.silhouette_score(x, labels)) if _scorable(x, labels) else -1.0


def davies_bouldin(x: Any, labels: Any) -> float:
    """Mean similarity of each cluster to its nearest (Davies & Bouldin, 1979); less is better.

    Parameters as for :func:`inertia`. Infinite where it is not defined.
    """
    x, labels = _embedding(x, labels)
    x = _unit_scale(x)
    return float(_sklearn.davies_bouldin_score(x, labels)) if _scorable(x, labels) else float("inf")


def modularity(adjacency: Any, labels: Any) -> float:
    """Modularity (Newman & Girvan, 2004): edges inside clusters beyond chance; more is better.

    Parameters
    ----------
    adjacency : scipy sparse, array, tensor, edge index or networkx graph
        [N, N], as for :func:`fastclust.validation.check_adjacency`.
    labels : array of shape [N]
        Cluster of each node.

    Returns
    -------
    float
        ``sum_k (inside_k / 2m - (volume_k / 2m)^2)``, in [-1/2, 1); 0 for a graph without edges.
    """
    return float(per_cluster(adjacency, labels)["modularity"].sum())


def conductance(adjacency: Any, labels: Any) -> float:
    """Mean over clusters of the weight leaving a cluster over the smaller side's volume.

    Parameters as for :func:`modularity`. In [0, 1], less is better; a cluster for which one side
    has no edges counts 1.
    """
    return float(per_cluster(adjacency, labels)["conductance"].mean())


def per_cluster(adjacency: Any, labels: Any) -> dict[str, npt.NDArray[Any]]:
    """Size, modularity and conductance of every cluster.

    Parameters as for :func:`modularity`.

    Returns
    -------
    dict
        ``cluster`` (the names, sorted), ``nodes`` int64, ``modularity`` (they add up to
        :func:`modularity`) and ``conductance`` (their mean is :func:`conductance`), float64; each
        [K'] for the K' clusters that have nodes.

    Examples
    --------
    >>> import numpy as np
    >>> two_pairs = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    >>> per_cluster(two_pairs, [7, 7, 3, 3])["modularity"]
    array([0.25, 0.25])
    """
    inside, volume = _volumes(adjacency, labels)
    total = volume.sum()
    share = volume / total if total > 0 else volume
    smaller = np.minimum(volume, total - volume)
    cut = volume - inside
    names, nodes = np.unique(np.asarray(labels), return_counts=True)
    return {
        "cluster": names,
        "nodes": nodes,
        "modularity": (inside / total if total > 0 else inside) - share**2,
        "conductance": np.where(smaller > 0, cut / np.where(smaller > 0, smaller, 1.0), 1.0),
    }


def node_margin(x: Any, labels: Any) -> npt.NDArray[np.float64]:
    """How clearly each node lies in its own cluster: its silhouette with respect to the centres.

    With a the distance of a node to the mean of its cluster and b that to the nearest other mean,
    ``(b - a) / max(a, b)`` (the simplified silhouette of Hruschka et al., 2004): near 1 for a node
    in the middle of its cluster, 0 between two clusters, below 0 nearer to another one. It costs
    N x K distances where the silhouette costs N x N.

    Parameters as for :func:`inertia`.

    Returns
    -------
    numpy.ndarray
        float64 [N] in [-1, 1]; 0 everywhere for a single cluster.

    Examples
    --------
    >>> node_margin([[0.0], [2.0], [9.0], [11.0]], [0, 0, 1, 1]).round(2)
    array([0.9 , 0.88, 0.88, 0.9 ])
    """
    x, labels = _embedding(x, labels)
    means = _means(x, labels)  # [K', d]
    if len(means) < 2:
        return np.zeros(labels.size)
    margin = np.empty(labels.size)
    for start in range(0, labels.size, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        distance = euclidean_distances(x[rows].astype(np.float64), means)  # [rows, K']
        own = labels[rows, None]
        a = np.take_along_axis(distance, own, axis=1)[:, 0]
        np.put_along_axis(distance, own, np.inf, axis=1)
        b = distance.min(axis=1)
        larger = np.maximum(a, b)
        margin[rows] = np.divide(b - a, larger, out=np.zeros_like(a), where=larger > 0)
    return margin


def _contingency(
    y_true: Any, y_pred: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Both labellings numbered from 0, and the counts [classes, clusters] of their pairs."""
    true = check_labels(y_true, name="y_true")
    pred = check_labels(y_pred, true.size, name="y_pred")
    n_classes, n_clusters = int(true.max()) + 1, int(pred.max()) + 1
    counts = np.bincount(true * n_clusters + pred, minlength=n_classes * n_clusters)
    return true, pred, counts.reshape(n_classes, n_clusters).astype(np.int64)


def _best_match(
    counts: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Matched classes and clusters, and the F1 of every class with every cluster.

    F1 adds up over matched pairs as the counts do and stays below 1 for each, so that a small
    share of it breaks ties between maps of equal ACC and nothing else.
    """
    f1 = 2.0 * counts / (counts.sum(axis=1, keepdims=True) + counts.sum(axis=0, keepdims=True))
    rows, cols = linear_sum_assignment(counts + f1 * (0.5 / min(counts.shape)), maximize=True)
    return rows, cols, f1


def _embedding(x: Any, labels: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    features = check_features(x, name="x")
    dense = sp.csr_array(features).toarray() if sp.issparse(features) else features
    return dense, check_labels(labels, dense.shape[0])


def _scorable(x: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> bool:
    return 1 <= int(labels.max()) < labels.size - 1 and bool((x != x[0]).any())


def _unit_scale(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x times the power of two that brings its spread near 1, or x where that is near it or above.

    scikit-learn takes distances below 1e-8 for none, and squares of small ones vanish in float32;
    the scores do not depend on the scale.
    """
    _, exponent = np.frexp(np.ptp(x, axis=0).max())
    return x if 0 <= exponent <= 16 else np.ldexp(x, -exponent)


def _scatter(x: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Sum of squared distances to the cluster means, in float64, a block of rows at a time."""
    means = _means(x, labels)
    total = 0.0
    for start in range(0, labels.size, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        gap = x[rows] - means[labels[rows]]
        total += float(np.einsum("ij,ij->", gap, gap))
    return total


def _means(x: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean of every cluster, [K', d], in float64, a block of rows at a time."""
    counts = np.bincount(labels)
    one_hot = sp.csr_array(
        (np.ones(labels.size), labels, np.arange(labels.size + 1)),
        shape=(labels.size, counts.size),
    )
    means = np.zeros((counts.size, x.shape[1]))
    for start in range(0, labels.size, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        means += one_hot[rows].T @ x[rows].astype(np.float64)
    return means / counts[:, None]


def _volumes(
    adjacency: Any, labels: Any
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per cluster: the weight of entries inside it, and the sum of its nodes' degrees."""
    matrix = check_adjacency(adjacency)
    labels = check_labels(labels, matrix.shape[0])
    n_clusters = int(labels.max()) + 1
    coo = matrix.tocoo()
    rows, cols, weight = labels[coo.row], labels[coo.col], coo.data.astype(np.float64)
    inside, volume = np.zeros((2, n_clusters))
    np.add.at(volume, rows, weight)
    np.add.at(inside, rows, np.where(rows == cols, weight, 0.0))
    return inside, volume
