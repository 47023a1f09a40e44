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

import collections
import hashlib
import io
import json
import logging
import os
import pickle
import pickletools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.files import replacing
from fastclust.memory import InsufficientMemoryError, require_memory
from fastclust.validation import (
    DataWarning,
    check_adjacency,
    check_features,
    require_valid_csr,
)

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

_log = logging.getLogger("fastclust")

#: Where downloads come from; the environment variable FASTCLUST_DATA_URL names a mirror that
#: serves the same paths.
BASE_URL = "https://raw.githubusercontent.com"

# The folders of fastclust.convert.
DIRECTORY_META = "dataset.json"
DIRECTORY_FORMAT = "fastclust-directory"
DIRECTORY_VERSION = 1

_TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds of silence while reading
_ATTEMPTS = 3
_RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled before each later one


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
    return _load(path, path.stem)


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
        return _load_directory(Path(text)) if os.path.isdir(text) else load_npz(text)
    key = text.strip().lower()
    if key == "digits":
        return _digits()
    source = _SOURCES.get(key)
    if source is None:
        raise DatasetNotFoundError(
            f"unknown data set {text!r}: it must be one of {', '.join(DATASET_NAMES)}, "
            f"or the path of a .npz file or of a folder from fastclust.convert"
        )

    tried = []
    for folder in _search_folders(root):
        found = _find_in(folder, key, source)
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

    cache = _cache_dir()
    cached = cache / f"{key}.npz"
    try:
        return _read_verified(cached, key, source)
    except DatasetNotFoundError:
        tried.append(f"{cached} (no such file)")
    except DatasetFormatError as error:
        tried.append(f"{cached} (ignored: {error})")
    return _download_dataset(key, source, cache, tried)


def _require_path(value: Any, argument: str, what: str) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{argument} must be {what}, got {value!r:.60} of {type(value).__name__}")


def is_dataset_path(name: str | os.PathLike[str]) -> bool:
    """Whether a data set is named by the path of its file or folder."""
    text = os.fspath(name)
    if isinstance(name, os.PathLike) or text.endswith(".npz") or os.sep in text:
        return True
    return text.strip().lower() not in DATASET_NAMES and os.path.isdir(text)


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


# --- where the benchmark graphs come from --------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Published files of one data set and what they must give."""

    files: tuple[str, ...]  # below BASE_URL
    build: Callable[[Mapping[str, bytes], str], Dataset]  # from contents, keyed by file name
    digest: str  # array_digest of the result
    blob_id: str | None = None  # git blob id, where the only file is a npz archive


def _planetoid_files(name: str) -> tuple[str, ...]:
    folder = "kimiyoung/planetoid/af6abf468a772cc055bec88c52e4d6f51b7c37e3/data"
    parts = ("allx", "ally", "tx", "ty", "graph", "test.index")
    return tuple(f"{folder}/ind.{name}.{part}" for part in parts)


def _airport_files(country: str) -> tuple[str, ...]:
    # The assembled arrays are verified, so a moving branch does no harm.
    folder = "leoribeiro/struc2vec/master/graph"
    return (f"{folder}/{country}-airports.edgelist", f"{folder}/labels-{country}-airports.txt")


def _search_folders(root: str | os.PathLike[str] | None) -> list[Path]:
    folders = [root, os.environ.get("FASTCLUST_DATA")]
    return [Path(folder).expanduser() for folder in folders if folder]


def _cache_dir() -> Path:
    import platformdirs  # here: whoever reads files of their own needs neither this nor pooch

    return Path(platformdirs.user_cache_dir("fastclust"))


def _find_in(folder: Path, key: str, source: _Source) -> tuple[Path, Callable[[], Dataset]] | None:
    """What of a data set a folder holds, and how to read it."""
    npz = folder / f"{key}.npz"
    if npz.exists():
        return npz, lambda: _load(npz, key, binary=source.blob_id is not None)
    files = [folder / Path(file).name for file in source.files]
    if all(file.is_file() for file in files):
        return files[0], lambda: source.build({f.name: _read_bytes(f) for f in files}, key)
    return None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetFormatError(f"{path} cannot be read: {error.strerror}") from None


