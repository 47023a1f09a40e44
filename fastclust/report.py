"""The results as a table for the terminal, and ``report.html``: one page that needs no network.

The figures are those of :mod:`fastclust.plot`, put into ``report.html.j2`` as SVG. Text and frames
are drawn in colours that become CSS variables there, so that one drawing serves light and dark,
prints and scales to a phone.
"""

from __future__ import annotations

import csv
import io
import json
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
        run["seed"]: _history(root if run is first else root / f"seed-{run['seed']}")
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


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / "history.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
) -> dict[str, list[tuple[str, str]]]:
    """Caption and SVG (or what went wrong) of the figures of each section."""
    truth, graph = dataset.labels, dataset.adjacency
    scatter = {"projection": projection}
    sections: dict[str, list[tuple[str, str]]] = {"Embedding": [], "Curves": [], "Clusters": []}

    def add(
        section: str, caption: str, height: float, draw: Callable[[Axes], Any], width: float = 4.6
    ) -> None:
        sections[section].append((caption, _figure(caption, (width, height), draw)))

    add(
        "Embedding",
        "by cluster",
        4.2,
        lambda ax: plot.embedding(embedding, labels, like=truth, ax=ax, **scatter),
    )
    if truth is not None:
        add(
            "Embedding",
            "by label",
            4.2,
            lambda ax: plot.embedding(embedding, truth, ax=ax, **scatter),
        )

    found = {key for history in histories.values() for row in history for key in row}
    keys: list[tuple[str, Any]] = [("loss", "loss")] if "loss" in found else []
    if scored := [key for key in LABEL_SCORES if key in found]:
        keys.append((f"scores against the labels, percent (seed {first['seed']})", scored))
    keys += [
        (name, key) for key, name in SCORE_NAMES.items() if key in found and key not in LABEL_SCORES
    ]
    for caption, key in keys:
        add(
            "Curves",
            caption,
            2.5,
            lambda ax, key=key: plot.learning_curve(  # type: ignore[misc]
                histories, key, epoch=first.get("selected_epoch"), ax=ax
            ),
        )

    n_clusters = min(len(np.unique(labels)), plot.MAX_BARS)
    tall = max(1.4, 0.24 * n_clusters + 0.3)
    bars: dict[str, Callable[[Axes], Any]] = {
        "nodes": lambda ax: plot.sizes(labels, like=truth, ax=ax),
        "modularity": lambda ax: plot.modularity(graph, labels, like=truth, ax=ax),
        "conductance": lambda ax: plot.conductance(graph, labels, like=truth, ax=ax),
    }
    for caption, draw in bars.items():
        add("Clusters", caption, tall, draw, width=3.2)
    if evidence := first.get("n_clusters_evidence"):
        add(
            "Clusters",
            "agreement of disjoint halves on K clusters",
            max(tall, 2.2),
            lambda ax: plot.agreement(evidence, ax=ax),
            width=3.2,
        )
    sections["Pairs"] = []
    add(
        "Pairs",
        "cosine similarity of a sample of nodes, by cluster",
        3.9,
        lambda ax: plot.similarity(embedding, labels, like=truth, ax=ax),
    )
    if truth is not None and len(np.unique(truth)) * n_clusters <= 900:
        add(
            "Pairs",
            "clusters by classes, nodes",
            3.9,
            lambda ax: plot.confusion(truth, labels, ax=ax),
        )
    return sections


def _figure(caption: str, size: tuple[float, float], draw: Callable[[Axes], Any]) -> str:
    """A drawing as SVG that fits into the page, or a line on why there is none."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    try:
        style: Any = STYLE | {"svg.hashsalt": caption}
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.add_subplot()).set_title("")
            file = io.StringIO()
            plain = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(figure).print_svg(file, metadata=plain)
    except Exception as error:
        if debugging():
            raise
        return Markup('<p class="note">could not be drawn: {}</p>').format(explain(error)[1])
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    drop = r' (width|height)="[\d.]+pt"| xmlns(:\w+)?="[^"]*"| version="1.1"'
    svg = re.sub(drop, "", svg, count=5)
    # Names of groups would come twice in a page; the page has a font of its own; the hundredth of
    # a point is enough (numbers after ">" are text).
    svg = re.sub(r'(?<=<g) id="[^"]*"|font-family: [^;"]*;? ?', "", svg)
    svg = re.sub(r"(?<![>\d\u2212])(-?\d+\.\d\d)\d+", r"\1", svg).replace("xlink:href", "href")
    svg = re.sub("|".join(THEME), lambda found: THEME[found[0]], svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(caption)}"', 1))


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
