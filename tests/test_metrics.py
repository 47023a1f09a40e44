"""Scores against scikit-learn, networkx, brute force over maps, and under relabelling."""

from __future__ import annotations

from itertools import permutations

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fastclust import metrics

labelings = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.lists(st.integers(0, 4), min_size=n, max_size=n),
    )
)


def brute_force(y_true: np.ndarray, y_pred: np.ndarray) -> tuple[float, float]:
    """Best ACC over all one-to-one maps, and the best macro F1 among the maps that reach it."""
    classes, clusters = np.unique(y_true), np.unique(y_pred)
    if len(clusters) < len(classes):  # pad with clusters that no node is in
        clusters = np.concatenate([clusters, -1 - np.arange(len(classes) - len(clusters))])
    best = (-1.0, -1.0)
    for chosen in permutations(clusters, len(classes)):
        pairs = [(y_true == a, y_pred == b) for a, b in zip(classes, chosen, strict=True)]
        hits = [np.sum(a & b) for a, b in pairs]
        sizes = [np.sum(a) + np.sum(b) for a, b in pairs]
        f1 = np.mean(2 * np.array(hits) / sizes)
        best = max(best, (float(np.sum(hits) / len(y_true)), round(float(f1), 12)))
    return best


@settings(max_examples=30, deadline=None)
@given(labelings)
def test_scores_equal_brute_force_and_scikit_learn(pair):
    y_true, y_pred = (np.array(labels) for labels in pair)
    scores = metrics.clustering_scores(y_true, y_pred)
    acc, f1 = brute_force(y_true, y_pred)
    assert scores["acc"] == pytest.approx(acc, abs=1e-12)
    assert scores["f1"] == pytest.approx(f1, abs=1e-9)
    assert scores["nmi"] == pytest.approx(sk.normalized_mutual_info_score(y_true, y_pred))
    assert scores["ari"] == pytest.approx(sk.adjusted_rand_score(y_true, y_pred))
    assert metrics.adjusted_mutual_info(y_true, y_pred) == pytest.approx(
        sk.adjusted_mutual_info_score(y_true, y_pred)
    )
    assert scores["acc"] <= metrics.purity(y_true, y_pred) <= 1.0


@settings(max_examples=30, deadline=None)
@given(labelings, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_names(pair, random):
    y_true, y_pred = (np.array(labels) for labels in pair)
    new_names = random.sample(range(-50, 1000, 7), 6)
    renamed = np.array(new_names)[y_pred]
    names = np.array(["d", "a", "zz", "b", "c"])[y_true]
    expected = metrics.clustering_scores(y_true, y_pred)
    assert metrics.clustering_scores(names, renamed) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(labelings)
def test_a_perfect_clustering_scores_one(pair):
    y_true = np.array(pair[0])
    assert metrics.clustering_scores(y_true, 10 - 3 * y_true) == pytest.approx(
        {"acc": 1.0, "nmi": 1.0, "ari": 1.0, "f1": 1.0}
    )
    assert metrics.purity(y_true, y_true) == 1.0


def test_f1_is_the_usual_value_when_counts_agree():
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 7, 500)
    y_pred = np.where(rng.random(500) < 0.7, (y_true + 3) % 7, rng.integers(0, 7, 500))
    mapped = metrics.best_map(y_true, y_pred)
    scores = metrics.clustering_scores(y_true, y_pred)
    assert scores["f1"] == pytest.approx(sk.f1_score(y_true, mapped, average="macro"))
    assert scores["acc"] == pytest.approx(sk.accuracy_score(y_true, mapped))


