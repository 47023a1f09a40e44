"""Benchmark graphs by name, and graphs from ``.npz`` files.

Two file formats are read, both with ``allow_pickle=False``:

- the *uniform* format: ``adj_indptr``, ``adj_indices``, ``x_indptr``, ``x_indices``, ``x_data``,
  ``shape_x``, optionally ``adj_data`` and ``labels``;
- the *gnn-benchmark* format (Shchur et al., 2018): ``adj_*`` and ``attr_*`` CSR matrices
  (``data``, ``indices``, ``indptr``, ``shape``) and ``labels``; its edges are directed and are
  made undirected here, self loops are dropped.

:func:`load_dataset` knows seven graphs and fetches them from where their authors published them.
What it assembles is checked against the SHA-256 of the arrays in use in the literature.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.validation import check_adjacency, check_features

__all__ = [
    "Dataset",
    "DatasetFormatError",
    "DatasetNotFoundError",
    "load_npz",
]


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
    """

    name: str
    adjacency: sp.csr_array
    features: sp.csr_array | npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    n_clusters: int | None

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


def load_npz(path: str | os.PathLike[str]) -> Dataset:
    """Read a graph from a ``.npz`` file in the uniform or the gnn-benchmark format.

    Nothing is ever unpickled.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    Dataset
        ``labels`` and ``n_clusters`` are None where the file has no labels.

    Raises
    ------
    DatasetNotFoundError
        There is no such file.
    DatasetFormatError
        The file is truncated, corrupt, pickled, of another format, or its graph is not valid.

    Examples
    --------
    >>> load_npz("cora.npz")  # doctest: +SKIP
    Dataset('cora': 2708 nodes, 10556 edges, 1433 features, 7 classes)
    """
    path = Path(path)
    arrays = _read_arrays(path)
    if "shape_x" in arrays or "x_indptr" in arrays:
        return _from_uniform(arrays, path.stem, str(path))
    if "adj_shape" in arrays or "attr_indptr" in arrays:
        return _from_gnn_benchmark(arrays, path.stem, str(path))
    raise DatasetFormatError(
        f"{path} must hold adj_indptr, adj_indices, x_indptr, x_indices, x_data and shape_x "
        f"(uniform format) or adj_* and attr_* (gnn-benchmark format), got the keys "
        f"{', '.join(sorted(arrays)) or 'none'}"
    )


# --- npz files -----------------------------------------------------------------------------------

