"""Figures of a clustering, as matplotlib axes: the same that ``report.html`` shows.

Every figure takes ``ax=None`` (then it is drawn into ``plt.gca()``) and returns the axes, so that
titles, sizes and saving stay yours. Text and frames follow your matplotlib style. Clusters keep
their colours from figure to figure; ``like=`` gives them the colours of the classes they match.

>>> import fastclust as fc
>>> ds = fc.load_dataset("digits")
>>> model = fc.SSGC(n_clusters=10).fit(ds.features, adjacency=ds.adjacency)
>>> ax = fc.plot.conductance(ds.adjacency, model.labels_)
>>> ax.figure.savefig("conductance.svg")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust import metrics
from fastclust.validation import check_choice, check_features

if TYPE_CHECKING:  # matplotlib takes half a second to import: only those who draw wait for it
    from matplotlib.axes import Axes

__all__ = [
    "PALETTE",
    "Projection",
    "agreement",
    "colors",
    "conductance",
    "confusion",
    "embedding",
    "learning_curve",
    "modularity",
    "project",
    "similarity",
    "sizes",
]

# Mid-tones that stand out on white and on near-black.
PALETTE = (
    "#3584e4", "#ed6d3f", "#20b486", "#dba11c", "#e2719e", "#43a047", "#8172e0", "#e05252",
    "#a67c52", "#7b8a9a",
)  # fmt: skip

SCORE_NAMES = {
    "acc": "ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "f1": "F1",
    "modularity": "modularity",
    "conductance": "conductance",
    "silhouette": "silhouette",
    "calinski-harabasz": "Calinski-Harabasz",
    "davies-bouldin": "Davies-Bouldin",
    "inertia": "k-means inertia, share of the variance",
}
LABEL_SCORES = ("acc", "nmi", "ari", "f1")
MAX_BARS = 40


class Projection(NamedTuple):
    """Nodes placed in the plane, see :func:`project`."""

    nodes: npt.NDArray[np.int64]  # [n], rising
    points: npt.NDArray[np.float64]  # [n, 2]
    method: str  # "t-SNE", "UMAP" or "PCA"


def project(
    embedding: Any,
    *,
    method: Literal["auto", "t-sne", "umap", "pca"] = "auto",
    max_nodes: int = 2000,
) -> Projection:
    """Place nodes in the plane for a picture.

    Parameters
    ----------
    embedding : array or tensor of shape [N, d]
        What ``embedding_`` of an estimator holds.
    method : {"auto", "t-sne", "umap", "pca"}, default "auto"
        ``"auto"`` takes UMAP where the package umap-learn is installed and t-SNE elsewhere. Fewer
        than 30 nodes are always placed by PCA.
    max_nodes : int, default 2000
        Above this many nodes a fixed random sample is placed: t-SNE takes seconds for 2000.

    Returns
    -------
    Projection
        ``nodes`` int64 [n], ``points`` float64 [n, 2] and ``method``; the same every time.

    Raises
    ------
    ValueError
        Unknown ``method``, or "umap" where umap-learn is not installed.
    """
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    has_umap = importlib.util.find_spec("umap") is not None
    check_choice("method", method, ("auto", "t-sne", "umap", "pca"))
    if method == "umap" and not has_umap:
        raise ValueError("method='umap' needs the package umap-learn: pip install umap-learn")
    x = _dense(embedding)
    nodes = _sample(len(x), max_nodes)
    x = x[nodes].astype(np.float64)  # [n, d]
    if len(x) < 3 or not np.ptp(x, axis=0).any():
        return Projection(nodes, np.column_stack([x[:, 0], np.zeros(len(x))]), "PCA")
    x = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    if x.shape[1] < 2:
        x = np.column_stack([x, np.zeros(len(x))])
    if method == "pca" or len(x) < 30:
        return Projection(nodes, np.asarray(x[:, :2], dtype=np.float64), "PCA")
    if method == "umap" or (method == "auto" and has_umap):
        import umap

        place, name = umap.UMAP(random_state=0, n_jobs=1), "UMAP"
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, len(x) / 4)
        place, name = TSNE(init="pca", perplexity=perplexity, max_iter=500, random_state=0), "t-SNE"
    # One thread: the picture then is the same anywhere, and a busy machine does not stall on the
    # barriers of hundreds of short parallel sections.
    with threadpool_limits(1):
        points = place.fit_transform(x.astype(np.float32))
    return Projection(nodes, np.asarray(points, dtype=np.float64), name)


def colors(groups: Any, like: Any = None) -> dict[Any, str]:
    """A colour for every group: ``PALETTE`` first, evenly spaced hues beyond.

    Parameters
    ----------
    groups : array of shape [N]
        Clusters or classes.
    like : array of shape [N], optional
        True classes: each cluster then gets the colour of the class it is matched with by
        :func:`fastclust.metrics.best_map`.

    Returns
    -------
    dict
        From group to ``"#rrggbb"``.
    """
    from matplotlib.colors import hsv_to_rgb, to_hex

    names, first = np.unique(np.asarray(groups), return_index=True)
    numbers = dict(zip(names.tolist(), range(len(names)), strict=True))
    if like is not None:
        n_classes = len(np.unique(np.asarray(like)))
        place = metrics.best_map(like, groups)[first]  # [K'], -1: no class of its own
        free = iter(range(n_classes, n_classes + len(names)))
        numbers = {
            name: k if k >= 0 else next(free)
            for name, k in zip(names.tolist(), place.tolist(), strict=True)
        }
    more = max(numbers.values(), default=0) + 1 - len(PALETTE)
    hues = [(i / more, 0.55, 0.8 - 0.15 * (i % 2)) for i in range(more)]
    extra = [to_hex(tuple(hsv_to_rgb(hue).tolist())) for hue in hues]
    every = [*PALETTE, *extra]
    return {name: every[number] for name, number in numbers.items()}


def embedding(
    embedding: Any,
    groups: Any,
    *,
    like: Any = None,
    projection: Projection | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Scatter of the embedding in the plane, coloured by cluster or by label.

    Parameters
    ----------
    embedding : array or tensor of shape [N, d]
        What ``embedding_`` of an estimator holds.
    groups : array of shape [N]
        Cluster or label of each node.
    like : array of shape [N], optional
        See :func:`colors`.
    projection : Projection, optional
        Of :func:`project`, to draw the same points twice; by default made here.
    ax : matplotlib Axes, optional
    """
    from matplotlib.patheffects import withStroke

    ax = _axes(ax)
    groups = _groups(groups, np.shape(embedding)[0])
    nodes, points, method = projection or project(embedding)
    color, shown = colors(groups, like), groups[nodes]
    size = float(np.clip(20000 / len(nodes), 9, 60))
    for group in np.unique(shown).tolist():
        dots = points[shown == group]
        ax.scatter(
            dots[:, 0],
            dots[:, 1],
            s=size,
            c=color[group],
            alpha=0.8,
            linewidths=0,
            label=_plain(group),
        )
    halo = [withStroke(linewidth=2.5, foreground=_background(ax))]
    for group in np.unique(shown).tolist():
        # The name of a group stands at that of its dots which is nearest to the middle of them all.
        dots = points[shown == group]
        at = dots[np.abs(dots - np.median(dots, axis=0)).sum(axis=1).argmin()]
        ax.text(
            at[0], at[1], _plain(group), ha="center", va="center", weight="bold", path_effects=halo
        )
    ax.set_aspect("equal", "datalim")
    ax.set_axis_off()
    ax.set_title(f"{method} of the embedding")
    return ax


