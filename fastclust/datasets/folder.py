"""Graphs in folders of arrays, mapped into memory; :mod:`fastclust.convert` has the format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.datasets.dataset import Dataset, DatasetFormatError, assemble, csr

PathLike = str | os.PathLike[str]

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


def write_directory(dataset: Dataset, out: PathLike) -> Path:
    """Write a data set as a folder for :func:`fastclust.load_dataset`.

    Parameters
    ----------
    dataset : Dataset
        From :func:`fastclust.load_dataset` or :func:`fastclust.make_attributed_sbm`.
    out : path
        The folder to make; it must not exist.

    Returns
    -------
    Path
        The folder.
    """

    def write(folder: Path) -> dict[str, Any]:
        a = dataset.adjacency
        x: Any = dataset.features
        arrays: dict[str, Any] = {
            "adj_indptr": np.asarray(a.indptr, np.int64),
            "adj_indices": np.asarray(a.indices, np.int32),
        }
        if a.nnz and (a.data != 1).any():
            arrays["adj_data"] = a.data
        if sp.issparse(x):
            arrays |= {
                "x_indptr": np.asarray(x.indptr, np.int64),
                "x_indices": np.asarray(x.indices, np.int32),
                "x_data": x.data,
            }
        else:
            arrays["features"] = x
        if dataset.labels is not None:
            arrays["labels"] = dataset.labels
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        return {
            "n_nodes": dataset.n_nodes,
            "n_edges": dataset.n_edges,
            "n_features": dataset.n_features,
        }

    return written_whole(out, write)


def written_whole(out: PathLike, write: Callable[[Path], dict[str, Any]]) -> Path:
    """A folder under its name only when it is complete."""
    target = Path(out)
    if target.exists():
        raise ValueError(f"{target} must not exist yet; remove it or give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        sizes = write(partial)
        meta = {"format": DIRECTORY_FORMAT, "version": DIRECTORY_VERSION, **sizes}
        (partial / DIRECTORY_META).write_text(json.dumps(meta, indent=1) + "\n")
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target
