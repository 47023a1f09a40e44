"""fastclust.convert: what goes in comes out, in bounded memory; faults are told by their line."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import fastclust as fc
from fastclust import ops, train
from fastclust.convert import command, convert, passes, write_directory
from fastclust.datasets import DatasetFormatError, DatasetNotFoundError
from fastclust.datasets.folder import DIRECTORY_FORMAT, DIRECTORY_VERSION

EDGES = np.array([[0, 1], [1, 0], [2, 5], [5, 2], [3, 3], [1, 4], [1, 4]])


def expected(edges: Any, n: int, weights: Any = None) -> sp.csr_array:
    dense = np.zeros((n, n), np.float32)
    weights = np.ones(len(edges)) if weights is None else weights
    for (u, v), w in zip(edges, weights, strict=True):
        if u != v:
            dense[u, v] = dense[v, u] = max(dense[u, v], w)
    return sp.csr_array(dense)


def same(a: sp.csr_array, b: sp.csr_array) -> bool:
    return a.shape == b.shape and (a != b).nnz == 0


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "gz", "npy", "npz", "wide", "two"])
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    paths = [tmp_path / "edges.txt"]
    lines = [f"{u} {v}" for u, v in EDGES]
    if kind == "csv":
        paths = [tmp_path / "edges.csv"]
        lines = ["source,target", *[f"{u},{v}" for u, v in EDGES]]
    elif kind == "tsv":
        lines = ["# a comment", "", *[f"{u}\t{v}\r" for u, v in EDGES], "% another", ""]
    text = "\n".join(lines)
    if kind == "gz":
        paths = [tmp_path / "edges.txt.gz"]
        paths[0].write_bytes(gzip.compress(text.encode()))
    elif kind == "npy":
        paths = [tmp_path / "edges.npy"]
        np.save(paths[0], EDGES.astype(np.int32))
    elif kind in ("npz", "wide"):
        paths = [tmp_path / "edges.npz"]
        np.savez_compressed(paths[0], edge_index=EDGES.T if kind == "wide" else EDGES)
    elif kind == "two":
        paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for path, part in zip(paths, (lines[:3], lines[3:]), strict=True):
            path.write_text("\n".join(part))
    else:
        paths[0].write_text(text)
    ds = fc.load_dataset(convert(tmp_path / "graph", paths, n_nodes=8))
    assert same(ds.adjacency, expected(EDGES, 8))
    assert ds.labels is None and ds.features.shape == (8, 1)


@pytest.mark.parametrize("header", ["", "source,target\n", "# made by hand\n"])
def test_byte_order_mark_costs_no_edge(tmp_path: Path, header: str) -> None:
    (tmp_path / "e.csv").write_text(f"{header}0,1\n1,2\n", encoding="utf-8-sig")
    ds = fc.load_dataset(convert(tmp_path / "g", tmp_path / "e.csv"))
    assert same(ds.adjacency, expected([(0, 1), (1, 2)], 3))


def test_weights_count_once_with_the_largest(tmp_path: Path) -> None:
    weights = [1, 3.5, 2, 2, 9, 0.25, 1e-3]
    lines = [f"{u},{v},{w}" for (u, v), w in zip(EDGES, weights, strict=True)]
    (tmp_path / "e.csv").write_text("a,b,w\n" + "\n".join(lines) + "\n")
    ds = fc.load_dataset(convert(tmp_path / "graph", tmp_path / "e.csv"))
    assert same(ds.adjacency, expected(EDGES, 6, weights))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (",source,target", "an index column without a name before source, target"),
        ('"","source","target"', "an index column without a name before source, target"),
        ("id\tsource\ttarget", "got the columns id, source, target; put 'source' and 'target'"),
    ],
)
def test_ends_that_are_not_the_first_columns_are_told(
    tmp_path: Path, header: str, message: str
) -> None:
    mark = "\t" if "\t" in header else ","
    lines = [mark.join(map(str, (k, *edge))) for k, edge in enumerate(EDGES.tolist())]
    (tmp_path / "e.txt").write_text("\n".join([header, *lines]) + "\n")
    with pytest.raises(DatasetFormatError, match=re.escape(message)):
        convert(tmp_path / "g", tmp_path / "e.txt")


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).random((6, 3), np.float32)
    pq.write_table(pa.table({"u": EDGES[:, 0], "v": EDGES[:, 1]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({f"f{i}": x[:, i] for i in range(3)}), tmp_path / "x.parquet")
    folder = convert(tmp_path / "g", tmp_path / "e.parquet", features=tmp_path / "x.parquet")
    ds = fc.load_dataset(folder)
    assert same(ds.adjacency, expected(EDGES, 6)) and np.array_equal(ds.features, x)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    pairs=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=80),
    weighted=st.booleans(),
    limit=st.sampled_from([1 << 27, 640, 8]),
    seed=st.integers(0, 99),
)
def test_any_graph_any_limit(
    tmp_path_factory: pytest.TempPathFactory,
    n: int,
    pairs: list[tuple[int, int]],
    weighted: bool,
    limit: int,
    seed: int,
) -> None:
    """Small buckets and limits, so that buckets are many, are split, down to a single row."""
    edges = np.array(pairs, np.int64).reshape(-1, 2) % n
    weights = np.random.default_rng(seed).integers(1, 9, len(edges)) if weighted else None
    tmp = tmp_path_factory.mktemp("convert")
    columns = [edges] if weights is None else [edges, weights[:, None]]
    np.savetxt(tmp / "e.txt", np.concatenate(columns, axis=1), fmt="%d")
    original = passes._sorted_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_ROW_BITS", 3)
        patch.setattr(passes, "_SPLIT_BITS", 1)
        patch.setattr(passes, "_sorted_parts", lambda p, b, w, _: original(p, b, w, limit))
        folder = convert(tmp / "graph", tmp / "e.txt", n_nodes=n)
    ds = fc.load_dataset(folder)
    assert same(ds.adjacency, expected(edges, n, weights)), "symmetric, no loops, no repetitions"
    assert ds.adjacency.has_canonical_format


def test_features_labels_and_memory_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((6, 4))
    np.save(tmp_path / "x.npy", dense)
    sp.save_npz(tmp_path / "x.npz", sp.random(6, 9, 0.4, "csr", random_state=1))
    (tmp_path / "y.txt").write_text("0\n1\n2\n0\n1\n1\n")
    (tmp_path / "e.txt").write_text("\n".join(f"{u} {v}" for u, v in EDGES))
    for name in ("npy", "npz"):
        folder = convert(
            tmp_path / name, tmp_path / "e.txt", features=tmp_path / f"x.{name}",
            labels=tmp_path / "y.txt",
        )  # fmt: skip
        ds = fc.load_dataset(folder)
        assert ds.labels.tolist() == [0, 1, 2, 0, 1, 1] and ds.n_clusters == 3
        if name == "npy":
            assert np.array_equal(ds.features, dense.astype(np.float32))
            base = ds.features
            while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                base = base.base
            assert isinstance(base, np.memmap), "not read, but mapped"
        else:
            assert np.allclose(ds.features.toarray(), sp.load_npz(tmp_path / "x.npz").toarray())


def test_written_data_set_comes_back_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = fc.make_attributed_sbm(300, 1500, 8, 3)
    folder = write_directory(ds, tmp_path / "sbm")
    again = fc.load_dataset(folder)
    assert same(ds.adjacency, again.adjacency) and np.array_equal(ds.features, again.features)
    assert np.array_equal(ds.labels, again.labels)
    assert train.main(["--dataset", str(folder), "--model", "ssgc", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["n_nodes"] == 300


def test_no_name_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.txt").write_text("0 1\n")
    with pytest.raises(SystemExit, match="2"):
        command.main(["", "--edges", "e.txt"])
    assert "must be a path, got ''" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["e.txt"]


@pytest.mark.parametrize(
    ("text", "line", "content"),
    [
        ("0 1\n1 2\n3\n", 3, "3"),
        ("0 1\n1 2 3\n", 2, "1 2 3"),
        ("0 1\n# c\n\n1 x\n", 4, "1 x"),
        ("u v\n0 -1\n", 2, "0 -1"),
        ("0 1\n2 99999999999999999999\n", 2, "2 99999999999999999999"),
        ("0 1 0.5\n1.5 2 1\n", 2, "1.5 2 1"),
        ("0 1 0.5\n1 2 nan\n", 2, "1 2 nan"),
        ("0 1 0.5\n1 2 1e5e\n", 2, "1 2 1e5e"),
        ("0 1 0.5\n1 2 -1\n", 2, "1 2 -1"),
        ("7\n", 1, "7"),
    ],
)
def test_malformed_line_is_told(tmp_path: Path, text: str, line: int, content: str) -> None:
    path = tmp_path / "edges.txt"
    path.write_text(text)
    with pytest.raises(DatasetFormatError, match=rf"line {line} must hold.*got '{content}'") as e:
        convert(tmp_path / "graph", path)
    assert str(path) in str(e.value)
    assert os.listdir(tmp_path) == ["edges.txt"], "nothing is left behind"


def test_line_numbers_go_on_over_blocks(tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text("0 1\n" * 200_000 + "2 2 2\n")
    with pytest.raises(DatasetFormatError, match="line 200001 must"):
        convert(tmp_path / "graph", path, memory=1 << 24)


def test_other_faults(tmp_path: Path) -> None:
    path = tmp_path / "e.txt"
    path.write_text("0 1\n1 7\n")
    with pytest.raises(DatasetFormatError, match="from 0 to 3, got 7"):
        convert(tmp_path / "g", path, n_nodes=4)
    with pytest.raises(DatasetNotFoundError, match=r"nothing\.txt"):
        convert(tmp_path / "g", tmp_path / "nothing.txt")
    with pytest.raises(DatasetFormatError, match="must be a file, got a directory"):
        convert(tmp_path / "g", tmp_path)
    with pytest.raises(ValueError, match="must not exist yet"):
        convert(tmp_path, path)
    with pytest.raises(ValueError, match="memory must be at least"):
        convert(tmp_path / "g", path, memory=1)
    np.save(tmp_path / "x.npy", np.full((3, 2), np.nan))
    with pytest.raises(DatasetFormatError, match="row 0"):
        convert(tmp_path / "g", path, features=tmp_path / "x.npy")
    np.savez(tmp_path / "archive.npz", x=np.zeros((3, 2)))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for what in ("features", "labels"):
        with pytest.raises(DatasetFormatError, match="archive of arrays"):
            convert(tmp_path / "g", path, **{what: tmp_path / "archive.npy"})
    (tmp_path / "names.txt").write_text("0 1\n1 2000000000\n")  # no numbers from 0 on
    with pytest.raises(DatasetFormatError, match="only 2 edges"):
        convert(tmp_path / "g", tmp_path / "names.txt")
    (tmp_path / "half.txt.gz").write_bytes(gzip.compress(b"0 1\n" * 5000)[:40])
    with pytest.raises(DatasetFormatError, match="truncated or corrupt"):
        convert(tmp_path / "g", tmp_path / "half.txt.gz")
    assert not (tmp_path / "g").exists()


def test_archive_in_a_folder_is_refused(tmp_path: Path) -> None:
    a = sp.csr_array(np.array([[0, 1], [1, 0]], np.float32))
    folder = write_directory(
        fc.datasets.Dataset("x", a, np.ones((2, 3), np.float32), None, None), tmp_path / "g"
    )
    np.savez(tmp_path / "features.npz", x=np.ones((2, 3), np.float32))
    (tmp_path / "features.npz").replace(folder / "features.npy")
    with pytest.raises(DatasetFormatError, match="archive of arrays"):
        fc.load_dataset(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("adj_indices", np.array([99, 0], np.int32)),
        ("adj_indices", np.array([1, 0], np.int64)),
        ("adj_indptr", np.array([0, 2, 1], np.int64)),
        ("features", np.full((2, 3), np.inf, np.float32)),
        ("features", np.zeros((1, 3), np.float32)),
        ("labels", np.array([0, -1])),
        ("adj_indptr", None),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, name: str, array: Any) -> None:
    a = sp.csr_array(np.array([[0, 1], [1, 0]], np.float32))
    ds = fc.datasets.Dataset("x", a, np.ones((2, 3), np.float32), np.array([0, 1]), 2)
    folder = write_directory(ds, tmp_path / "g")
    if array is None:
        (folder / f"{name}.npy").unlink()
    else:
        np.save(folder / f"{name}.npy", array)
    with pytest.raises(DatasetFormatError, match=str(folder)):
        fc.load_dataset(folder)


INFINITE = {"format": DIRECTORY_FORMAT, "version": DIRECTORY_VERSION, "n_nodes": float("inf")}


@pytest.mark.parametrize(
    "text", [json.dumps(INFINITE), "[" * 100_000, "[]", "{}", "\udcff", ""], ids=range(6)
)
def test_damaged_sizes_are_refused(tmp_path: Path, text: str) -> None:
    a = sp.csr_array(np.array([[0, 1], [1, 0]], np.float32))
    ds = fc.datasets.Dataset("x", a, np.ones((2, 3), np.float32), np.array([0, 1]), 2)
    folder = write_directory(ds, tmp_path / "g")
    (folder / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetFormatError, match=str(folder)):
        fc.load_dataset(folder)


def test_64_bit_pointers_go_through_graph_and_propagate() -> None:
    import torch

    ds = fc.make_attributed_sbm(500, 2000, 4, 2)
    wide = ds.adjacency.copy()
    wide.indptr, wide.indices = wide.indptr.astype(np.int64), wide.indices.astype(np.int64)
    graph, other = fc.Graph(wide), fc.Graph(ds.adjacency)
    assert graph.indptr.dtype == torch.int64
    x = torch.from_numpy(ds.features)
    assert torch.equal(ops.propagate(graph, x), ops.propagate(other, x))


SCRIPT = """
import resource, sys
from fastclust.convert import convert
def peak():
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")][0] * 1024
before = peak()
convert(sys.argv[2], sys.argv[1], memory=1 << 26)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Three million edges, 48 MB of text and 48 MB of entries, within 64 MB."""
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 200_000, (3_000_000, 2), dtype=np.int32)
    edges[: 1 << 20, 0] = 5  # a hub, so that its bucket is the largest by far
    text = "\n".join([f"{u} {v}" for u, v in edges.tolist()])
    (tmp_path / "e.txt").write_text(text)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "e.txt"), str(tmp_path / "g")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 26, "what the converter took beyond the imported package"
    ds = fc.load_dataset(tmp_path / "g")
    keys = np.unique(np.sort(edges, axis=1).astype(np.int64) @ [1 << 32, 1])
    assert ds.n_edges == 2 * int((keys >> 32 != keys & 0xFFFFFFFF).sum())
