"""Every kind of graph and feature input, and a message for everything that is wrong with one."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclust import validation
from fastclust.validation import (
    DataWarning,
    check_adjacency,
    check_device,
    check_features,
    check_labels,
    check_n_clusters,
    is_graph_data,
    unpack_graph_data,
)

PATH = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)  # 0 - 1 - 2
EDGE_INDEX = np.array([[0, 1, 1, 2], [1, 0, 2, 1]])


def assert_canonical(matrix: sp.csr_array) -> None:
    assert isinstance(matrix, sp.csr_array)
    assert matrix.dtype == np.float32
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    assert matrix.has_canonical_format
    assert matrix.data.all()
    assert not matrix.diagonal().any()
    assert (matrix != matrix.T).nnz == 0


@pytest.mark.parametrize(
    "adjacency",
    [
        PATH,
        PATH.astype(bool),
        PATH.astype(np.uint8),
        PATH.astype(np.float16),
        PATH.astype(">f8"),
        PATH.tolist(),
        *(sp.csr_array(PATH).asformat(f) for f in ("csr", "csc", "coo", "bsr", "lil", "dok")),
        sp.csr_matrix(PATH.astype(np.int64)),
        torch.from_numpy(PATH),
        torch.from_numpy(PATH).to(torch.bfloat16).requires_grad_(),
        torch.from_numpy(PATH).to_sparse_coo(),
        torch.from_numpy(PATH).to_sparse_csr(),
        torch.from_numpy(PATH).to_sparse_csc(),
        EDGE_INDEX,
        EDGE_INDEX.astype(np.int32),
        torch.from_numpy(EDGE_INDEX),
        np.concatenate([EDGE_INDEX, EDGE_INDEX[:, :1]], axis=1),
        nx.path_graph(3),
        nx.relabel_nodes(nx.path_graph(3), {0: "a", 1: "b", 2: "c"}),
    ],
    ids=lambda a: f"{type(a).__name__}-{getattr(a, 'dtype', '')}",
)
def test_every_kind_of_adjacency(adjacency):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = check_adjacency(adjacency, 3)
    assert_canonical(matrix)
    np.testing.assert_array_equal(matrix.toarray(), PATH)


def test_networkx_nodes_named_by_number_are_sorted():
    graph = nx.Graph([(2, 1), (1, 0)])
    graph.add_edge(0, 1, weight=5.0)
    np.testing.assert_array_equal(
        check_adjacency(graph).toarray(), [[0, 5, 0], [5, 0, 1], [0, 1, 0]]
    )


def test_networkx_nodes_numbered_otherwise_keep_their_order_and_that_is_told():
    graph = nx.Graph([(3, 2), (2, 1)])  # counted from 1, in the order of the edges: 3, 2, 1
    with pytest.warns(DataWarning, match=r"numbered, but not 0 to 2: .* listed: 3, 2, 1"):
        matrix = check_adjacency(graph)
    np.testing.assert_array_equal(matrix.toarray(), PATH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_adjacency(nx.Graph([(1, 2), (2, 5)]))  # in order


def test_two_by_two_is_dense_unless_the_node_count_says_otherwise():
    swap = np.array([[0, 1], [1, 0]])
    np.testing.assert_array_equal(check_adjacency(swap).toarray(), swap)
    assert check_adjacency(swap, 3).shape == (3, 3)


def test_edge_index_may_leave_nodes_isolated():
    matrix = check_adjacency(EDGE_INDEX, 6)
    assert matrix.shape == (6, 6)
    assert matrix.nnz == 4
    assert check_adjacency(np.zeros((2, 0), np.int64), 4).nnz == 0


def test_graphs_without_edges_and_of_one_node():
    assert check_adjacency(np.zeros((1, 1))).shape == (1, 1)
    assert check_adjacency(sp.csr_array((5, 5))).nnz == 0


def test_self_loops_are_dropped_with_a_warning():
    with pytest.warns(DataWarning, match="adjacency has 2 self loops; they were dropped"):
        matrix = check_adjacency(PATH + np.diag([3.0, 0.0, 1.0]))
    np.testing.assert_array_equal(matrix.toarray(), PATH)


def test_asymmetric_is_symmetrised_by_the_maximum_with_a_warning():
    with pytest.warns(DataWarning, match=r"not symmetric \(2 pairs"):
        matrix = check_adjacency(np.array([[0, 2, 0], [1, 0, 0], [0, 4, 0]]))
    np.testing.assert_array_equal(matrix.toarray(), [[0, 2, 0], [2, 0, 4], [0, 4, 0]])


def test_asymmetry_by_rounding_is_mended_in_silence():
    weights = np.array([[0, 0.1], [np.nextafter(np.float32(0.1), np.float32(1)), 0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_canonical(check_adjacency(weights))


def test_small_integer_weights_do_not_overflow():
    weights = np.array([[0, 200], [100, 0]], np.uint8)
    with pytest.warns(DataWarning, match="not symmetric"):
        assert check_adjacency(sp.csr_array(weights)).toarray().max() == 200


def test_duplicate_coo_entries_add_up_and_stored_zeros_go():
    matrix = sp.coo_array(([1.0, 1.0, 2.0, 0.0], ([0, 0, 1, 1], [1, 1, 0, 1])), shape=(2, 2))
    result = check_adjacency(matrix)
    assert_canonical(result)
    assert result.nnz == 2
    assert result.toarray().max() == 2.0


def test_the_argument_is_left_alone():
    unsorted = sp.csr_array(
        (np.array([1.0, 2.0, 1.0, 2.0]), np.array([2, 1, 0, 0]), np.array([0, 2, 3, 4])),
        shape=(3, 3),
    )
    before = [a.copy() for a in (unsorted.data, unsorted.indices, unsorted.indptr)]
    with pytest.warns(DataWarning):
        assert_canonical(check_adjacency(unsorted))
    for old, new in zip(before, (unsorted.data, unsorted.indices, unsorted.indptr), strict=True):
        np.testing.assert_array_equal(old, new)
    assert unsorted.dtype == np.float64


def corrupt(**arrays) -> sp.csr_array:
    matrix = sp.csr_array(PATH)
    for name, value in arrays.items():
        setattr(matrix, name, np.asarray(value))
    return matrix


@pytest.mark.parametrize(
    ("adjacency", "n_nodes", "error", "message"),
    [
        (np.ones((3, 2)), None, ValueError, r"must be square, got shape \(3, 2\).*transposed"),
        (np.ones((2, 3)), None, ValueError, "must be square.*must hold integers"),
        (np.ones((3, 4)), None, ValueError, r"must be square, got shape \(3, 4\)"),
        (np.ones(3), None, ValueError, r"must be 2-dimensional.*got shape \(3,\)"),
        (np.ones((3, 3, 3)), None, ValueError, "must be 2-dimensional"),
        (np.zeros((0, 0)), None, ValueError, "at least one node"),
        (nx.Graph(), None, ValueError, "at least one node"),
        (np.zeros((2, 0), int), None, ValueError, "at least one edge"),
        (PATH, 4, ValueError, r"one row and one column per row of the features \(4\)"),
        (EDGE_INDEX, 2, ValueError, "must hold indices below 2, got 2"),
        (EDGE_INDEX - 1, None, ValueError, "node indices of 0 or more, got -1"),
        (corrupt(indices=[1, 0, -2, 1]), None, ValueError, "0 or more, got -2"),
        (corrupt(indices=[1, 0, 7, 1]), None, ValueError, "below 3, got 7"),
        (corrupt(indptr=[0, 3, 1, 4]), None, ValueError, "valid compressed sparse matrix"),
        (corrupt(indptr=[0, 1, 3, 9]), None, ValueError, "valid compressed sparse matrix"),
        (-PATH, None, ValueError, "no negative weights, got -1"),
        (PATH * np.nan, None, ValueError, "finite values only, got 9.*NaN at row 0, column 0"),
        (corrupt(data=[1, np.inf, 1, 1]), None, ValueError, "first inf.* at row 1, column 0"),
        (PATH.astype(np.float64) * 1e300, None, ValueError, "must fit float32"),
        (PATH * 1j, None, ValueError, "Complex data not supported"),
        ("cora", None, TypeError, "must be an array, sparse matrix or tensor, got 'cora'"),
        (None, None, TypeError, "got None"),
        ([[0, 1], [1]], None, TypeError, "must be an array"),
        (np.array([["a", "b"], ["c", "d"]]), None, ValueError, "must be numeric"),
    ],
)
def test_bad_adjacency(adjacency, n_nodes, error, message):
    with pytest.raises(error, match=message) as caught:
        check_adjacency(adjacency, n_nodes)
    assert "adjacency" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=30),
        )
    )
)
def test_any_edge_list_becomes_canonical_and_stays(graph):
    n, edges = graph
    index = np.array(edges, np.int64).reshape(-1, 2).T
    expected = np.zeros((n, n), bool)
    expected[index[0], index[1]] = True
    expected |= expected.T
    np.fill_diagonal(expected, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        matrix = check_adjacency(index if n != 2 else expected, n)
    assert_canonical(matrix)
    np.testing.assert_array_equal(matrix.toarray() != 0, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = check_adjacency(matrix, n)
    np.testing.assert_array_equal(again.indices, matrix.indices)


X = np.array([[1.0, 0.0], [0.0, 0.0], [0.5, 2.0]])


@pytest.mark.parametrize(
    "features",
    [X, X.tolist(), np.asfortranarray(X), torch.from_numpy(X), X.astype(object)],
    ids=["float64", "list", "fortran", "tensor", "object"],
)
def test_every_kind_of_dense_features(features):
    result = check_features(features, 3)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, X.astype(np.float32))


@pytest.mark.parametrize(
    "features",
    [
        *(sp.csr_array(X).asformat(f) for f in ("csr", "csc", "coo", "bsr", "lil")),
        sp.csr_matrix(X.astype(np.float32)),
        torch.from_numpy(X).to_sparse_csr(),
        torch.from_numpy(X).to_sparse_coo(),
    ],
    ids=lambda a: type(a).__name__,
)
def test_every_kind_of_sparse_features(features):
    result = check_features(features, 3)
    assert isinstance(result, sp.csr_array)
    assert result.dtype == np.float32
    assert result.has_canonical_format
    np.testing.assert_array_equal(result.toarray(), X.astype(np.float32))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_far_from_one_is_told(scale):
    for features in (PATH * scale, sp.csr_array(PATH) * scale):
        with pytest.warns(
            DataWarning, match="as its largest magnitude, the methods expect about 1"
        ):
            check_features(features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_features(PATH * np.sqrt(scale))
        check_features(0 * PATH)


def test_float32_features_are_not_copied():
    x = X.astype(np.float32)
    assert check_features(x) is x
    sparse = sp.csr_array(x)
    assert np.shares_memory(check_features(sparse).data, sparse.data)


@pytest.mark.parametrize(
    ("features", "n_nodes", "error", "message"),
    [
        (np.array([[1.0, np.nan]]), None, ValueError, "the first NaN at row 0, column 1"),
        (np.array([[np.inf, 1.0]]), None, ValueError, "inf"),
        (sp.csr_array(np.array([[np.nan, 1.0]])), None, ValueError, "NaN"),
        (np.array([[1e300]]), None, ValueError, "must fit float32"),
        (np.full((2, 4), 1e19), None, ValueError, "squared length fits float32, got entries up to"),
        (sp.csr_array([[0, -1e20]]), None, ValueError, "squared length fits float32"),
        (X, 4, ValueError, r"one row per node \(4\), got shape \(3, 2\)"),
        (np.zeros((3, 0)), None, ValueError, r"0 feature\(s\) \(shape=\(3, 0\)\)"),
        (sp.csr_array((3, 0)), None, ValueError, r"0 feature\(s\)"),
        (np.zeros((0, 3)), None, ValueError, r"0 sample\(s\)"),
        (np.ones(3), None, ValueError, r"2-dimensional.*Reshape your data"),
        (X * 1j, None, ValueError, "Complex data not supported"),
        ("x", None, TypeError, "must be an array"),
        (np.array([[{}, 1]], dtype=object), None, TypeError, "argument must be .* string.* number"),
        (np.array([["a"]]), None, ValueError, "must be numeric"),
        (np.array(["2020-01-01"], "M8[D]")[:, None], None, TypeError, "must be numeric"),
    ],
)
def test_bad_features(features, n_nodes, error, message):
    with pytest.raises(error, match=message) as caught:
        check_features(features, n_nodes)
    assert "features" in str(caught.value)


def test_labels():
    np.testing.assert_array_equal(check_labels([5, -1, 5], 3), [1, 0, 1])
    np.testing.assert_array_equal(check_labels(np.array(["b", "a"])), [1, 0])
    with pytest.raises(ValueError, match=r"labels must hold one label per node \(3\), got 2"):
        check_labels([0, 1], 3)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, np.nan, 1], dtype=object),
        ["a", "b", float("nan"), "b"],  # NumPy makes it "nan", a class like the others
        ["a", "b", None, "b"],
        np.array(["2020-01-01", "NaT", "2020-01-02", "NaT"], dtype="datetime64[D]"),
        np.ma.masked_array([0, 1, 5, 1], [False, False, True, False]),
    ],
    ids=["object", "words", "None", "dates", "masked"],
)
def test_missing_labels_are_no_class(labels):
    with pytest.raises(ValueError, match=r"labels must not hold missing values, got [12]; drop"):
        check_labels(labels)


def test_missing_labels_of_pandas_are_no_class():
    pd = pytest.importorskip("pandas")
    for values, dtype in (
        (["a", None, "b"], None),
        (["a", None, "b"], "category"),
        ([True, None, False], "boolean"),
        ([1, None, 2], object),
    ):
        with pytest.raises(ValueError, match="labels must not hold"):
            check_labels(pd.Series(values, dtype=dtype))


class NoDLPack:
    """As an Arrow array of words, or with nulls: the method is there and raises."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack__(self, **_: object) -> object:
        raise TypeError("Can only use DLPack on arrays with no nulls.")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.values


