"""Files, names, downloads: the right arrays, or one clear line about what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import http.server
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from fastclust import datasets, memory
from fastclust.datasets import (
    Dataset,
    DatasetFormatError,
    DatasetNotFoundError,
    array_digest,
    download,
    load_dataset,
    load_npz,
    nearest_neighbor_graph,
    npz,
    published,
)
from fastclust.validation import DataWarning

GRAPHS = ("cora", "citeseer", "amap", "amac", "eat", "uat", "bat")

# --- the published formats, written from arrays ---------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings as str, modules by their names of that time."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)

    def save_str(self, obj: str) -> None:
        self.save_bytes(obj.encode("latin1"))

    def save_global(self, obj: object, name: str | None = None) -> None:
        module, qualname = obj.__module__, name or obj.__qualname__
        renamed = {
            "builtins": "__builtin__",
            "copyreg": "copy_reg",
            "numpy._core.multiarray": "numpy.core.multiarray",
            "scipy.sparse._csr": "scipy.sparse.csr",
        }
        line = f"{renamed.get(module, module)}\n{qualname}\n"
        self.write(pickle.GLOBAL + line.encode("ascii"))
        self.memoize(obj)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str
    dispatch[type] = save_global
    dispatch[type(np.empty(0).__reduce__()[0])] = save_global


def python2_pickle(obj: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(obj)
    return buffer.getvalue()


def to_planetoid(dataset: Dataset, n_test: int, n_missing: int, dumps) -> dict[str, bytes]:
    """Rows of the last ``n_test`` nodes become shuffled test rows, some of which are left out."""
    n, k = dataset.n_nodes, dataset.n_clusters
    n_train = n - n_test
    features = sp.csr_matrix(dataset.features)
    one_hot = np.eye(k, dtype=np.int32)[dataset.labels]
    test = np.arange(n_train, n)
    if n_missing:
        empty = np.flatnonzero(np.diff(features.indptr) == 0)
        assert len(empty) == n_missing
        test = np.setdiff1d(test, empty)
    test = np.random.default_rng(0).permutation(test)
    graph = collections.defaultdict(list)
    for i in range(n):
        start, stop = dataset.adjacency.indptr[i : i + 2]
        graph[i] = [int(j) for j in dataset.adjacency.indices[start:stop][::-1]]
        if i % 50 == 0:
            graph[i] += [i, *graph[i][:1]]  # a self loop and a repeated edge
    name = dataset.name
    return {
        f"ind.{name}.allx": dumps(features[:n_train]),
        f"ind.{name}.ally": dumps(one_hot[:n_train]),
        f"ind.{name}.tx": dumps(features[test]),
        f"ind.{name}.ty": dumps(one_hot[test]),
        f"ind.{name}.graph": dumps(graph),
        f"ind.{name}.test.index": "".join(f"{i}\n" for i in test).encode(),
    }


def to_airports(dataset: Dataset, country: str, shuffle: bool) -> dict[str, bytes]:
    """Self loops are what the one-hot degree counts beyond the adjacency."""
    rng = np.random.default_rng(0)
    n = dataset.n_nodes
    ids = rng.permutation(np.arange(10_000, 10_000 + n)) if shuffle else np.arange(n)
    coo = sp.triu(dataset.adjacency).tocoo()
    loops = np.flatnonzero(dataset.features.indices - np.diff(dataset.adjacency.indptr))
    edges = np.concatenate([np.stack([coo.row, coo.col], 1), np.stack([loops, loops], 1)])
    edges = rng.permutation(np.concatenate([edges, edges[:3, ::-1]]))  # some in both directions
    edge_text = "".join(f"{ids[i]} {ids[j]}\n" for i, j in edges)
    pairs = zip(ids, dataset.labels, strict=True)
    label_text = "node label\n" + "".join(f"{node} {label}\n" for node, label in pairs)
    return {
        f"{country}-airports.edgelist": edge_text.encode(),
        f"labels-{country}-airports.txt": label_text.encode(),
    }


def to_gnn_benchmark(dataset: Dataset, **changes: np.ndarray) -> bytes:
    """One direction of most edges, both of some, a self loop, and counts for features."""
    upper = sp.triu(dataset.adjacency).tocoo()
    rng = np.random.default_rng(0)
    flip = rng.random(upper.nnz) < 0.5
    rows, cols = np.where(flip, upper.col, upper.row), np.where(flip, upper.row, upper.col)
    rows, cols = np.r_[rows, cols[:5], 3], np.r_[cols, rows[:5], 3]
    shape = dataset.adjacency.shape
    adjacency = sp.csr_array((np.ones(rows.size, np.float32), (rows, cols)), shape=shape)
    features = sp.csr_array(dataset.features)
    arrays = {
        "adj_data": adjacency.data,
        "adj_indices": adjacency.indices,
        "adj_indptr": adjacency.indptr,
        "adj_shape": np.array(shape),
        "attr_data": features.data * rng.integers(1, 4, features.nnz).astype(np.float32),
        "attr_indices": features.indices,
        "attr_indptr": features.indptr,
        "attr_shape": np.array(features.shape),
        "labels": dataset.labels,
        "class_names": np.array([b"kept", b"out"], dtype=object),  # pickled; must not be touched
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **(arrays | changes))
    return buffer.getvalue()


def assert_same(left: Dataset, right: Dataset) -> None:
    for a, b in ((left.adjacency, right.adjacency), (left.features, right.features)):
        assert a.shape == b.shape
        for part in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(a, part), getattr(b, part))
            assert getattr(a, part).dtype == getattr(b, part).dtype
    np.testing.assert_array_equal(left.labels, right.labels)
    assert left.n_clusters == right.n_clusters


# --- fixtures -------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Dataset:
    """40 nodes, 12 binary features, 3 classes."""
    rng = np.random.default_rng(3)
    upper = sp.triu(sp.random_array((40, 40), density=0.15, rng=rng), 1)
    adjacency = sp.csr_array(((upper + upper.T) > 0).astype(np.float32))
    features = sp.csr_array((rng.random((40, 12)) < 0.3).astype(np.float32))
    arrays = {
        "adj_indptr": adjacency.indptr.astype(np.int64),
        "adj_indices": adjacency.indices,
        "x_indptr": features.indptr,
        "x_indices": features.indices,
        "x_data": features.data,
        "shape_x": np.array(features.shape),
        "labels": rng.permutation(np.arange(40) % 3),
    }
    return npz.from_uniform(arrays, "small", "test")


@pytest.fixture
def uniform(small) -> dict[str, np.ndarray]:
    return npz.to_uniform(small)


@pytest.fixture(autouse=True)
def no_places(tmp_path, monkeypatch):
    """No data folder, an empty cache, no network, no waiting."""
    monkeypatch.delenv("FASTCLUST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTCLUST_DATA_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setattr(download, "_RETRY_PAUSE", 0.0)


class Server:
    """Serves ``files`` by name; a number in place of content is a status."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | int] = {}
        self.cut: set[str] = set()  # announced in full, broken off half-way
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[1]
                outer.requests.append(name)
                content = outer.files.get(name, 404)
                if isinstance(content, int):
                    self.send_error(content)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if name in outer.cut else content)

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("FASTCLUST_DATA_URL", server.url)
    yield server
    server.close()


