"""Graphs with planted clusters, of any size: :func:`make_attributed_sbm`.

Real benchmark graphs with labels end at a few million nodes and cannot be varied; how cost and
quality change with size, degree or noise is measured on graphs that are made to order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.datasets import Dataset

__all__ = ["make_attributed_sbm"]

# What a stream of random numbers is for; with the seed and the block it is the stream's key.
_LABELS, _DEGREES, _INSIDE, _ACROSS, _CENTERS, _NOISE = range(6)
_BLOCK = 1 << 20  # drawn at a time
_ROUNDS = 100  # of drawing again what was drawn twice


def make_attributed_sbm(
    n_nodes: int,
    n_edges: int,
    n_features: int,
    n_clusters: int,
    *,
    homophily: float = 0.8,
    feature_noise: float = 0.5,
    degree_exponent: float | None = 2.5,
    sizes: Any = None,
    random_state: int = 0,
) -> Dataset:
    """A degree-corrected stochastic block model with Gaussian attributes and known clusters.

    Every node has a propensity theta, drawn from a power law. A share ``homophily`` of the edges
    joins nodes of one cluster, the rest nodes of two; both ends are drawn with probability
    proportional to theta (Karrer and Newman, 2011), repeated edges and self loops are drawn again.
    The attributes of a node are the centre of its cluster, a random unit vector, plus noise.

    Parameters
    ----------
    n_nodes : int
        N.
    n_edges : int
        Undirected edges, exactly; ``Dataset.n_edges`` counts both directions.
    n_features : int
        D.
    n_clusters : int
        K.
    homophily : float in [0, 1], default 0.8
        Share of edges inside clusters. With one cluster it must be 1.
    feature_noise : float, default 0.5
        Standard deviation of the noise in every attribute; centres have length 1.
    degree_exponent : float or None, default 2.5
        Exponent of the density of theta, more than 2; its largest value is capped at
        sqrt(N) times its smallest. None gives all nodes the same theta.
    sizes : array-like [K], optional
        Relative sizes of the clusters; equal by default. Every cluster gets at least one node.
    random_state : int, default 0
        Seed. The same seed gives the same graph with any number of threads.

    Returns
    -------
    Dataset
        Adjacency (CSR [N, N], symmetric, no self loops), attributes (float32 [N, D]), labels
        (int64 [N]). Nodes are in random order; some may be isolated.

    Raises
    ------
    ValueError
        A number out of its range, or more edges than the clusters have room for.

    References
    ----------
    Karrer, B. and Newman, M. E. J. (2011). Stochastic blockmodels and community structure in
    networks. Physical Review E 83, 016107.

    Examples
    --------
    >>> import fastclust as fc
    >>> ds = fc.make_attributed_sbm(1000, 5000, 32, 4, homophily=0.9)
    >>> ds.adjacency.shape, ds.n_edges, ds.features.shape
    ((1000, 1000), 10000, (1000, 32))
    """
    n, k = _count("n_nodes", n_nodes, 2), _count("n_clusters", n_clusters, 1)
    n_edges, d = _count("n_edges", n_edges, 0), _count("n_features", n_features, 1)
    seed = _count("random_state", random_state, 0)
    _in_range("homophily", homophily, 0.0, 1.0)
    homophily = float(homophily)  # a product with a short float would be rounded to one
    _in_range("feature_noise", feature_noise, 0.0, math.inf)
    if degree_exponent is not None:
        _in_range("degree_exponent", degree_exponent, 2.0, math.inf)
        if degree_exponent == 2.0:
            raise ValueError("degree_exponent must be more than 2, got 2")
    if k > n:
        raise ValueError(f"n_clusters must be at most n_nodes = {n}, got {k}")

    ends = _cluster_ends(n, k, sizes)  # [K + 1]: cluster c is the nodes ends[c] to ends[c + 1]
    by_cluster = np.repeat(np.arange(k), np.diff(ends))  # [N]
    inside = n_edges if k == 1 and homophily == 1 else round(homophily * n_edges)
    _check_room(ends, n_edges, inside)

    # While edges are drawn nodes are numbered by cluster, so that a cluster is a range of theta.
    theta = _propensities(n, degree_exponent, seed)
    total = np.concatenate(([0.0], np.cumsum(theta)))  # [N + 1]
    first, last = total[ends[:-1]], total[ends[1:]]  # [K]

    def within(rng: np.random.Generator, count: int) -> tuple[_Nodes, _Nodes]:
        u = _locate(total, rng.random(count) * total[-1])
        c = by_cluster[u]
        return u, _locate(total, first[c] + rng.random(count) * (last - first)[c])

    def between(rng: np.random.Generator, count: int) -> tuple[_Nodes, _Nodes]:
        u = _locate(total, rng.random(count) * total[-1])
        c = by_cluster[u]
        x = rng.random(count) * (total[-1] - (last - first)[c])
        v = _locate(total, np.where(x >= first[c], x + (last - first)[c], x))
        # Rounding at the seam may land in the cluster itself; drawn again as a self loop is.
        return u, np.where(by_cluster[v] == c, u, v)

    keys = np.concatenate(
        [
            _distinct_edges(within, inside, n, (seed, _INSIDE)),
            _distinct_edges(between, n_edges - inside, n, (seed, _ACROSS)),
        ]
    )
    order = _generator(seed, _LABELS).permutation(n)  # [N]: node by cluster -> its final number
    u, v = order[keys // n], order[keys % n]
    del keys
    labels = np.empty(n, dtype=np.int64)
    labels[order] = by_cluster
    ones = np.ones(2 * n_edges, dtype=np.float32)
    pairs = (np.concatenate((u, v)), np.concatenate((v, u)))
    adjacency = sp.csr_array(sp.coo_array((ones, pairs), shape=(n, n)))
    adjacency.sort_indices()
    return Dataset(
        name=f"sbm-{n}-{n_edges}-{d}-{k}",
        adjacency=adjacency,
        features=_attributes(labels, k, d, feature_noise, seed),
        labels=labels,
        n_clusters=k,
    )


_Nodes = npt.NDArray[np.int64]


def _generator(*key: int) -> np.random.Generator:
    """A stream of its own for every key, so that no draw depends on what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _cluster_ends(n: int, k: int, sizes: Any) -> npt.NDArray[np.int64]:
    share = np.ones(k) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if share.shape != (k,) or not np.all(np.isfinite(share)) or not np.all(share > 0):
        raise ValueError(f"sizes must be {k} positive numbers, got {sizes!r}")
    # One node for each, the rest by share.
    rest = np.floor(np.cumsum(share) / share.sum() * (n - k) + 0.5).astype(np.int64)
    rest[-1] = n - k
    return np.concatenate(([0], rest + np.arange(1, k + 1)))


