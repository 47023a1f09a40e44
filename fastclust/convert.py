"""``python -m fastclust.convert``: edge lists of any length to a folder of arrays.

The folder is what :func:`fastclust.load_dataset` and ``--dataset`` take by its path, mapped into
memory instead of read:

====================================  ============================================================
``dataset.json``                      ``format``, ``version``, ``n_nodes``, ``n_edges`` (both
                                      directions), ``n_features``
``adj_indptr.npy  adj_indices.npy``   int64 [N + 1], int32 [E]: symmetric CSR, no self loops, no
                                      repeated edge, neighbours ascending
``adj_data.npy``                      float32 [E], where edges have weights
``features.npy``                      float32 [N, D], or ``x_indptr.npy`` int64 [N + 1],
                                      ``x_indices.npy`` int32, ``x_data.npy`` float32
``labels.npy``                        int64 [N], where there are labels
====================================  ============================================================

How: one pass over the edges writes both directions of each, as (row, neighbour) in 64 bits, to a
file per 2^16 rows; then file by file is sorted, freed of repetitions and appended. No step holds
more than a block of the input or one such file, and a file over the limit is split by rows until it
fits. The result has another name until it is complete.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import gzip
import json
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust import cli
from fastclust.datasets import Dataset, DatasetFormatError
from fastclust.datasets.folder import (
    DIRECTORY_FORMAT,
    DIRECTORY_META,
    DIRECTORY_VERSION,
    load_array,
)
from fastclust.tables import INDEX_NAMES, existing_file, parquet_reader, require_ends_first
from fastclust.validation import check_features

__all__ = ["convert", "main", "write_directory"]

_ROW_BITS = 16  # rows of a bucket file: 2^16
_SPLIT_BITS = 4  # a bucket that is too large is split in 2^4
_MAX_NODES = 2**31 - 1  # neighbours are int32
_MAX_DIGITS = 18
# From this many nodes on, so many for each edge are taken for names that are no numbers from 0 on.
_FEW_NODES, _NODES_PER_EDGE = 2**20, 64
_HEADER = 128  # bytes of a .npy header for one axis

PathLike = str | os.PathLike[str]
# Sources, destinations and weights (or None) of a block of edges.
_Block = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32] | None]
Progress = Callable[[str, int, int], None]  # what is done, units done, units in all


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


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
    if n_nodes is not None and not 0 < n_nodes <= _MAX_NODES:
        raise ValueError(f"n_nodes must be from 1 to {_MAX_NODES}, got {n_nodes}")
    paths = [edges] if isinstance(edges, (str, os.PathLike)) else list(edges)
    sources = [existing_file(path) for path in paths]
    report = progress or (lambda what, done, total: None)

    def write(folder: Path) -> dict[str, Any]:
        n_features = n_rows = None
        if features is not None:
            n_rows, n_features = _write_features(existing_file(features), folder, memory, report)
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
            np.save(folder / "labels.npy", _read_labels(existing_file(labels), n))
        return {"n_nodes": n, "n_edges": n_edges, "n_features": n_features or 1}

    return _written_whole(out, write)


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

    return _written_whole(out, write)


def _written_whole(out: PathLike, write: Callable[[Path], dict[str, Any]]) -> Path:
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


# --- reading edges -------------------------------------------------------------------------------


def _edge_blocks(path: Path, memory: int, report: Progress) -> Iterator[_Block]:
    """The edges of a file in blocks, whatever it is."""
    name = path.name.lower()
    if name.endswith((".npy", ".npz")):
        with _damage_told(path, "array of NumPy"):
            yield from _array_blocks(path, memory, report)
    elif name.endswith(".parquet"):
        with _damage_told(path, "Parquet file"):
            yield from _parquet_blocks(path, report)
    else:
        yield from _text_blocks(path, memory, report)


@contextlib.contextmanager
def _damage_told(path: Path, kind: str) -> Iterator[None]:
    """Errors of readers as errors of the file: of a damaged one they can be nearly anything."""
    try:
        yield
    except (DatasetFormatError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise DatasetFormatError(f"{path} is damaged or no {kind} ({text})") from None


_SEPARATORS = np.zeros(256, bool)
_SEPARATORS[list(b" \t,;\r\n")] = True
_DIGITS = np.zeros(256, bool)
_DIGITS[list(b"0123456789")] = True
_NUMERIC = _DIGITS.copy()
_NUMERIC[list(b"+-.eE")] = True
_TO_BLANK = bytes.maketrans(b"\t,;\r", b"    ")
_TO_COMMA = str.maketrans("\t;", ",,")


def _text_blocks(path: Path, memory: int, report: Progress) -> Iterator[_Block]:
    """Blocks of whole lines; a line that is no edge is told by file and number."""
    size = max(1 << 16, memory // 64)  # a block of text takes some 20 times its size to look at
    total = path.stat().st_size
    columns = 0
    line = 1
    rest = b""
    with open(path, "rb") as raw:
        zipped = path.name.lower().endswith(".gz")
        file: _Readable = gzip.GzipFile(fileobj=raw) if zipped else raw
        while True:
            try:
                chunk = file.read(size)
            except (OSError, EOFError) as error:
                raise DatasetFormatError(f"{path} is truncated or corrupt ({error})") from None
            text = rest + chunk
            end = len(text) if not chunk else text.rfind(b"\n") + 1
            text, rest = text[:end], text[end:]
            if len(rest) > size:
                raise DatasetFormatError(f"{path}: line {line} has more than {size} bytes")
            if text:
                block, columns = _parse(text, path, line, columns)
                line += text.count(b"\n")
                if block is not None:
                    yield block
                report(f"reading {path.name}", raw.tell(), total)
            if not chunk:
                return


def _parse(text: bytes, path: Path, line: int, columns: int) -> tuple[_Block | None, int]:
    """Edges of whole lines, and the number of columns (0: not known yet)."""
    if line == 1:
        text = text.removeprefix(codecs.BOM_UTF8)
    if b"#" in text or b"%" in text:
        text = re.sub(rb"(?m)^[ \t]*[#%].*$", b"", text)
    if not columns:
        first = text.lstrip(b"\r\n\t ,;")
        if line == 1 and first and not _NUMERIC[first[0]]:  # a first line of words is a header
            _check_header(text.lstrip(b"\r\n").split(b"\n", 1)[0], path)
            text = re.sub(rb"\A([\s,;]*)[^\n]*", rb"\1", text)
            first = text.lstrip(b"\r\n\t ,;")
        if not first:
            return None, 0
        columns = len(first.split(b"\n", 1)[0].translate(_TO_BLANK).split())
        if columns not in (2, 3):
            columns = 2  # the line itself is then told of
    data = np.frombuffer(text, np.uint8)
    blank = _SEPARATORS[data]
    begins = np.flatnonzero(~blank & np.concatenate(([True], blank[:-1])))  # [tokens]
    if not begins.size:
        return None, columns
    ends = np.flatnonzero(~blank & np.concatenate((blank[1:], [True]))) + 1
    breaks = np.flatnonzero(data == 10)
    row = np.searchsorted(breaks, begins)  # [tokens], line of each
    per_line = np.bincount(row)
    wrong = (per_line != 0) & (per_line != columns)
    allowed = _DIGITS if columns == 2 else _NUMERIC
    bad = row[(ends - begins > (_MAX_DIGITS if columns == 2 else 32))]
    strange = np.flatnonzero(~blank & ~allowed[data])
    lines = [np.flatnonzero(wrong)[:1], bad[:1], np.searchsorted(breaks, strange[:1])]
    values: Any = None
    if not any(found.size for found in lines):
        plain = text.translate(_TO_BLANK)
        kind = np.int64 if columns == 2 else np.float64
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)  # of NumPy 1: no number
                values = np.fromstring(plain, dtype=kind, sep=" ").reshape(-1, columns)
        except (ValueError, DeprecationWarning):
            lines = [row[[_first_no_number(plain)]]]
        else:
            if columns == 3:
                ids = values[:, :2]
                off = (ids != np.floor(ids)) | (ids < 0) | (ids > _MAX_NODES)
                off = off.any(axis=1) | ~(values[:, 2] >= 0) | ~np.isfinite(values[:, 2])
                lines = [row[::columns][np.flatnonzero(off)[:1]]]
    at = [int(found[0]) for found in lines if found.size]
    if at:
        number = min(at)
        content = text.split(b"\n")[number].strip()[:60].decode("ascii", "replace")
        what = "two node numbers" if columns == 2 else "two node numbers and a weight of 0 or more"
        raise DatasetFormatError(f"{path}: line {line + number} must hold {what}, got {content!r}")
    weights = values[:, 2].astype(np.float32) if columns == 3 else None
    return (values[:, 0].astype(np.int64), values[:, 1].astype(np.int64), weights), columns


def _check_header(line: bytes, path: Path) -> None:
    """Raise where the first two columns are not the ends of the edges."""
    cells = line.decode("utf-8", "replace").strip("\r ").translate(_TO_COMMA).split(",")
    header = [cell.strip().strip('"') for cell in cells]
    if header[0] in INDEX_NAMES and len(header) > 1:
        raise DatasetFormatError(
            f"{path} must have the ends of each edge in its first two columns, got an index column "
            f"without a name before {', '.join(header[1:])}; write it without the index (pandas: "
            f"index=False)"
        )
    require_ends_first(header, path)


def _first_no_number(text: bytes) -> int:
    """The position among blank-separated words of the first that is no number."""
    for i, word in enumerate(text.split()):
        try:
            float(word)
        except ValueError:
            return i
    return 0


def _array_blocks(path: Path, memory: int, report: Progress) -> Iterator[_Block]:
    """Edges [E, 2] or [2, E] of a ``.npy`` file, or of an array in a ``.npz`` archive."""
    with contextlib.ExitStack() as files:
        if path.name.lower().endswith(".npy"):
            opened: Callable[[], Any] = functools.partial(open, path, "rb")
            what = str(path)
        else:
            archive = files.enter_context(zipfile.ZipFile(path))
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            member = next((name for name in names if name in ("edges", "edge_index")), None)
            if member is None and len(names) == 1:
                member = names[0]
            if member is None:
                raise DatasetFormatError(
                    f"{path} must hold an array named edges or edge_index, got {', '.join(names)}"
                )
            opened, what = functools.partial(archive.open, f"{member}.npy"), f"{path}[{member}]"
        first, second = files.enter_context(opened()), files.enter_context(opened())
        shape, dtype, start = _npy_header(first)
        if len(shape) != 2 or 2 not in shape or dtype.kind not in "iu":
            raise DatasetFormatError(
                f"{what} must hold integers [E, 2] or [2, E], got {dtype} of shape {list(shape)}"
            )
        rows_of_pairs = shape[1] == 2 and shape[0] != 2
        count = shape[0] if rows_of_pairs else shape[1]
        step = max(1, memory // 128)
        _skip(second, start if rows_of_pairs else start + count * dtype.itemsize)
        for begin in range(0, count, step):
            length = min(step, count - begin)
            if rows_of_pairs:
                pairs = _numbers(first, 2 * length, dtype, what).reshape(length, 2)
                yield pairs[:, 0].copy(), pairs[:, 1].copy(), None
            else:
                yield (
                    _numbers(first, length, dtype, what),
                    _numbers(second, length, dtype, what),
                    None,
                )
            report(f"reading {path.name}", begin + length, count)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and where the numbers begin."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, dtype = read(file)
    if fortran:  # [2, E] by columns is [E, 2] by rows
        shape = shape[::-1]
    return shape, dtype, int(file.tell())


def _skip(file: Any, count: int) -> None:
    while count:
        piece = len(file.read(min(count, 1 << 24)))
        if not piece:
            return
        count -= piece


def _numbers(file: Any, count: int, dtype: np.dtype[Any], what: str) -> npt.NDArray[np.int64]:
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise DatasetFormatError(f"{what} is truncated")
    return np.frombuffer(content, dtype).astype(np.int64)


def _parquet(path: Path) -> Any:
    reader = parquet_reader(path)
    try:
        return reader.ParquetFile(path)
    except Exception as error:
        raise DatasetFormatError(f"{path} is no Parquet file ({error})") from None


def _parquet_blocks(path: Path, report: Progress) -> Iterator[_Block]:
    file = _parquet(path)
    names = [name for name in file.schema_arrow.names if name not in INDEX_NAMES]
    if len(names) not in (2, 3):
        raise DatasetFormatError(
            f"{path} must have two or three columns, got {len(names)}: {', '.join(names[:8])}"
        )
    require_ends_first(names, path)
    done, total = 0, file.metadata.num_rows
    for batch in file.iter_batches(batch_size=1 << 20, columns=names):
        values = [batch.column(i).to_numpy(zero_copy_only=False) for i in range(len(names))]
        for name, column in zip(names[:2], values, strict=False):
            if column.dtype.kind not in "iu":
                raise DatasetFormatError(f"{path}: {name} must hold integers, got {column.dtype}")
        weights = values[2].astype(np.float32) if len(values) == 3 else None
        if weights is not None and not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise DatasetFormatError(f"{path}: {names[2]} must hold weights of 0 or more")
        yield values[0].astype(np.int64), values[1].astype(np.int64), weights
        done += batch.num_rows
        report(f"reading {path.name}", done, total)


# --- two passes ----------------------------------------------------------------------------------


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
    limit = _MAX_NODES if n_nodes is None else n_nodes
    largest, n_read = -1, 0
    weighted: bool | None = None
    for path in sources:
        for u, v, w in _edge_blocks(path, memory, report):
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


# --- attributes and labels -----------------------------------------------------------------------


def _write_features(path: Path, folder: Path, memory: int, report: Progress) -> tuple[int, int]:
    """Copy the attributes in blocks of rows, checked, as float32; returns N and D."""
    name = path.name.lower()
    if name.endswith(".npz"):
        with _damage_told(path, "matrix of scipy.sparse"):
            matrix: Any = check_features(sp.load_npz(path), name="the matrix")
        np.save(folder / "x_indptr.npy", matrix.indptr.astype(np.int64))
        np.save(folder / "x_indices.npy", matrix.indices.astype(np.int32))
        np.save(folder / "x_data.npy", matrix.data)
        return int(matrix.shape[0]), int(matrix.shape[1])
    if name.endswith(".npy"):
        with _damage_told(path, "array of NumPy"):
            source = load_array(path, "r")
        if source.ndim != 2 or source.dtype.kind not in "biuf" or 0 in source.shape:
            raise DatasetFormatError(
                f"{path} must hold numbers [N, D], got {source.dtype} of shape {source.shape}"
            )
        n, d = source.shape
        step = max(1, memory // (32 * d))
        blocks: Iterator[Any] = (source[i : i + step] for i in range(0, n, step))
    elif name.endswith(".parquet"):
        file = _parquet(path)
        names = [column for column in file.schema_arrow.names if column not in INDEX_NAMES]
        n, d = file.metadata.num_rows, len(names)
        blocks = (
            np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
            for batch in file.iter_batches(batch_size=max(1, memory // (32 * d)), columns=names)
        )
    else:
        raise DatasetFormatError(f"{path} must be .npy, .npz of scipy.sparse, or .parquet")
    out = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, d))
    done = 0
    for block in blocks:
        if block.dtype.kind not in "biuf":
            raise DatasetFormatError(f"{path} must hold numbers only, got {block.dtype}")
        out[done : done + len(block)] = block
        _require_finite(out[done : done + len(block)], path, done)
        done += len(block)
        out.flush()
        report(f"copying {path.name}", done, n)
    return n, d


def _require_finite(values: Any, path: Path, first_row: int = 0) -> None:
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0]) + first_row
        raise DatasetFormatError(f"{path} must hold finite values, row {row} does not")


def _read_labels(path: Path, n: int) -> npt.NDArray[np.int64]:
    try:
        if path.name.lower().endswith(".npy"):
            labels = load_array(path)
        else:
            labels = np.loadtxt(path, dtype=np.int64, ndmin=1)
    except Exception as error:  # of a damaged file it can be nearly anything
        raise DatasetFormatError(f"{path} must hold one whole number per node ({error})") from None
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DatasetFormatError(
            f"{path} must hold one whole number of 0 or more per node ({n}), got {labels.dtype} "
            f"of shape {list(labels.shape)}"
        )
    return labels.astype(np.int64)


# --- command line --------------------------------------------------------------------------------

DESCRIPTION = """\
Convert an edge list of any length, and the attributes of its nodes, to a folder of arrays that
--dataset and fastclust.load_dataset map into memory."""

EPILOG = """\
examples:
  python -m fastclust.convert graph --edges edges.csv.gz --features features.npy
  python -m fastclust.convert graph --edges part-0.parquet part-1.parquet --n-nodes 2449029
  python -m fastclust.train --dataset graph/ --model ssgc --n-clusters 47