def publish(monkeypatch, dataset: Dataset, key: str, content: bytes | None = None) -> None:
    """Make ``dataset`` what ``key`` stands for."""
    source = published.SOURCES[key]
    blob_id = None if content is None else download.git_blob_id(content)
    changed = dataclasses.replace(source, digest=array_digest(dataset), blob_id=blob_id)
    monkeypatch.setitem(published.SOURCES, key, changed)


def cache_file(tmp_path: Path, key: str) -> Path:
    return tmp_path / "cache" / "fastclust" / f"{key}.npz"


# --- npz files ------------------------------------------------------------------------------------


def test_uniform_format(tmp_path, small, uniform):
    np.savez(tmp_path / "mine.npz", **uniform)
    loaded = load_npz(tmp_path / "mine.npz")
    assert_same(loaded, small)
    assert loaded.name == "mine"
    assert repr(loaded).startswith("Dataset('mine': 40 nodes, ")
    assert array_digest(loaded) == array_digest(small)
    assert_same(load_dataset(str(tmp_path / "mine.npz")), small)
    assert_same(load_dataset(tmp_path / "mine.npz"), small)


def test_files_need_no_package_for_downloads(tmp_path, uniform):
    """A machine without a network need not have them."""
    np.savez(tmp_path / "mine.npz", **uniform)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pooch', 'platformdirs', 'requests']));"
        "import fastclust, fastclust.train, fastclust.info;"
        "print(fastclust.load_dataset(sys.argv[1]).n_nodes)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mine.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 40


