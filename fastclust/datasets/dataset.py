"""An attributed graph, and how its parts are made of arrays that may hold anything."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.conversion import require_valid_csr
from fastclust.validation import check_adjacency, check_features


class DatasetNotFoundError(FileNotFoundError):
    """No such data set, or its files are nowhere to be found."""


class DatasetFormatError(ValueError):
    """A data file is damaged, of an unknown format, or does not hold a valid graph."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """An attributed graph.

    Attributes
    ----------
    name : str
        Name of the data set, or stem of its file.
    adjacency : scipy.sparse.csr_array
        [N, N] float32, symmetric, without self loops.
    features : scipy.sparse.csr_array or numpy.ndarray
        [N, D] float32.
    labels : numpy.ndarray or None
        int64 [N], the class of each node, or None where classes are not known.
    n_clusters : int or None
        Number of classes, or None where they are not known.
    node_names : numpy.ndarray or None
        str [N], what the nodes are called in the user's files, see :mod:`fastclust.tables`.
    """

    name: str
    adjacency: sp.csr_array
    features: sp.csr_array | npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    n_clusters: int | None
    node_names: npt.NDArray[np.str_] | None = None

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return int(self.adjacency.shape[0])

    @property
    def n_edges(self) -> int:
        """Number of stored adjacency entries: both directions of every edge."""
        return int(self.adjacency.nnz)

    @property
    def n_features(self) -> int:
        """Number of features D."""
        return int(self.features.shape[1])

    def __repr__(self) -> str:
        classes = "no labels" if self.labels is None else f"{self.n_clusters} classes"
        return (
            f"Dataset({self.name!r}: {self.n_nodes} nodes, {self.n_edges} edges, "
            f"{self.n_features} features, {classes})"
        )


def nearest_neighbor_graph(
    features: npt.NDArray[np.float32] | sp.csr_array, n_neighbors: int = 10
) -> sp.csr_array:
    """The symmetric graph of Euclidean nearest neighbours.

    Two nodes are joined where either is among the ``n_neighbors`` nearest of the other; every edge
    has weight 1 and no node is its own neighbour.

    Parameters
    ----------
    features : numpy.ndarray or scipy.sparse.csr_array
        [N, D].
    n_neighbors : int, default 10
        Neighbours per node; at most N - 1 are used.

    Returns
    -------
    scipy.sparse.csr_array
        [N, N], float32.
    """
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    n = int(features.shape[0])
    k = min(n_neighbors, n - 1)
    if k < 1:
        return sp.csr_array((n, n), dtype=np.float32)
    # Of neighbours at one distance, as whole numbers have many, the threads decide which are kept.
    with threadpool_limits(limits=1):
        directed = sp.csr_array(NearestNeighbors(n_neighbors=k).fit(features).kneighbors_graph())
    return check_adjacency(directed.maximum(directed.T))


def array_digest(dataset: Dataset) -> str:
    """SHA-256 over the arrays of a data set, whatever file or format they came from.

    Covers the adjacency and the features in canonical CSR form and the labels, each with its name,
    dtype and length, as little-endian bytes.
    """
    digest = hashlib.sha256()
    features = sp.csr_array(dataset.features)
    labels = np.zeros(0) if dataset.labels is None else dataset.labels
    for name, array, dtype in (
        ("adj_indptr", dataset.adjacency.indptr, "<i8"),
        ("adj_indices", dataset.adjacency.indices, "<i4"),
        ("adj_data", dataset.adjacency.data, "<f4"),
        ("x_indptr", features.indptr, "<i8"),
        ("x_indices", features.indices, "<i4"),
        ("x_data", features.data, "<f4"),
        ("shape_x", np.asarray(features.shape), "<i8"),
        ("labels", labels, "<i8"),
    ):
        digest.update(f"{name} {dtype} {array.size}\n".encode())
        digest.update(np.ascontiguousarray(array, dtype=dtype).data)
    return digest.hexdigest()


def csr(data: Any, indices: Any, indptr: Any, shape: Any, source: str, what: str) -> sp.csr_array:
    """A CSR matrix from arrays that may hold anything."""
    for part, array in (("indices", indices), ("indptr", indptr), ("shape", shape)):
        if array.dtype.kind not in "iu" or array.ndim != 1:
            key = "shape_x" if (what, part) == ("x", "shape") else f"{what}_{part}"
            raise DatasetFormatError(
                f"{source}: {key} must be 1-dimensional integers, "
                f"got shape {array.shape} of {array.dtype}"
            )
    if shape.size != 2 or shape.min() < 0:
        raise DatasetFormatError(
            f"{source}: the shape of {what} must be two sizes, got {shape.tolist()}"
        )
    if data.dtype.kind not in "biuf" or data.ndim != 1:
        raise DatasetFormatError(
            f"{source}: {what}_data must be 1-dimensional numbers, "
            f"got shape {data.shape} of {data.dtype}"
        )
    n_rows, n_columns = (int(size) for size in shape)
    try:
        require_valid_csr(data, indices, indptr, n_rows, n_columns, what)
    except ValueError as error:
        raise DatasetFormatError(f"{source}: {error}") from None
    return sp.csr_array((data, indices, indptr), shape=(n_rows, n_columns))


def assemble(name: str, adjacency: Any, features: Any, labels: Any, source: str) -> Dataset:
    """Validate the three parts and put them together."""
    try:
        adjacency = check_adjacency(adjacency)
        n = int(adjacency.shape[0])
        features = check_features(features, n)
    except (TypeError, ValueError) as error:
        raise DatasetFormatError(f"{source}: {error}") from None
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (n,):
            raise DatasetFormatError(
                f"{source}: labels must hold one class per node ({n}), got shape {labels.shape}"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**63:
            raise DatasetFormatError(
                f"{source}: labels must be integers of 0 or more, got {labels.dtype}"
                + (f" from {labels.min()}" if labels.dtype.kind in "iuf" else "")
            )
        labels = labels.astype(np.int64)
    n_clusters = None if labels is None else int(np.unique(labels).size)
    return Dataset(name, adjacency, features, labels, n_clusters)
