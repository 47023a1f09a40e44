"""A graph of one's own from files: a list of edges, a table of attributes, labels where there are.

===================  =============================================================================
``.csv .tsv .txt``   Text columns apart by tab, comma, semicolon or blanks. The first line is a
                     header unless it holds a number; it is one all the same where it names a
                     column that is looked for, or is 0, 1, 2, ... in a table of attributes. ``#``
                     and ``%`` begin lines of comment.
``.parquet``         The same as columns of a Parquet file; needs pyarrow.
``.npz``             A matrix from ``scipy.sparse.save_npz``.
``.mtx``             A matrix in Matrix Market format, also ``.mtx.gz``.
``.npy``             A dense matrix from ``numpy.save``.
===================  =============================================================================

Nodes are rows of the attributes. A column ``id``, ``node`` or ``node_id`` of the attribute table
gives them names, by which the edges and labels may then call them, and so does the index that
pandas writes as a column without a name; otherwise they are 0, 1, 2, ... Nothing is ever unpickled.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
import scipy.sparse as sp

from fastclust.cli import did_you_mean
from fastclust.datasets import (
    Dataset,
    DatasetFormatError,
    DatasetNotFoundError,
    nearest_neighbor_graph,
)
from fastclust.datasets.folder import load_array
from fastclust.validation import DataWarning, check_adjacency, check_features, check_labels

__all__ = ["INDEX_NAMES", "existing_file", "load_files", "parquet_reader", "require_ends_first"]

ID_COLUMNS = ("id", "node", "node_id")
_EDGE_PAIRS = (("source", "target"), ("src", "dst"), ("from", "to"), ("u", "v"), ("node1", "node2"))
_EDGE_WORDS = frozenset(itertools.chain(*_EDGE_PAIRS))
# What pandas and R call the column of an index without a name, in text, read again, in Parquet.
INDEX_NAMES = ("", "Unnamed: 0", "__index_level_0__")
_MATRICES = (".npz", ".mtx", ".npy")

PathLike = str | os.PathLike[str]


def load_files(
    edges: PathLike | None = None,
    features: PathLike | None = None,
    labels: str | os.PathLike[str] | None = None,
    *,
    ids: str | None = None,
    n_neighbors: int = 10,
) -> Dataset:
    """Read an attributed graph from files of one's own.

    Parameters
    ----------
    edges : path, optional
        A table of two columns, the ends of each undirected edge, and optionally a third, its
        weight; an edge that is listed again counts once, with its largest weight. An index column
        without a name, as pandas writes it, is left out. Or a square matrix. Without it: the graph
        of ``n_neighbors`` nearest neighbours of the attributes.
    features : path
        The attributes, a table of numbers or a matrix [N, D].
    labels : str or path, optional
        A column of the attribute table, or a file: a table with one label per node in the order of
        the nodes, or with two columns, node and label.
    ids : str, optional
        The column of the attribute table that names the nodes; by default ``id``, ``node`` or
        ``node_id``, where there is one, or the index column without a name.
    n_neighbors : int, default 10
        Of the graph made of the attributes where no edges are given.

    Returns
    -------
    Dataset

    Raises
    ------
    DatasetNotFoundError
        A file does not exist.
    DatasetFormatError
        A file is damaged, not what its suffix says, or does not fit the others. The message names
        the file and, where it can, the line or column.
    """
    if features is None:
        raise DatasetFormatError("--features FILE is required with --edges, --labels or --ids")
    path = existing_file(features)
    table = None
    if not _is_matrix(path):
        asked = [os.fspath(name) for name in (ids, labels) if name is not None]
        table = _Table.read(path, words=(*ID_COLUMNS, *asked))
    if labels is not None:
        _require_labels(os.fspath(labels), [] if table is None else table.header)
    names = label_column = None
    if table is None:
        matrix = _checked(check_features, _matrix(path), name=str(path))
        if ids is not None:
            raise DatasetFormatError(f"ids must be left out: {path} is a matrix without columns")
    else:
        id_column = _id_column(table, ids)
        if id_column is not None:
            names = _unique_names(table.text(id_column), table, id_column)
        if labels is not None and os.fspath(labels) in table.header:
            label_column = table.header.index(os.fspath(labels))
        left_out = (id_column, label_column, table.index_column)
        numeric = [i for i in range(table.width) if i not in left_out]
        matrix = _checked(check_features, table.numbers(numeric), name=str(path))
    n = int(matrix.shape[0])

    if edges is None:
        adjacency = nearest_neighbor_graph(matrix, n_neighbors)
    else:
        adjacency = _adjacency(existing_file(edges), n, names)
    classes = None
    if label_column is not None and table is not None:
        classes = _numbered(table.text(label_column), n, names)
    elif labels is not None:
        classes = _numbered(_labels(labels, n, names), n, names)
    k = None if classes is None else int(classes.max()) + 1
    return Dataset(path.name.partition(".")[0], adjacency, matrix, classes, k, names)


def _require_labels(labels: str, header: Sequence[str]) -> None:
    """Raise unless the labels are a column of the attribute table or a file."""
    if labels not in header and not Path(labels).expanduser().exists():
        raise DatasetNotFoundError(
            f"labels must be a column of the attribute table or a file, got {labels!r}"
            + did_you_mean(labels, header)
        )


# --- edges and labels -----------------------------------------------------------------------------


def _adjacency(path: Path, n: int, names: npt.NDArray[np.str_] | None) -> sp.csr_array:
    if _is_matrix(path):
        return _checked(check_adjacency, _matrix(path), n, name=str(path))
    table = _Table.read(path, edge_list=True, names=names)
    columns = [i for i in range(table.width) if i != table.index_column]
    if len(columns) not in (2, 3):
        raise DatasetFormatError(
            f"{path} must have two columns, the ends of each edge, and at most a third, its "
            f"weight; got {len(columns)}"
        )
    require_ends_first([table.header[i] for i in columns] if table.header else [], path)
    ends = np.stack([_nodes(table.text(i), n, names, path) for i in columns[:2]])  # [2, E]
    weights = np.ones(ends.shape[1], np.float32)
    if len(columns) == 3:
        weights = table.numbers(columns[2:])[:, 0]
    # One entry per pair of nodes, of the largest of its weights, in both directions.
    low, high = np.minimum(*ends), np.maximum(*ends)
    order = np.lexsort((-weights, high, low))
    low, high, weights = low[order], high[order], weights[order]
    first = np.r_[True, (low[1:] != low[:-1]) | (high[1:] != high[:-1])][: low.size]
    low, high, weights = low[first], high[first], weights[first]
    upper = sp.csr_array((weights, (low, high)), shape=(n, n))
    return _checked(check_adjacency, upper + upper.T, n, name=str(path))


def require_ends_first(header: Sequence[str], path: Path) -> None:
    """Raise where the header of an edge list names the ends, but not in its first two columns."""
    words = [word.lower() for word in header]
    for pair in _EDGE_PAIRS:
        if set(pair) <= set(words) and set(words[:2]) != set(pair):
            raise DatasetFormatError(
                f"{path} must have the ends of each edge in its first two columns, got the columns "
                f"{', '.join(header)}; put {pair[0]!r} and {pair[1]!r} first, and at most a weight "
                f"behind them"
            )


def _nodes(
    ends: npt.NDArray[np.str_], n: int, names: npt.NDArray[np.str_] | None, path: Path
) -> npt.NDArray[np.int64]:
    """Node numbers from names, or from numbers as text."""
    if names is None:
        try:
            nodes = ends.astype(np.int64)
        except (ValueError, OverflowError):
            bad = str(next(end for end in ends if not re.fullmatch("[+-]?[0-9]{1,18}", end)))
            raise DatasetFormatError(
                f"{path} must hold node numbers 0..{n - 1}, got {bad!r}; for nodes with names, "
                f"give the attribute table a column {ID_COLUMNS[0]!r}, or name it with --ids"
            ) from None
        if nodes.size and not 0 <= nodes.min() <= nodes.max() < n:
            raise DatasetFormatError(
                f"{path} must hold node numbers 0..{n - 1}, one per row of the attributes, got "
                f"{nodes.min()}..{nodes.max()}; numbers count from 0"
            )
        return nodes
    order = np.argsort(names)
    place = np.minimum(np.searchsorted(names, ends, sorter=order), n - 1)
    nodes = order[place]
    unknown = np.flatnonzero(names[nodes] != ends)
    if unknown.size:
        raise DatasetFormatError(
            f"{path} must hold nodes of the attribute table only, got {str(ends[unknown[0]])!r}, "
            f"which is not in its id column ({unknown.size} such entries)"
        )
    return nodes


def _labels(labels: PathLike, n: int, names: npt.NDArray[np.str_] | None) -> npt.NDArray[Any]:
    path = existing_file(labels)
    if path.suffix == ".npy":
        array = _matrix(path)
        return np.asarray(array).reshape(-1)
    table = _Table.read(path, names=names)
    if table.width == 1:
        classes = table.text(0)
        if classes.size == n - 1 and table.header:
            classes = np.concatenate([table.header, classes])  # a label like the others
    elif table.width == 2:
        nodes = _nodes(table.text(0), n, names, path)
        if np.unique(nodes).size != nodes.size:
            raise DatasetFormatError(f"{path} must hold one label per node, some have two")
        classes = np.full(n, "", dtype=table.text(1).dtype)
        classes[nodes] = table.text(1)
    else:
        raise DatasetFormatError(
            f"{path} must have one column of labels, or two, node and label; got {table.width}"
        )
    if classes.size != n:
        raise DatasetFormatError(f"{path} must hold one label per node ({n}), got {classes.size}")
    return classes


def _numbered(
    classes: npt.NDArray[Any], n: int, names: npt.NDArray[np.str_] | None
) -> npt.NDArray[np.int64]:
    """Labels as numbers from 0 on; every node must have one."""
    if classes.dtype.kind in "OSU":
        without = np.flatnonzero(np.char.str_len(classes.astype(str)) == 0)
        if without.size:
            name = int(without[0]) if names is None else str(names[without[0]])
            raise DatasetFormatError(
                f"labels: {without.size} nodes have none, the first is {name!r}; give every "
                f"node a label, or leave --labels out"
            )
    return np.asarray(_checked(check_labels, classes, n, name="labels"))


def _id_column(table: _Table, ids: str | None) -> int | None:
    if ids is None:
        found = [i for i, name in enumerate(table.header) if name.lower() in ID_COLUMNS]
        return found[0] if found else table.index_column
    if ids not in table.header:
        raise DatasetFormatError(
            f"{table.path} must have the column {ids!r} that ids names"
            + did_you_mean(ids, table.header)
        )
    return table.header.index(ids)


def _unique_names(names: npt.NDArray[np.str_], table: _Table, column: int) -> npt.NDArray[np.str_]:
    values, counts = np.unique(names, return_counts=True)
    if (counts > 1).any():
        raise DatasetFormatError(
            f"{table.path} must name every node once, got {str(values[counts.argmax()])!r} "
            f"{counts.max()} times in column {table.header[column]!r}"
        )
    return names


# --- files ----------------------------------------------------------------------------------------


def existing_file(path: PathLike) -> Path:
    """The path of a file, ``~`` expanded.

    Raises
    ------
    DatasetNotFoundError
        There is nothing.
    DatasetFormatError
        It is a directory or a special file.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise DatasetNotFoundError(f"{found} does not exist; give the path of a file")
    if not found.is_file():
        raise DatasetFormatError(f"{found} must be a file, got a directory or special file")
    return found


