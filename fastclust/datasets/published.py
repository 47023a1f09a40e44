"""The benchmark graphs as their authors published them: which files, and what is made of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust.datasets.dataset import Dataset, DatasetFormatError, assemble
from fastclust.datasets.npz import from_arrays, unzip
from fastclust.datasets.unpickling import unpickle, unpickle_array, unpickle_matrix
from fastclust.validation import without_diagonal


@dataclass(frozen=True)
class Source:
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


def build_gnn_benchmark(contents: Mapping[str, bytes], key: str) -> Dataset:
    ((file, content),) = contents.items()
    return from_arrays(unzip(io.BytesIO(content), file), key, file, binary=True)


def build_planetoid(contents: Mapping[str, bytes], key: str) -> Dataset:
    """Rows 0.. are ``allx``; row ``test.index[i]`` is ``tx[i]``.

    The ids missing from ``test.index`` (15 in citeseer) keep an all-zero row and class 0, as in
    the arrays that the literature uses.
    """
    source = f"ind.{key}.*"
    parts = {file.removeprefix(f"ind.{key}."): data for file, data in contents.items()}
    allx, tx = (unpickle_matrix(parts[part], f"ind.{key}.{part}") for part in ("allx", "tx"))
    ally, ty = (unpickle_array(parts[part], f"ind.{key}.{part}") for part in ("ally", "ty"))
    graph = unpickle(parts["graph"], f"ind.{key}.graph")
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
    return assemble(key, without_diagonal(adjacency), features, labels, source)


def build_airports(contents: Mapping[str, bytes], key: str) -> Dataset:
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
    return assemble(key, without_diagonal(adjacency), features, labels, edge_file)


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


SOURCES = {
    "cora": Source(
        _planetoid_files("cora"),
        build_planetoid,
        "c695a0c340354939807124bad76c584be16da4cabfb72fdb5d18e9b47186199e",
    ),
    "citeseer": Source(
        _planetoid_files("citeseer"),
        build_planetoid,
        "52999914a0be96951a6d31af32ef6e53171a6dea0afa7ae575e28045d98b035d",
    ),
    "amap": Source(
        ("shchur/gnn-benchmark/master/data/npz/amazon_electronics_photo.npz",),
        build_gnn_benchmark,
        "ca346736a6dfff399c76ea9357d98c183a0ef191ad5cc5f495657831dcb05964",
        blob_id="97323743cb56aca9dd611f5b4b46862c1c9c6bd9",
    ),
    "amac": Source(
        ("shchur/gnn-benchmark/master/data/npz/amazon_electronics_computers.npz",),
        build_gnn_benchmark,
        "e4e10f2c3a46099f0c2a33d6161bca0d0b87dc3a02f370e48c8b10b929e89178",
        blob_id="8120e4148a330b3fafe37c4476823302d9d834b9",
    ),
    "eat": Source(
        _airport_files("europe"),
        build_airports,
        "3b87bf363e90d37b85aeaf8f04cb0b9c9b7bfc3c15899775bfef61622c3f3c49",
    ),
    "uat": Source(
        _airport_files("usa"),
        build_airports,
        "5d2d71ecc6d9d2be91a3ceb1e596dd4d57a5142ac993ba808a6a316e715d4c15",
    ),
    "bat": Source(
        _airport_files("brazil"),
        build_airports,
        "b393c961c166fcb5751faeb7a89c5151b9070f51133f3b63dae1fc3bf22f06af",
    ),
}
