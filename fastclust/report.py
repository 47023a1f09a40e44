"""The results as a table for the terminal, and ``report.html``: one page that needs no network.

The figures are those of :mod:`fastclust.plot`, put into ``report.html.j2`` as SVG. Text and frames
are drawn in colours that become CSS variables there, so that one drawing serves light and dark,
prints and scales to a phone.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastclust import metrics, plot
from fastclust.cli import debugging, duration, explain
from fastclust.datasets import Dataset
from fastclust.files import write_atomically
from fastclust.plot import LABEL_SCORES, SCORE_NAMES
from fastclust.rundir import read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LABEL_SCORES", "headline", "table", "write_page"]

MODEL_NAMES = {"ecnmf": "ECN-MF", "hsan": "HSAN", "ssgc": "SSGC"}
N_SHOWN = 8  # nodes in each of the tables of the clearest and the hardest
# What matplotlib draws with, and what the page makes of it.
THEME = {
    "#15202b": "var(--ink)",
    "#55616e": "var(--soft)",
    "#e3e7ec": "var(--rule)",
    "#fefefe": "var(--panel)",
}
INK, SOFT, RULE, PANEL = THEME
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "figure.facecolor": PANEL,
    "savefig.facecolor": "none",
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.labelcolor": SOFT,
}


_Labels = npt.NDArray[np.int64]
_Figure = tuple[str, str]  # caption; SVG, or what went wrong


# --- terminal ----------------------------------------------------------------------------------


def headline(model: str, dataset: Dataset, n_clusters: int | str, where: str) -> str:
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
    rows = table_rows(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The cells of :func:`table`, the header first."""
    names = list(result["mean"])
    rows = [["", *(SCORE_NAMES.get(name, name) for name in names), "epochs", "time", "memory"]]
    rows += [
        [
            f"seed {run['seed']}",
            *(score_text(name, run["metrics"].get(name)) for name in names),
            str(run["epochs"]),
            duration(run["seconds"]),
            size_text(run["peak_memory_bytes"]),
        ]
        for run in result["runs"]
    ]
    for title in ("mean", "std") if len(result["runs"]) > 1 else ():
        scores = (score_text(name, result[title].get(name)) for name in names)
        rows.append([title, *scores, "", "", ""])
    return rows


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

    A figure that cannot be drawn is replaced by a line that says why; the rest of the page stands.

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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    with (root / "assignments.csv").open(encoding="utf-8", newline="") as file:
        labels = np.array([int(row[-1]) for row in list(csv.reader(file))[1:]], dtype=np.int64)
    embedding = np.nan_to_num(np.load(root / "embedding.npy", allow_pickle=False))
    first = result["runs"][0]
    histories = {
        run["seed"]: read_history(
            (root if run is first else root / f"seed-{run['seed']}") / "history.jsonl"
        )
        for run in result["runs"]
    }
    projection = plot.project(embedding)
    environment = Environment(
        loader=PackageLoader("fastclust", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=f"{MODEL_NAMES[result['model']]} on {dataset.name}",
        result=result,
        first=first,
        dataset=dataset,
        cards=_cards(result),
        projection=projection,
        figures=_figures(labels, embedding, projection, dataset, histories, first),
        modularity=metrics.modularity(dataset.adjacency, labels),
        nodes=_nodes(labels, embedding, dataset),
        rows=table_rows(result),
        settings=_settings(result),
        max_bars=plot.MAX_BARS,
    )
    path = root / "report.html"
    write_atomically(path, page)
    return path


def _cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and remark of what stands at the top."""
    runs = result["runs"]
    several = len(runs) > 1
    cards = [
        (
            SCORE_NAMES.get(name, name),
            score_text(name, mean),
            f"± {score_text(name, result['std'][name])}" if several else "",
        )
        for name, mean in result["mean"].items()
    ]
    seconds = float(np.mean([run["seconds"] for run in runs]))
    memory = max(run["peak_memory_bytes"] for run in runs)
    cards.append(("time", duration(seconds), "mean per seed" if several else "training"))
    cards.append(("memory", size_text(memory), "peak, resident"))
    return cards


def _figures(
    labels: npt.NDArray[np.int64],
    embedding: npt.NDArray[Any],
    projection: plot.Projection,
    dataset: Dataset,
    histories: Mapping[int, list[dict[str, Any]]],
    first: Mapping[str, Any],
) -> dict[str, list[_Figure]]:
    """The figures of each section."""
    truth = dataset.labels
    return {
        "Embedding": _scatter(embedding, labels, truth, projection),
        "Curves": _curves(histories, first),
        "Clusters": _bars(dataset, labels, first.get("n_clusters_evidence")),
        "Pairs": _matrices(embedding, labels, truth),
    }


def _scatter(
    embedding: npt.NDArray[Any], labels: _Labels, truth: _Labels | None, projection: plot.Projection
) -> list[_Figure]:
    size, options = (4.6, 4.2), {"projection": projection}
    figures = [
        _figure("by cluster", size, plot.embedding, embedding, labels, like=truth, **options)
    ]
    if truth is not None:
        figures.append(_figure("by label", size, plot.embedding, embedding, truth, **options))
    return figures


def _curves(
    histories: Mapping[int, list[dict[str, Any]]], first: Mapping[str, Any]
) -> list[_Figure]:
    found = {key for history in histories.values() for row in history for key in row}
    keys: list[tuple[str, Any]] = [("loss", "loss")] if "loss" in found else []
    if scored := [key for key in LABEL_SCORES if key in found]:
        keys.append((f"scores against the labels, percent (seed {first['seed']})", scored))
    keys += [
        (name, key) for key, name in SCORE_NAMES.items() if key in found and key not in LABEL_SCORES
    ]
    epoch = first.get("selected_epoch")
    return [
        _figure(caption, (4.6, 2.5), plot.learning_curve, histories, key, epoch=epoch)
        for caption, key in keys
    ]


def _bars(dataset: Dataset, labels: _Labels, evidence: Mapping[str, Any] | None) -> list[_Figure]:
    graph, like = dataset.adjacency, dataset.labels
    height = max(1.4, 0.24 * _n_shown(labels) + 0.3)
    size = 3.2, height
    figures = [
        _figure("nodes", size, plot.sizes, labels, like=like),
        _figure("modularity", size, plot.modularity, graph, labels, like=like),
        _figure("conductance", size, plot.conductance, graph, labels, like=like),
    ]
    if evidence:
        caption = "agreement of disjoint halves on K clusters"
        figures.append(_figure(caption, (3.2, max(height, 2.2)), plot.agreement, evidence))
    return figures


def _matrices(embedding: npt.NDArray[Any], labels: _Labels, truth: _Labels | None) -> list[_Figure]:
    size = 4.6, 3.9
    caption = "cosine similarity of a sample of nodes, by cluster"
    figures = [_figure(caption, size, plot.similarity, embedding, labels, like=truth)]
    if truth is not None and len(np.unique(truth)) * _n_shown(labels) <= 900:
        figures.append(_figure("clusters by classes, nodes", size, plot.confusion, truth, labels))
    return figures


def _n_shown(labels: _Labels) -> int:
    return min(len(np.unique(labels)), plot.MAX_BARS)


def _figure(
    caption: str, size: tuple[float, float], draw: Callable[..., Axes], *data: Any, **options: Any
) -> _Figure:
    """A drawing as SVG that fits into the page, or a line on why there is none."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    try:
        style: Any = STYLE | {"svg.hashsalt": caption}
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(*data, ax=figure.add_subplot(), **options).set_title("")
            file = io.StringIO()
            plain = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(figure).print_svg(file, metadata=plain)
    except Exception as error:
        if debugging():
            raise
        why = Markup('<p class="note">could not be drawn: {}</p>').format(explain(error)[1])
        return caption, why
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    drop = r' (width|height)="[\d.]+pt"| xmlns(:\w+)?="[^"]*"| version="1.1"'
    svg = re.sub(drop, "", svg, count=5)
    # Names of groups would come twice in a page; the page has a font of its own; the hundredth of
    # a point is enough (numbers after ">" are text).
    svg = re.sub(r'(?<=<g) id="[^"]*"|font-family: [^;"]*;? ?', "", svg)
    svg = re.sub(r"(?<![>\d\u2212])(-?\d+\.\d\d)\d+", r"\1", svg).replace("xlink:href", "href")
    svg = re.sub("|".join(THEME), lambda found: THEME[found[0]], svg)
    named = f'<svg role="img" aria-label="{Markup.escape(caption)}"'
    return caption, Markup(svg.replace("<svg", named, 1))


def _nodes(
    labels: npt.NDArray[np.int64], embedding: npt.NDArray[Any], dataset: Dataset
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The nodes that lie most clearly in their cluster, and those that lie least so."""
    margin = metrics.node_margin(embedding, labels)
    order = np.argsort(-margin, kind="stable")
    graph, names = dataset.adjacency, dataset.node_names

    def row(i: int) -> dict[str, Any]:
        neighbours = graph.indices[graph.indptr[i] : graph.indptr[i + 1]]
        inside = int((labels[neighbours] == labels[i]).sum())
        return {
            "node": i if names is None else names[i],
            "cluster": labels[i],
            "label": None if dataset.labels is None else dataset.labels[i],
            "margin": margin[i],
            "inside": f"{inside} of {len(neighbours)}",
        }

    return [
        (title, [row(int(i)) for i in chosen])
        for title, chosen in (
            ("most confident", order[:N_SHOWN]),
            ("hardest", order[::-1][:N_SHOWN]),
        )
    ]


def _settings(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of names and values: every hyper-parameter, the machine, the versions."""
    shared = ("protocol", "selection", "device", "precision")
    config = {key: result[key] for key in shared} | {
        key: value for key, value in result["config"].items() if key not in shared
    }
    groups = {
        "hyper-parameters": config,
        "machine": result.get("machine", {}),
        "versions": result["versions"],
    }
    return [
        (title, [(key, _value(value)) for key, value in values.items()])
        for title, values in groups.items()
        if values
    ]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
