"""make_attributed_sbm: what was asked for is what comes, to the edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import fastclust as fc
from fastclust import ops, synthetic
from fastclust.metrics import clustering_scores


def check(ds: fc.datasets.Dataset, n: int, n_edges: int, d: int, k: int, homophily: float) -> None:
    """Everything that holds for any settings."""
    a = ds.adjacency
    assert a.shape == (n, n) and a.nnz == 2 * n_edges == ds.n_edges
    assert a.has_canonical_format and (a != a.T).nnz == 0 and not a.diagonal().any()
    assert set(a.data.tolist()) <= {1.0}
    assert ds.features.shape == (n, d) and ds.features.dtype == np.float32
    assert ds.labels is not None and np.bincount(ds.labels, minlength=k).min() >= 1
    rows = np.repeat(np.arange(n), np.diff(a.indptr))
    same = int((ds.labels[rows] == ds.labels[a.indices]).sum()) // 2
    assert same == round(homophily * n_edges), "homophily is met exactly"


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(50, 300),  # of fewer, six clusters have no room for the densest graph
    degree=st.floats(0, 3),
    d=st.integers(1, 20),
    k=st.integers(2, 6),
    homophily=st.floats(0, 1),
    exponent=st.one_of(st.none(), st.floats(2.2, 6)),
    seed=st.integers(0, 2**32 - 1),
)
def test_counts_are_exact(
    n: int, degree: float, d: int, k: int, homophily: float, exponent: float | None, seed: int
) -> None:
    n_edges = int(degree * n / 2)
    ds = fc.make_attributed_sbm(
        n, n_edges, d, k, homophily=homophily, degree_exponent=exponent, random_state=seed
    )
    check(ds, n, n_edges, d, k, homophily)


def test_a_homophily_of_few_digits() -> None:
    """2051 is no number of half precision."""
    ds = fc.make_attributed_sbm(1000, 2051, 4, 2, homophily=np.float16(1.0))
    assert ds.n_edges == 2 * 2051


def test_same_seed_same_graph_and_another_seed_another() -> None:
    first, again, other = (
        fc.make_attributed_sbm(500, 2000, 8, 5, random_state=seed) for seed in (3, 3, 4)
    )
    assert (first.adjacency != again.adjacency).nnz == 0
    assert np.array_equal(first.features, again.features)
    assert np.array_equal(first.labels, again.labels)
    assert (first.adjacency != other.adjacency).nnz > 0
    assert not np.array_equal(first.labels, other.labels)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in many small blocks the graph is another one, but as good."""
    monkeypatch.setattr(synthetic, "_BLOCK", 64)
    check(fc.make_attributed_sbm(400, 3000, 6, 4, homophily=0.7), 400, 3000, 6, 4, 0.7)


def test_degrees_follow_the_power_law() -> None:
    heavy = fc.make_attributed_sbm(20_000, 100_000, 2, 4, degree_exponent=2.5)
    equal = fc.make_attributed_sbm(20_000, 100_000, 2, 4, degree_exponent=None)
    heavy_degree, equal_degree = (np.diff(ds.adjacency.indptr) for ds in (heavy, equal))
    # With equal theta degrees are Poisson of mean 10; the power law reaches far beyond.
    assert equal_degree.max() < 40 and heavy_degree.max() > 100
    assert np.isclose(equal_degree.var(), 10, rtol=0.1)
    # Tail of theta: P(theta > t) ~ t^-1.5; expected degree is proportional to theta.
    theta = synthetic._propensities(200_000, 2.5, 0)
    for t in (2.0, 5.0, 10.0):
        assert np.isclose((theta > t).mean(), t**-1.5, rtol=0.1)


def test_clusters_can_be_found_and_noise_hides_them() -> None:
    scores = {}
    for noise in (0.05, 5.0):
        ds = fc.make_attributed_sbm(600, 3000, 16, 3, feature_noise=noise)
        labels = ops.kmeans(torch_from(ds.features), 3, n_init=3).labels.numpy()
        scores[noise] = clustering_scores(ds.labels, labels)["nmi"]
    assert scores[0.05] == 1.0 and scores[5.0] < 0.1


def torch_from(x: Any) -> Any:
    import torch

    return torch.from_numpy(np.asarray(x))


def test_sizes_are_relative() -> None:
    ds = fc.make_attributed_sbm(1000, 3000, 4, 3, sizes=[1, 2, 7])
    assert np.abs(np.bincount(ds.labels) - [100, 200, 700]).max() <= 2


def test_edges_are_drawn_by_theta_on_both_sides() -> None:
    """A node's expected degree is 2 E theta_i / sum theta where clusters are alike."""
    n, n_edges = 300, 1500
    theta = synthetic._propensities(n, 3.0, 7)
    degree = np.zeros(n)
    runs = 40
    for seed in range(runs):
        # theta depends on the seed; hold it fixed to average over the edges alone.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "_propensities", lambda *_: theta)
            ds = fc.make_attributed_sbm(n, n_edges, 1, 2, degree_exponent=3.0, random_state=seed)
        order = synthetic._generator(seed, 0).permutation(n)
        degree += np.diff(ds.adjacency.indptr)[order] / runs
    light = theta < 3  # heavy nodes lose a little to edges that are drawn twice
    assert np.corrcoef(degree[light], theta[light])[0, 1] > 0.97
    assert np.isclose(degree.sum(), 2 * n_edges)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_nodes": 1}, "n_nodes must be a whole number of 2 or more, got 1"),
        ({"n_edges": 2.5}, "n_edges must be a whole number"),
        ({"n_clusters": 200}, "n_clusters must be at most n_nodes = 100"),
        ({"homophily": 1.1}, "homophily must be a number of at least 0 and at most 1, got 1.1"),
        ({"feature_noise": -1}, "feature_noise must be a number of at least 0"),
        ({"degree_exponent": 2.0}, "degree_exponent must be more than 2"),
        ({"sizes": [1, 2]}, "sizes must be 4 positive numbers"),
        ({"n_edges": 4000}, "edges inside clusters were asked for and there is room for 1200"),
        ({"n_clusters": 1, "homophily": 0.5}, "edges between clusters were asked for"),
        ({"random_state": None}, "random_state must be a whole number"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    settings_: dict[str, Any] = {"n_nodes": 100, "n_edges": 300, "n_features": 2, "n_clusters": 4}
    with pytest.raises(ValueError, match=message):
        fc.make_attributed_sbm(**(settings_ | changes))


@pytest.mark.slow
def test_a_graph_of_the_shape_of_ogbn_arxiv() -> None:
    ds = fc.make_attributed_sbm(169_343, 1_166_243, 128, 40)
    check(ds, 169_343, 1_166_243, 128, 40, 0.8)
    assert isinstance(ds.adjacency, sp.csr_array)