def test_uniform_format_without_labels_and_with_weights(tmp_path, small, uniform):
    del uniform["labels"]
    np.savez(tmp_path / "a.npz", adj_data=np.full(small.n_edges, 2.5), **uniform)
    loaded = load_npz(str(tmp_path / "a.npz"))
    assert loaded.labels is None
    assert loaded.n_clusters is None
    assert set(loaded.adjacency.data) == {2.5}
    assert "no labels" in repr(loaded)


def test_gnn_benchmark_format_keeps_feature_values(tmp_path, small):
    (tmp_path / "a.npz").write_bytes(to_gnn_benchmark(small))
    loaded = load_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.adjacency.toarray(), small.adjacency.toarray())
    assert set(loaded.features.data) == {1.0, 2.0, 3.0}


def test_self_loops_and_direction_in_a_uniform_file_are_reported(tmp_path, uniform):
    uniform["adj_indices"] = uniform["adj_indices"].copy()
    uniform["adj_indices"][0] = 0
    np.savez(tmp_path / "a.npz", **uniform)
    with pytest.warns(DataWarning) as caught:
        load_npz(tmp_path / "a.npz")
    assert {"1 self loops" in str(w.message) for w in caught} == {True, False}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_missing_file(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"nowhere.npz does not exist") as caught:
        load_npz(tmp_path / "nowhere.npz")
    assert isinstance(caught.value, FileNotFoundError)
    one_line(caught.value)


def test_damaged_files(tmp_path, uniform):
    np.savez_compressed(tmp_path / "good.npz", **uniform)
    good = (tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bad.npz"
    rng = np.random.default_rng(0)
    cases = [b"", b"PK", b"hello, world", good[:-30], good[: len(good) // 2], good[10:]]
    for _ in range(60):  # flipped bytes: either harmless (names, dates) or reported
        flipped = bytearray(good)
        flipped[rng.integers(len(good))] ^= int(rng.integers(1, 256))
        cases.append(bytes(flipped))
    reported = 0
    for case in cases:
        path.write_bytes(case)
        try:
            load_npz(path)
        except DatasetFormatError as error:
            assert "bad.npz" in one_line(error)
            reported += 1
    assert reported > 40
    with pytest.raises(DatasetFormatError, match="got a directory"):
        load_npz(tmp_path)


def test_pickles_are_never_loaded(tmp_path, uniform):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.savez(tmp_path / "a.npz", **(uniform | {"x_data": np.array([Bomb()], dtype=object)}))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DatasetFormatError, match="pickled") as caught:
            load_npz(tmp_path / name)
        one_line(caught.value)
    assert not (tmp_path / "boom").exists()


def test_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DatasetFormatError, match="got a single array"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_data": None}, "lacks the arrays x_data"),
        ({"x_indptr": None, "shape_x": None}, "must hold adj_indptr.*got the keys"),
        ({"labels": np.arange(39)}, r"labels must hold one class per node \(40\), got shape"),
        ({"labels": np.ones(40)}, "labels must be integers of 0 or more, got float64"),
        ({"labels": np.arange(40) - 1}, "labels must be integers of 0 or more, got int64 from -1"),
        ({"adj_indptr": np.arange(41)[::-1].copy()}, "adj must be a valid compressed"),
        ({"adj_indptr": np.zeros(0, int)}, "adj"),
        ({"adj_indices": lambda a: a - 1}, "adj must hold node indices of 0 or more, got -1"),
        ({"adj_indices": lambda a: a + 30}, "adj must hold indices below 40"),
        ({"adj_indices": lambda a: a.astype(float)}, "adj_indices must be 1-dimensional integers"),
        ({"x_indices": lambda a: a + 5}, "x must hold indices below 12"),
        ({"x_data": lambda a: a * np.nan}, "features must hold finite values only"),
        ({"x_data": lambda a: a[:-1]}, "x must be a valid compressed"),
        ({"x_data": lambda a: a.astype("U1")}, "x_data must be 1-dimensional numbers"),
        ({"shape_x": np.array([40.0, 12.0])}, "shape_x must be 1-dimensional integers"),
        ({"shape_x": np.array([40, 12, 1])}, "shape of x must be two sizes"),
        ({"shape_x": np.array([40, -12])}, "shape of x must be two sizes"),
        ({"shape_x": np.array([41, 12])}, "x must be a valid compressed"),
        ({"adj_data": np.array([1.0])}, "adj must be a valid compressed"),
        ({"labels": lambda a: a.astype(np.uint64) + 2**63}, "labels must be integers of 0 or more"),
    ],
)
def test_files_with_impossible_contents(tmp_path, uniform, changes, message):
    for key, change in changes.items():
        value = change(uniform[key]) if callable(change) else change
        uniform[key] = value
    np.savez(tmp_path / "a.npz", **{k: v for k, v in uniform.items() if v is not None})
    with pytest.raises(DatasetFormatError, match=message) as caught:
        load_npz(tmp_path / "a.npz")
    assert "a.npz" in one_line(caught.value)


