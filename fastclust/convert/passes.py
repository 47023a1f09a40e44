"""The conversion: both directions of every edge to files by rows, then file by file to arrays."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclust.convert.edges import MAX_NODES, Progress, edge_blocks
from fastclust.convert.nodes import read_labels, write_features
from fastclust.datasets import DatasetFormatError
from fastclust.datasets.folder import PathLike, written_whole
from fastclust.tables import existing_file

_ROW_BITS = 16  # rows of a bucket file: 2^16
_SPLIT_BITS = 4  # a bucket that is too large is split in 2^4
# From this many nodes on, so many for each edge are taken for names that are no numbers from 0 on.
_FEW_NODES, _NODES_PER_EDGE = 2**20, 64
_HEADER = 128  # bytes of a .npy header for one axis


def convert(
    out: PathLike,
    edges: PathLike | Sequence[PathLike],
    *,
    features: PathLike | None = None,
    labels: PathLike | None = None,
    n_nodes: int | None = None,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> Path:
    """Convert edge lists, attributes and labels to a folder for :func:`fastclust.load_dataset`.

    Edges are undirected: both directions are stored, repeated edges count once (with their largest
    weight), self loops are dropped.

    Parameters
    ----------
    out : path
        The folder to make; it must not exist.
    edges : path or sequence of paths
        Text with two node numbers per line and perhaps a weight (``.txt .csv .tsv``, also
        ``.gz``; apart by blanks, tabs, commas or semicolons; ``#`` and ``%`` begin comments, the
        first line may be a header); ``.npy`` or ``.npz`` with integers [E, 2] or [2, E] (in an
        archive named ``edges`` or ``edge_index``); ``.parquet``, the first two or three columns
        (needs pyarrow). Several files are one list.
    features : path, optional
        Attributes of the nodes: ``.npy`` [N, D], ``.npz`` of ``scipy.sparse.save_npz``, or
        ``.parquet`` with D numeric columns.
    labels : path, optional
        ``.npy`` or text, one whole number of 0 or more per node.
    n_nodes : int, optional
        N; by default the rows of ``features``, or one more than the largest node number.
    memory : int, default 2**30
        Bytes that blocks and buckets may take, about; at least 2**24. Besides, the converter holds
        8 bytes per 2^16 nodes.
    progress : callable, optional
        Called with what is being done, the units done and the units in all.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DatasetFormatError
        A malformed line (the message names file and line), a node number out of range or, without
        ``n_nodes``, out of proportion, a file of another kind.
    DatasetNotFoundError
        A file does not exist.
    ValueError
        ``out`` exists, or ``memory`` is too small.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "edges.txt").write_text("0 1\\n1 2\\n1 0\\n")
    >>> convert(folder / "graph", folder / "edges.txt").name
    'graph'
    """
    if memory < 1 << 24:
        raise ValueError(f"memory must be at least {1 << 24} bytes, got {memory}")
    if n_nodes is not None and not 0 < n_nodes <= MAX_NODES:
        raise ValueError(f"n_nodes must be from 1 to {MAX_NODES}, got {n_nodes}")
    paths = [edges] if isinstance(edges, (str, os.PathLike)) else list(edges)
    sources = [existing_file(path) for path in paths]
    report = progress or (lambda what, done, total: None)

    def write(folder: Path) -> dict[str, Any]:
        n_features = n_rows = None
        if features is not None:
            n_rows, n_features = write_features(existing_file(features), folder, memory, report)
        n = n_nodes if n_nodes is not None else n_rows
        if n_rows is not None and n != n_rows:
            raise DatasetFormatError(
                f"{features} must have one row per node ({n}), got {n_rows}; give another --n-nodes"
            )
        buckets = folder / "buckets"
        buckets.mkdir()
        largest, n_read, weighted = _distribute(sources, buckets, n, memory, report)
        if n is None:
            n = largest + 1
            if n > max(_FEW_NODES, _NODES_PER_EDGE * n_read):
                raise DatasetFormatError(
                    f"{paths[0]} must number nodes from 0 on: the largest number is {largest}, "
                    f"with only {n_read} edges; if there are that many nodes, give --n-nodes"
                )
        if n == 0:
            raise DatasetFormatError(f"{paths[0]} holds no edge; give --n-nodes for such a graph")
        n_edges = _collect(folder, buckets, n, weighted, memory, report)
        shutil.rmtree(buckets)
        if labels is not None:
            np.save(folder / "labels.npy", read_labels(existing_file(labels), n))
        return {"n_nodes": n, "n_edges": n_edges, "n_features": n_features or 1}

    return written_whole(out, write)


def _entry_type(weighted: bool) -> np.dtype[Any]:
    """An entry of a bucket: row within it and neighbour, and its weight."""
    return np.dtype([("key", "<i8"), ("weight", "<f4")] if weighted else [("key", "<i8")])


def _distribute(
    sources: Sequence[Path], buckets: Path, n_nodes: int | None, memory: int, report: Progress
) -> tuple[int, int, bool]:
    """Pass 1: both directions of every edge into a file per 2^16 rows.

    Returns the largest node number (-1: no edge), how many edges were read and whether they have
    weights.
    """
    limit = MAX_NODES if n_nodes is None else n_nodes
    largest, n_read = -1, 0
    weighted: bool | None = None
    for path in sources:
        for u, v, w in edge_blocks(path, memory, report):
            if not u.size:
                continue
            if weighted is None:
                weighted = w is not None
            if weighted != (w is not None):
                raise DatasetFormatError(f"{path} must have weights where the other files have")
            low, high = min(int(u.min()), int(v.min())), max(int(u.max()), int(v.max()))
            if low < 0 or high >= limit:
                number = low if low < 0 else high
                raise DatasetFormatError(
                    f"{path} must hold node numbers from 0 to {limit - 1}, got {number}"
                )
            largest, n_read = max(largest, high), n_read + u.size
            keep = u != v
            u, v = u[keep], v[keep]
            entries = np.empty(2 * u.size, _entry_type(weighted))
            rows = np.concatenate((u, v))
            entries["key"] = (rows & ((1 << _ROW_BITS) - 1)) << 32 | np.concatenate((v, u))
            if w is not None:
                entries["weight"] = np.tile(w[keep], 2)
            _append(entries, rows >> _ROW_BITS, lambda b: buckets / f"{b}")
    return largest, n_read, bool(weighted)


def _append(
    entries: npt.NDArray[Any], bucket: npt.NDArray[np.int64], path: Callable[[int], Path]
) -> None:
    """Append each entry to the file of its bucket."""
    if not entries.size:
        return
    order = np.argsort(bucket, kind="stable")
    entries, bucket = entries[order], bucket[order]
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    for begin, end in zip(starts, [*starts[1:], bucket.size], strict=True):
        with open(path(int(bucket[begin])), "ab") as file:
            file.write(entries[begin:end].data)


def _collect(
    folder: Path, buckets: Path, n: int, weighted: bool, memory: int, report: Progress
) -> int:
    """Pass 2: bucket by bucket sorted, without repetitions, appended to the arrays."""
    n_buckets = ((n - 1) >> _ROW_BITS) + 1
    with contextlib.ExitStack() as files:
        indptr = files.enter_context(_Appended(folder / "adj_indptr.npy", "<i8"))
        indices = files.enter_context(_Appended(folder / "adj_indices.npy", "<i4"))
        data = None
        if weighted:
            data = files.enter_context(_Appended(folder / "adj_data.npy", "<f4"))
        indptr.append(np.zeros(1, np.int64))
        total = 0
        for b in range(n_buckets):
            rows = min(1 << _ROW_BITS, n - (b << _ROW_BITS))
            degree = np.zeros(rows, np.int64)
            for part in _sorted_parts(buckets / f"{b}", _ROW_BITS, weighted, memory // 8):
                degree += np.bincount(part["key"] >> 32, minlength=rows)
                indices.append((part["key"] & 0xFFFFFFFF).astype(np.int32))
                if data is not None:
                    data.append(part["weight"])
            indptr.append(total + np.cumsum(degree))
            total += int(degree.sum())
            report("sorting", b + 1, n_buckets)
    return total


def _sorted_parts(path: Path, bits: int, weighted: bool, limit: int) -> Iterable[npt.NDArray[Any]]:
    """The distinct entries of a bucket of 2^bits rows in order, in parts of bounded size."""
    if not path.exists():
        return
    dtype = _entry_type(weighted)
    if path.stat().st_size <= limit:
        yield _distinct(np.fromfile(path, dtype))
        path.unlink()
        return
    step = max(1, limit // dtype.itemsize)
    if bits == 0:  # a single row: distinct neighbours, N at the most
        row = np.empty(0, dtype)
        with open(path, "rb") as file:
            while (piece := np.fromfile(file, dtype, step)).size:
                row = _distinct(np.concatenate((row, piece)))
        path.unlink()
        yield row
        return
    bits = max(0, bits - _SPLIT_BITS)
    found: set[int] = set()
    with open(path, "rb") as file:
        while (piece := np.fromfile(file, dtype, max(1, step // 4))).size:
            part = piece["key"] >> (32 + bits)
            found.update(np.unique(part).tolist())
            _append(piece, part, lambda p: path.with_name(f"{path.name}-{p}"))
    path.unlink()
    for p in sorted(found):
        yield from _sorted_parts(path.with_name(f"{path.name}-{p}"), bits, weighted, limit)


def _distinct(entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Entries by ascending key, each key once with its largest weight."""
    if entries.dtype.itemsize == 8:
        keys = np.sort(entries["key"])
        entries = keys.view(entries.dtype)
    else:
        entries = entries[np.argsort(entries["key"], kind="stable")]
    starts = np.flatnonzero(np.diff(entries["key"], prepend=-1))
    out = entries[starts]
    if entries.dtype.itemsize > 8 and entries.size:
        out["weight"] = np.maximum.reduceat(entries["weight"], starts)
    return out


class _Appended:
    """A ``.npy`` file of one axis whose length is known at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self.file = open(path, "wb")  # noqa: SIM115 (closed by close or __exit__)
        self.file.write(bytes(_HEADER))

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write more of it."""
        self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += values.size

    def close(self) -> None:
        """Write the header, flush to the disk."""
        head = (
            f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.length},), }}"
        )
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little"))
        self.file.write(head.ljust(_HEADER - 11).encode("ascii") + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def __enter__(self) -> _Appended:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()
