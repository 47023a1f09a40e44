"""fc.plot: axes in, axes out; the numbers drawn are those of the metrics."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import fastclust as fc
from fastclust import metrics, plot


@pytest.fixture
def case() -> Any:
    """Embedding [90, 5], adjacency, clusters named 2, 5, 9 and classes 0, 1, 2."""
    rng = np.random.default_rng(0)
    truth = np.arange(90) % 3
    clusters = np.array([9, 2, 5])[truth]
    clusters[:6] = 5
    embedding = np.eye(3, 5)[truth] + 0.1 * rng.normal(size=(90, 5))
    dense = np.triu(rng.random((90, 90)) < np.where(truth[:, None] == truth, 0.3, 0.03), 1)
    return embedding.astype(np.float32), sp.csr_array((dense | dense.T) * 1.0), clusters, truth


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


HISTORY = [{"epoch": e, "loss": 1 / e, "acc": 0.5, "nmi": 0.1 * e} for e in range(1, 8)]

DRAW = {
    "embedding": lambda z, a, k, y, **kw: plot.embedding(z, k, like=y, **kw),
    "learning_curve": lambda z, a, k, y, **kw: plot.learning_curve(HISTORY, **kw),
    "sizes": lambda z, a, k, y, **kw: plot.sizes(k, like=y, **kw),
    "modularity": lambda z, a, k, y, **kw: plot.modularity(a, k, **kw),
    "conductance": lambda z, a, k, y, **kw: plot.conductance(a, k, **kw),
    "similarity": lambda z, a, k, y, **kw: plot.similarity(z, k, **kw),
    "agreement": lambda z, a, k, y, **kw: plot.agreement(
        {"n_clusters": [2, 3], "agreement": [0.1, 0.4]}, **kw
    ),
    "confusion": lambda z, a, k, y, **kw: plot.confusion(y, k, **kw),
}


@pytest.mark.parametrize("name", DRAW)
def test_axes_in_axes_out(case: Any, name: str) -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert DRAW[name](*case, ax=right) is right
    assert not left.has_data()
    assert DRAW[name](*case) is plt.gca()
    right.figure.canvas.draw()


def test_bars_show_the_metrics(case: Any) -> None:
    _, adjacency, clusters, _ = case
    parts = metrics.per_cluster(adjacency, clusters)
    for draw, key in ((plot.modularity, "modularity"), (plot.conductance, "conductance")):
        ax = draw(adjacency, clusters, ax=plt.figure().gca())
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(parts[key].tolist())
    ax = plot.sizes(clusters, ax=plt.figure().gca())
    assert [bar.get_width() for bar in ax.patches] == [28, 34, 28]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["2", "5", "9"]


def test_only_the_largest_clusters_are_drawn() -> None:
    labels = np.repeat(np.arange(50), np.arange(1, 51))
    ax = plot.sizes(labels)
    assert [bar.get_width() for bar in ax.patches] == list(range(11, 51))


def test_clusters_wear_the_colours_of_their_classes(case: Any) -> None:
    _, _, clusters, truth = case
    assert plot.colors(truth) == dict(enumerate(plot.PALETTE[:3]))
    assert plot.colors(clusters, truth) == {
        9: plot.PALETTE[0],
        2: plot.PALETTE[1],
        5: plot.PALETTE[2],
    }
    # A fourth cluster has no class: it gets the first colour that no class has.
    assert plot.colors([*clusters, 11], [*truth, 0])[11] == plot.PALETTE[3]


def test_many_groups_get_different_colours() -> None:
    assert len(set(plot.colors(np.arange(64)).values())) == 64


def test_scatter_draws_every_sampled_node_once(case: Any) -> None:
    embedding, _, clusters, _ = case
    projection = plot.project(torch.from_numpy(embedding), method="pca", max_nodes=50)
    ax = plot.embedding(embedding, clusters, projection=projection)
    dots = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    assert sorted(map(tuple, dots)) == sorted(map(tuple, projection.points))
    assert {text.get_text() for text in ax.texts} == {"2", "5", "9"}


def test_learning_curve_of_several_seeds_and_keys() -> None:
    ax = plot.learning_curve({0: HISTORY, 3: HISTORY[:4]}, epoch=5)
    strong, thin, mark = ax.lines
    assert strong.get_linewidth() > thin.get_linewidth()
    assert mark.get_xdata()[0] == 5
    assert strong.get_ydata().tolist() == [row["loss"] for row in HISTORY]
    ax = plot.learning_curve(HISTORY, ["acc", "nmi"], ax=plt.figure().gca())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ACC", "NMI"]
    assert ax.lines[0].get_ydata()[0] == 50.0


def test_learning_curve_of_wide_range_is_logarithmic() -> None:
    rows = [{"epoch": e, "loss": 10.0**-e} for e in range(5)]
    assert plot.learning_curve(rows).get_yscale() == "log"


def test_similarity_is_sorted_by_cluster(case: Any) -> None:
    embedding, _, clusters, _ = case
    drawn = np.asarray(plot.similarity(embedding, clusters).images[0].get_array())
    block = np.repeat([0, 1, 2], [28, 34, 28])
    same = block[:, None] == block
    assert np.allclose(np.diag(drawn), 1, atol=1e-6)
    assert drawn[same].mean() > drawn[~same].mean() + 0.5


def test_confusion_counts(case: Any) -> None:
    _, _, clusters, truth = case
    ax = plot.confusion(truth, clusters)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["9", "2", "5"]
    assert sorted(int(text.get_text()) for text in ax.texts) == [2, 2, 28, 28, 30]


@pytest.mark.parametrize("shape", [(40, 1), (40, 3), (3000, 8)])
def test_projection_shapes(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nodes, points, method = plot.project(x, method="t-sne", max_nodes=500)
    assert len(nodes) == len(points) == min(shape[0], 500)
    assert points.shape[1] == 2 and np.isfinite(points).all()
    assert (np.diff(nodes) > 0).all() and method == "t-SNE"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_projection_of_a_collapsed_embedding(value: float) -> None:
    assert np.isfinite(plot.project(np.full((50, 4), value, dtype=np.float32)).points).all()


def test_projection_keeps_clusters_apart(case: Any) -> None:
    embedding, _, _, truth = case
    for method in ("t-sne", "pca"):
        assert metrics.silhouette(plot.project(embedding, method=method).points, truth) > 0.5  # type: ignore[arg-type]


def test_umap_where_it_is_installed(case: Any) -> None:
    embedding, _, _, truth = case
    if importlib.util.find_spec("umap") is None:
        with pytest.raises(ValueError, match="pip install umap-learn"):
            plot.project(embedding, method="umap")
        pytest.skip("umap-learn is not installed")
    projection = plot.project(embedding)
    assert projection.method == "UMAP"
    assert metrics.silhouette(projection.points, truth) > 0.5


def test_bad_arguments(case: Any) -> None:
    embedding, _, clusters, _ = case
    with pytest.raises(ValueError, match="labels must have shape"):
        plot.embedding(embedding, clusters[:-1])
    with pytest.raises(ValueError, match="method must be"):
        plot.project(embedding, method="mds")  # type: ignore[arg-type]


def test_importing_fastclust_does_not_import_matplotlib() -> None:
    code = "import sys, fastclust; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert fc.plot is plot


def test_names_between_dollars_are_no_formulas(case: Any) -> None:
    x, adjacency, _, truth = case
    names = np.array(["$a_", "b$$", "c$^$"])[truth]
    axes = [plt.figure().gca() for _ in range(5)]
    plot.sizes(names, ax=axes[0])
    plot.conductance(adjacency, names, ax=axes[1])
    plot.embedding(x, names, ax=axes[2]).legend()
    plot.similarity(x, names, ax=axes[3])
    plot.confusion(names, truth, ax=axes[4])
    for ax in axes:
        ax.figure.canvas.draw()


def test_curves_of_more_scores_than_colours_in_the_palette() -> None:
    keys = [f"score {i}" for i in range(12)]
    history = [{"epoch": e, **{key: e + i for i, key in enumerate(keys)}} for e in (1, 2)]
    ax = plot.learning_curve(history, keys)
    assert len({line.get_color() for line in ax.get_lines()}) == 12
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == keys


def test_sparse_embeddings_are_drawn(case: Any) -> None:
    x, _, clusters, _ = case
    assert plot.embedding(sp.csr_array(x), clusters).collections
    assert plot.similarity(sp.csr_array(x), clusters).images