def _is_matrix(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(_MATRICES)


def _matrix(path: Path) -> Any:
    """A matrix from a .npz, .mtx or .npy file, sparse or dense."""
    try:
        if path.suffix == ".npz":
            return sp.load_npz(path)  # as it is: conversions trust indices that nobody checked
        if path.suffix == ".npy":
            return load_array(path)
        return _matrix_market(path)
    except Exception as error:  # a damaged file can raise nearly anything
        text = " ".join(str(error).split())[:160]
        kind = {".npz": "scipy.sparse.save_npz", ".npy": "numpy.save"}.get(path.suffix)
        raise DatasetFormatError(
            f"{path} must be a matrix "
            f"{f'written by {kind}' if kind else 'in Matrix Market format'}: "
            f"{text or type(error).__name__}"
        ) from None


def _matrix_market(path: Path) -> Any:
    """A real matrix in Matrix Market format; coordinates as scipy sparse, arrays as NumPy array.

    scipy's own reader writes past the end of its memory where the body does not fit the header
    (seen with SciPy 1.17); so only the header is left to it.
    """
    rows, columns, entries, form, field, symmetry = scipy.io.mminfo(path)
    if symmetry not in ("general", "symmetric") or field == "complex":
        raise ValueError(f"{field} {symmetry} matrices are not read; write it as real general")
    sparse = form == "coordinate"
    triangle = symmetry == "symmetric" and not sparse
    expected = rows * (rows + 1) // 2 if triangle else entries
    width = (2 if field == "pattern" else 3) if sparse else 1
    with _open_text(path) as file:
        lines = itertools.islice(filter(_is_data, file), 1, expected + 2)
        first = next(lines, None)  # loadtxt warns of no lines at all
        body = np.empty((0, width))
        if first is not None:
            body = np.loadtxt(itertools.chain([first], lines), comments=None, ndmin=2)
    if body.shape != (expected, width):
        raise ValueError(f"its header says {expected} lines of {width} numbers, got {body.shape}")
    if sparse:
        with np.errstate(invalid="ignore"):
            place = body[:, :2].T.astype(np.int64) - 1  # [2, entries]
        if (place + 1 != body[:, :2].T).any():
            raise ValueError("rows and columns must be whole numbers")
        values = body[:, 2] if width == 3 else np.ones(entries)
        if symmetry == "symmetric":
            off = place[0] != place[1]
            values = np.concatenate([values, values[off]])
            place = np.concatenate([place, place[::-1, off]], axis=1)
        return sp.coo_array((values, tuple(place)), shape=(rows, columns))
    if not triangle:
        return body.reshape(columns, rows).T
    if rows != columns:
        raise ValueError("a symmetric matrix must be square")
    upper = np.zeros((rows, rows))
    upper[np.triu_indices(rows)] = body[:, 0]  # the columns of the lower triangle, one by one
    return upper + np.triu(upper, 1).T


def _checked(check: Any, *arguments: Any, name: str) -> Any:
    """The result of a check, its errors as errors of a file."""
    try:
        return check(*arguments, name=name)
    except (TypeError, ValueError) as error:
        raise DatasetFormatError(str(error)) from None


@dataclass
class _Table:
    """Columns of a text or Parquet file; ``header`` is empty where columns have no names."""

    path: Path
    header: list[str]
    width: int
    separator: str | None = None
    skip: int = 0  # lines before the data
    first: int = 1  # the line that tells the number of columns
    parquet: Any = None

    @property
    def index_column(self) -> int | None:
        """The column of an index that has no name, or None."""
        return next((i for i, name in enumerate(self.header) if name in INDEX_NAMES), None)

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        edge_list: bool = False,
        names: npt.NDArray[np.str_] | None = None,
        words: Collection[str] = (),
    ) -> _Table:
        if path.suffix == ".parquet":
            return cls._read_parquet(path)
        try:
            with _open_text(path) as file:
                # A tab in front stands behind an empty name.
                used = (
                    (i, line.strip("\r\n ").rstrip())
                    for i, line in enumerate(file)
                    if _is_data(line)
                )
                head = list(itertools.islice(used, 2))
            if not head:
                raise DatasetFormatError(f"{path} must hold a table, got no line of data")
            separator = next((mark for mark in "\t,;" if mark in head[0][1]), None)
            rows = [_split(line, separator) for _, line in head]
        except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
            raise DatasetFormatError(f"{path} must be a text table: {error}") from None
        first = rows[0]
        is_header = not any(map(_is_number, first))
        if edge_list and is_header:
            # Ends may be names: then only known words or numbers below tell a header.
            known = {word.lower() for word in first}
            is_header = bool(known & _EDGE_WORDS) or any(map(_is_number, rows[-1][:2]))
        if names is not None and len(first) > 1 and first[0] in names:
            is_header = False  # it begins with the name of a node
        numbered = [str(i) for i in range(len(first))]  # as pandas names columns without names
        if any(word in words or word.lower() in words for word in first) or (
            len(first) > 1 and first == ["", *numbered[:-1]]
        ):
            is_header = True
        elif words and len(first) > 2 and first == numbered:
            is_header = True
            warnings.warn(
                f"{path} begins with {', '.join(first[:3])}, ...: taken for the names that pandas "
                f"gives to columns; if it is the first node, write a header above it",
                DataWarning,
                stacklevel=3,
            )
        skip = head[0][0] + is_header
        header = first if is_header else []
        return cls(path, header, len(first), separator, skip, head[0][0] + 1)

    @classmethod
    def _read_parquet(cls, path: Path) -> _Table:
        reader = parquet_reader(path)
        try:
            table = reader.read_table(path)
        except Exception as error:  # pyarrow has many kinds
            text = " ".join(str(error).split())[:160]
            raise DatasetFormatError(f"{path} must be a Parquet file: {text}") from None
        return cls(path, list(table.column_names), table.num_columns, parquet=table)

    def text(self, column: int) -> npt.NDArray[np.str_]:
        """One column as text, without blanks around it."""
        if self.parquet is not None:
            values = self.parquet.column(column).to_pylist()
            return np.array(["" if value is None else str(value) for value in values])
        return np.char.strip(self._load([column], str)[:, 0])

    def numbers(self, columns: Sequence[int]) -> npt.NDArray[np.floating[Any]]:
        """Columns of numbers, float32 [rows, columns].

        They are float64 where one is infinite as float32, so that the check which follows can tell
        a number that is too large from one that is not finite.
        """
        if not columns:
            raise DatasetFormatError(f"{self.path} must have columns of numbers, the attributes")
        if self.parquet is None:
            table = self._load(columns, np.float32)
            return self._load(columns, np.float64) if np.isinf(table).any() else table
        arrays: list[npt.NDArray[Any]] = []
        for column in columns:
            array = self.parquet.column(column).to_numpy()
            if array.dtype.kind not in "biuf":
                raise DatasetFormatError(self._not_numeric(column, str(array[0])))
            with np.errstate(over="ignore"):
                narrow = array.astype(np.float32)
            arrays.append(array.astype(np.float64) if np.isinf(narrow).any() else narrow)
        return np.stack(arrays, axis=1)

    def _load(self, columns: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
        try:
            with _open_text(self.path) as file:
                return np.loadtxt(
                    self._lines(file),
                    dtype=dtype,
                    comments=None,
                    delimiter=self.separator,
                    usecols=columns,
                    quotechar='"',
                    ndmin=2,
                )
        except DatasetFormatError:
            raise
        except (ValueError, IndexError, UnicodeDecodeError, OSError, EOFError) as error:
            text = " ".join(str(error).split()).partition("; use")[0][:160]
            if dtype is not str:
                with _open_text(self.path) as file:
                    line = next(itertools.islice(file, self.skip, None), "")
                for column, word in enumerate(_split(line.rstrip(), self.separator)):
                    if column in columns and not _is_number(word):
                        text = self._not_numeric(column, word)
                        raise DatasetFormatError(text) from None
            raise DatasetFormatError(
                f"{self.path} must be a table of {self.width} columns: {text} (rows of data count "
                f"from 0)"
            ) from None

    def _lines(self, file: Iterable[str]) -> Iterator[str]:
        """Lines of data. NumPy reads chosen columns of a line without a look at how many it has."""
        for number, line in enumerate(itertools.islice(file, self.skip, None), self.skip + 1):
            if not _is_data(line):
                continue
            if self.separator is None:
                width = len(line.split())
            else:
                width = line.rstrip().count(self.separator) + 1
            if width != self.width and '"' not in line:
                raise DatasetFormatError(
                    f"{self.path} must have as many columns in every line, got {self.width} in "
                    f"line {self.first} and {width} in line {number}; name every column, and quote "
                    f"text that holds the separator"
                )
            yield line

    def _not_numeric(self, column: int, value: str) -> str:
        name = self.header[column] if self.header else f"{column + 1}"
        return (
            f"{self.path} must hold numbers in its attribute columns, got {value!r} in column "
            f"{name!r}; leave the column out, encode it, or name it with --ids or --labels"
        )


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


def _open_text(path: Path) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _is_data(line: str) -> bool:
    return line.strip() != "" and line.lstrip()[0] not in "#%"


def _split(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    rows: Iterator[list[str]] = csv.reader([line], delimiter=separator)
    return [word.strip() for word in next(rows)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
