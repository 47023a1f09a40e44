"""Graphs in ``.npz`` files of the uniform and the gnn-benchmark format; nothing is unpickled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.datasets.dataset import (
    Dataset,
    DatasetFormatError,
    DatasetNotFoundError,
    assemble,
    csr,
)
from fastclust.memory import InsufficientMemoryError, require_memory
from fastclust.validation import without_diagonal

_UNIFORM_KEYS = ("adj_indptr", "adj_indices", "x_indptr", "x_indices", "x_data", "shape_x")
_GNN_BENCHMARK_KEYS = tuple(
    f"{matrix}_{part}"
    for matrix in ("adj", "attr")
    for part in ("data", "indices", "indptr", "shape")
)
# Each tells the one format from the other.
_UNIFORM_MARKS = ("shape_x", "x_indptr")
_GNN_BENCHMARK_MARKS = ("adj_shape", "attr_indptr")
_KNOWN_KEYS = frozenset((*_UNIFORM_KEYS, *_GNN_BENCHMARK_KEYS, "labels"))


def read_npz(path: Path, name: str, *, binary: bool = False) -> Dataset:
    """Either format from a file; ``binary`` is for :func:`_from_gnn_benchmark`."""
    return from_arrays(_read_arrays(path), name, str(path), binary)


def from_arrays(arrays: Mapping[str, Any], name: str, source: str, binary: bool) -> Dataset:
    """Either format from its arrays; ``source`` is how messages call them."""
    if any(key in arrays for key in _UNIFORM_MARKS):
        return from_uniform(arrays, name, source)
    return _from_gnn_benchmark(arrays, name, source, binary)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz file that either format knows; other members are not touched."""
    if not path.exists():
        raise DatasetNotFoundError(f"{path} does not exist; give the path of a .npz file")
    if not path.is_file():
        raise DatasetFormatError(f"{path} must be a .npz file, got a directory or special file")
    try:
        with open(path, "rb") as file:
            return unzip(file, str(path))
    except OSError as error:
        raise DatasetFormatError(f"{path} cannot be read: {error.strerror}") from None


def unzip(file: Any, source: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an open npz file that either format knows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about old or odd headers
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DatasetFormatError(f"{source} must be a .npz archive, got a single array")
            assert archive.zip is not None
            keys = [key for key in archive.files if key in _KNOWN_KEYS]
            # No more than this is read, whatever the compressed size and the headers say.
            sizes = [archive.zip.getinfo(f"{key}.npy").file_size for key in keys]
            require_memory(sum(sizes), f"{source}, unpacked,", "give a smaller or an intact file")
            arrays = {key: archive[key] for key in keys}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise DatasetFormatError(f"{source} must hold arrays only, got a file of bytes")
            _require_known_format(archive.files, source)
            return arrays
    except (DatasetFormatError, InsufficientMemoryError):
        raise
    except Exception as error:  # zipfile, zlib and numpy's header parser raise nearly anything
        raise DatasetFormatError(_damage(source, error)) from None


def _require_known_format(keys: Sequence[str], source: str) -> None:
    """``keys``: those of the whole file, not only the known ones, for the message to list."""
    if not any(key in keys for key in (*_UNIFORM_MARKS, *_GNN_BENCHMARK_MARKS)):
        shown = ", ".join(sorted(keys)[:20]) + (", ..." if len(keys) > 20 else "")
        raise DatasetFormatError(
            f"{source} must hold adj_indptr, adj_indices, x_indptr, x_indices, x_data and shape_x "
            f"(uniform format) or adj_* and attr_* (gnn-benchmark format), got the keys "
            f"{shown or 'none'}"
        )


def _damage(path: str, error: BaseException) -> str:
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


def from_uniform(arrays: Mapping[str, Any], name: str, source: str) -> Dataset:
    _require_keys(arrays, _UNIFORM_KEYS, source)
    n = int(arrays["adj_indptr"].size) - 1
    data = arrays.get("adj_data")
    if data is None:
        data = np.ones(arrays["adj_indices"].size, np.float32)
    adjacency = csr(
        data, arrays["adj_indices"], arrays["adj_indptr"], np.array([n, n]), source, "adj"
    )
    features = csr(
        arrays["x_data"], arrays["x_indices"], arrays["x_indptr"], arrays["shape_x"], source, "x"
    )
    return assemble(name, adjacency, features, arrays.get("labels"), source)


def _from_gnn_benchmark(arrays: Mapping[str, Any], name: str, source: str, binary: bool) -> Dataset:
    """The gnn-benchmark format; ``binary`` sets positive weights and features to 1.

    The latter is how the Amazon graphs are used in the literature.
    """
    _require_keys(arrays, _GNN_BENCHMARK_KEYS, source)
    adjacency, features = (
        csr(
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
        adjacency = without_diagonal(adjacency)
    if binary:
        adjacency, features = ((matrix > 0).astype(np.float32) for matrix in (adjacency, features))
    return assemble(name, adjacency, features, arrays.get("labels"), source)


def to_uniform(dataset: Dataset) -> dict[str, Any]:
    """The arrays of the uniform format."""
    features = sp.csr_array(dataset.features)
    return {
        "adj_indptr": dataset.adjacency.indptr.astype(np.int64),
        "adj_indices": dataset.adjacency.indices,
        "x_indptr": features.indptr.astype(np.int64),
        "x_indices": features.indices,
        "x_data": features.data,
        "shape_x": np.asarray(features.shape, np.int64),
        "labels": dataset.labels,
    }
