"""The training-free embedding: its parts against dense formulas, its result on real graphs."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

import fastclust as fc
from fastclust import ops
from fastclust.datasets import load_dataset
from fastclust.graph import Graph
from fastclust.metrics import clustering_scores
from fastclust.models import consensus, halves, ssgc
from fastclust.models.consensus import consensus_kmeans
from fastclust.models.inputs import inverse_document_frequency, unit_rows, weighted_rows
from fastclust.models.leading import gram_matrix, leading_bases
from fastclust.models.ssgc import ssgc_embedding, ssgc_projection


def one_hot(columns: np.ndarray) -> sp.csr_array:
    return sp.csr_array(np.eye(int(columns.max()) + 1, dtype=np.float32)[columns])


@pytest.mark.parametrize("recipe", ["multiview", "plain"])
def test_planted_blocks_are_found(two_blocks, recipe):
    adjacency, features, labels = two_blocks
    embedding, info = ssgc_embedding(features, adjacency, 2, recipe=recipe)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (60, 4 if recipe == "multiview" else 8)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(60))
    found = ops.kmeans(embedding, 2).labels.numpy()
    assert clustering_scores(labels, found)["acc"] > 0.95
    assert info["recipe"] == recipe
    assert info["n_steps"] in (0, 1, 2, 4, 8)
    assert (info["agreement"] is None) == (recipe == "plain")


def test_same_seed_same_embedding(two_blocks):
    adjacency, features, _ = two_blocks
    first, _ = ssgc_embedding(features, adjacency, 2, seed=3)
    second, _ = ssgc_embedding(features, adjacency, 2, seed=3)
    assert torch.equal(first, second)


def test_sparse_and_dense_features_agree(two_blocks):
    adjacency, features, _ = two_blocks
    features = np.abs(features)
    dense, _ = ssgc_embedding(features, adjacency, 2, n_steps=4)
    sparse, _ = ssgc_embedding(sp.csr_array(features), adjacency, 2, n_steps=4)
    torch.testing.assert_close(dense, sparse, atol=1e-4, rtol=0)


def test_plain_is_the_singular_value_decomposition_of_the_smoothed_rows(two_blocks):
    adjacency, features, _ = two_blocks
    a = adjacency.toarray() + np.eye(60)
    d = a.sum(axis=1) ** -0.5
    s = d[:, None] * a * d
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    powers = sum(np.linalg.matrix_power(s, t) for t in (1, 2, 3)) / 3
    u, values, _ = np.linalg.svd(0.05 * x + 0.95 * powers @ x, full_matrices=False)
    expected = (u * values)[:, :3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    embedding, _ = ssgc_embedding(features, adjacency, 2, recipe="plain", n_steps=3, n_components=3)
    got = embedding.numpy()
    got = got * np.sign((got * expected).sum(axis=0))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_smoothing_keeps_every_number_of_steps(path_graph):
    graph = Graph(path_graph, norm="sym")
    q = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    smoothed = ssgc._smoothed(graph, q, (0, 1, 3))
    one = ops.propagate(graph, q)
    two = ops.propagate(graph, one)
    three = ops.propagate(graph, two)
    assert torch.equal(smoothed[0], q)
    torch.testing.assert_close(smoothed[1], 0.05 * q + 0.95 * one)
    torch.testing.assert_close(smoothed[3], 0.05 * q + 0.95 * (one + two + three) / 3)


def test_views_are_leading_singular_vectors_of_the_scaled_matrix():
    rng = np.random.default_rng(0)
    m = rng.normal(size=(40, 6)).astype(np.float32)
    scale = torch.from_numpy(rng.random(6) + 0.1)
    (basis,) = leading_bases(gram_matrix([torch.from_numpy(m)]), [scale], 2).float()
    view = unit_rows(torch.from_numpy(m) @ basis)
    u, values, _ = np.linalg.svd(m * scale.numpy(), full_matrices=False)
    expected = (u * values)[:, :2]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = view.numpy()
    np.testing.assert_allclose(got * np.sign((got * expected).sum(0)), expected, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_tf_idf_is_the_smooth_one(dense):
    rng = np.random.default_rng(0)
    counts = (rng.random((30, 9)) < 0.3) * rng.integers(1, 5, (30, 9))
    counts[4] = 0
    features = counts.astype(np.float32)
    expected = TfidfTransformer().fit_transform(counts.astype(np.float64)).toarray()
    features = features if dense else sp.csr_array(features)
    got = weighted_rows(features, inverse_document_frequency(features))
    np.testing.assert_allclose(got if dense else got.toarray(), expected, atol=1e-6)


def test_attributes_that_encode_degrees_are_recognised():
    rng = np.random.default_rng(0)
    upper = np.triu(rng.random((80, 80)) < rng.random((80, 1)) * 0.5, 1)
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    degree = np.diff(adjacency.indptr)
    embedding, info = ssgc_embedding(one_hot(degree), adjacency, 4)
    assert (info["recipe"], info["n_steps"], info["agreement"]) == ("degree", 0, None)
    assert info["projection"] == {} and info["scales"] == []
    assert embedding.shape == (80, 3)
    order = np.argsort(embedding[:, 0].numpy(), kind="stable")
    assert (np.diff(degree[order]) >= 0).all()
    # Not so: an identity matrix (a column per node), or classes that say nothing about degrees.
    assert ssgc_embedding(one_hot(np.arange(80)), adjacency, 4)[1]["recipe"] == "multiview"
    assert ssgc_embedding(one_hot(np.arange(80) % 5), adjacency, 4)[1]["recipe"] == "multiview"
    assert ssgc_embedding(one_hot(degree), adjacency, 4, recipe="plain")[1]["recipe"] == "plain"


def test_centralities_are_those_of_dense_linear_algebra():
    rng = np.random.default_rng(1)
    upper = np.triu(rng.random((50, 50)) < 0.15, 1)
    upper[:, 49] = False  # no edge
    a = (upper | upper.T).astype(np.float64)
    degree = a.sum(axis=1)
    google = 0.85 * a / np.maximum(degree, 1)
    walk = np.linalg.solve(np.eye(50) - google, np.full(50, 0.15 / 50))
    _, vectors = np.linalg.eigh(a)
    ranks = ssgc._centrality_ranks(sp.csr_array(a.astype(np.float32)))
    assert ranks.dtype == np.float32 and ranks.min() > 0 and ranks.max() <= 1
    for column, expected in enumerate((degree, walk, np.abs(vectors[:, -1]))):
        np.testing.assert_allclose(ranks[:, column], rankdata(expected.round(9)) / 50, rtol=1e-6)


def test_nodes_alike_are_ties_also_where_the_graph_is_bipartite():
    cycle = sp.csr_array(np.roll(np.eye(6), 1, axis=0) + np.roll(np.eye(6), -1, axis=0))
    assert (ssgc._centrality_ranks(cycle) == np.float32(3.5 / 6)).all()
    star = np.zeros((5, 5))
    star[0, 1:] = star[1:, 0] = 1
    for adjacency in (star, np.zeros((5, 5))):
        ranks = ssgc._centrality_ranks(sp.csr_array(adjacency))
        assert (ranks[1:] == ranks[1]).all() and (ranks[0] >= ranks[1]).all()


def test_scales_are_the_embeddings_with_half_and_twice_the_steps(two_blocks, monkeypatch):
    adjacency, features, _ = two_blocks
    embedding, info = ssgc_embedding(features, adjacency, 2, n_steps=4, scales=True)
    alone, without = ssgc_embedding(features, adjacency, 2, n_steps=4)
    assert torch.equal(embedding, alone) and without["scales"] == []
    for n_steps, other in zip((2, 8), info["scales"], strict=True):
        expected, _ = ssgc_embedding(features, adjacency, 2, n_steps=n_steps)
        torch.testing.assert_close(other, expected, atol=1e-5, rtol=0)
    for n_steps, count in ((0, 0), (1, 1), (2, 2)):
        _, info = ssgc_embedding(features, adjacency, 2, n_steps=n_steps, scales=True)
        assert len(info["scales"]) == count
    monkeypatch.setattr(ssgc, "SAMPLED_FROM", 59)
    assert ssgc_embedding(features, adjacency, 2, n_steps=4, scales=True)[1]["scales"] == []


def test_fewer_steps_must_agree_clearly_better():
    assert ssgc._choose_steps(None) == 8
    base = {0: 0.1, 1: 0.2, 2: 0.3, 4: 0.52, 8: 0.5}
    assert ssgc._choose_steps(base) == 8
    assert ssgc._choose_steps(base | {2: 0.6}) == 2
    assert ssgc._choose_steps({0: 0.0, 1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0}) == 8


def test_no_steps_where_the_graph_is_noise():
    """Clear clusters in the attributes and random edges: smoothing can only do harm."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 60)
    features = np.repeat(np.eye(3), 10, axis=1)[labels] + 0.3 * rng.random((180, 30))
    upper = np.triu(rng.random((180, 180)) < 0.05, 1)
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    embedding, info = ssgc_embedding(features.astype(np.float32), adjacency, 3)
    found = ops.kmeans(embedding, 3).labels.numpy()
    assert info["n_steps"] < 8
    assert clustering_scores(labels, found)["acc"] == 1.0