def test_unknown_format_lists_the_keys_that_are_there(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.arange(3), edges=np.zeros((2, 3)), x=np.ones(3))
    with pytest.raises(DatasetFormatError, match=r"got the keys edges, labels, x$"):
        load_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "many.npz", **{f"a{i:02d}": np.ones(1) for i in range(30)})
    with pytest.raises(DatasetFormatError, match=r"a19, \.\.\.$"):
        load_npz(tmp_path / "many.npz")


def test_half_precision_in_files(tmp_path, uniform, small):
    uniform |= {"x_data": np.ones(uniform["x_data"].size, np.float16)}
    np.savez(tmp_path / "a.npz", **uniform)
    assert load_npz(tmp_path / "a.npz").features.dtype == np.float32
    with np.load(io.BytesIO(to_gnn_benchmark(small))) as arrays:
        halves = arrays["adj_data"].astype(np.float16)
    (tmp_path / "b.npz").write_bytes(to_gnn_benchmark(small, adj_data=halves))
    assert load_npz(tmp_path / "b.npz").adjacency.dtype == np.float32


@pytest.mark.parametrize("wrong", [3, None, b"a.npz"])
def test_what_is_no_path(wrong):
    with pytest.raises(TypeError, match=r"^path must be the path of a .npz file, got"):
        load_npz(wrong)
    with pytest.raises(TypeError, match=r"^name must be the name of a data set, or a path, got"):
        load_dataset(wrong)
    with pytest.raises(TypeError, match=r"^root must be the path of a folder, or None, got"):
        load_dataset("cora", root=wrong or 3)


def test_gnn_benchmark_adjacency_must_be_square(tmp_path, small):
    content = to_gnn_benchmark(small, adj_shape=np.array([40, 41]))
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DatasetFormatError, match="must be square"):
        load_npz(tmp_path / "a.npz")


# --- names and places -----------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(DatasetNotFoundError, match=r"unknown data set 'coral': .* cora, .*digits"):
        load_dataset("coral")


def test_digits_needs_no_file():
    digits = load_dataset("digits")
    assert digits.adjacency.shape == (1797, 1797)
    assert digits.features.shape == (1797, 64)
    assert digits.features.max() == 1.0
    assert digits.n_clusters == 10
    degrees = np.diff(digits.adjacency.indptr)
    assert degrees.min() >= 10
    same = digits.labels[digits.adjacency.tocoo().row] == digits.labels[digits.adjacency.indices]
    assert same.mean() > 0.95
    assert array_digest(digits) == array_digest(load_dataset("Digits"))