_UNIFORM_KEYS = ("adj_indptr", "adj_indices", "x_indptr", "x_indices", "x_data", "shape_x")
_GNN_BENCHMARK_KEYS = tuple(
    f"{matrix}_{part}"
    for matrix in ("adj", "attr")
    for part in ("data", "indices", "indptr", "shape")
)
_KNOWN_KEYS = frozenset((*_UNIFORM_KEYS, *_GNN_BENCHMARK_KEYS, "labels"))


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz file that either format knows; other members are not touched."""
    if not path.exists():
        raise DatasetNotFoundError(f"{path} does not exist; give the path of a .npz file")
    if not path.is_file():
        raise DatasetFormatError(f"{path} must be a .npz file, got a directory or special file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DatasetFormatError(f"{path} must be a .npz archive, got a single array")
            return {key: archive[key] for key in archive.files if key in _KNOWN_KEYS}
    except DatasetFormatError:
        raise
    except PermissionError:
        raise DatasetFormatError(f"{path} cannot be read: permission denied") from None
    except (OSError, EOFError, ValueError, KeyError, MemoryError, SyntaxError) as error:
        raise DatasetFormatError(_damage(path, error)) from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DatasetFormatError(_damage(path, error)) from None


def _damage(path: Path, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "pickle" in text.lower():
        return (
            f"{path} holds pickled objects (or is no .npz file at all), which are never loaded; "
            f"save plain arrays with numpy.savez"
        )
    return f"{path} is truncated, corrupt or no .npz file ({text[:120] or type(error).__name__})"


def _require_keys(arrays: Mapping[str, Any], keys: tuple[str, ...], source: str) -> None:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise DatasetFormatError(f"{source} lacks the arrays {', '.join(missing)}")


def _from_uniform(arrays: Mapping[str, Any], name: str, source: str) -> Dataset:
    _require_keys(arrays, _UNIFORM_KEYS, source)
    n = int(arrays["adj_indptr"].size) - 1
    data = arrays.get("adj_data")
    if data is None:
        data = np.ones(arrays["adj_indices"].size, np.float32)
    adjacency = _csr(data, arrays["adj_indices"], arrays["adj_indptr"], (n, n), source, "adj")
    features = _csr(
        arrays["x_data"], arrays["x_indices"], arrays["x_indptr"], arrays["shape_x"], source, "x"
    )
    return _assemble(name, adjacency, features, arrays.get("labels"), source)


def _from_gnn_benchmark(arrays: Mapping[str, Any], name: str, source: str) -> Dataset:
    _require_keys(arrays, _GNN_BENCHMARK_KEYS, source)
    adjacency, features = (
        _csr(
            arrays[f"{matrix}_data"],
            arrays[f"{matrix}_indices"],
            arrays[f"{matrix}_indptr"],
            arrays[f"{matrix}_shape"],
            source,
            matrix,
        )
        for matrix in ("adj", "attr")
    )
    if adjacency.shape[0] == adjacency.shape[1]:
        # Directed by definition of the format, so made undirected without a warning.
        adjacency = sp.csr_array(adjacency.maximum(adjacency.T))
        adjacency = _without_diagonal(adjacency)
    return _assemble(name, adjacency, features, arrays.get("labels"), source)


def _csr(data: Any, indices: Any, indptr: Any, shape: Any, source: str, what: str) -> sp.csr_array:
    """A CSR matrix from arrays that may hold anything."""
    shape = np.asarray(shape).reshape(-1)
    for part, array in (("indices", indices), ("indptr", indptr), ("shape", shape)):
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise DatasetFormatError(
                f"{source}: {what}_{part} must be 1-dimensional integers, "
                f"got shape {array.shape} of {array.dtype}"
            )
    if shape.size != 2 or shape.min() < 0:
        raise DatasetFormatError(
            f"{source}: the shape of {what} must be two sizes, got {shape.tolist()}"
        )
    if data.dtype.kind not in "biuf" or data.shape != indices.shape:
        raise DatasetFormatError(
            f"{source}: {what}_data must be numbers, one per index {indices.shape}, "
            f"got shape {data.shape} of {data.dtype}"
        )
    n_rows, n_cols = (int(s) for s in shape)
    if (
        indptr.shape != (n_rows + 1,)
        or indptr[0] != 0
        or indptr[-1] != indices.size
        or (indptr[1:] < indptr[:-1]).any()
    ):
        raise DatasetFormatError(
            f"{source}: {what}_indptr must rise from 0 to {indices.size} over {n_rows + 1} values, "
            f"got {indptr.size} values"
        )
    if indices.size and (indices.min() < 0 or indices.max() >= n_cols):
        raise DatasetFormatError(
            f"{source}: {what}_indices must be in 0..{n_cols - 1}, "
            f"got {indices.min()}..{indices.max()}"
        )
    return sp.csr_array((data, indices, indptr), shape=(n_rows, n_cols))


def _assemble(name: str, adjacency: Any, features: Any, labels: Any, source: str) -> Dataset:
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
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DatasetFormatError(
                f"{source}: labels must be integers of 0 or more, got {labels.dtype}"
                + (f" from {labels.min()}" if labels.dtype.kind in "iuf" else "")
            )
        labels = labels.astype(np.int64)
    n_clusters = None if labels is None else int(np.unique(labels).size)
    return Dataset(name, adjacency, features, labels, n_clusters)


def _without_diagonal(matrix: sp.csr_array) -> sp.csr_array:
    coo = matrix.tocoo()
    keep = coo.row != coo.col
    return sp.csr_array((coo.data[keep], (coo.row[keep], coo.col[keep])), shape=matrix.shape)