@pytest.mark.parametrize("recipe", ["multiview", "plain"])
@pytest.mark.parametrize(
    ("features", "adjacency", "n_clusters"),
    [
        (np.eye(5, 3, dtype=np.float32), sp.csr_array((5, 5), dtype=np.float32), 2),
        (np.ones((2, 1), np.float32), sp.csr_array(1 - np.eye(2, dtype=np.float32)), 2),
        (np.arange(4.0, dtype=np.float32)[:, None], sp.csr_array(np.ones((4, 4)) - np.eye(4)), 3),
        (np.zeros((6, 4), np.float32), sp.csr_array(np.ones((6, 6)) - np.eye(6)), 2),
        (sp.csr_array((6, 4), dtype=np.float32), sp.csr_array(np.ones((6, 6)) - np.eye(6)), 2),
        (-np.eye(6, dtype=np.float32), sp.csr_array(np.ones((6, 6)) - np.eye(6)), 6),
    ],
    ids=["no edges", "two nodes", "one feature", "zeros", "sparse zeros", "negative"],
)
def test_smallest_cases(features, adjacency, n_clusters, recipe):
    embedding, _ = ssgc_embedding(features, adjacency.astype(np.float32), n_clusters, recipe=recipe)
    assert embedding.shape[0] == features.shape[0]
    assert torch.isfinite(embedding).all()
    assert ops.kmeans(embedding, n_clusters).labels.shape == (features.shape[0],)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"recipe": "best"}, "recipe must be 'multiview' or 'plain', got 'best'"),
        ({"weighting": "bm25"}, "weighting must be 'auto', 'l2' or 'tf-idf', got 'bm25'"),
        ({"weighting": "tf-idf"}, "must be given features of 0 or more, got -1"),
        ({"n_steps": -1}, "n_steps must be 0 or more, got -1"),
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
    ],
)
def test_bad_arguments(path_graph, keywords, message):
    with pytest.raises(ValueError, match=message):
        ssgc_embedding(-np.eye(5, dtype=np.float32), path_graph, 2, **keywords)


