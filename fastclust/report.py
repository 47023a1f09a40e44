"""The results as a table for the terminal, and ``report.html``: one page that needs no network.

The page is plain HTML with inline SVG whose colours are CSS variables, so that one drawing serves
light and dark, prints, scales to a phone and stays small (a few hundred kilobytes at most).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclust import metrics
from fastclust.cli import duration
from fastclust.datasets import Dataset
from fastclust.rundir import write_atomically

__all__ = ["headline", "project", "table", "write_page"]

MODEL_NAMES = {"ecnmf": "ECN-MF", "hsan": "HSAN", "ssgc": "SSGC"}
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
# t-SNE costs about a millisecond per node and iteration round; above this many nodes a sample of
# them is drawn.
MAX_PROJECTED = 2000
# [light, dark] per cluster; further clusters get evenly spaced hues.
PALETTE = (
    ("#2a78d6", "#4a95ee"), ("#eb6834", "#e8703f"), ("#1baf7a", "#23b083"), ("#d99400", "#d69a1e"),
    ("#e06b9a", "#e0709b"), ("#007f0e", "#4fae4f"), ("#5a48c0", "#9a8ff0"), ("#d83f3e", "#ec7070"),
    ("#84603a", "#b8906a"), ("#5f6b7a", "#98a6b8"),
)  # fmt: skip


# --- terminal ----------------------------------------------------------------------------------


def headline(model: str, dataset: Dataset, n_clusters: int, where: str) -> str:
    """One line on what is about to run."""
    return (
        f"{MODEL_NAMES[model]} on {dataset.name}: {dataset.n_nodes:,} nodes, "
        f"{dataset.n_edges:,} edges (both directions), {dataset.n_features:,} features, "
        f"{n_clusters} clusters; {where}"
    )


def table(result: Mapping[str, Any]) -> str:
    """The scores of every seed, their mean and sample standard deviation.

    ACC, NMI, ARI and F1 are in percent; internal scores are as they are.
    """
    names = list(result["mean"])
    header = ["", *(SCORE_NAMES.get(name, name) for name in names), "epochs", "time", "memory"]
    rows = [
        [
            f"seed {run['seed']}",
            *(score_text(name, run["metrics"].get(name)) for name in names),
            str(run["epochs"]),
            duration(run["seconds"]),
            size_text(run["peak_memory_bytes"]),
        ]
        for run in result["runs"]
    ]
    if len(result["runs"]) > 1:
        for title in ("mean", "std"):
            scores = (score_text(name, result[title].get(name)) for name in names)
            rows.append([title, *scores, "", "", ""])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def score_text(name: str, value: float | None) -> str:
    """A score with as many digits as it deserves."""
    if value is None:
        return "-"
    if name in LABEL_SCORES:
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"


def size_text(n_bytes: int) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


# --- the page ----------------------------------------------------------------------------------


def write_page(root: Path, result: Mapping[str, Any], dataset: Dataset) -> Path:
    """Write ``report.html`` from what lies in a run directory.

    Parameters
    ----------
    root : Path
        The run directory; the first seed's files are drawn.
    result : mapping
        The content of ``result.json``.
    dataset : Dataset
        The graph that was clustered; its labels, if any, are drawn beside the clusters.

    Returns
    -------
    Path
        The page.
    """
    labels = np.loadtxt(
        root / "assignments.csv", delimiter=",", skiprows=1, usecols=1, dtype=np.int64, ndmin=1
    )
    embedding = np.load(root / "embedding.npy", allow_pickle=False)
    first = result["runs"][0]["seed"]
    histories = {
        run["seed"]: _history(root if run["seed"] == first else root / f"seed-{run['seed']}")
        for run in result["runs"]
    }
    colors = _cluster_colors(labels, dataset.labels)
    name = MODEL_NAMES[result["model"]]
    title = f"{name} on {dataset.name}"
    sections = [
        _scores(result),
        _projection(labels, embedding, dataset, colors, first),
        _curves(result, histories),
        _clusters(labels, dataset, colors),
        _runs(result),
        _settings(result),
    ]
    facts = (
        f"{dataset.n_nodes:,} nodes · {dataset.n_edges:,} edges (both directions) · "
        f"{dataset.n_features:,} features · {result['n_clusters']} clusters"
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_e(title)}</title>
<style>{_css(_n_colors(colors, dataset.labels))}</style>
</head>
<body>
<header><p class="eyebrow">fastclust report</p><h1>{_e(title)}</h1><p>{_e(facts)}</p></header>
<main>
{"".join(section for section in sections if section)}
</main>
<footer>fastclust {_e(result["versions"]["fastclust"])}. Labels, where there are any, were used
for scores and pictures only; training and the choice of the epoch never saw them.</footer>
</body>
</html>
"""
    path = root / "report.html"
    write_atomically(path, page)
    return path


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / "history.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scores(result: Mapping[str, Any]) -> str:
    """One card per score."""
    several = len(result["runs"]) > 1
    cards = []
    for name, mean in result["mean"].items():
        spread = f"± {score_text(name, result['std'][name])}" if several else ""
        cards.append(
            f'<div class="card"><div class="label">{_e(SCORE_NAMES.get(name, name))}</div>'
            f'<div class="value">{score_text(name, mean)}</div>'
            f'<div class="spread">{spread}</div></div>'
        )
    runs = result["runs"]
    seconds = [run["seconds"] for run in runs]
    memory = max(run["peak_memory_bytes"] for run in runs)
    for label, value in (
        ("time", duration(float(np.mean(seconds)))),
        ("memory", size_text(memory)),
    ):
        note = "mean per seed" if several and label == "time" else "peak" if label != "time" else ""
        cards.append(
            f'<div class="card quiet"><div class="label">{label}</div>'
            f'<div class="value">{value}</div><div class="spread">{note}</div></div>'
        )
    if result["labelled"]:
        what = "Percent. ACC and F1 after the best one-to-one map of clusters to classes."
    else:
        what = "The data has no labels: these scores judge the clustering by itself."
    if several:
        what += f" Mean and sample standard deviation over {len(runs)} seeds."
    return f'<section><div class="cards">{"".join(cards)}</div><p class="note">{what}</p></section>'


