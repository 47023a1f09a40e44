"""Graph: normalisation, immutability, chunk tables, pickling."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import fastclust as fc
import fastclust.graph as graph_module
from fastclust import reference
from fastclust.graph import Graph, _chunk_tables


def random_adjacency(n: int, degree: float, seed: int = 0, weighted: bool = False) -> sp.csr_array:
    """A symmetric adjacency without self loops of about the given mean degree."""
    rng = np.random.default_rng(seed)
    upper = sp.triu(sp.random_array((n, n), density=min(1.0, degree / n), rng=rng), 1)
    upper.data = rng.uniform(0.1, 3.0, upper.nnz) if weighted else np.ones(upper.nnz)
    return sp.csr_array(upper + upper.T, dtype=np.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
def test_scales_give_the_normalised_adjacency(norm, self_loops, weighted):
    adjacency = random_adjacency(40, 6, weighted=weighted)
    graph = Graph(adjacency, norm, self_loops)
    dense = adjacency.toarray().astype(np.float64) + (np.eye(40) if self_loops else 0)
    degree = dense.sum(axis=1)
    if norm == "rw":
        dense = dense / degree[:, None]
    elif norm == "sym":
        dense = dense / np.sqrt(np.outer(degree, degree))
    np.testing.assert_allclose(reference.dense_adjacency(graph).numpy(), dense, rtol=1e-12)
    row, col = graph.scales(torch.float64)
    ours = np.asarray(adjacency.todense(), np.float64) + (np.eye(40) if self_loops else 0)
    if row is not None:
        ours = row.numpy()[:, None] * ours
    if col is not None:
        ours = ours * col.numpy()[None, :]
    np.testing.assert_allclose(ours, dense, rtol=1e-12)
    assert (graph.values is None) == (not weighted)
    assert (graph.row_scale is None) == (norm == "none")
    assert (graph.col_scale is None) == (norm != "sym")


def test_form_of_the_arrays():
    graph = Graph(random_adjacency(30, 4))
    assert graph.indptr.dtype == torch.int64 and graph.indptr.shape == (31,)
    assert graph.indices.dtype == torch.int32 and graph.indices.shape == (graph.n_edges,)
    assert graph.row_scale.dtype == torch.float32
    assert graph.n_nodes == 30 and graph.device == torch.device("cpu")
    assert (
        repr(graph)
        == f"Graph(n_nodes=30, n_edges={graph.n_edges}, norm='rw', self_loops=True, device='cpu')"
    )


def test_every_kind_of_adjacency_gives_the_same_graph():
    networkx = pytest.importorskip("networkx")
    adjacency = random_adjacency(20, 3)
    coo = adjacency.tocoo()
    edge_index = np.stack([coo.row, coo.col])
    nx_graph = networkx.Graph()
    nx_graph.add_nodes_from(range(20))
    nx_graph.add_edges_from(edge_index.T.tolist())
    kinds = {
        "array": adjacency.toarray(),
        "coo": coo,
        "torch dense": torch.from_numpy(adjacency.toarray()),
        "torch sparse": torch.from_numpy(adjacency.toarray()).to_sparse(),
        "torch csr": torch.from_numpy(adjacency.toarray()).to_sparse_csr(),
        "networkx": nx_graph,
    }
    if edge_index.max() == 19:
        kinds["edge index"] = torch.from_numpy(edge_index)
    expected = Graph(adjacency)
    for kind, value in kinds.items():
        graph = Graph(value)
        assert torch.equal(graph.indptr, expected.indptr), kind
        assert torch.equal(graph.indices, expected.indices), kind


def test_isolated_nodes_have_scale_zero_without_self_loops():
    graph = Graph(sp.csr_array((3, 3), dtype=np.float32), self_loops=False)
    assert graph.row_scale.tolist() == [0.0, 0.0, 0.0]
    assert Graph(sp.csr_array((3, 3), dtype=np.float32)).row_scale.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("weight", [1e-39, 1e-44])
def test_degrees_whose_inverse_overflows_are_told(weight):
    adjacency = np.array([[0.0, weight], [weight, 0.0]])
    with pytest.raises(ValueError, match=r"degrees of 1e-38 or more, got 1e-\d\d; scale"):
        Graph(adjacency, self_loops=False)
    Graph(adjacency)  # a self loop adds 1
    scale = Graph(adjacency, "sym", self_loops=False).row_scale
    assert scale.isfinite().all()


def test_graph_never_changes():
    adjacency = random_adjacency(10, 3)
    graph = Graph(adjacency)
    with pytest.raises(AttributeError, match="never changes"):
        graph.norm = "sym"
    with pytest.raises(AttributeError, match="never changes"):
        del graph.indices
    before = graph.indices.clone()
    adjacency.indices[:] = 0  # the graph must not see later changes of what it was made from
    assert torch.equal(graph.indices, before)


def test_pickle_and_to_keep_everything():
    graph = Graph(random_adjacency(25, 5, weighted=True), "sym", False)
    copy = pickle.loads(pickle.dumps(graph))
    assert graph.to("cpu") is graph
    assert repr(copy) == repr(graph) and copy.__dict__.keys() == graph.__dict__.keys()
    for name, value in graph.__dict__.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, copy.__dict__[name]), name
        else:
            assert value == copy.__dict__[name], name
    with pytest.raises(AttributeError, match="never changes"):
        copy.norm = "rw"


def test_moving_to_another_device_type_moves_every_tensor_and_recuts_hubs():
    graph = Graph(random_adjacency(25, 5, weighted=True), "sym")
    moved = graph.to("meta")
    assert moved.device.type == "meta" and moved.n_edges == graph.n_edges
    for name, value in moved.__dict__.items():
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", name


@pytest.mark.parametrize("hub_edges", [1, 7, 64, 10_000])
def test_chunk_tables_cover_every_edge_once(hub_edges, monkeypatch):
    monkeypatch.setattr(graph_module, "TASK_EDGES", 50)
    rng = np.random.default_rng(1)
    degree = rng.integers(0, 40, 90)
    degree[[0, 17, 18, 89]] = [200, 65, 64, 500]
    indptr = np.concatenate([[0], np.cumsum(degree)])
    tables = _chunk_tables(indptr, hub_edges)
    task_rows, segments, hubs = (tables[k].numpy() for k in ("_task_rows", "_segments", "_hubs"))
    assert task_rows[0] == 0 and task_rows[-1] == 90 and (np.diff(task_rows) > 0).all()

    seen = np.zeros(indptr[-1], dtype=int)
    for row in np.flatnonzero(degree <= hub_edges):
        seen[indptr[row] : indptr[row + 1]] += 1
    for _, begin, end in segments:
        assert 0 < end - begin <= hub_edges
        seen[begin:end] += 1
    assert (seen == 1).all()

    assert hubs[:, 0].tolist() == np.flatnonzero(degree > hub_edges).tolist()
    covered = []
    for row, first, last in hubs:
        assert (segments[first:last, 0] == row).all()
        assert segments[first, 1] == indptr[row] and segments[last - 1, 2] == indptr[row + 1]
        covered += range(first, last)
    assert covered == list(range(len(segments)))

    # no task holds many more edges than it should: one row more at most
    small = np.where(degree > hub_edges, 0, degree)
    load = np.add.reduceat(small, task_rows[:-1])
    assert load.max() <= 50 + small.max()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"norm": "row"}, ValueError, "norm must be one of 'rw', 'sym', 'none', got 'row'"),
        ({"self_loops": "no"}, TypeError, "self_loops must be True or False"),
    ],
)
def test_wrong_options(kwargs, error, match):
    with pytest.raises(error, match=match):
        Graph(random_adjacency(5, 2), **kwargs)


def test_wrong_adjacency():
    with pytest.raises(ValueError, match="adjacency must be square"):
        Graph(np.ones((3, 4)))
    with pytest.raises(TypeError, match="adjacency"):
        Graph("cora")


def test_graph_is_public():
    assert fc.Graph is Graph