def _check_room(ends: npt.NDArray[np.int64], n_edges: int, inside: int) -> None:
    count = np.diff(ends).astype(object)  # Python integers: no overflow
    room = int(sum(c * (c - 1) // 2 for c in count))
    n = int(ends[-1])
    across = n * (n - 1) // 2 - room
    for wanted, there, where in (
        (inside, room, "inside clusters"),
        (n_edges - inside, across, "between clusters"),
    ):
        # Drawing again what was drawn before takes forever in a graph that is almost complete.
        if wanted > 0.5 * there:
            raise ValueError(
                f"n_edges must be less: {wanted} edges {where} were asked for and there is room "
                f"for {there}, half of which can be had"
            )


def _propensities(n: int, exponent: float | None, seed: int) -> npt.NDArray[np.float64]:
    """theta [N]: inverse transform of the power law on [1, sqrt(N)]."""
    if exponent is None:
        return np.ones(n)
    power = 1.0 - exponent
    highest = float(np.sqrt(n)) ** power
    uniform = _generator(seed, _DEGREES).random(n)
    return np.asarray((1.0 - uniform * (1.0 - highest)) ** (1.0 / power))


def _locate(total: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> _Nodes:
    """The node whose stretch of the cumulated theta holds x."""
    found = np.searchsorted(total, x, side="right") - 1
    return np.minimum(found, total.size - 2)


def _merge(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What is in a or b, once and in order; both are sorted."""
    # np.unique hashes, which takes ten times as long for these keys. A stable sort finds the runs.
    both = np.sort(np.concatenate((a, b)), kind="stable")
    first = np.ones(both.size, dtype=bool)
    np.not_equal(both[1:], both[:-1], out=first[1:])
    return both[first]


def _distinct_edges(
    draw: Callable[[np.random.Generator, int], tuple[_Nodes, _Nodes]],
    wanted: int,
    n: int,
    key: tuple[int, int],
) -> npt.NDArray[np.int64]:
    """Exactly ``wanted`` distinct edges u < v as u n + v, sorted; the first drawn are kept."""
    kept = np.empty(0, dtype=np.int64)
    block = 0
    for _ in range(_ROUNDS):
        missing = wanted - kept.size
        if missing == 0:
            return kept
        parts = []
        for start in range(0, missing, _BLOCK):
            u, v = draw(_generator(*key, block), min(_BLOCK, missing - start))
            block += 1
            parts.append((np.minimum(u, v) * n + np.maximum(u, v))[u != v])
        kept = _merge(kept, np.sort(np.concatenate(parts)))
    raise ValueError(
        f"n_edges must be less: after {_ROUNDS} rounds {kept.size} of {wanted} distinct edges were "
        f"found, since few nodes take most of them; raise degree_exponent or lower n_edges"
    )


def _attributes(
    labels: npt.NDArray[np.int64], k: int, d: int, noise: float, seed: int
) -> npt.NDArray[np.float32]:
    """Centres plus noise, float32 [N, D], made in blocks of rows with a stream each."""
    centers = _generator(seed, _CENTERS).standard_normal((k, d), dtype=np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    x = np.empty((labels.size, d), dtype=np.float32)
    rows = max(1, _BLOCK // d)
    for block, start in enumerate(range(0, labels.size, rows)):
        part = x[start : start + rows]
        _generator(seed, _NOISE, block).standard_normal(dtype=np.float32, out=part)
        part *= np.float32(noise)
        part += centers[labels[start : start + rows]]
    return x


def _count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
    return int(value)


def _in_range(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, Real) or not low <= float(value) <= high or value == math.inf:
        upper = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{name} must be a number of at least {low:g}{upper}, got {value!r}")
