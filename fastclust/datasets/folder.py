"""Graphs in folders of arrays, as :mod:`fastclust.convert` writes them, mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.datasets.dataset import Dataset, DatasetFormatError, assemble, csr

DIRECTORY_META = "dataset.json"
DIRECTORY_FORMAT = "fastclust-directory"
DIRECTORY_VERSION = 1


def load_array(path: Path, mmap_mode: Literal["r", "c"] | None = None) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file; np.load opens an archive of that name as well."""
    array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an archive of arrays, no array")
    return array


def load_directory(folder: Path) -> Dataset:
    """What :mod:`fastclust.convert` wrote, mapped copy-on-write: the files are never changed.

    Sizes, row pointers, the range of the indices and finiteness are checked; that the graph is
    symmetric is checked by whoever makes use of it.
    """
    try:
        meta = json.loads((folder / DIRECTORY_META).read_text())
        if meta["format"] != DIRECTORY_FORMAT or meta["version"] != DIRECTORY_VERSION:
            raise ValueError(f"it says {meta['format']!r}, version {meta['version']!r}")
        n, n_edges, n_features = (int(meta[k]) for k in ("n_nodes", "n_edges", "n_features"))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DatasetFormatError(
            f"{folder} must hold the {DIRECTORY_META} of fastclust.convert: {error}"
        ) from None

    def mapped(name: str, dtype: type, *shape: int | None) -> Any:
        path = folder / f"{name}.npy"
        try:
            # Nothing can be mapped of a file without numbers.
            array = load_array(path, "c" if 0 not in shape else None)
        except Exception as error:  # NumPy's header parser raises nearly anything
            raise DatasetFormatError(f"{path} is missing or damaged: {error}") from None
        wrong = array.ndim != len(shape) or any(
            want not in (None, got) for want, got in zip(shape, array.shape, strict=False)
        )
        if wrong or array.dtype != dtype:
            raise DatasetFormatError(
                f"{path} must be {np.dtype(dtype)} of shape {list(shape)}, "
                f"got {array.dtype} of {list(array.shape)}"
            )
        return array.view(np.ndarray)

    def compressed(name: str, size: int | None, n_columns: int, ones: bool) -> sp.csr_array:
        indptr = mapped(f"{name}_indptr", np.int64, n + 1)
        indices = mapped(f"{name}_indices", np.int32, size)
        data = np.ones(indices.size, np.float32)
        if not ones:
            data = mapped(f"{name}_data", np.float32, indices.size)
        return csr(data, indices, indptr, np.array([n, n_columns]), str(folder), name)

    unweighted = not (folder / "adj_data.npy").exists()
    adjacency = compressed("adj", n_edges, n, unweighted)
    features: Any = np.ones((n, 1), np.float32)  # a graph without attributes
    if (folder / "features.npy").exists():
        features = mapped("features", np.float32, n, n_features)
    elif (folder / "x_indptr.npy").exists():
        features = compressed("x", None, n_features, False)
    labels = None
    if (folder / "labels.npy").exists():
        labels = np.array(mapped("labels", np.int64, n))
    return assemble(folder.name, adjacency, features, labels, str(folder))