def test_more_or_fewer_clusters_than_classes():
    # Cluster 9 has no class: its two nodes are missed. Worked by hand.
    scores = metrics.clustering_scores([0, 0, 0, 1, 1, 1], [5, 5, 9, 4, 4, 9])
    assert scores["acc"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx((2 * 2 / 5 + 2 * 2 / 5) / 2)
    # One cluster: the class that takes it has precision 1/2, the other scores 0.
    scores = metrics.clustering_scores([0, 0, 1, 1], [3, 3, 3, 3])
    assert scores["acc"] == 0.5
    assert scores["f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.best_map([0, 0, 1, 1, 1], [5, 5, 2, 2, 9]).tolist() == [0, 0, 1, 1, -1]


def test_tensors_and_columns_are_accepted():
    y = torch.tensor([0, 0, 2, 2])
    assert metrics.clustering_scores(y, y.numpy()[:, None])["acc"] == 1.0


@pytest.mark.parametrize(
    ("y_true", "y_pred", "message"),
    [
        ([0, 1, 1], [0, 1], "y_pred must hold one label per node"),
        ([], [], "y_true must hold at least one label"),
        ([0, 1], [0.0, np.nan], "y_pred must not hold NaN"),
        ([[0, 1], [1, 0]], [0, 1], "y_true must be 1-dimensional"),
    ],
)
def test_bad_labels_are_refused(y_true, y_pred, message):
    with pytest.raises(ValueError, match=message):
        metrics.clustering_scores(y_true, y_pred)


def test_labels_of_mixed_type_are_refused():
    with pytest.raises(TypeError, match="y_true must hold labels of one sortable type"):
        metrics.clustering_scores(np.array([0, "a", 1.5], dtype=object), [0, 1, 2])


def test_internal_scores_equal_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 300)
    x = (rng.normal(size=(300, 6)) + labels[:, None]).astype(np.float32)
    names = np.array([4, -1, 7, 30])[labels]
    assert metrics.calinski_harabasz(x, names) == pytest.approx(
        sk.calinski_harabasz_score(x, labels), rel=1e-5
    )
    assert metrics.silhouette(x, names) == pytest.approx(sk.silhouette_score(x, labels), rel=1e-5)
    assert metrics.davies_bouldin(torch.from_numpy(x), names) == pytest.approx(
        sk.davies_bouldin_score(x, labels), rel=1e-5
    )
    centered = [x[labels == k].astype(np.float64) for k in range(4)]
    expected = sum(((part - part.mean(0)) ** 2).sum() for part in centered)
    assert metrics.inertia(x, names) == pytest.approx(expected, rel=1e-6)
    total = ((x - x.mean(0, dtype=np.float64)) ** 2).sum()
    assert metrics.inertia(x, names, relative=True) == pytest.approx(expected / total, rel=1e-6)


def test_inertia_does_not_cancel_far_from_the_origin():
    x = np.array([[1000.0], [1000.5], [2000.0], [2000.5]], np.float32)
    assert metrics.inertia(x, [0, 0, 1, 1]) == pytest.approx(0.25, rel=1e-9)


def test_silhouette_of_many_nodes_is_sampled_and_repeatable():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 6000)
    x = rng.normal(size=(6000, 2)) + 4.0 * labels[:, None]
    score = metrics.silhouette(x, labels)
    assert score == metrics.silhouette(x, labels)
    assert score == pytest.approx(sk.silhouette_score(x, labels), abs=0.02)


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.arange(5)])
def test_degenerate_clusterings_get_the_worst_score(labels):
    x = np.random.default_rng(0).normal(size=(5, 2))
    assert metrics.calinski_harabasz(x, labels) == 0.0
    assert metrics.silhouette(x, labels) == -1.0
    assert metrics.davies_bouldin(x, labels) == float("inf")