def test_arrays_that_speak_dlpack_in_name_only():
    np.testing.assert_array_equal(check_labels(NoDLPack(np.array(["b", "a"]))), [1, 0])
    with pytest.raises(ValueError, match="labels must not hold missing values, got 1"):
        check_labels(NoDLPack(np.array(["a", None], dtype=object)))


def test_sparse_tables_of_any_fill_value():
    pd = pytest.importorskip("pandas")
    for fill in (0.0, 1.0):
        column = pd.arrays.SparseArray([1.0, 0.0, 1.0], fill_value=fill)
        features = check_features(pd.DataFrame({"a": column, "b": column}))
        dense = features.toarray() if fill == 0 else features
        np.testing.assert_array_equal(dense, [[1, 1], [0, 0], [1, 1]])
    column = pd.arrays.SparseArray([1.0, np.nan], fill_value=np.nan)
    with pytest.raises(ValueError, match="features must hold finite values only"):
        check_features(pd.DataFrame({"a": column}))


def test_masked_values_are_refused():
    masked = np.ma.masked_array(np.ones((3, 3)), np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="features must have no masked entries, got 3; fill"):
        check_features(masked)
    with pytest.raises(ValueError, match="adjacency must have no masked entries, got 3; fill"):
        check_adjacency(masked)
    np.testing.assert_array_equal(check_features(np.ma.masked_array(np.ones((2, 2)))), 1)