def _read_verified(path: Path, key: str, source: _Source) -> Dataset:
    """A cached file, provided that it is what was put there."""
    if source.blob_id is not None and path.exists():
        blob_id = git_blob_id(_read_bytes(path))
        if blob_id != source.blob_id:
            raise DatasetFormatError(f"its git blob id is {blob_id}, not {source.blob_id}")
    dataset = _load(path, key, binary=source.blob_id is not None)
    if source.blob_id is None and array_digest(dataset) != source.digest:
        raise DatasetFormatError(f"its arrays are not those of {key!r}")
    return dataset


def git_blob_id(content: bytes) -> str:
    """The id by which git knows a file of this content."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = check_features(bunch.data / 16.0)
    labels = bunch.target.astype(np.int64)
    return Dataset("digits", nearest_neighbor_graph(features, 10), features, labels, 10)


# --- download ------------------------------------------------------------------------------------


class _DownloadError(Exception):
    """A download that did not succeed; the message is one line."""


def _download_dataset(key: str, source: _Source, cache: Path, tried: list[str]) -> Dataset:
    """Fetch, verify, cache."""
    base_url = os.environ.get("FASTCLUST_DATA_URL", BASE_URL).rstrip("/")
    contents = {}
    for file in source.files:
        url = f"{base_url}/{file}"
        try:
            contents[Path(file).name] = _fetch(url, source.blob_id)
        except _DownloadError as error:
            tried.append(f"{url} ({error})")
            names = " ".join(Path(f).name for f in source.files)
            raise DatasetNotFoundError(
                f"data set {key!r} was not found; tried: {'; '.join(tried)}. Connect to the "
                f"network, or put {key}.npz (or {names}) in a folder and name it as the data "
                f"root or in FASTCLUST_DATA"
            ) from None
    dataset = source.build(contents, key)
    if array_digest(dataset) != source.digest:
        if source.blob_id is None:
            raise DatasetFormatError(
                f"{base_url}/{source.files[0]} and its companions do not give the arrays known as "
                f"{key!r}: they were altered or truncated on the way; try again, or name another "
                f"mirror in FASTCLUST_DATA_URL"
            )
        _log.info("%s: published file verified; its arrays differ from the reference", key)
    _store(cache / f"{key}.npz", contents, source, dataset)
    return dataset


def _fetch(url: str, blob_id: str | None) -> bytes:
    """The content behind a URL, with the given git blob id where there is one."""
    import pooch
    import requests

    _log.info("downloading %s", url)
    download = pooch.HTTPDownloader(timeout=_TIMEOUT)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_RETRY_PAUSE * 2 ** (attempt - 1))
        buffer = io.BytesIO()
        try:
            download(url, buffer, None)
        except requests.exceptions.HTTPError as error:
            status = 0 if error.response is None else error.response.status_code
            failure = f"HTTP status {status}"
            if 400 <= status < 500 and status not in (408, 429):
                break
        except requests.exceptions.Timeout:
            failure = "timed out"
        except requests.exceptions.ChunkedEncodingError:
            failure = "the connection broke off before the end of the file"
        except requests.exceptions.ConnectionError:
            failure = "no connection"
        except (requests.exceptions.RequestException, OSError) as error:
            raise _DownloadError(" ".join(str(error).split())[:120]) from None
        else:
            content = buffer.getvalue()
            if blob_id is None or git_blob_id(content) == blob_id:
                return content
            failure = f"checksum does not match: git blob id {git_blob_id(content)}, not {blob_id}"
    raise _DownloadError(failure)


def _store(path: Path, contents: Mapping[str, bytes], source: _Source, dataset: Dataset) -> None:
    """Put a verified data set into the cache: all of it, or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if source.blob_id is not None:
                file.write(contents[Path(source.files[0]).name])
            else:
                np.savez_compressed(file, **_to_uniform(dataset))
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error.strerror}); the download is not cached",
            DataWarning,
            stacklevel=4,
        )


def _to_uniform(dataset: Dataset) -> dict[str, Any]:
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


# --- npz files -----------------------------------------------------------------------------------

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


def _load(path: Path, name: str, *, binary: bool = False) -> Dataset:
    """Either format from a file; ``binary`` is for :func:`_from_gnn_benchmark`."""
    return _from_arrays(_read_arrays(path), name, str(path), binary)