edges:     .txt .csv .tsv (.gz): two node numbers from 0 on and perhaps a weight per line;
           .npy .npz: integers [E, 2] or [2, E]; .parquet (needs pyarrow)
features:  .npy [N, D]; .npz of scipy.sparse.save_npz; .parquet with D numeric columns;
           without --features every node gets the same constant attribute
labels:    .npy or text, one whole number per node; used for scores only

Disk: 16 bytes per edge while it works, then 8 bytes per edge and 8 per node."""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; returns the exit code."""
    parser = cli.Parser(prog="python -m fastclust.convert", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("out", metavar="DIR", help="the folder to make")
    parser.add_argument("--edges", nargs="+", required=True, metavar="FILE", help="edge lists")
    parser.add_argument("--features", metavar="FILE", help="attributes of the nodes")
    parser.add_argument("--labels", metavar="FILE", help="known classes")
    parser.add_argument("--n-nodes", type=cli.count, metavar="N", help="number of nodes")
    parser.add_argument(
        "--memory",
        type=_size,
        default=1 << 30,
        metavar="SIZE",
        help="memory for blocks and buckets, as 512M or 2G (default: 1G)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    folder = convert(
        arguments.out,
        arguments.edges,
        features=arguments.features,
        labels=arguments.labels,
        n_nodes=arguments.n_nodes,
        memory=arguments.memory,
        progress=None if arguments.quiet else _Lines(),
    )
    meta = json.loads((folder / DIRECTORY_META).read_text())
    print(
        f"{folder}: {meta['n_nodes']} nodes, {meta['n_edges'] // 2} edges, "
        f"{cli.duration(time.perf_counter() - began)}"
    )
    return 0


class _Lines:
    """Progress on stderr: at most a line a second, over itself on a terminal."""

    def __init__(self) -> None:
        self.what, self.shown = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self.what and done < total and now - self.shown < 1.0:
            return
        over = sys.stderr.isatty() and what == self.what
        self.what, self.shown = what, now
        share = 100.0 * done / max(1, total)
        if sys.stderr.isatty():
            start = "\r" if over else "\n"
            print(f"{start}{what}  {share:.0f} %", end="", file=sys.stderr, flush=True)
        else:
            cli.note(f"{what}  {share:.0f} %")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"must be a size such as 512M or 2G, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


if __name__ == "__main__":
    cli.run(main)