@pytest.mark.parametrize(
    ("name", "recipe", "least"),
    [
        ("cora", "multiview", 0.67),
        ("cora", "plain", 0.63),
        pytest.param("citeseer", "multiview", 0.69, marks=pytest.mark.slow),
        ("bat", "multiview", 0.77),
        ("eat", "multiview", 0.53),
        ("uat", "multiview", 0.56),
        pytest.param("amap", "multiview", 0.785, marks=pytest.mark.slow),
        pytest.param("amac", "multiview", 0.53, marks=pytest.mark.slow),
    ],
)
def test_real_graphs(data_root, name, recipe, least):
    dataset = load_dataset(name, root=data_root)
    embedding, _ = ssgc_embedding(
        dataset.features, dataset.adjacency, dataset.n_clusters, recipe=recipe
    )
    found = ops.kmeans(embedding, dataset.n_clusters).labels.numpy()
    assert clustering_scores(dataset.labels, found)["acc"] >= least


def test_consensus_is_the_typical_minimum_and_hardly_depends_on_the_seed() -> None:
    """Overlapping groups have several minima; the votes of many starts find the same one."""
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(size=(400, 6)).astype(np.float32))
    single = [ops.kmeans(z, 6, n_init=1, seed=s) for s in range(8)]
    agreed = [consensus_kmeans(z, 6, n_init=60, seed=s) for s in range(8)]

    def agreement(runs: list[ops.KMeansResult]) -> float:
        pairs = itertools.combinations([r.labels.numpy() for r in runs], 2)
        return float(np.mean([adjusted_rand_score(*pair) for pair in pairs]))

    assert agreement(agreed) > agreement(single) + 0.1
    typical = np.median([float(r.inertia) for r in single])
    assert all(float(r.inertia) <= typical for r in agreed)
    again = consensus_kmeans(z, 6, n_init=60, seed=3)
    assert torch.equal(again.labels, agreed[3].labels)
    few = consensus_kmeans(z, 6, n_init=3, seed=1)
    assert torch.equal(few.labels, ops.kmeans(z, 6, n_init=3, seed=1).labels)