def _from_arrays(arrays: Mapping[str, Any], name: str, source: str, binary: bool) -> Dataset:
    if any(key in arrays for key in _UNIFORM_MARKS):
        return _from_uniform(arrays, name, source)
    return _from_gnn_benchmark(arrays, name, source, binary)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz file that either format knows; other members are not touched."""
    if not path.exists():
        raise DatasetNotFoundError(f"{path} does not exist; give the path of a .npz file")
    if not path.is_file():
        raise DatasetFormatError(f"{path} must be a .npz file, got a directory or special file")
    try:
        with open(path, "rb") as file:
            return _unzip(file, str(path))
    except OSError as error:
        raise DatasetFormatError(f"{path} cannot be read: {error.strerror}") from None


def _unzip(file: Any, source: str) -> dict[str, npt.NDArray[Any]]:
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


def _from_uniform(arrays: Mapping[str, Any], name: str, source: str) -> Dataset:
    _require_keys(arrays, _UNIFORM_KEYS, source)
    n = int(arrays["adj_indptr"].size) - 1
    data = arrays.get("adj_data")
    if data is None:
        data = np.ones(arrays["adj_indices"].size, np.float32)
    adjacency = _csr(
        data, arrays["adj_indices"], arrays["adj_indptr"], np.array([n, n]), source, "adj"
    )
    features = _csr(
        arrays["x_data"], arrays["x_indices"], arrays["x_indptr"], arrays["shape_x"], source, "x"
    )
    return _assemble(name, adjacency, features, arrays.get("labels"), source)


def _from_gnn_benchmark(arrays: Mapping[str, Any], name: str, source: str, binary: bool) -> Dataset:
    """The gnn-benchmark format; ``binary`` sets positive weights and features to 1.

    The latter is how the Amazon graphs are used in the literature.
    """
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
    if binary:
        adjacency, features = ((matrix > 0).astype(np.float32) for matrix in (adjacency, features))
    return _assemble(name, adjacency, features, arrays.get("labels"), source)


def _csr(data: Any, indices: Any, indptr: Any, shape: Any, source: str, what: str) -> sp.csr_array:
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
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**63:
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


# --- folders of arrays ---------------------------------------------------------------------------


def load_array(path: Path, mmap_mode: Literal["r", "c"] | None = None) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file; np.load opens an archive of that name as well."""
    array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an archive of arrays, no array")
    return array