@pytest.mark.parametrize(
    ("n_clusters", "n_nodes", "error", "message"),
    [
        (1, 10, ValueError, "n_clusters must be at least 2, got 1"),
        (0, 10, ValueError, "at least 2"),
        (-3, None, ValueError, "at least 2"),
        (11, 10, ValueError, "n_clusters=11 with n_samples=10"),
        (2, 1, ValueError, "n_samples=1"),
        (2.0, 10, TypeError, "must be an integer, got 2.0 of type float"),
        (True, 10, TypeError, "must be an integer"),
        ("3", 10, TypeError, "must be an integer"),
        (None, 10, TypeError, "must be an integer"),
    ],
)
def test_bad_n_clusters(n_clusters, n_nodes, error, message):
    with pytest.raises(error, match=message):
        check_n_clusters(n_clusters, n_nodes)


def test_n_clusters():
    assert check_n_clusters(np.int64(3), 3) == 3
    assert check_n_clusters(1, 1, minimum=1) == 1


def test_torch_geometric_like_data():
    data = SimpleNamespace(x=torch.ones(4, 2), edge_index=torch.from_numpy(EDGE_INDEX), y=None)
    assert is_graph_data(data)
    features, adjacency = unpack_graph_data(data)
    assert features.shape == (4, 2)
    assert adjacency.shape == (4, 4)
    assert adjacency.nnz == 4

    data.edge_weight = torch.tensor([2.0, 2.0, 3.0, 3.0])
    assert unpack_graph_data(data)[1].toarray()[1].tolist() == [2.0, 0.0, 3.0, 0.0]
    data.edge_weight = torch.ones(3)
    with pytest.raises(ValueError, match=r"edge_weight must hold one weight per edge \(4\), got 3"):
        unpack_graph_data(data)


