"""The figures: accuracy by epoch, by method and by what was swept, and embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastclust import plot
from fastclust.compare.methods import title_of
from fastclust.compare.results import Results
from fastclust.compare.tables import grouped
from fastclust.datasets import Dataset
from fastclust.settings import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure with neither date nor random names, so that equal results are equal files."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.name}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, **options)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of so many inches with its axes; without pyplot, which keeps a state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def plot_curves(
    dataset: str, histories: Mapping[str, list[list[dict[str, Any]]]], path: Path
) -> None:
    """Accuracy by epoch: the mean over seeds and the range between the worst and the best."""
    figure, axes = _axes(7, 4)
    for title, runs in histories.items():
        epochs = [entry["epoch"] for entry in min(runs, key=len)]
        values = 100 * np.array([[entry["acc"] for entry in run[: len(epochs)]] for run in runs])
        (line,) = axes.plot(epochs, values.mean(0), label=title)
        axes.fill_between(
            epochs, values.min(0), values.max(0), alpha=0.15, color=line.get_color(), linewidth=0
        )
    axes.set(title=dataset, xlabel="epoch", ylabel="ACC (%)")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_bars(rows: Sequence[Mapping[str, Any]], dataset: str, path: Path) -> None:
    """Accuracy of every method at the last epoch, with one standard deviation."""
    rows = [row for row in rows if row["dataset"] == dataset and row["selection"] == "last"]
    groups = grouped(rows, "model", "protocol", "variant")
    titles = [title_of(*key) for key in groups]
    values = [100 * np.array([row["acc"] for row in members]) for members in groups.values()]
    figure, axes = _axes(7, 0.8 + 0.32 * len(titles))
    errors = [float(v.std(ddof=1)) if v.size > 1 else 0.0 for v in values]
    axes.barh(titles, [float(v.mean()) for v in values], xerr=errors, height=0.7)
    axes.invert_yaxis()
    axes.set(title=f"{dataset}, last epoch", xlabel="ACC (%)")
    _save(figure, path)


def plot_sweep(rows: Sequence[Mapping[str, Any]], title: str, key: str, path: Path) -> None:
    """ACC and NMI at the last epoch over the values of one setting, with one standard deviation."""
    figure, axes = _axes(5, 3.4)
    groups = grouped(rows, "variant")
    points = sorted((float(variant.split()[1]), members) for (variant,), members in groups.items())
    for score in ("acc", "nmi"):
        values = [100 * np.array([row[score] for row in members]) for _, members in points]
        axes.errorbar(
            [x for x, _ in points],
            [float(v.mean()) for v in values],
            [float(v.std(ddof=1)) if v.size > 1 else 0.0 for v in values],
            marker="o",
            capsize=3,
            label=score.upper(),
        )
    axes.set(title=title, xlabel=key, ylabel="%")
    axes.legend(fontsize="small")
    _save(figure, path)


def swept(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """Rows at the last epoch by graph, model and setting, of settings with two numbers or more.

    The preset's number is one of them, if it was run: as the plain method unless it was swept too.
    """
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    last = [row for row in rows if (row["selection"], row["protocol"]) == ("last", "standard")]
    for row in last:
        key, _, value = row["variant"].partition(" ")
        if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", value):
            found.setdefault((row["dataset"], row["model"], key), []).append(row)
    for (dataset, model, key), members in found.items():
        value = MODELS[model].for_dataset(dataset).get_params()[key]
        run = {float(row["variant"].split()[1]) for row in members}
        if isinstance(value, int | float) and value not in run:
            plain = [
                r for r in last if (r["dataset"], r["model"], r["variant"]) == (dataset, model, "")
            ]
            members += [{**row, "variant": f"{key} {value}"} for row in plain]
    return {k: v for k, v in found.items() if len({row["variant"] for row in v}) > 1}


def plot_embeddings(dataset: Dataset, folders: Mapping[str, Path], path: Path) -> None:
    """The embedding of every method's first seed in the plane, coloured by the true classes."""
    figure, row = _axes(3.2 * len(folders), 3.4, len(folders))
    for axes, (title, folder) in zip(np.atleast_1d(row), folders.items(), strict=True):
        z = np.load(folder / "embedding.npy")
        placed = plot.project(z, method="t-sne", max_nodes=1000)
        plot.embedding(z, dataset.labels, projection=placed, ax=axes)
        axes.set_title(f"{title}, {placed.method}", fontsize="small")
    _save(figure, path, dpi=80)


def draw(
    out: Path,
    datasets: Sequence[Dataset],
    results: Results,
) -> list[Path]:
    """All plots."""
    rows, paths = results.rows, []
    for dataset in datasets:
        name = dataset.name
        if results.histories[name]:
            paths.append(out / f"curves-{name}.svg")
            plot_curves(name, results.histories[name], paths[-1])
        if any(row["dataset"] == name for row in rows):
            paths.append(out / f"methods-{name}.svg")
            plot_bars(rows, name, paths[-1])
        for (graph, model, key), members in swept(rows).items():
            if graph == name:
                paths.append(out / f"sweep-{name}-{model}-{key}.svg")
                plot_sweep(members, f"{name}, {model}", key, paths[-1])
        if results.embeddings[name]:
            paths.append(out / f"t-sne-{name}.png")
            plot_embeddings(dataset, results.embeddings[name], paths[-1])
    return paths