def _cluster_colors(
    labels: npt.NDArray[np.int64], truth: npt.NDArray[np.int64] | None
) -> dict[int, int]:
    """Number of each cluster's colour: that of the class it is matched with, else a free one."""
    clusters = np.unique(labels).tolist()
    if truth is None:
        return {cluster: cluster for cluster in clusters}
    matched = _matched_classes(truth, labels)
    free = iter(range(int(truth.max()) + 1, int(truth.max()) + 1 + len(clusters)))
    return {k: matched[k] if k in matched else next(free) for k in clusters}


def _n_colors(colors: Mapping[int, int], truth: npt.NDArray[np.int64] | None) -> int:
    # Seven at least: the curves wear them too.
    return 1 + max([*colors.values(), 6, 0 if truth is None else int(truth.max())])


# --- projection --------------------------------------------------------------------------------


def project(
    embedding: npt.NDArray[Any], *, max_nodes: int = MAX_PROJECTED
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], str]:
    """Place nodes in the plane for a picture.

    Parameters
    ----------
    embedding : numpy.ndarray
        [N, d].
    max_nodes : int
        Above this many nodes a fixed random sample is placed.

    Returns
    -------
    nodes : numpy.ndarray
        int64 [n], the nodes placed, rising.
    points : numpy.ndarray
        float64 [n, 2].
    method : str
        ``"t-SNE"``, or ``"PCA"`` for fewer than 30 nodes.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n = int(embedding.shape[0])
    nodes = np.arange(n)
    if n > max_nodes:
        nodes = np.sort(np.random.default_rng(0).choice(n, max_nodes, replace=False))
    x = np.nan_to_num(np.asarray(embedding, dtype=np.float64)[nodes])  # [n, d]
    n_components = min(50, *x.shape)
    if len(x) < 3 or not np.ptp(x, axis=0).any():
        return nodes, np.column_stack([x[:, 0], np.zeros(len(x))]), "PCA"
    x = PCA(n_components, svd_solver="full").fit_transform(x)
    if n_components < 2:
        x = np.column_stack([x, np.zeros(len(x))])
    if len(x) < 30:
        return nodes, x[:, :2], "PCA"
    tsne = TSNE(init="pca", perplexity=min(30.0, len(x) / 4), max_iter=500, random_state=0)
    # One thread: the picture then is the same anywhere, and a busy machine does not stall on the
    # barriers of hundreds of short parallel sections.
    with threadpool_limits(1):
        points = tsne.fit_transform(x.astype(np.float32))
    return nodes, np.asarray(points, dtype=np.float64), "t-SNE"


def _projection(
    labels: npt.NDArray[np.int64],
    embedding: npt.NDArray[Any],
    dataset: Dataset,
    colors: Mapping[int, int],
    seed: int,
) -> str:
    nodes, points, method = project(embedding)
    panels = [("by cluster", _scatter(points, labels[nodes], colors))]
    if dataset.labels is not None:
        own = {k: k for k in np.unique(dataset.labels).tolist()}
        panels.append(("by label", _scatter(points, dataset.labels[nodes], own)))
    figures = "".join(f"<figure><figcaption>{t}</figcaption>{svg}</figure>" for t, svg in panels)
    part = f"a sample of {len(nodes):,} nodes" if len(nodes) < len(labels) else "all nodes"
    matched_note = " Clusters wear the colour of their class." if len(panels) > 1 else ""
    return (
        f'<section><h2>Embedding</h2><div class="grid">{figures}</div>'
        f'<p class="note">{method} of the embedding of seed {seed}, {part}.{matched_note} '
        f"Distances between far groups mean little in such a picture.</p></section>"
    )


def _scatter(
    points: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], colors: Mapping[int, int]
) -> str:
    """Dots as one path per group: a zero-length line with a round cap is a dot of ten bytes."""
    low, high = points.min(0), points.max(0)
    scale = 380 / max(float((high - low).max()), 1e-12)
    xy = np.round((points - (low + high) / 2) * [scale, -scale] + 200, 1)
    width = float(np.clip(140 / math.sqrt(len(points)), 4, 12))
    paths, texts = [], []
    for group in np.unique(groups).tolist():
        dots = xy[groups == group]  # [m, 2]
        path = "".join(f"M{x:g} {y:g}h0" for x, y in dots.tolist())
        paths.append(f'<path d="{path}" stroke="var(--c{colors[group]})"/>')
        # The name of a group stands at that of its dots which is nearest to the middle of them all.
        x, y = dots[np.abs(dots - np.median(dots, axis=0)).sum(axis=1).argmin()].tolist()
        texts.append(f'<text x="{x:g}" y="{y + 4:g}">{group}</text>')
    return (
        f'<svg viewBox="0 0 400 400" role="img" aria-label="scatter plot of the embedding">'
        f'<g fill="none" stroke-linecap="round" stroke-width="{width:.1f}" opacity=".8">'
        f'{"".join(paths)}</g><g class="names" text-anchor="middle">{"".join(texts)}</g></svg>'
    )


# --- curves ------------------------------------------------------------------------------------


def _curves(result: Mapping[str, Any], histories: Mapping[int, list[dict[str, Any]]]) -> str:
    rows = [row for history in histories.values() for row in history]
    if not rows:
        return ""
    first = result["runs"][0]
    mark = first.get("selected_epoch")
    charts = []

    def series(key: str) -> list[tuple[str, str, list[tuple[float, float]]]]:
        """One line per seed, the first seed's last so that it lies on top."""
        lines = []
        for seed, history in histories.items():
            xy = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            css = "line first" if seed == first["seed"] else "line rest"
            lines.append(("", css, xy))
        return lines[::-1]

    charts.append(("loss", _line_chart(series("loss"), mark)))
    scored = [name for name in LABEL_SCORES if any(name in row for row in rows)]
    if scored:
        history = histories[first["seed"]]
        lines = [
            (
                SCORE_NAMES[name],
                f"line k{i}",
                [(row["epoch"], 100 * row[name]) for row in history if name in row],
            )
            for i, name in enumerate(scored)
        ]
        charts.append(
            (f"scores against the labels, percent (seed {first['seed']})", _line_chart(lines, mark))
        )
    for name, label in SCORE_NAMES.items():
        if name not in LABEL_SCORES and sum(name in row for row in rows) > 1:
            charts.append((label, _line_chart(series(name), mark)))
    figures = "".join(
        f"<figure><figcaption>{_e(t)}</figcaption>{svg}</figure>" for t, svg in charts
    )
    several = " Thin lines: the other seeds." if len(histories) > 1 else ""
    chosen = " Dashed: the epoch of the result." if mark else ""
    return (
        f'<section><h2>Learning curves</h2><div class="grid">{figures}</div>'
        f'<p class="note">By epoch.{several}{chosen}</p></section>'
    )


