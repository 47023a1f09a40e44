"""Edges from files of any length and several kinds, a block at a time."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastclust.datasets import DatasetFormatError
from fastclust.tables import INDEX_NAMES, parquet_reader, require_ends_first

MAX_NODES = 2**31 - 1  # neighbours are int32
_MAX_DIGITS = 18

# Sources, destinations and weights (or None) of a block of edges.
Block = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32] | None]
Progress = Callable[[str, int, int], None]  # what is done, units done, units in all


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def edge_blocks(path: Path, memory: int, report: Progress) -> Iterator[Block]:
    """The edges of a file in blocks, whatever it is."""
    name = path.name.lower()
    if name.endswith((".npy", ".npz")):
        with damage_told(path, "array of NumPy"):
            yield from _array_blocks(path, memory, report)
    elif name.endswith(".parquet"):
        with damage_told(path, "Parquet file"):
            yield from _parquet_blocks(path, report)
    else:
        yield from _text_blocks(path, memory, report)


@contextlib.contextmanager
def damage_told(path: Path, kind: str) -> Iterator[None]:
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


def _text_blocks(path: Path, memory: int, report: Progress) -> Iterator[Block]:
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


def _parse(text: bytes, path: Path, line: int, columns: int) -> tuple[Block | None, int]:
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
                off = (ids != np.floor(ids)) | (ids < 0) | (ids > MAX_NODES)
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


def _array_blocks(path: Path, memory: int, report: Progress) -> Iterator[Block]:
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


def open_parquet(path: Path) -> Any:
    reader = parquet_reader(path)
    try:
        return reader.ParquetFile(path)
    except Exception as error:
        raise DatasetFormatError(f"{path} is no Parquet file ({error})") from None


def _parquet_blocks(path: Path, report: Progress) -> Iterator[Block]:
    file = open_parquet(path)
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
