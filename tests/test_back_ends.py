"""k-means or normalised cut: eigenvectors, the rule, what the estimator makes of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import fastclust as fc
from fastclust.datasets import load_dataset, nearest_neighbor_graph
from fastclust.metrics import clustering_scores
from fastclust.models import back_ends
from fastclust.models.back_ends import choose_back_end, compare_back_ends, cut_vectors
from fastclust.validation import DataWarning

TWO_SPLITS = 2


def complete(n: int) -> sp.csr_array:
    return sp.csr_array(np.ones((n, n), np.float32) - np.eye(n, dtype=np.float32))


@pytest.fixture(scope="module")
def planted() -> fc.datasets.Dataset:
    """Six groups whose attributes are mostly noise: the cut finds more of them."""
    return fc.make_attributed_sbm(
        500, 3000, 20, 6, homophily=0.7, feature_noise=0.7, random_state=1
    )


def test_cut_finds_more_of_planted_groups_and_is_taken(planted):
    fits = {
        back_end: fc.SSGC(6, back_end=back_end, n_init=20).fit(
            planted.features, adjacency=planted.adjacency
        )
        for back_end in ("kmeans", "cut", "auto")
    }
    acc = {
        name: clustering_scores(planted.labels, fitted.labels_)["acc"]
        for name, fitted in fits.items()
    }
    assert acc["cut"] > acc["kmeans"] > 0.9
    for name, fitted in fits.items():
        assert np.array_equal(fitted.embedding_, fits["kmeans"].embedding_), name
        assert (fitted.back_end_evidence_ is None) == (name != "auto")
    assert np.array_equal(fits["auto"].labels_, fits["cut"].labels_)
    assert [fits[name].resolved_["back_end"] for name in fits] == ["kmeans", "cut", "cut"]
    evidence = fits["auto"].back_end_evidence_
    assert evidence["back_end"] == "cut" and "disjoint halves" in evidence["rule"]
    for agreement in (evidence["between_halves"], evidence["with_whole"]):
        assert 1 > agreement["cut"] > 1.05 * agreement["kmeans"] > 0


def test_predict_gives_the_nearest_mean(planted, tmp_path):
    x, a = planted.features, planted.adjacency
    fitted = fc.SSGC(6, back_end="cut", n_init=20).fit(x, adjacency=a)
    means = np.stack([fitted.embedding_[fitted.labels_ == c].mean(axis=0) for c in range(6)])
    np.testing.assert_allclose(fitted.parameters_["centers"].numpy(), means, atol=1e-5)
    distance = ((fitted.embedding_[:, None] - means) ** 2).sum(axis=2)
    predicted = fitted.predict(x, adjacency=a)
    assert (predicted == distance.argmin(axis=1)).mean() > 0.99
    assert (predicted == fitted.labels_).mean() > 0.9

    fitted.save(tmp_path)
    loaded = fc.SSGC.load(tmp_path)
    assert loaded.back_end == "cut" and loaded.resolved_ == fitted.resolved_
    assert np.array_equal(loaded.labels_, fitted.labels_)
    assert np.array_equal(loaded.predict(x, adjacency=a), predicted)


def test_evidence_is_kept_by_save(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    fitted = fc.SSGC(2, back_end="auto").fit(x, adjacency=adjacency)
    fitted.save(tmp_path)
    loaded = fc.SSGC.load(tmp_path)
    assert set(loaded.back_end_evidence_["with_whole"]) == {"kmeans", "cut"}
    assert loaded.back_end_evidence_ == fitted.back_end_evidence_
    assert loaded.get_params() == fitted.get_params()


def test_the_rule():
    def rule(halves: tuple[float, float], whole: tuple[float, float]) -> str:
        names = ("kmeans", "cut")
        return choose_back_end(*(dict(zip(names, pair, strict=True)) for pair in (halves, whole)))

    assert rule((0.60, 0.64), (0.70, 0.74)) == "cut"
    assert rule((0.60, 0.62), (0.70, 0.74)) == "kmeans"  # halves: less than 5 %
    assert rule((0.60, 0.64), (0.70, 0.73)) == "kmeans"  # half and whole: less than 5 %
    assert rule((0.60, 0.90), (0.70, 0.60)) == "kmeans"
    assert rule((0.0, 0.0), (0.0, 0.0)) == "kmeans"
    assert rule((1.0, 1.0), (1.0, 1.0)) == "kmeans"


def test_halves_are_compared_with_each_other_and_with_the_whole(planted):
    """A back end that knows the groups, and one that guesses: the first agrees with itself."""
    halves = []
    rng = np.random.default_rng(0)

    def cluster(features, adjacency):
        halves.append((features, adjacency))
        return {"cut": planted.labels, "kmeans": rng.integers(0, 6, 500)}

    whole = {"cut": planted.labels, "kmeans": rng.integers(0, 6, 500)}
    evidence = compare_back_ends(planted.features, planted.adjacency, whole, cluster)
    assert evidence["between_halves"]["cut"] == evidence["with_whole"]["cut"] == 1.0
    assert evidence["back_end"] == "cut" and evidence["between_halves"]["kmeans"] < 0.1
    assert len(halves) == 2 * TWO_SPLITS
    for (x1, a1), (x2, a2) in (halves[:2], halves[2:]):
        assert x1.shape == x2.shape == (500, 10)
        assert ((a1 + a2) != planted.adjacency).nnz == 0
    merged = whole | {"cut": np.zeros(500, int)}  # agrees with nothing but itself
    assert compare_back_ends(planted.features, planted.adjacency, merged, cluster)["back_end"] == (
        "kmeans"
    )


def test_no_comparison_says_why(degrees_only, two_blocks, monkeypatch):
    adjacency, x = degrees_only
    for asked in ("cut", "auto"):
        fitted = fc.SSGC(4, back_end=asked).fit(x, adjacency=adjacency)
        assert fitted.recipe_ == "degree" and fitted.resolved_["back_end"] == "kmeans"
    assert fitted.back_end_evidence_["reason"] == "attributes only encode degrees"
    plain = fc.SSGC(4).fit(x, adjacency=adjacency)
    assert np.array_equal(plain.labels_, fitted.labels_)

    adjacency, x, _ = two_blocks
    one_column = fc.SSGC(2, back_end="auto").fit(x[:, :1], adjacency=adjacency)
    assert "nothing to cut in half" in one_column.back_end_evidence_["reason"]

    monkeypatch.setattr("fastclust.estimators.ssgc.MOST_NODES", 50)
    many = fc.SSGC(2, back_end="auto").fit(x, adjacency=adjacency)
    assert many.resolved_["back_end"] == "kmeans"
    assert many.back_end_evidence_["reason"] == "more than 50 nodes"
    with pytest.raises(ValueError, match=r"at most 50 nodes, got 60; use back_end='kmeans', or"):
        fc.SSGC(2, back_end="cut").fit(x, adjacency=adjacency)
    with pytest.raises(ValueError, match="'back_end' parameter of SSGC must be a str among"):
        fc.SSGC(2, back_end="best").fit(x, adjacency=adjacency)


def _random(n: int, d: int, sparse: bool = False) -> np.ndarray | sp.csr_array:
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    return sp.csr_array(np.maximum(x - 1, 0)) if sparse else x


@pytest.mark.parametrize("keywords", [{}, {"recipe": "plain"}, {"consensus": False, "n_init": 1}])
@pytest.mark.parametrize(
    ("features", "adjacency", "n_clusters"),
    [
        (np.ones((2, 1), np.float32), complete(2), 2),
        (np.eye(3, dtype=np.float32), complete(3), 3),
        (np.zeros((6, 4), np.float32), complete(6), 2),
        (sp.csr_array((6, 4), dtype=np.float32), complete(6), 2),
        (_random(40, 6), sp.csr_array((40, 40), dtype=np.float32), 5),
        (_random(40, 1), complete(40), 3),
        (_random(16, 5), complete(16), 16),
        (_random(60, 8), complete(60) * np.float32(0.3), 1),
        (_random(60, 8), complete(60) * np.float32(0.3), 2),
        (_random(90, 9, sparse=True), sp.block_diag([complete(5)] * 18).tocsr(), 4),
        (np.ones((600, 3), np.float32), complete(600), 2),
    ],
    ids=[
        "two nodes", "K = N = 3", "zeros", "sparse zeros", "no edges", "one feature", "K = N = 16",
        "K = 1", "weights", "cliques", "all alike",
    ],
)  # fmt: skip
def test_smallest_cases(features, adjacency, n_clusters, keywords):
    for back_end in ("cut", "auto"):
        model = fc.SSGC(n_clusters, back_end=back_end, **{"n_init": 4, **keywords})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # one cluster
            labels = model.fit_predict(features, adjacency=adjacency)
            again = model.fit_predict(features, adjacency=adjacency)
        assert labels.shape == (features.shape[0],) and np.array_equal(labels, again)
        assert set(labels) <= set(range(n_clusters))
        predicted = model.predict(features, adjacency=adjacency)
        if model.resolved_["back_end"] == "cut":
            assert set(predicted) <= set(labels), "no cluster without nodes is ever the nearest"


@pytest.mark.parametrize("n", [60, 800])
def test_rows_of_the_cut_are_those_of_dense_linear_algebra(n):
    rng = np.random.default_rng(3)
    labels = np.arange(n) % 4
    z = np.eye(4)[labels] + 0.4 * rng.normal(size=(n, 4))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    upper = np.triu(rng.random((n, n)) < np.where(labels[:, None] == labels, 8 / n, 1 / n), 1)
    a = sp.csr_array((upper | upper.T).astype(np.float32)) * np.float32(0.7)
    near = nearest_neighbor_graph(z, 15).toarray().astype(float)
    w = near / near.sum() + a.toarray() / a.sum()
    d = w.sum(axis=1) ** -0.5
    _, vectors = np.linalg.eigh(d[:, None] * w * d)
    expected = vectors[:, ::-1][:, :4]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    rows = cut_vectors(torch.from_numpy(z), a, 4, seed=1)
    assert rows.dtype == torch.float32 and rows.shape == (n, 4)
    # Rotations and signs are free: compare the angles between rows.
    got = rows.numpy()
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=5e-3)


def test_every_component_has_its_eigenvector():
    """Iterations on the whole find one to three copies of the five times that 1 is there."""
    rng = np.random.default_rng(0)
    sizes = (2000, 300, 700, 40, 600)
    blocks = [nearest_neighbor_graph(rng.normal(size=(n, 3)), 20) for n in sizes]
    order = rng.permutation(sum(sizes))
    w = sp.block_diag(blocks).tocsr()[order][:, order].astype(np.float64)
    scale = sp.diags_array(np.asarray(w.sum(axis=1)).reshape(-1) ** -0.5)
    s = sp.csr_array(scale @ w @ scale)
    u = back_ends.leading_eigenvectors(s, 5)
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-8)
    np.testing.assert_allclose(s @ u, u, atol=1e-3)
    assert (np.count_nonzero(u, axis=0) == sorted(sizes, reverse=True)).all()
    three = back_ends.leading_eigenvectors(s, 3)
    assert (np.count_nonzero(three, axis=0) == (2000, 700, 600)).all()


@pytest.mark.slow
def test_amac(data_root):
    """The graph of the literature that gains: k-means splits its largest class."""
    data = load_dataset("amac", root=data_root)
    fitted = fc.SSGC(10, back_end="cut").fit(data.features, adjacency=data.adjacency)
    assert clustering_scores(data.labels, fitted.labels_)["acc"] > 0.65