def _line_chart(
    lines: Iterable[tuple[str, str, list[tuple[float, float]]]], mark: float | None = None
) -> str:
    """Lines of (name, css class, points) over epochs; names stand at the ends of the lines."""
    lines = [line for line in lines if line[2]]
    if not lines:
        return '<p class="note">nothing recorded</p>'
    width, height, left, right, top, bottom = 400, 230, 46, 40, 8, 26
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    log = min(ys) > 0 and max(ys) > 50 * min(ys)
    ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(ys), max(ys))
    y0, y1 = min(*ys, *ticks), max(*ys, *ticks)

    def at_x(x: float) -> float:
        return left + (width - left - right) * (x - x0) / (x1 - x0)

    def at_y(y: float) -> float:
        if log:
            y, low, high = math.log(y), math.log(y0), math.log(y1)
        else:
            low, high = y0, y1
        return top + (height - top - bottom) * (high - y) / max(high - low, 1e-300)

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<path class="rule" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in _ticks(x0, x1, whole=True):
        if x0 <= tick <= x1:
            parts.append(
                f'<text x="{at_x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
            )
    if mark is not None and x0 <= mark <= x1:
        parts.append(f'<path class="mark" d="M{at_x(mark):.1f} {top}V{height - bottom}"/>')
    ends: list[tuple[float, str, str]] = []
    for name, css, points in lines:
        points = _thin(points)
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in points)
        parts.append(f'<path class="{css}" d="M{path}"/>')
        if len(points) == 1:
            parts.append(f'<path class="{css} dot" d="M{path}h0"/>')
        if name:
            ends.append((at_y(points[-1][1]) + 4, name, css))
    below = -math.inf
    for y, name, css in sorted(ends):
        y = max(y, below + 13)
        below = y
        parts.append(
            f'<text class="end {css}" x="{width - right + 5}" y="{y:.1f}">{_e(name)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="line chart">'
        f"{''.join(parts)}</svg>"
    )