def learning_curve(
    history: Sequence[Mapping[str, Any]] | Mapping[Any, Sequence[Mapping[str, Any]]],
    key: str | Sequence[str] = "loss",
    *,
    epoch: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A number of the history over the epochs.

    Parameters
    ----------
    history : list of dict, or dict of such lists by seed
        ``history_`` of an estimator, or the rows of ``history.jsonl``. The first seed is drawn
        strong, the others thin.
    key : str or sequence of str, default "loss"
        What to draw; several keys get one line each (of the first seed). ACC, NMI, ARI and F1 are
        drawn in percent.
    epoch : int, optional
        An epoch to mark: that of the result.
    ax : matplotlib Axes, optional
    """
    ax = _axes(ax)
    runs = list(history.values()) if isinstance(history, Mapping) else [history]
    keys = [key] if isinstance(key, str) else list(key)
    every = list(colors(range(len(keys))).values())
    values: list[float] = []
    for i, name in enumerate(keys):
        scale = 100.0 if name in LABEL_SCORES else 1.0
        for run in runs if len(keys) == 1 else runs[:1]:
            rows = [row for row in run if row.get(name) is not None]
            x, y = [row["epoch"] for row in rows], [scale * row[name] for row in rows]
            values += y
            style: dict[str, Any] = {
                "color": every[i],
                "lw": 1.8,
                "zorder": 3,
                "label": SCORE_NAMES.get(name, name),
            }
            if run is not runs[0]:
                style = {"color": PALETTE[-1], "lw": 0.8, "alpha": 0.6}
            ax.plot(x, y, marker="o" if len(x) == 1 else None, ms=4, **style)
    if values and min(values) > 0 and max(values) > 50 * min(values):
        ax.set_yscale("log")
    if epoch is not None:
        ax.axvline(epoch, color=PALETTE[-1], lw=1, ls=(0, (3, 3)))
    if len(keys) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    ax.set_xlabel("epoch")
    ax.grid(axis="y")
    ax.margins(x=0.02)
    _bare(ax, "left", "bottom")
    return ax


def sizes(labels: Any, *, like: Any = None, ax: Axes | None = None) -> Axes:
    """Bars: the number of nodes of every cluster (of the 40 largest, where there are more).

    Parameters
    ----------
    labels : array of shape [N]
        Cluster of each node.
    like : array of shape [N], optional
        See :func:`colors`.
    ax : matplotlib Axes, optional
    """
    names, counts = np.unique(np.asarray(labels), return_counts=True)
    return _bars(names, counts, counts, "{:,.0f}", labels, like, ax)


def modularity(adjacency: Any, labels: Any, *, like: Any = None, ax: Axes | None = None) -> Axes:
    """Bars: what each cluster adds to the modularity; more is better.

    Parameters
    ----------
    adjacency : anything :func:`fastclust.metrics.modularity` takes
        [N, N].
    labels, like, ax
        As for :func:`sizes`.
    """
    parts = metrics.per_cluster(adjacency, labels)
    return _bars(parts["cluster"], parts["modularity"], parts["nodes"], "{:.3f}", labels, like, ax)


def conductance(adjacency: Any, labels: Any, *, like: Any = None, ax: Axes | None = None) -> Axes:
    """Bars: the share of each cluster's edge ends that lead out of it; less is better.

    Parameters as for :func:`modularity`.
    """
    parts = metrics.per_cluster(adjacency, labels)
    return _bars(parts["cluster"], parts["conductance"], parts["nodes"], "{:.3f}", labels, like, ax)


def agreement(evidence: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """How well two halves of the data agree on K clusters, for every K that ``"auto"`` tried.

    Parameters
    ----------
    evidence : mapping
        ``n_clusters_evidence_`` of an estimator with ``n_clusters="auto"``.
    ax : matplotlib Axes, optional
    """
    ax = _axes(ax)
    ax.plot(evidence["n_clusters"], evidence["agreement"], marker="o", ms=4, color=PALETTE[0])
    ax.set_xlabel("number of clusters")
    ax.grid(axis="y")
    _bare(ax, "left", "bottom")
    return ax


def similarity(
    embedding: Any, labels: Any, *, like: Any = None, max_nodes: int = 240, ax: Axes | None = None
) -> Axes:
    """Heat map of the cosine similarities of a sample of nodes, in the order of their clusters.

    Bright blocks on the diagonal are clusters; bright blocks off it are clusters that look alike.
    Inside a cluster the nodes stand from the clearest to the hardest.

    Parameters
    ----------
    embedding : array or tensor of shape [N, d]
        What ``embedding_`` of an estimator holds.
    labels : array of shape [N]
        Cluster of each node.
    like : array of shape [N], optional
        See :func:`colors`.
    max_nodes : int, default 240
        Size of the sample, which is the same every time.
    ax : matplotlib Axes, optional
    """
    from matplotlib.patches import Rectangle

    ax = _axes(ax)
    x = _dense(embedding)
    labels = _groups(labels, len(x))
    nodes = _sample(len(x), max_nodes)
    nodes = nodes[np.lexsort([-metrics.node_margin(x, labels)[nodes], labels[nodes]])]
    x = x[nodes] / np.maximum(np.linalg.norm(x[nodes], axis=1, keepdims=True), 1e-12)
    cosine = x @ x.T  # [n, n]
    low = min(max(float(np.percentile(cosine, 2)), 0.0), 0.99)
    image = ax.imshow(cosine, cmap=_blue(), vmin=low, vmax=1, interpolation="nearest")
    color, n = colors(labels, like), len(nodes)
    names, starts, counts = np.unique(labels[nodes], return_index=True, return_counts=True)
    for name, start, count in zip(names.tolist(), starts, counts, strict=True):
        bar: dict[str, Any] = {"facecolor": color[name], "linewidth": 0, "clip_on": False}
        thick, away = 0.02 * n, -0.03 * n - 0.5
        ax.add_patch(Rectangle((start - 0.5, away), count, thick, **bar))
        ax.add_patch(Rectangle((away, start - 0.5), thick, count, **bar))
    ticks = starts + (counts - 1) / 2
    ax.set_yticks(ticks[counts > 0.03 * n], [*map(_plain, names[counts > 0.03 * n])])
    ax.set_xticks([])
    ax.tick_params(length=0, pad=8)
    scale = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.03)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0)
    _bare(ax)
    return ax


def confusion(y_true: Any, labels: Any, *, ax: Axes | None = None) -> Axes:
    """Heat map of clusters (rows) by classes (columns), clusters in the order of their classes.

    Parameters
    ----------
    y_true, labels : array of shape [N]
        Class and cluster of each node.
    ax : matplotlib Axes, optional
    """
    ax = _axes(ax)
    labels = _groups(labels, len(y_true))
    classes, j = np.unique(np.asarray(y_true), return_inverse=True)
    clusters, first, i = np.unique(labels, return_index=True, return_inverse=True)
    counts = np.zeros((len(clusters), len(classes)), dtype=np.int64)
    np.add.at(counts, (i, j), 1)
    place = metrics.best_map(y_true, labels)[first]
    order = np.argsort(np.where(place < 0, len(classes), place), kind="stable")
    counts, clusters = counts[order], clusters[order]
    share = counts / counts.sum(axis=1, keepdims=True)
    ax.imshow(share, cmap=_blue(), vmin=0, vmax=1, aspect="auto")
    if counts.size <= 150:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                strong: dict[str, Any] = {"color": "white"} if share[row, column] > 0.6 else {}
                ax.text(column, row, f"{count}", ha="center", va="center", size="small", **strong)
    if len(classes) <= MAX_BARS and len(clusters) <= MAX_BARS:
        ax.set_xticks(range(len(classes)), [*map(_plain, classes)])
        ax.set_yticks(range(len(clusters)), [*map(_plain, clusters)])
    ax.tick_params(length=0)
    ax.set_xlabel("class")
    ax.set_ylabel("cluster")
    _bare(ax)
    return ax


# --- helpers -----------------------------------------------------------------------------------


def _bars(
    names: npt.NDArray[Any],
    values: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    text: str,
    labels: Any,
    like: Any,
    ax: Axes | None,
) -> Axes:
    """A horizontal bar per cluster, with its value at the end."""
    ax = _axes(ax)
    shown = np.sort(np.argsort(-counts, kind="stable")[:MAX_BARS])
    names, values, color = names[shown], values[shown], colors(labels, like)
    bars = ax.barh(range(len(names)), values, color=[color[name] for name in names.tolist()])
    ax.bar_label(bars, [text.format(v) for v in values.tolist()], padding=3, size="small")
    ax.set_yticks(range(len(names)), [*map(_plain, names)])
    ax.invert_yaxis()
    ax.margins(x=0.18, y=0.01)
    ax.set_xticks([])
    ax.tick_params(length=0)
    _bare(ax)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()


def _blue() -> Any:
    """From clear to full colour, so that a heat map sits well on any background."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("", [to_rgba(PALETTE[0], a) for a in (0, 1)])


def _background(ax: Axes) -> Any:
    from matplotlib.colors import to_rgba

    color = to_rgba(ax.figure.get_facecolor())
    return "white" if color[3] == 0 else color


def _bare(ax: Axes, *sides: str) -> None:
    """Leave only some sides of the frame."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in sides)


def _plain(name: Any) -> str:
    """The name of a group as it is: matplotlib takes what stands between dollars for a formula."""
    return str(name).replace("$", r"\$")


def _dense(embedding: Any) -> npt.NDArray[np.float32]:
    x = check_features(embedding, name="embedding")
    return sp.csr_array(x).toarray() if sp.issparse(x) else np.asarray(x)


def _groups(labels: Any, n: int) -> npt.NDArray[Any]:
    groups = np.asarray(labels)
    if groups.shape != (n,):
        raise ValueError(f"labels must have shape [{n}], one per node, got {list(groups.shape)}")
    return groups


def _sample(n: int, most: int) -> npt.NDArray[np.int64]:
    """All nodes, or a fixed random sample, rising."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, most, replace=False))