def test_nearest_neighbor_graph():
    x = np.array([[0.0], [1.0], [3.0], [10.0]], np.float32)
    graph = nearest_neighbor_graph(x, 1)
    np.testing.assert_array_equal(
        graph.toarray(), [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    )
    assert nearest_neighbor_graph(x, 99).nnz == 12
    assert nearest_neighbor_graph(x[:1]).nnz == 0
    assert (nearest_neighbor_graph(sp.csr_array(x), 1) != graph).nnz == 0


def test_nearest_neighbor_graph_is_the_same_for_any_number_of_threads():
    """Attributes that are whole numbers have many neighbours at one distance: which are taken?"""
    x = np.random.default_rng(0).integers(0, 4, size=(1797, 20)).astype(np.float32)
    graphs = []
    for threads in (1, 2, 3):
        with threadpool_limits(limits=threads):
            graphs.append(nearest_neighbor_graph(x, 10))
    assert all((graph != graphs[0]).nnz == 0 for graph in graphs)


def test_root_comes_before_the_environment(tmp_path, monkeypatch, small, uniform):
    publish(monkeypatch, small, "cora")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    np.savez(second / "cora.npz", **uniform)
    monkeypatch.setenv("FASTCLUST_DATA", str(second))
    assert_same(load_dataset("CORA", root=first), small)
    np.savez(first / "cora.npz", **(uniform | {"labels": np.arange(40) % 5}))
    with pytest.warns(DataWarning, match="does not hold the arrays known as 'cora'"):
        assert load_dataset("cora", root=first).n_clusters == 5


def test_nothing_found_lists_every_place(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCLUST_DATA", str(tmp_path / "env"))
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("amac", root=tmp_path / "root")
    text = one_line(caught.value)
    for part in ("root/amac.npz", "env/amac.npz", "cache/fastclust/amac.npz", "127.0.0.1:9"):
        assert part in text
    assert "no connection" in text
    assert "Connect to the network, or put amac.npz" in text


# --- download -------------------------------------------------------------------------------------


def test_good_download_is_cached(tmp_path, monkeypatch, server, small):
    content = to_gnn_benchmark(small)
    publish(monkeypatch, small, "amap", content)
    server.files["amazon_electronics_photo.npz"] = content
    assert_same(load_dataset("amap"), small)
    assert cache_file(tmp_path, "amap").read_bytes() == content
    server.files.clear()
    assert_same(load_dataset("amap"), small)
    assert len(server.requests) == 1


def test_good_download_of_several_files_is_cached(tmp_path, monkeypatch, server, small):
    small = dataclasses.replace(small, name="cora")
    publish(monkeypatch, small, "cora")
    server.files |= to_planetoid(small, 10, 0, python2_pickle)
    assert_same(load_dataset("cora"), small)
    assert len(server.requests) == 6
    assert_same(load_npz(cache_file(tmp_path, "cora")), small)
    assert_same(load_dataset("cora"), small)
    assert len(server.requests) == 6


def test_wrong_checksum_is_refused(tmp_path, monkeypatch, server, small):
    publish(monkeypatch, small, "amap", to_gnn_benchmark(small))
    server.files["amazon_electronics_photo.npz"] = to_gnn_benchmark(small, labels=np.zeros(40, int))
    with pytest.raises(DatasetNotFoundError, match="checksum does not match") as caught:
        load_dataset("amap")
    one_line(caught.value)
    assert not cache_file(tmp_path, "amap").exists()


def test_wrong_arrays_are_refused(tmp_path, monkeypatch, server, small):
    small = dataclasses.replace(small, name="cora")
    publish(monkeypatch, small, "cora")
    files = to_planetoid(small, 10, 0, python2_pickle)
    files["ind.cora.test.index"] = b"\n".join(files["ind.cora.test.index"].split()[::-1])
    server.files |= files
    with pytest.raises(DatasetFormatError, match="altered or truncated on the way") as caught:
        load_dataset("cora")
    one_line(caught.value)
    assert not cache_file(tmp_path, "cora").exists()


def test_truncated_download_is_retried_then_refused(tmp_path, monkeypatch, server, small):
    content = to_gnn_benchmark(small)
    publish(monkeypatch, small, "amap", content)
    server.files["amazon_electronics_photo.npz"] = content
    server.cut.add("amazon_electronics_photo.npz")
    with pytest.raises(DatasetNotFoundError, match=r"broke off|checksum") as caught:
        load_dataset("amap")
    one_line(caught.value)
    assert len(server.requests) == 3
    assert not cache_file(tmp_path, "amap").exists()


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 3)])
def test_http_errors(server, status, requests):
    server.files["europe-airports.edgelist"] = status
    with pytest.raises(DatasetNotFoundError, match=f"HTTP status {status}") as caught:
        load_dataset("eat")
    one_line(caught.value)
    assert len(server.requests) == requests