def test_votes_are_orthonormal_indicators() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    votes = consensus._votes(x, 3, 4, seed=0)
    assert votes.shape == (50, 6)
    for vote in votes.split(3, dim=1):
        torch.testing.assert_close(vote.T @ vote, torch.eye(3))
        assert ((vote > 0).sum(1) == 1).all()


@pytest.mark.parametrize("sampled_from", [1 << 14, 100])
def test_other_embeddings_vote_as_well(monkeypatch, sampled_from) -> None:
    """Rows whose groups cannot be seen are clustered by the votes of those that show them."""
    monkeypatch.setattr(consensus, "SAMPLED_FROM", sampled_from)
    monkeypatch.setattr(consensus, "AGREEMENT_ROWS", 150)
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 100)
    blurred, clear = (
        torch.from_numpy((np.eye(3)[labels] + noise * rng.normal(size=(300, 3))).astype(np.float32))
        for noise in (0.6, 0.05)
    )
    alone = consensus_kmeans(blurred, 3, n_init=12).labels.numpy()
    helped = consensus_kmeans(blurred, 3, n_init=12, others=[clear, clear]).labels.numpy()
    assert adjusted_rand_score(labels, helped) >= adjusted_rand_score(labels, alone)
    again = consensus_kmeans(blurred, 3, n_init=12, others=[clear, clear]).labels.numpy()
    assert np.array_equal(helped, again)


def test_consensus_with_fewer_distinct_rows_than_clusters() -> None:
    z = torch.eye(3).repeat(4, 1)  # [12, 3]
    labels = consensus_kmeans(z, 5, n_init=8).labels
    assert len(set(labels[:3].tolist())) == 3 and torch.equal(labels[:3], labels[3:6])


