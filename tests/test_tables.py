"""Graphs from one's own files: every format gives the same graph, every mistake a clear message."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from fastclust.datasets import DatasetFormatError, DatasetNotFoundError
from fastclust.memory import InsufficientMemoryError
from fastclust.tables import load_files
from fastclust.validation import DataWarning

# 0 - 1 - 2, 0 - 3, with names, attributes and classes
NAMES = ["ann", "bob", "cy", "di"]
X = np.array([[1, 0.5], [0, 2], [-3, 0], [0, 0]], np.float32)
CLASSES = ["red", "blue", "red", "blue"]
EDGES = [(0, 1), (1, 2), (0, 3)]
A = np.zeros((4, 4), np.float32)
for i, j in EDGES:
    A[i, j] = A[j, i] = 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [f"{n},{a},{b},{c}" for n, (a, b), c in zip(NAMES, X, CLASSES, strict=True)]
    write("named.csv", "id,height,weight,colour", *lines)
    write("plain.csv", "height,weight", *(f"{a},{b}" for a, b in X))
    write("edges.csv", "source,target", *(f"{NAMES[i]},{NAMES[j]}" for i, j in EDGES))
    write("numbers.txt", "# a comment", *(f"{i} {j}" for i, j in EDGES))
    return tmp_path


def write(name: str, *lines: str) -> None:
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def check(dataset, *, adjacency=A, labelled=False, named=False) -> None:
    np.testing.assert_array_equal(dataset.adjacency.toarray(), adjacency)
    features = dataset.features.toarray() if sp.issparse(dataset.features) else dataset.features
    np.testing.assert_array_equal(features, X)
    assert features.dtype == np.float32
    assert (dataset.labels is not None) == labelled == (dataset.n_clusters is not None)
    if labelled:
        assert dataset.labels.tolist() == [1, 0, 1, 0] and dataset.n_clusters == 2
    assert (dataset.node_names is not None) == named
    if named:
        assert dataset.node_names.tolist() == NAMES


def test_tables_with_names(folder):
    check(load_files("edges.csv", "named.csv", "colour"), labelled=True, named=True)
    check(load_files("edges.csv", "named.csv", "colour", ids="id"), labelled=True, named=True)


def test_tables_with_numbers(folder):
    check(load_files("numbers.txt", "plain.csv"))
    write("tabs.tsv", *(f"{i}\t{j}" for i, j in EDGES))
    write("semicolons.csv", "h;w", *(f"{a}; {b}" for a, b in X))
    check(load_files("tabs.tsv", "semicolons.csv"))
    write("no_header.txt", *(f"{a}\t{b}" for a, b in X))
    check(load_files("numbers.txt", "no_header.txt"))
    with gzip.open("edges.csv.gz", "wt") as file:
        file.write("u,v\n" + "".join(f"{i},{j}\n" for i, j in EDGES))
    check(load_files("edges.csv.gz", "plain.csv"))
    write("byte_mark.csv", "\ufeffh,w", *(f"{a},{b}" for a, b in X))
    check(load_files("numbers.txt", "byte_mark.csv"))


def test_names_without_a_header_and_with_quotes(folder):
    write("bare.csv", *(f"{NAMES[i]},{NAMES[j]}" for i, j in EDGES))
    check(load_files("bare.csv", "named.csv", "colour"), labelled=True, named=True)
    write(
        "quoted.csv", "id,h,w", *(f'"{n}, jr",{a},{b}' for n, (a, b) in zip(NAMES, X, strict=True))
    )
    write("edges2.csv", "from,to", *(f'"{NAMES[i]}, jr","{NAMES[j]}, jr"' for i, j in EDGES))
    assert load_files("edges2.csv", "quoted.csv").node_names[0] == "ann, jr"


def test_first_row_with_the_name_of_a_node_is_no_header(folder):
    """Names may be words of a header (u, v), and labels of a file without one are text, too."""
    write("named.csv", "id,h,w", *(f"{n},{a},{b}" for n, (a, b) in zip("uvwx", X, strict=True)))
    write("edges.csv", *(f"{'uvwx'[i]},{'uvwx'[j]}" for i, j in EDGES))
    write("y.csv", *(f"{n},{c}" for n, c in zip("uvwx", CLASSES, strict=True)))
    dataset = load_files("edges.csv", "named.csv", "y.csv", ids="id")
    np.testing.assert_array_equal(dataset.adjacency.toarray(), A)
    assert dataset.labels.tolist() == [1, 0, 1, 0]


def test_tables_as_pandas_writes_them(folder):
    """An index without a name is no attribute and no end of an edge, but names the nodes."""
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(X, columns=["h", "w"])
    wide = pd.DataFrame(np.c_[X, X])  # columns 0, 1, 2, 3
    edges = pd.DataFrame(EDGES, columns=["source", "target"])
    edges.to_csv("links.csv")
    table.to_csv("x.csv")
    check_numbered(load_files("links.csv", "x.csv"))
    pd.read_csv("x.csv").to_csv("x.csv", index=False)  # "Unnamed: 0"
    check_numbered(load_files("links.csv", "x.csv"))
    table.to_csv("x.tsv", sep="\t")
    check_numbered(load_files("links.csv", "x.tsv"))
    table.set_axis(NAMES).to_csv("x.csv")
    check(load_files("edges.csv", "x.csv"), named=True)
    table.assign(id=NAMES).to_csv("x.csv")
    check(load_files("edges.csv", "x.csv"), named=True)

    for options in ({}, {"index_label": "id"}):
        wide.to_csv("wide.csv", **options)
        dataset = load_files("links.csv", "wide.csv")
        np.testing.assert_array_equal(dataset.features, np.c_[X, X])
        assert dataset.node_names.tolist() == ["0", "1", "2", "3"]
    wide.to_csv("wide.csv", index=False)
    with pytest.warns(DataWarning, match="taken for the names that pandas gives to columns"):
        dataset = load_files("links.csv", "wide.csv")
    np.testing.assert_array_equal(dataset.features, np.c_[X, X])

    write("x.csv", ",0.5,1", "2,0,1")  # an attribute is missing: no header
    with pytest.raises(DatasetFormatError, match="numbers in its attribute columns, got ''"):
        load_files(features="x.csv")


def check_numbered(dataset) -> None:
    np.testing.assert_array_equal(dataset.adjacency.toarray(), A)
    np.testing.assert_array_equal(dataset.features, X)
    assert dataset.node_names.tolist() == ["0", "1", "2", "3"]


def test_parquet_with_an_index(folder):
    pytest.importorskip("pyarrow")
    pd = pytest.importorskip("pandas")
    pd.DataFrame(EDGES, columns=["u", "v"], index=[5, 7, 9]).to_parquet("e.parquet")
    pd.DataFrame(X, columns=["h", "w"], index=NAMES).to_parquet("x.parquet")
    check(load_files("edges.csv", "x.parquet"), named=True)
    check(load_files("e.parquet", "plain.csv"))


@pytest.mark.parametrize("header", ["id,source,target", "weight,Source,Target", "n,u,v"])
def test_ends_that_are_not_the_first_columns_are_told(folder, header):
    write("links.csv", header, *(f"{k},{i},{j}" for k, (i, j) in enumerate(EDGES)))
    with pytest.raises(
        DatasetFormatError, match="must have the ends of each edge in its first two"
    ):
        load_files("links.csv", "plain.csv")


def test_lines_of_other_lengths_are_told(folder):
    """NumPy would take the first columns of each: half a label, another attribute."""
    write("y.txt", "red", "dark blue", "dark green", "red")
    with pytest.raises(DatasetFormatError, match="got 1 in line 1 and 2 in line 2"):
        load_files("numbers.txt", "plain.csv", "y.txt")
    write("r.txt", "h w", *(f"{i} {a} {b}" for i, (a, b) in enumerate(X)))  # R's write.table
    with pytest.raises(DatasetFormatError, match="got 2 in line 1 and 3 in line 2"):
        load_files("numbers.txt", "r.txt")
    write("x.csv", "# made by hand", "h,w", *(f"{a},{b}" for a, b in X[:3]), "0,0,5")
    with pytest.raises(DatasetFormatError, match="got 2 in line 2 and 3 in line 6"):
        load_files("numbers.txt", "x.csv")


def test_home_of_every_path(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write("y.txt", *CLASSES)
    check(load_files("~/numbers.txt", "~/plain.csv", "~/y.txt"), labelled=True)


def test_repeated_and_weighted_edges(folder):
    write("again.txt", *(f"{i} {j}" for i, j in EDGES), "1 0", "0 1")
    check(load_files("again.txt", "plain.csv"))
    write("weighted.csv", "source,target,weight", "0,1,2", "1,0,5", "1,2,0.5", "0,3,1")
    expected = A.copy()
    expected[0, 1] = expected[1, 0] = 5
    expected[1, 2] = expected[2, 1] = 0.5
    check(load_files("weighted.csv", "plain.csv"), adjacency=expected)


def test_matrices(folder):
    sp.save_npz("a.npz", sp.csr_matrix(A))
    sp.save_npz("x.npz", sp.csc_array(X))
    scipy.io.mmwrite("a.mtx", sp.coo_array(np.triu(A) + np.tril(A)))
    scipy.io.mmwrite("x.mtx", X)
    np.save("x.npy", X)
    np.save("y.npy", np.array([4, 2, 4, 2]))
    scipy.io.mmwrite("pattern.mtx", sp.coo_array(A), field="pattern")
    scipy.io.mmwrite("whole.mtx", sp.coo_array(A), symmetry="general")
    scipy.io.mmwrite("square.mtx", A, symmetry="symmetric")
    scipy.io.mmwrite("entries.mtx", sp.coo_array(X), comment="by hand")
    Path("x.mtx.gz").write_bytes(gzip.compress(Path("x.mtx").read_bytes()))
    for edges in ("a.npz", "a.mtx", "pattern.mtx", "whole.mtx", "square.mtx", "numbers.txt"):
        for features in ("x.npz", "x.mtx", "x.mtx.gz", "entries.mtx", "x.npy"):
            check(load_files(edges, features, "y.npy"), labelled=True)
    check(load_files("a.mtx", "named.csv", "colour"), labelled=True, named=True)


def test_parquet(folder, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {"id": NAMES, "h": X[:, 0].tolist(), "w": X[:, 1].tolist(), "colour": CLASSES}
    parquet.write_table(pa.table(columns), "x.parquet")
    ends = {"u": [NAMES[i] for i, _ in EDGES], "v": [NAMES[j] for _, j in EDGES]}
    parquet.write_table(pa.table(ends), "e.parquet")
    check(load_files("e.parquet", "x.parquet", "colour"), labelled=True, named=True)
    with pytest.raises(DatasetFormatError, match="numbers in its attribute columns, got 'red'"):
        load_files("e.parquet", "x.parquet")
    write("bad.parquet", "hello")
    with pytest.raises(DatasetFormatError, match="must be a Parquet file"):
        load_files("e.parquet", "bad.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DatasetFormatError, match="pip install pyarrow, or save the table as CSV"):
        load_files("edges.csv", "x.parquet")


def test_labels_from_files(folder):
    write("y.txt", *CLASSES)
    check(load_files("numbers.txt", "plain.csv", "y.txt"), labelled=True)
    write("y.csv", "node,class", *(f"{i},{CLASSES[i]}" for i in (2, 0, 3, 1)))
    check(load_files("numbers.txt", "plain.csv", "y.csv"), labelled=True)


def test_attributes_alone_make_a_nearest_neighbour_graph(folder):
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.normal(size=(50, 3)))
    assert load_files(features="x.npy").adjacency.nnz >= 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edges.csv", None), "--features FILE is required"),
        (("absent.csv", "plain.csv"), "absent.csv does not exist"),
        (("edges.csv", "."), "must be a file, got a directory"),
        (("edges.csv", "plain.csv"), "node numbers 0..3, got 'ann'; for nodes with names"),
        (("numbers.txt", "named.csv", "colour"), "nodes of the attribute table only, got '0'"),
        (("edges.csv", "named.csv"), "got 'red' in column 'colour'"),
        (("edges.csv", "named.csv", "color"), r"did you mean colour\?"),
        (("one.txt", "plain.csv"), "must have two columns"),
        (("far.txt", "plain.csv"), r"node numbers 0..3, one per row .* got 1..4; numbers count"),
        (("negative.txt", "plain.csv"), "no negative weights, got -1"),
        (("ragged.csv", "plain.csv"), "in every line, got 2 in line 1 and 1 in line 3"),
        (("numbers.txt", "empty.csv"), "must hold a table, got no line of data"),
        (("numbers.txt", "binary.csv"), "must be a text table"),
        (("numbers.txt", "field.csv"), "must be a text table: field larger than field limit"),
        (("numbers.txt", "nan.csv"), "finite values only.*NaN at row 1, column 0"),
        (("numbers.txt", "twice.csv"), "name every node once, got 'ann' 2 times"),
        (("numbers.txt", "words.csv"), "got 'tall' in column 'h'"),
        (("numbers.txt", "late.csv"), "could not convert string 'tall'"),
        (("numbers.txt", "plain.csv", "short.txt"), r"one label per node \(4\), got 2"),
        (("numbers.txt", "plain.csv", "some.csv"), "labels: 2 nodes have none, the first is 2"),
        (("numbers.txt", "bad.npz"), "written by scipy.sparse.save_npz"),
        (("bad.mtx", "plain.csv"), "must be a matrix in Matrix Market format"),
        (("wide.mtx", "plain.csv"), "must be square"),
        (("numbers.txt", "long.mtx"), r"its header says 4 lines of 1 numbers, got \(5, 1\)"),
        (("numbers.txt", "short.mtx"), r"its header says 4 lines of 1 numbers, got \(0, 1\)"),
        (("place.mtx", "plain.csv"), "rows and columns must be whole numbers"),
        (("outside.mtx", "plain.csv"), "axis 1 index 4 exceeds"),
        (("complex.mtx", "plain.csv"), "complex hermitian matrices are not read"),
        (("numbers.txt", "huge.mtx"), r"shape \(10+, 2\) needs .* number rows from 0"),
        (("signs.txt", "plain.csv"), "node numbers 0..3, got '--1'"),
        (("big.txt", "plain.csv"), "node numbers 0..3, got '9{30}'"),
        (("numbers.txt", "far.npz"), "hold indices below 4, got 9"),
        (("numbers.txt", "bad.npy"), "written by numpy.save"),
    ],
)
def test_mistakes(folder, arguments, message):
    write("one.txt", "0", "1")
    write("field.csv", f"{'x' * 200_000},y", "1,2")
    write("far.txt", "0 1", "1 4")
    write("negative.txt", "0 1 -1")
    write("ragged.csv", "source,target", "0,1", "2")
    write("empty.csv", "", "# nothing")
    Path("binary.csv").write_bytes(b"\xff\xfe\x00\x81" * 9)
    write("nan.csv", "h,w", "1,2", "nan,2", "1,1", "1,1")
    write("twice.csv", "id,h", "ann,1", "bob,2", "ann,3", "di,4")
    write("words.csv", "h,w", "tall,1", "small,2")
    write("late.csv", "h,w", "1,1", "tall,1")
    write("short.txt", "1", "2")
    write("some.csv", "node,class", "0,a", "1,b")
    for name in ("bad.npz", "bad.npy", "bad.mtx"):
        write(name, "no such matrix")
    scipy.io.mmwrite("wide.mtx", sp.coo_array(np.ones((4, 5))))
    banner = "%%MatrixMarket matrix"
    write("long.mtx", f"{banner} array real general", "2 2", *"123456")
    write("short.mtx", f"{banner} array real general", "2 2")
    write("place.mtx", f"{banner} coordinate pattern general", "4 4 1", "1.5 2")
    write("outside.mtx", f"{banner} coordinate pattern general", "4 4 1", "1 5")
    write("complex.mtx", f"{banner} coordinate complex hermitian", "4 4 1", "2 1 1 1")
    write("huge.mtx", f"{banner} coordinate real general", f"{10**17} 2 1", "1 1 1")
    write("signs.txt", "0 1", "--1 2")
    write("big.txt", "0 1", "1 " + "9" * 30)
    matrix = sp.csc_array(np.ones((4, 3)))
    matrix.indices[2] = 9
    sp.save_npz("far.npz", matrix)
    refusals = (DatasetFormatError, DatasetNotFoundError, InsufficientMemoryError)
    with pytest.raises(refusals, match=message) as caught:
        load_files(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_too_large_for_float32(folder, kind):
    write("large.csv", "height,weight", "1,0.5", "0,1e300", "-3,0", "0,0")
    write("infinite.csv", "height,weight", "1,0.5", "0,inf", "-3,0", "0,0")
    if kind == "parquet":
        table = pytest.importorskip("pyarrow.csv")
        import pyarrow.parquet

        for name in ("large", "infinite"):
            pyarrow.parquet.write_table(table.read_csv(f"{name}.csv"), f"{name}.parquet")
    with pytest.raises(DatasetFormatError, match=r"must fit float32 .* of size 1e\+300"):
        load_files(None, f"large.{kind}")
    with pytest.raises(DatasetFormatError, match="must hold finite values only"):
        load_files(None, f"infinite.{kind}")