def test_damaged_cache_is_replaced(tmp_path, monkeypatch, server, small):
    content = to_gnn_benchmark(small)
    publish(monkeypatch, small, "amap", content)
    path = cache_file(tmp_path, "amap")
    path.parent.mkdir(parents=True)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetNotFoundError, match=r"amap.npz \(ignored: its git blob id is"):
        load_dataset("amap")
    server.files["amazon_electronics_photo.npz"] = content
    assert_same(load_dataset("amap"), small)
    assert path.read_bytes() == content


def test_cache_with_other_arrays_is_replaced(tmp_path, monkeypatch, server, small, uniform):
    small = dataclasses.replace(small, name="cora")
    publish(monkeypatch, small, "cora")
    path = cache_file(tmp_path, "cora")
    path.parent.mkdir(parents=True)
    np.savez(path, **(uniform | {"labels": np.zeros(40, int)}))
    server.files |= to_planetoid(small, 10, 0, python2_pickle)
    assert_same(load_dataset("cora"), small)
    assert_same(load_npz(path), small)


def test_failed_write_leaves_no_file_behind(tmp_path, monkeypatch, server, small):
    content = to_gnn_benchmark(small)
    publish(monkeypatch, small, "amap", content)
    server.files["amazon_electronics_photo.npz"] = content

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(DataWarning, match="No space left on device"):
        assert_same(load_dataset("amap"), small)
    assert list(cache_file(tmp_path, "amap").parent.iterdir()) == []


def test_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch, server, small):
    (tmp_path / "cache").write_text("a file, not a folder")
    content = to_gnn_benchmark(small)
    publish(monkeypatch, small, "amap", content)
    server.files["amazon_electronics_photo.npz"] = content
    with pytest.warns(DataWarning, match="is not cached"):
        assert_same(load_dataset("amap"), small)


# --- the published formats ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dumps",
    [python2_pickle, *(lambda obj, p=p: pickle.dumps(obj, p) for p in (0, 1, 2, 4))],
    ids=["python2", "0", "1", "2", "4"],
)
def test_planetoid_pickles_of_every_age(small, dumps):
    files = to_planetoid(dataclasses.replace(small, name="cora"), 15, 0, dumps)
    assert_same(published.build_planetoid(files, "cora"), small)


def test_python2_pickles_are_what_they_should_be():
    content = python2_pickle(sp.csr_matrix(np.eye(2)))
    assert b"scipy.sparse.csr\ncsr_matrix" in content
    assert b"numpy.core.multiarray\n_reconstruct" in content
    assert b"_codecs" not in content


class Command:
    def __reduce__(self):
        return os.system, ("touch owned",)


class Attribute:
    """Would patch a class that the process goes on using."""

    def __reduce__(self):
        return setattr, (sp.csr_matrix, "tocoo", None)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Command(), 0),
        pickle.dumps(Command(), 4),
        pickle.dumps(Attribute()),
        pickle.dumps([np.load, 1]),
        pickle.dumps(np.array([Command()], dtype=object)),
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'touch owned'\ntR.",
        b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cfastclust.datasets\n_DownloadError\n(tR.",
    ],
    ids=range(10),
)
def test_pickles_of_anything_else_are_refused(tmp_path, monkeypatch, small, content):
    monkeypatch.chdir(tmp_path)
    tocoo = sp.csr_matrix.tocoo
    files = to_planetoid(dataclasses.replace(small, name="cora"), 15, 0, python2_pickle)
    for part in ("allx", "ty", "graph"):
        with pytest.raises(DatasetFormatError, match=f"ind.cora.{part} must hold") as caught:
            published.build_planetoid(files | {f"ind.cora.{part}": content}, "cora")
        one_line(caught.value)
    assert not (tmp_path / "owned").exists()
    assert sp.csr_matrix.tocoo is tocoo