def _thin(points: list[tuple[float, float]], limit: int = 400) -> list[tuple[float, float]]:
    """At most about ``limit`` points of a curve, the last one among them."""
    step = max(1, len(points) // limit)
    return points if step == 1 else [*points[:-1:step], points[-1]]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that span a range."""
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if raw <= m * power * (1 + 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 5))
    return [10.0**p for p in range(first, last + 1, step)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:g}"


# --- clusters ----------------------------------------------------------------------------------


def _clusters(labels: npt.NDArray[np.int64], dataset: Dataset, colors: Mapping[int, int]) -> str:
    """Size, conductance and, with labels, the classes of every cluster."""
    names, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    conductance = _conductance_by_cluster(dataset, index, len(names))
    matched = {} if dataset.labels is None else _matched_classes(dataset.labels, labels)
    rows = []
    for i, name in enumerate(names.tolist()):
        cells = [
            f'<td><i style="background:var(--c{colors[name]})"></i>{name}</td>',
            f'<td class="bar"><div><span style="width:{100 * sizes[i] / sizes.max():.1f}%"></span>'
            f"<b>{sizes[i]:,}</b></div></td>",
            f"<td>{conductance[i]:.3f}</td>",
        ]
        if dataset.labels is not None:
            counts = np.bincount(dataset.labels[index == i])
            cells.append(f"<td>{matched.get(name, '-')}</td>")
            cells.append(f"<td>{100 * counts.max() / sizes[i]:.1f}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = ["cluster", "nodes", "conductance"]
    notes = (
        f"Modularity {metrics.modularity(dataset.adjacency, labels):.4f}. Conductance: the share "
        f"of a cluster's edge ends that lead out of it; lower is better."
    )
    if dataset.labels is not None:
        header += ["class", "purity, %"]
        notes += (
            " Class: its partner in the one-to-one map; purity: the share of its largest class."
        )
    head = "".join(f"<th>{text}</th>" for text in header)
    heat = _confusion(labels, dataset.labels) if dataset.labels is not None else ""
    return (
        f'<section><h2>Clusters</h2><div class="grid"><div class="scroll"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{heat}</div>"
        f'<p class="note">{notes}</p></section>'
    )


def _matched_classes(truth: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> dict[int, int]:
    """The class of each cluster under the best one-to-one map; unmatched clusters are left out."""
    clusters, first = np.unique(labels, return_index=True)
    positions = metrics.best_map(truth, labels)[first]
    classes = np.unique(truth).tolist()
    pairs = zip(clusters.tolist(), positions.tolist(), strict=True)
    return {cluster: classes[position] for cluster, position in pairs if position >= 0}


def _conductance_by_cluster(
    dataset: Dataset, index: npt.NDArray[np.intp], n: int
) -> npt.NDArray[np.float64]:
    """Cut weight over the smaller of the two volumes, per cluster; 0 where that is empty."""
    edges = dataset.adjacency.tocoo()
    volume = np.bincount(index[edges.row], weights=edges.data, minlength=n)
    cut = np.bincount(
        index[edges.row], weights=edges.data * (index[edges.row] != index[edges.col]), minlength=n
    )
    smaller = np.minimum(volume, volume.sum() - volume)
    return np.divide(cut, smaller, out=np.zeros(n), where=smaller > 0)


def _confusion(labels: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> str:
    """Heat map of clusters by classes, clusters in the order of the classes they match."""
    clusters, i = np.unique(labels, return_inverse=True)
    classes, j = np.unique(truth, return_inverse=True)
    if len(clusters) * len(classes) > 900:
        return ""
    counts = np.zeros((len(clusters), len(classes)), dtype=np.int64)
    np.add.at(counts, (i, j), 1)
    matched = _matched_classes(truth, labels)
    order = sorted(range(len(clusters)), key=lambda c: matched.get(int(clusters[c]), math.inf))
    cell = min(36.0, 340 / len(classes))
    width, height = 50 + cell * len(classes), 40 + cell * len(clusters)
    share = counts / counts.sum(axis=1, keepdims=True)
    parts = []
    for r, c in enumerate(order):
        y = 34 + r * cell
        parts.append(
            f'<text x="44" y="{y + cell / 2 + 4:.1f}" text-anchor="end">{clusters[c]}</text>'
        )
        for k in range(len(classes)):
            x = 50 + k * cell
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1.5:.1f}" height="{cell - 1.5:.1f}" '
                f'rx="2" class="heat" style="--p:{share[c, k]:.3f}"/>'
            )
            if counts[c, k] and cell >= 24:
                strong = " strong" if share[c, k] > 0.5 else ""
                parts.append(
                    f'<text class="in{strong}" x="{x + cell / 2 - 0.75:.1f}" '
                    f'y="{y + cell / 2 + 3:.1f}" text-anchor="middle">{counts[c, k]}</text>'
                )
    for k, name in enumerate(classes):
        parts.append(
            f'<text x="{50 + (k + 0.5) * cell:.1f}" y="28" text-anchor="middle">{name}</text>'
        )
    return (
        f"<figure><figcaption>clusters (rows) by classes (columns), nodes</figcaption>"
        f'<svg viewBox="0 10 {width:.0f} {height - 10:.0f}" role="img" '
        f'aria-label="heat map of clusters by classes" style="max-width:{1.2 * width:.0f}px">'
        f"{''.join(parts)}</svg></figure>"
    )


# --- tables ------------------------------------------------------------------------------------


def _runs(result: Mapping[str, Any]) -> str:
    names = list(result["mean"])
    head = ["seed", *(SCORE_NAMES.get(name, name) for name in names), "epochs", "time", "memory"]
    rows = [
        [
            str(run["seed"]),
            *(score_text(name, run["metrics"].get(name)) for name in names),
            str(run["epochs"]),
            duration(run["seconds"]),
            size_text(run["peak_memory_bytes"]),
        ]
        for run in result["runs"]
    ]
    for title in ("mean", "std") if len(rows) > 1 else ():
        scores = [score_text(name, result[title][name]) for name in names]
        rows.append([title, *scores, "", "", ""])
    return f"<section><h2>Runs</h2>{_table(head, rows)}</section>"


def _settings(result: Mapping[str, Any]) -> str:
    shared = ("protocol", "selection", "device", "precision")
    config = {key: result[key] for key in shared} | {
        key: value for key, value in result["config"].items() if key not in shared
    }
    hyper = _table(["setting", "value"], [[k, _value(v)] for k, v in config.items()])
    versions = _table(["package", "version"], [list(item) for item in result["versions"].items()])
    tables = f'<div class="grid">{hyper}{versions}</div>'
    return f"<section><h2>Settings and versions</h2>{tables}</section>"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    header = "".join(f"<th>{_e(text)}</th>" for text in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _css(n_colors: int) -> str:
    def colors(dark: int) -> str:
        chosen = [pair[dark] for pair in PALETTE[:n_colors]]
        more = n_colors - len(chosen)
        chosen += [
            f"oklch({(0.70 if dark else 0.58) + 0.08 * (i % 2)} 0.15 {360 * i / more:.0f})"
            for i in range(more)
        ]
        return "".join(f"--c{i}:{color};" for i, color in enumerate(chosen))

    light = (
        "--page:#f6f7f9;--panel:#fff;--ink:#15202b;--soft:#55616e;--rule:#e3e7ec;--accent:#2a78d6;"
        "--heat:42,120,214;"
    )
    dark = (
        "--page:#0f1419;--panel:#171e26;--ink:#e8edf2;--soft:#9aa7b4;--rule:#2a343f;"
        "--accent:#4a95ee;--heat:74,149,238;"
    )
    return f"""
:root{{{light}{colors(0)}}}
@media (prefers-color-scheme:dark){{:root{{{dark}{colors(1)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
header,main,footer{{max-width:1040px;margin:0 auto;padding:0 20px}}
header{{padding-top:32px}}
header p{{margin:2px 0 0;color:var(--soft)}}
.eyebrow{{font-size:12px;letter-spacing:.08em;text-transform:uppercase}}
h1{{margin:4px 0 0;font-size:30px;line-height:1.2;letter-spacing:-.01em}}
h2{{margin:0 0 12px;font-size:18px}}
section{{margin:20px 0;padding:20px;background:var(--panel);border:1px solid var(--rule);
border-radius:12px}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:12px}}
.card .label{{color:var(--soft);font-size:13px}}
.card .value{{font-size:28px;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}}
.card.quiet .value{{font-weight:400;font-size:22px;line-height:35px}}
.card .spread{{color:var(--soft);font-size:13px;min-height:1.5em}}
.note{{margin:12px 0 0;color:var(--soft);font-size:13px;max-width:75ch}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:24px}}
figure{{margin:0;min-width:0}}
figcaption{{margin-bottom:6px;color:var(--soft);font-size:13px}}
svg{{display:block;width:100%;height:auto}}
svg text{{font-size:11.5px;fill:var(--soft);font-variant-numeric:tabular-nums}}
svg .names text{{font-size:14px;font-weight:700;fill:var(--ink);stroke:var(--panel);
stroke-width:4px;stroke-linejoin:round;paint-order:stroke}}
.rule{{stroke:var(--rule);fill:none}}
.mark{{stroke:var(--soft);stroke-dasharray:3 4;fill:none}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.dot{{stroke-width:7}}
.first{{stroke:var(--accent)}}
.rest{{stroke:var(--soft);stroke-width:1;opacity:.45}}
.k0{{stroke:var(--c0)}}.k1{{stroke:var(--c1)}}
.k2{{stroke:var(--c2)}}.k3{{stroke:var(--c6)}}
svg text.end{{stroke:none;font-weight:600}}
text.k0{{fill:var(--c0)}}text.k1{{fill:var(--c1)}}
text.k2{{fill:var(--c2)}}text.k3{{fill:var(--c6)}}
.heat{{fill:rgba(var(--heat),calc(.05 + .95*var(--p)))}}
svg text.in{{font-size:10px}}svg text.strong{{fill:#fff;font-weight:600}}
.scroll{{overflow-x:auto;min-width:0}}
table{{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}}
th,td{{padding:5px 10px 5px 0;text-align:left;border-bottom:1px solid var(--rule);
white-space:nowrap}}
th{{color:var(--soft);font-size:13px;font-weight:500}}
tr:last-child td{{border-bottom:0}}
td i{{display:inline-block;width:10px;height:10px;margin-right:8px;border-radius:50%}}
td.bar{{min-width:110px;width:40%;padding-right:20px}}
td.bar div{{position:relative}}
td.bar span{{position:absolute;inset:0 auto 0 0;background:rgba(var(--heat),.2);border-radius:3px}}
td.bar b{{position:relative;padding-left:6px;font-weight:400}}
footer{{padding-bottom:40px;color:var(--soft);font-size:13px}}
@media (max-width:600px){{header,main,footer{{padding-left:12px;padding-right:12px}}
section{{padding:14px;margin:12px 0}}h1{{font-size:24px}}
.cards{{grid-template-columns:repeat(auto-fit,minmax(84px,1fr))}}.card .value{{font-size:22px}}}}
"""