def test_sketch_of_many_votes_is_their_decomposition(monkeypatch) -> None:
    """The same leading directions, nearly all of the energy, and the same clusters."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 30)
    z = torch.from_numpy((np.eye(12)[labels] + 0.3 * rng.normal(size=(360, 12))).astype(np.float32))
    votes = consensus._votes(z, 12, 100, seed=0)
    assert votes.shape[1] > consensus._EXACT_VOTES
    sketched = consensus._leading_coordinates(votes, 48, seed=0)
    found = consensus_kmeans(z, 12).labels
    monkeypatch.setattr(consensus, "_EXACT_VOTES", votes.shape[1])
    exact = consensus._leading_coordinates(votes, 48, seed=0)
    assert sketched.shape == exact.shape == (360, 48)
    bases = [torch.linalg.qr(rows[:, :12]).Q for rows in (sketched, exact)]
    assert torch.linalg.svdvals(bases[0].T @ bases[1]).min() > 0.999
    assert sketched.square().sum() > 0.995 * exact.square().sum()
    assert torch.equal(found, consensus_kmeans(z, 12).labels)


def test_sketch_of_votes_does_not_depend_on_threads() -> None:
    z = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with threadpool_limits(limits=count, user_api="blas"):
                votes = consensus._votes(z, 15, 100, seed=0)
                rows = consensus._leading_coordinates(votes, 60, seed=0)
                results.append((rows, consensus_kmeans(z, 15).labels))
    finally:
        torch.set_num_threads(threads)
    for rows, labels in results[1:]:
        assert torch.equal(rows, results[0][0]) and torch.equal(labels, results[0][1])


def test_time_of_the_consensus_grows_gently_with_the_clusters() -> None:
    """By a decomposition in K^3, 60 clusters took 60 times as long as 7; now it is 4 times."""
    z = torch.randn(131, 64, generator=torch.Generator().manual_seed(0))

    def seconds(n_clusters: int) -> float:
        start = time.process_time()
        consensus_kmeans(z, n_clusters)
        return time.process_time() - start

    few, many = (min(seconds(k) for _ in range(3)) for k in (7, 60))
    assert many < 25 * few


def test_many_nodes_in_blocks_are_as_few_nodes_at_once(monkeypatch, tmp_path):
    """Streamed Gram matrix, columns at a time, views by blocks: the embedding up to rounding."""
    ds = fc.make_attributed_sbm(500, 3000, 20, 3, homophily=0.9, feature_noise=0.3)
    np.save(tmp_path / "x.npy", ds.features)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole, info = ssgc_embedding(ds.features, ds.adjacency, 3)
    for module, name, value in (
        (ssgc, "SAMPLE_ROWS", 64),
        (ssgc, "SAMPLED_FROM", 64),
        (ssgc, "_COLUMNS", 8),
        (ssgc, "AGREEMENT_ROWS", 200),
        (halves, "_EDGES", 500),
    ):
        monkeypatch.setattr(module, name, value)
    blocks, again = ssgc_embedding(mapped, ds.adjacency, 3)
    assert info["n_steps"] == again["n_steps"] and again["agreement"][8] > 0.3
    assert abs((whole * blocks).sum(1)).min() > 0.999, "the same up to the signs of columns"
    projected = ssgc_projection(
        ds.features, ds.adjacency, again["projection"], n_steps=again["n_steps"]
    )
    torch.testing.assert_close(projected, blocks, atol=1e-4, rtol=0)


def test_hashed_halves_share_no_edge_and_lose_none(monkeypatch):
    ds = fc.make_attributed_sbm(300, 2000, 4, 3)
    for block in (1 << 20, 700):
        monkeypatch.setattr(halves, "_EDGES", block)
        first, second = (halves._hashed_half(ds.adjacency, half, 17) for half in range(2))
        assert ((first + second) != ds.adjacency).nnz == 0
        assert (first != first.T).nnz == 0 and first.has_sorted_indices
        assert abs(first.nnz - second.nnz) < 4 * 2 * np.sqrt(2000)


@pytest.mark.parametrize("blas_threads", [1, 2])
def test_bases_do_not_depend_on_the_threads_of_lapack(blas_threads: int) -> None:
    m = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 500)))
    gram = gram_matrix([m])
    alone = leading_bases(gram, [torch.ones(500)], 40)
    with threadpool_limits(limits=blas_threads, user_api="blas"):
        assert torch.equal(leading_bases(gram, [torch.ones(500)], 40), alone)