def test_pickle_cannot_change_scipy(small):
    # BUILD on the class itself: reaches the stand-in's slot, not scipy.
    patch = b"cscipy.sparse.csr\ncsr_matrix\n(N}S'tocoo'\nNstb."
    files = to_planetoid(dataclasses.replace(small, name="cora"), 15, 0, python2_pickle)
    with pytest.raises(DatasetFormatError):
        published.build_planetoid(files | {"ind.cora.allx": patch}, "cora")
    assert callable(sp.csr_matrix.tocoo)


def test_pickle_cannot_change_numpy(small):
    # BUILD on a dtype: numpy's own __setstate__ changes the one float32 of the whole process.
    patch = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI63\ntb."
    files = to_planetoid(dataclasses.replace(small, name="cora"), 15, 0, python2_pickle)
    with pytest.raises(DatasetFormatError):
        published.build_planetoid(files | {"ind.cora.allx": patch}, "cora")
    assert np.dtype("f4").flags == 0
    np.zeros(3, np.float32)


def test_damaged_pickles(small):
    files = to_planetoid(dataclasses.replace(small, name="cora"), 15, 0, python2_pickle)
    for part in ("allx", "ty", "graph"):
        name = f"ind.cora.{part}"
        for content in (b"", files[name][:-20], files[name][: len(files[name]) // 2], b"xyz"):
            with pytest.raises(DatasetFormatError, match=f"{name} is truncated or corrupt"):
                published.build_planetoid(files | {name: content}, "cora")


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("allx", python2_pickle(np.eye(3)), "must hold a scipy CSR matrix"),
        ("ally", python2_pickle([1, 2]), "must hold a numeric array"),
        ("graph", python2_pickle([1, 2]), "must hold a dictionary of lists"),
        ("graph", python2_pickle({0: [np.eye(2)]}), "must hold node numbers"),
        ("graph", python2_pickle({0: [99]}), r"must hold nodes 0..39, got 0..99"),
        ("test.index", b"a\nb\n", "must hold 1 integers per line"),
        ("test.index", b"1\n2\n", "sizes of its files do not fit"),
        # found by fuzzing: numbers beyond 64 bits, sizes that would take all memory
        ("graph", python2_pickle({0: [10**30]}), "must hold node numbers"),
        ("test.index", b"9" * 30 + b"\n", "must hold 1 integers per line"),
        ("test.index", b"".join(b"%d\n" % (10**12 + i) for i in range(15)), "sizes of its files"),
        ("graph", b"(true\xff\x05", "truncated or corrupt|without end"),
        ("graph", b"\x80\x02}r\xff\xff\xff\x7f.", "without end"),
    ],
    ids=range(12),
)
def test_planetoid_files_that_do_not_fit(small, part, content, message):
    files = to_planetoid(dataclasses.replace(small, name="cora"), 15, 0, python2_pickle)
    with pytest.raises(DatasetFormatError, match=message):
        published.build_planetoid(files | {f"ind.cora.{part}": content}, "cora")


@pytest.mark.parametrize(
    ("edges", "labels", "message"),
    [
        (b"1 2\n2 3\n", b"node label\n1 0\n2 1\n", "must hold nodes of .* only"),
        (b"1 2\n2\n", b"1 0\n2 1\n", "must hold 2 integers per line"),
        (b"", b"1 0\n2 1\n", "must hold 2 integers per line"),
        (b"<html>\n", b"1 0\n2 1\n", "must hold 2 integers per line"),
        (b"1 2\n", b"1 0\n2 1\n2 0\n", "must hold nodes of"),
    ],
)
def test_airport_files_that_do_not_fit(edges, labels, message):
    files = {"brazil-airports.edgelist": edges, "labels-brazil-airports.txt": labels}
    with pytest.raises(DatasetFormatError, match=message):
        published.build_airports(files, "bat")