def parquet_reader(path: Path) -> Any:
    """The module that reads Parquet files, for the file ``path``.

    Raises
    ------
    DatasetFormatError
        It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise DatasetFormatError(
            f"{path} must be read with pyarrow, which is not installed: pip install pyarrow, "
            f"or save the table as CSV"
        ) from None
    return pyarrow.parquet


def _load_directory(folder: Path) -> Dataset:
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
        return _csr(data, indices, indptr, np.array([n, n_columns]), str(folder), name)

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
    return _assemble(folder.name, adjacency, features, labels, str(folder))


# --- the published files -------------------------------------------------------------------------


def _build_gnn_benchmark(contents: Mapping[str, bytes], key: str) -> Dataset:
    ((file, content),) = contents.items()
    return _from_arrays(_unzip(io.BytesIO(content), file), key, file, binary=True)


def _build_planetoid(contents: Mapping[str, bytes], key: str) -> Dataset:
    """Rows 0.. are ``allx``; row ``test.index[i]`` is ``tx[i]``.

    The ids missing from ``test.index`` (15 in citeseer) keep an all-zero row and class 0, as in
    the arrays that the literature uses.
    """
    source = f"ind.{key}.*"
    parts = {file.removeprefix(f"ind.{key}."): data for file, data in contents.items()}
    allx, tx = (_unpickle_matrix(parts[part], f"ind.{key}.{part}") for part in ("allx", "tx"))
    ally, ty = (_unpickle_array(parts[part], f"ind.{key}.{part}") for part in ("ally", "ty"))
    graph = _restricted_unpickle(parts["graph"], f"ind.{key}.graph")
    test_index = _integer_table(parts["test.index"], f"ind.{key}.test.index", 1)[:, 0]
    if not isinstance(graph, dict) or not all(isinstance(v, list) for v in graph.values()):
        raise DatasetFormatError(f"ind.{key}.graph must hold a dictionary of lists")
    n = int(test_index.max()) + 1
    rows = np.concatenate([np.arange(allx.shape[0]), test_index])
    if (
        allx.shape[1] != tx.shape[1]
        or allx.shape[0] != ally.shape[0]
        or tx.shape[0] != ty.shape[0]
        or ty.shape[0] != test_index.size
        or ally.shape[1] != ty.shape[1]
        or test_index.min() < 0
        or n > 2 * rows.size
        or np.unique(rows).size != rows.size
    ):
        raise DatasetFormatError(f"{source}: the sizes of its files do not fit together")
    stacked = sp.coo_array(sp.vstack([allx, tx]))
    features = sp.csr_array(
        (stacked.data, (rows[stacked.row], stacked.col)), shape=(n, stacked.shape[1])
    )
    labels = np.zeros(n, np.int64)
    labels[rows] = np.concatenate([ally, ty]).argmax(axis=1)
    try:
        pairs = [(int(i), int(j)) for i, neighbors in graph.items() for j in neighbors]
        edges = np.array(pairs, np.int64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise DatasetFormatError(f"ind.{key}.graph must hold node numbers") from None
    adjacency = _undirected(edges, n, f"ind.{key}.graph")
    return _assemble(key, _without_diagonal(adjacency), features, labels, source)


def _build_airports(contents: Mapping[str, bytes], key: str) -> Dataset:
    """Nodes in the order of the label file; features are one-hot degrees.

    The degree counts a self loop of the source once, and there are maximum degree + 1 columns:
    the construction that the literature took over from R-GAE. The adjacency has no self loops.
    """
    edge_file, label_file = sorted(contents, key=lambda file: file.endswith(".txt"))
    table = _integer_table(contents[label_file], label_file, 2)
    nodes, labels = table[:, 0], table[:, 1]
    order = np.argsort(nodes, kind="stable")
    edges = _integer_table(contents[edge_file], edge_file, 2)
    place = np.searchsorted(nodes, edges, sorter=order).clip(max=nodes.size - 1)
    edges_by_row = order[place]
    if np.unique(nodes).size != nodes.size or (nodes[edges_by_row] != edges).any():
        raise DatasetFormatError(f"{edge_file} must hold nodes of {label_file} only")
    adjacency = _undirected(edges_by_row, nodes.size, edge_file)
    degree = adjacency.sum(axis=1).astype(np.int64)
    features = sp.csr_array(
        (np.ones(nodes.size, np.float32), degree, np.arange(nodes.size + 1)),
        shape=(nodes.size, int(degree.max()) + 1),
    )
    return _assemble(key, _without_diagonal(adjacency), features, labels, edge_file)


def _integer_table(content: bytes, source: str, n_columns: int) -> npt.NDArray[np.int64]:
    """The leading integers of each line; a first line of words is a header."""
    lines = [line.split() for line in content.decode("ascii", "replace").splitlines()]
    lines = [line for line in lines if line]
    if lines and not lines[0][0].lstrip("-").isdigit():
        lines = lines[1:]
    try:
        rows = [[int(line[column]) for column in range(n_columns)] for line in lines]
        table = np.array(rows, np.int64)
    except (ValueError, IndexError, OverflowError):
        rows = []
    if not rows:
        raise DatasetFormatError(f"{source} must hold {n_columns} integers per line")
    return table


def _undirected(edges: npt.NDArray[np.int64], n: int, source: str) -> sp.csr_array:
    """Edges [E, 2] as a symmetric 0/1 matrix; self loops stay, repeated edges count once."""
    if edges.size and (edges.min() < 0 or edges.max() >= n):
        raise DatasetFormatError(
            f"{source} must hold nodes 0..{n - 1}, got {edges.min()}..{edges.max()}"
        )
    rows, cols = np.concatenate([edges, edges[:, ::-1]]).T
    matrix = sp.csr_array((np.ones(rows.size, np.float32), (rows, cols)), shape=(n, n))
    matrix.data[:] = 1.0
    return matrix


class _PickledMatrix:
    """Stands in for scipy's sparse matrix classes while a pickle is read.

    A pickle gets to fill this object's state, never a class that the process goes on using.
    """

    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state)


class _PickledDtype:
    """Stands in for numpy.dtype, whose own ``__setstate__`` can be made to break NumPy."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise DatasetFormatError(f"it asks for arrays of {name!r}")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands in for numpy.ndarray."""

    array: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data  # written by Python 2
        flat = np.frombuffer(raw, dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads NumPy arrays, scipy sparse matrices and plain containers; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("scipy.sparse") and name in ("csr_matrix", "csr_array"):
            return _PickledMatrix
        if module in ("copy_reg", "copyreg") and name == "_reconstructor":
            return _reconstruct_matrix
        if (module, name) in _UNPICKLED:
            return _UNPICKLED[module, name]
        raise DatasetFormatError(f"it asks for {module}.{name}")


def _reconstruct_matrix(cls: Any, base: Any, state: Any) -> _PickledMatrix:
    if cls is not _PickledMatrix or base is not object or state is not None:
        raise DatasetFormatError("it asks for an object that is not an array")
    return _PickledMatrix()


def _encode_latin1(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for pickle protocols below 3."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DatasetFormatError("it asks for a text encoding")
    return text.encode("latin1")


def _reconstruct_array(cls: Any, shape: Any, code: Any) -> _PickledArray:
    return _PickledArray()


_UNPICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct_array,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct_array,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("collections", "defaultdict"): collections.defaultdict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
    ("__builtin__", "object"): object,
    ("builtins", "object"): object,
    ("_codecs", "encode"): _encode_latin1,
}


def _restricted_unpickle(content: bytes, source: str) -> Any:
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # The unpickler makes room for as many memory slots as a single number asks for.
            if opcode.name.endswith("PUT") and (argument or 0) > len(content):
                raise DatasetFormatError("it asks for memory without end")
        return _RestrictedUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DatasetFormatError as error:
        raise DatasetFormatError(
            f"{source} must hold arrays and plain containers only and is not loaded: {error}"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DatasetFormatError(
            f"{source} is truncated or corrupt ({type(error).__name__})"
        ) from None


def _unpickle_matrix(content: bytes, source: str) -> sp.csr_array:
    matrix = _restricted_unpickle(content, source)
    state = getattr(matrix, "state", {}) if isinstance(matrix, _PickledMatrix) else {}
    data, indices, indptr = (
        getattr(state.get(key), "array", None) for key in ("data", "indices", "indptr")
    )
    shape = state.get("_shape", state.get("shape"))
    if (
        any(array is None for array in (data, indices, indptr))
        or not isinstance(shape, tuple)
        or not all(isinstance(size, int) and size < 2**62 for size in shape)
    ):
        raise DatasetFormatError(f"{source} must hold a scipy CSR matrix")
    return _csr(data, indices, indptr, np.array(shape), source, "matrix")


def _unpickle_array(content: bytes, source: str) -> npt.NDArray[Any]:
    array = getattr(_restricted_unpickle(content, source), "array", None)
    if array is None or array.ndim != 2:
        raise DatasetFormatError(f"{source} must hold a numeric array [n, classes]")
    return array


_SOURCES = {
    "cora": _Source(
        _planetoid_files("cora"),
        _build_planetoid,
        "c695a0c340354939807124bad76c584be16da4cabfb72fdb5d18e9b47186199e",
    ),
    "citeseer": _Source(
        _planetoid_files("citeseer"),
        _build_planetoid,
        "52999914a0be96951a6d31af32ef6e53171a6dea0afa7ae575e28045d98b035d",
    ),
    "amap": _Source(
        ("shchur/gnn-benchmark/master/data/npz/amazon_electronics_photo.npz",),
        _build_gnn_benchmark,
        "ca346736a6dfff399c76ea9357d98c183a0ef191ad5cc5f495657831dcb05964",
        blob_id="97323743cb56aca9dd611f5b4b46862c1c9c6bd9",
    ),
    "amac": _Source(
        ("shchur/gnn-benchmark/master/data/npz/amazon_electronics_computers.npz",),
        _build_gnn_benchmark,
        "e4e10f2c3a46099f0c2a33d6161bca0d0b87dc3a02f370e48c8b10b929e89178",
        blob_id="8120e4148a330b3fafe37c4476823302d9d834b9",
    ),
    "eat": _Source(
        _airport_files("europe"),
        _build_airports,
        "3b87bf363e90d37b85aeaf8f04cb0b9c9b7bfc3c15899775bfef61622c3f3c49",
    ),
    "uat": _Source(
        _airport_files("usa"),
        _build_airports,
        "5d2d71ecc6d9d2be91a3ceb1e596dd4d57a5142ac993ba808a6a316e715d4c15",
    ),
    "bat": _Source(
        _airport_files("brazil"),
        _build_airports,
        "b393c961c166fcb5751faeb7a89c5151b9070f51133f3b63dae1fc3bf22f06af",
    ),
}

#: Names that :func:`load_dataset` knows.
DATASET_NAMES = (*_SOURCES, "digits")