@pytest.mark.filterwarnings("ignore:x has .* as its largest magnitude")
@pytest.mark.parametrize("scale", [1e-25, 1e-9, 1e-5, 1e15])
def test_internal_scores_do_not_depend_on_the_scale(scale):
    """Small embeddings had no distances, which is the best there is to Davies-Bouldin."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 10)
    x = (rng.normal(size=(30, 4)) + np.eye(3, 4)[labels]).astype(np.float32)
    for score in (metrics.calinski_harabasz, metrics.davies_bouldin, metrics.silhouette):
        assert score(x * np.float32(scale), labels) == pytest.approx(score(x, labels), rel=1e-5)


def test_rows_that_are_all_the_same_get_the_worst_score():
    x, labels = np.full((30, 4), 0.3), np.repeat([0, 1, 2], 10)
    assert metrics.inertia(x, labels, relative=True) == 1.0
    assert metrics.calinski_harabasz(x, labels) == 0.0
    assert metrics.davies_bouldin(x, labels) == np.inf
    assert metrics.silhouette(x, labels) == -1.0


def test_modularity_and_conductance_equal_networkx(two_blocks):
    adjacency, _, labels = two_blocks
    graph = nx.from_scipy_sparse_array(adjacency)
    parts = [set(np.flatnonzero(labels == k)) for k in (0, 1)]
    assert metrics.modularity(adjacency, labels) == pytest.approx(
        nx.community.modularity(graph, parts)
    )
    expected = np.mean([nx.conductance(graph, part) for part in parts])
    assert metrics.conductance(adjacency, labels) == pytest.approx(expected)


def test_graph_scores_of_a_weighted_graph():
    graph = nx.Graph()
    graph.add_weighted_edges_from([(0, 1, 2.0), (1, 2, 0.5), (2, 3, 3.0)])
    labels = [0, 0, 1, 1]
    assert metrics.modularity(graph, labels) == pytest.approx(
        nx.community.modularity(graph, [{0, 1}, {2, 3}])
    )
    assert metrics.conductance(graph, labels) == pytest.approx(0.5 / 4.5)  # 4.5 < 6.5


def test_graph_scores_without_edges():
    empty = sp.csr_array((4, 4))
    assert metrics.modularity(empty, [0, 0, 1, 1]) == 0.0
    assert metrics.conductance(empty, [0, 0, 1, 1]) == 1.0


def test_graph_and_labels_must_agree(path_graph):
    with pytest.raises(ValueError, match=r"labels must hold one label per node \(5\), got 2"):
        metrics.modularity(path_graph, [0, 1])


def test_per_cluster_adds_up(two_blocks):
    adjacency, _, labels = two_blocks
    parts = metrics.per_cluster(adjacency, np.array([8, 3])[labels])
    assert parts["cluster"].tolist() == [3, 8]
    assert parts["nodes"].tolist() == np.bincount(labels)[::-1].tolist()
    assert parts["modularity"].sum() == pytest.approx(metrics.modularity(adjacency, labels))
    assert parts["conductance"].mean() == pytest.approx(metrics.conductance(adjacency, labels))
    graph = nx.from_scipy_sparse_array(adjacency)
    assert parts["conductance"][1] == pytest.approx(
        nx.conductance(graph, set(np.flatnonzero(labels == 0)))
    )


def test_node_margin_by_hand():
    x = np.array([[0.0], [2.0], [9.0], [11.0], [5.0]])
    labels = [0, 0, 1, 1, 1]
    first, second = 1.0, 25 / 3
    a = np.array([1, 1, 9 - second, 11 - second, second - 5])
    b = np.array([second, second - 2, 8, 10, 5 - first])
    assert metrics.node_margin(x, labels) == pytest.approx((b - a) / np.maximum(a, b))
    assert metrics.node_margin(x, [4] * 5).tolist() == [0] * 5
    assert metrics.node_margin(np.ones((4, 2)), [0, 0, 1, 1]).tolist() == [0] * 4


def test_node_margin_of_a_misplaced_node_is_negative(two_blocks):
    x = np.r_[np.zeros(6), np.ones(6), 0.0][:, None]
    labels = np.r_[np.zeros(6, int), np.ones(7, int)]
    margin = metrics.node_margin(x, labels)
    assert margin[-1] < 0 < margin[:-1].min()