def test_airport_degrees_count_a_loop_once():
    files = {
        "brazil-airports.edgelist": b"7 5\n5 7\n7 7\n5 9\n",
        "labels-brazil-airports.txt": b"node label\n9 0\n5 1\n7 1\n",
    }
    dataset = published.build_airports(files, "bat")
    np.testing.assert_array_equal(dataset.adjacency.toarray(), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(dataset.features.toarray(), [[0, 1, 0], [0, 0, 1], [0, 0, 1]])


def test_published_files_in_a_folder_are_used(tmp_path, monkeypatch, small):
    small = dataclasses.replace(small, name="citeseer")
    publish(monkeypatch, small, "citeseer")
    for name, content in to_planetoid(small, 15, 0, python2_pickle).items():
        (tmp_path / name).write_bytes(content)
    assert_same(load_dataset("citeseer", root=tmp_path), small)


# --- the real graphs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_real_graphs_are_the_reference(data_root, recwarn, name):
    dataset = load_dataset(name, root=data_root)
    assert not [w for w in recwarn if issubclass(w.category, DataWarning)]
    with np.load(data_root / f"{name}.npz") as arrays:
        np.testing.assert_array_equal(dataset.adjacency.indptr, arrays["adj_indptr"])
        np.testing.assert_array_equal(dataset.adjacency.indices, arrays["adj_indices"])
        np.testing.assert_array_equal(dataset.features.indptr, arrays["x_indptr"])
        np.testing.assert_array_equal(dataset.features.indices, arrays["x_indices"])
        np.testing.assert_array_equal(dataset.features.data, arrays["x_data"])
        np.testing.assert_array_equal(dataset.labels, arrays["labels"])


def published_files(dataset: Dataset) -> dict[str, bytes]:
    """The files that a data set is published as, written from its arrays."""
    name = dataset.name
    if name in ("cora", "citeseer"):
        n_test, n_missing = {"cora": (1000, 0), "citeseer": (1015, 15)}[name]
        return to_planetoid(dataset, n_test, n_missing, python2_pickle)
    if name in ("amap", "amac"):
        return {Path(published.SOURCES[name].files[0]).name: to_gnn_benchmark(dataset)}
    country = {"eat": "europe", "uat": "usa", "bat": "brazil"}[name]
    return to_airports(dataset, country, shuffle=name == "uat")


@pytest.mark.parametrize("name", GRAPHS)
def test_downloads_give_exactly_the_reference(data_root, monkeypatch, server, name):
    reference = load_dataset(name, root=data_root)
    files = published_files(reference)
    server.files |= files
    source = published.SOURCES[name]
    if source.blob_id is not None:
        blob_id = download.git_blob_id(next(iter(files.values())))
        changed = dataclasses.replace(source, blob_id=blob_id)
        monkeypatch.setitem(published.SOURCES, name, changed)
    downloaded = load_dataset(name)  # verified by the digest of the published arrays
    assert_same(downloaded, reference)
    assert array_digest(downloaded) == source.digest
    server.files.clear()
    assert_same(load_dataset(name), reference)  # from the cache


def test_every_name_has_a_source():
    assert (*GRAPHS, "digits") == tuple(datasets.DATASET_NAMES) or set(GRAPHS) | {"digits"} == set(
        datasets.DATASET_NAMES
    )
    for source in published.SOURCES.values():
        assert len(source.digest) == 64


def member(header: bytes) -> bytes:
    """An archive with right checksums whose one known member begins with this header."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("labels.npy", header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "header",
    [
        b"no array",  # numpy hands such members over as bytes
        b"\x93NUMPY\x01\x00\x08\x00{'descr'(",  # ends inside a bracket: numpy lets TokenError pass
        b"\x93NUMPY\x01\x00\x40\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1<<60,)}",
    ],
)
def test_members_that_are_no_arrays(tmp_path, header):
    (tmp_path / "a.npz").write_bytes(member(header))
    with pytest.raises(DatasetFormatError, match=r"a\.npz (must hold arrays only|is truncated)"):
        load_npz(tmp_path / "a.npz")


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch, uniform):
    """A megabyte that says, and holds, more than there is memory."""
    uniform["x_data"] = np.zeros(1 << 27, np.float32)
    np.savez_compressed(
        tmp_path / "bomb.npz", **{k: v for k, v in uniform.items() if v is not None}
    )
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": 1 << 28)
    with pytest.raises(memory.InsufficientMemoryError, match=r"unpacked, needs at least 0.54 GB"):
        load_npz(tmp_path / "bomb.npz")


def test_zip_with_a_foreign_member(tmp_path, uniform, small):
    np.savez(tmp_path / "a.npz", **uniform)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("notes.txt", "not an array")
    assert_same(load_npz(tmp_path / "a.npz"), small)