def test_torch_geometric_like_data_without_parts():
    assert not is_graph_data(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"data.x must hold the node features"):
        unpack_graph_data(SimpleNamespace(x=None, edge_index=EDGE_INDEX))
    with pytest.raises(ValueError, match="edges in edge_index or adj_t"):
        unpack_graph_data(SimpleNamespace(x=X))
    with pytest.raises(ValueError, match=r"data.edge_index must hold indices below 2"):
        unpack_graph_data(SimpleNamespace(x=X[:2], edge_index=EDGE_INDEX))


def test_torch_geometric_like_data_with_transposed_adjacency():
    stored = SimpleNamespace(to_scipy=lambda layout: sp.csr_array(PATH))
    _, adjacency = unpack_graph_data(SimpleNamespace(x=X, adj_t=stored))
    np.testing.assert_array_equal(adjacency.toarray(), PATH)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of the compute capability that is given."""

    def there_are(capability: tuple[int, int]) -> None:
        answers = {
            "is_available": True, "device_count": 2, "get_device_capability": capability,
            "get_device_name": "GeForce",
        }  # fmt: skip
        for name, value in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
        monkeypatch.setattr("fastclust.validation.cuda_loaded", True)

    validation._tell_why_cpu.cache_clear()
    return there_are


def test_a_gpu_that_the_kernels_run_on(gpus):
    gpus((8, 0))
    assert check_device("auto").type == "cuda"
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"got 'cuda:7': torch sees 2 CUDA devices.*use 'cpu'"):
        check_device("cuda:7")


def test_a_gpu_that_is_too_old(gpus):
    gpus((7, 5))
    message = r"GeForce has compute capability 7\.5, the kernels need 8\.0 or later"
    with pytest.warns(UserWarning, match=message):
        assert check_device("auto").type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_device("auto").type == "cpu"  # told once
    for device in ("cuda", torch.device("cuda", 0)):
        with pytest.raises(ValueError, match=message):
            check_device(device)


def test_a_gpu_without_the_library_is_told(gpus, monkeypatch):
    gpus((9, 0))
    monkeypatch.setattr("fastclust.validation.cuda_loaded", False)
    with pytest.warns(UserWarning, match="CUDA library"):
        assert check_device("auto").type == "cpu"
