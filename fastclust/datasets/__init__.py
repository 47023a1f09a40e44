"""Benchmark graphs by name, and graphs from ``.npz`` files or folders of arrays.

Two file formats are read, both with ``allow_pickle=False``; folders are what
:mod:`fastclust.convert` writes, and are mapped into memory:

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
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fastclust.datasets.dataset import (
    Dataset,
    DatasetFormatError,
    DatasetNotFoundError,
    array_digest,
    nearest_neighbor_graph,
)
from fastclust.datasets.download import (
    cache_dir,
    download_dataset,
    find_in,
    read_verified,
    search_folders,
)
from fastclust.datasets.folder import load_directory
from fastclust.datasets.npz import read_npz
from fastclust.datasets.published import SOURCES
from fastclust.validation import DataWarning, check_features

__all__ = [
    "DATASET_NAMES",
    "Dataset",
    "DatasetFormatError",
    "DatasetNotFoundError",
    "array_digest",
    "load_dataset",
    "load_npz",
    "nearest_neighbor_graph",
]

#: Names that :func:`load_dataset` knows.
DATASET_NAMES = (*SOURCES, "digits")


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
    TypeError
        ``path`` is no path.

    Examples
    --------
    >>> load_npz("cora.npz")  # doctest: +SKIP
    Dataset('cora': 2708 nodes, 10556 edges, 1433 features, 7 classes)
    """
    _require_path(path, "path", "the path of a .npz file")
    path = Path(path)
    return read_npz(path, path.stem)


def load_dataset(
    name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> Dataset:
    """Load a benchmark graph by name, or a graph from a ``.npz`` file or a folder of arrays.

    A name is looked for in ``root``, in the folder named by the environment variable
    ``FASTCLUST_DATA``, in the user cache folder, and at last downloaded from where its authors
    published it. Each folder may hold ``<name>.npz`` or the published files themselves. Downloads
    are verified (git blob id of the file, or SHA-256 of the assembled arrays) before they
    are cached; a local file with other arrays is used with a warning.

    Parameters
    ----------
    name : str or path
        ``cora``, ``citeseer`` (Planetoid; Yang et al., 2016), ``amap``, ``amac`` (Amazon Photo and
        Computers; Shchur et al., 2018), ``eat``, ``uat``, ``bat`` (European, USA and Brazilian
        air traffic; Ribeiro et al., 2017), ``digits`` (scikit-learn's 1797 handwritten digits,
        pixels in [0, 1], with the graph of 10 nearest neighbours, an edge where either of two
        nodes is among the other's), the path of a ``.npz`` file (see :func:`load_npz`), or of a
        folder from :mod:`fastclust.convert`, whose attributes and neighbours are mapped into
        memory: pages are read when they are needed and give way when memory is short.
    root : path, optional
        The folder to look in first.

    Returns
    -------
    Dataset

    Raises
    ------
    DatasetNotFoundError
        The name is not known, or its files are in none of the places and cannot be downloaded. The
        message lists every place.
    DatasetFormatError
        A file that was found is damaged, or a download is not what was published.
    TypeError
        ``name`` is no name and no path, or ``root`` is no path.

    Examples
    --------
    >>> load_dataset("digits")
    Dataset('digits': 1797 nodes, 24680 edges, 64 features, 10 classes)
    """
    _require_path(name, "name", "the name of a data set, or a path")
    if root is not None:
        _require_path(root, "root", "the path of a folder, or None")
    text = os.fspath(name)
    if is_dataset_path(name):
        return load_directory(Path(text)) if os.path.isdir(text) else load_npz(text)
    key = text.strip().lower()
    if key == "digits":
        return _digits()
    source = SOURCES.get(key)
    if source is None:
        raise DatasetNotFoundError(
            f"unknown data set {text!r}: it must be one of {', '.join(DATASET_NAMES)}, "
            f"or the path of a .npz file or of a folder from fastclust.convert"
        )

    tried = []
    for folder in search_folders(root):
        found = find_in(folder, key, source)
        if found is None:
            tried.append(f"{folder / key}.npz (no such file)")
            continue
        path, read = found
        dataset = read()
        if array_digest(dataset) != source.digest:
            warnings.warn(
                f"{path} does not hold the arrays known as {key!r} (another node order, other "
                f"weights or features?); results will not be comparable",
                DataWarning,
                stacklevel=2,
            )
        return dataset

    cache = cache_dir()
    cached = cache / f"{key}.npz"
    try:
        return read_verified(cached, key, source)
    except DatasetNotFoundError:
        tried.append(f"{cached} (no such file)")
    except DatasetFormatError as error:
        tried.append(f"{cached} (ignored: {error})")
    return download_dataset(key, source, cache, tried)


def _require_path(value: Any, argument: str, what: str) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{argument} must be {what}, got {value!r:.60} of {type(value).__name__}")


def is_dataset_path(name: str | os.PathLike[str]) -> bool:
    """Whether a data set is named by the path of its file or folder."""
    text = os.fspath(name)
    if isinstance(name, os.PathLike) or text.endswith(".npz") or os.sep in text:
        return True
    return text.strip().lower() not in DATASET_NAMES and os.path.isdir(text)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = check_features(bunch.data / 16.0)
    labels = bunch.target.astype(np.int64)
    return Dataset("digits", nearest_neighbor_graph(features, 10), features, labels, 10)
