"""Two halves of a graph that share neither a column nor an edge: what both show is structure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp

__all__ = ["Features", "disjoint_halves"]

Features: TypeAlias = Any  # numpy.ndarray or scipy.sparse.csr_array, float32 [N, D]

_EDGES = 1 << 23  # looked at at a time


def disjoint_halves(
    features: Features,
    adjacency: sp.csr_array,
    rng: np.random.Generator,
) -> Iterator[tuple[Features, sp.csr_array]]:
    """Two random halves of columns [N, D / 2] and edges [N, N] that share none of either.

    Of more than 2^23 stored edges each goes to a half by a hash of its ends, so that the halves are
    equal but for chance and nothing is sorted or drawn.
    """
    n, d = features.shape
    if adjacency.nnz > _EDGES:
        order, salt = rng.permutation(d), int(rng.integers(1 << 62))
        for half in range(2):
            chosen = np.sort(order[half::2])
            part = (
                features.tocsc()[:, chosen].tocsr()
                if sp.issparse(features)
                else features[:, chosen]
            )
            yield part, _hashed_half(adjacency, half, salt)
        return
    upper = sp.triu(adjacency, 1).tocoo()
    columns = features.tocsc() if sp.issparse(features) else features
    column_order, edge_order = rng.permutation(d), rng.permutation(upper.nnz)
    for half in range(2):
        part = columns[:, np.sort(column_order[half::2])]
        edges = edge_order[half::2]
        one_way = sp.csr_array(
            (upper.data[edges], (upper.row[edges], upper.col[edges])), shape=(n, n)
        )
        yield (part.tocsr() if sp.issparse(part) else part), (one_way + one_way.T).tocsr()


def _hashed_half(adjacency: sp.csr_array, half: int, salt: int) -> sp.csr_array:
    """The edges of one half, both directions of an edge alike."""
    n = adjacency.shape[0]
    degree = np.zeros(n, np.int64)
    kept = np.empty(adjacency.nnz, dtype=bool)
    cuts = np.searchsorted(adjacency.indptr, np.arange(0, adjacency.nnz, _EDGES), side="right") - 1
    for first, last in itertools.pairwise([*np.unique(cuts), n]):
        begin, end = int(adjacency.indptr[first]), int(adjacency.indptr[last])
        row = np.repeat(np.arange(first, last), np.diff(adjacency.indptr[first : last + 1]))
        column = adjacency.indices[begin:end].astype(np.int64)
        low, high = np.minimum(row, column), np.maximum(row, column)
        mixed = (low.astype(np.uint64) << np.uint64(32)) + high.astype(np.uint64) + np.uint64(salt)
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(multiplier)
        kept[begin:end] = (mixed >> np.uint64(63)) == half
        degree[first:last] = np.bincount(row[kept[begin:end]] - first, minlength=last - first)
    indptr = np.concatenate(([0], np.cumsum(degree)))
    return sp.csr_array(
        (adjacency.data[kept], adjacency.indices[kept], indptr), shape=adjacency.shape
    )
