"""The tables, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastclust import cli
from fastclust.compare.methods import ORACLE, methods, title_of, with_preset
from fastclust.info import versions
from fastclust.report import LABEL_SCORES
from fastclust.settings import MODELS

# ACC, NMI, ARI, F1 in percent as their authors report them; how the epoch was chosen.
PUBLISHED: dict[str, tuple[str, dict[str, tuple[float, float, float, float]]]] = {
    "HSAN (AAAI 2023)": (
        "best epoch by the labels, ten runs",
        {
            "cora": (77.07, 59.21, 57.52, 75.11),
            "citeseer": (71.15, 45.06, 47.05, 63.01),
            "amap": (77.02, 67.21, 58.01, 72.03),
            "bat": (77.15, 53.21, 52.20, 77.13),
            "eat": (56.69, 33.25, 26.85, 57.26),
            "uat": (56.04, 26.99, 25.22, 54.20),
        },
    ),
    "ECN-MF (CMC 2024)": (
        "last epoch, ten runs",
        {
            "cora": (71.57, 54.75, 48.62, 64.45),
            "citeseer": (71.80, 45.07, 46.63, 64.53),
            "eat": (51.87, 24.05, 22.75, 50.64),
            "uat": (52.01, 24.73, 23.78, 43.93),
            "amap": (76.88, 68.21, 58.98, 71.58),
            "amac": (54.12, 35.59, 33.21, 32.99),
        },
    ),
    "Dink-Net (ICML 2023)": (
        "best epoch by the labels",
        {
            "cora": (78.10, 62.28, 61.61, 72.66),
            "citeseer": (70.36, 45.87, 46.96, 65.96),
            "amap": (81.71, 74.36, 68.40, 73.92),
        },
    ),
}


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of shares, in percent.

    Examples
    --------
    >>> spread([0.5, 0.52]), spread([0.5])
    ('51.00 ± 1.41', '50.00')
    """
    mean = f"{100 * np.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.2f}"


def grouped(
    rows: Iterable[Mapping[str, Any]], *names: str
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *lines])


def overview(
    rows: Sequence[Mapping[str, Any]], datasets: Sequence[str], rule: str, score: str
) -> str:
    """One score of every method: graphs as columns; last, label-free and oracle as rows."""
    lines = []
    kept = [row for row in rows if row["selection"] in ("last", rule, ORACLE)]
    groups = grouped(kept, "model", "protocol", "variant", "selection")
    for (model, protocol, variant, selection), members in groups.items():
        cells = []
        for dataset in datasets:
            values = [row[score] for row in members if row["dataset"] == dataset]
            cells.append(spread(values) if values else "")
        name = title_of(model, protocol, variant)
        how = "no training" if protocol == "floor" else selection
        lines.append([name, "**oracle**" if how == ORACLE else how, *cells])
    column = LABEL_SCORES.index(score)
    for name, (how, table) in PUBLISHED.items():
        cells = [f"{table[d][column]:.2f}" if d in table else "" for d in datasets]
        if any(cells):
            lines.append([f"*published:* {name}", how, *cells])
    return _markdown(["method", "epoch chosen by", *datasets], lines)


def dataset_table(rows: Sequence[Mapping[str, Any]], dataset: str) -> str:
    """Everything measured on one graph."""
    lines = []
    rows = [row for row in rows if row["dataset"] == dataset]
    for key, members in grouped(rows, "model", "protocol", "variant", "selection").items():
        *method, selection = key
        cells = [spread([row[score] for row in members]) for score in LABEL_SCORES]
        seconds = float(np.mean([row["seconds"] for row in members]))
        memory = [row["peak_memory_bytes"] for row in members if row["peak_memory_bytes"]]
        lines.append(
            [
                title_of(*method),
                "no training" if key[1] == "floor" else selection,
                *cells,
                str(len(members)),
                str(members[0]["epochs"]),
                cli.duration(seconds),
                f"{max(memory) / 1e6:.0f} MB" if memory else "",
            ]
        )
    for name, (how, table) in PUBLISHED.items():
        if dataset in table:
            scores = [f"{value:.2f}" for value in table[dataset]]
            lines.append([f"*published:* {name}", how, *scores, "", "", "", ""])
    header = ["method", "epoch chosen by", "ACC", "NMI", "ARI", "F1", "seeds", "epochs", "time",
              "peak memory"]  # fmt: skip
    return _markdown(header, lines)


def progress(rows: Sequence[Mapping[str, Any]], datasets: Sequence[str]) -> str:
    """How many seeds of every method, with its preset, in any precision, each graph has."""
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for row in rows:
        if row["selection"] == "last" and with_preset(row["variant"]):
            key = (row["dataset"], row["model"], row["protocol"])
            seeds.setdefault(key, set()).add(row["seed"])
    lines = []
    for method in methods(list(MODELS), ("standard", "paper-code"), False, {}):
        found = [len(seeds.get((d, method.model, method.protocol), ())) for d in datasets]
        lines.append([method.title, *(str(count or "") for count in found)])
    return _markdown(["seeds", *datasets], lines)


def page(
    rows: Sequence[Mapping[str, Any]],
    datasets: Sequence[str],
    rule: str,
    command: str,
    commands: Sequence[str],
    failures: Mapping[str, str],
    plots: Sequence[str],
) -> str:
    """The whole ``results.md``; plots by their place as seen from there."""
    runs_made_by = "\n".join(commands)
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [
        "# Results",
        f"Made by\n\n```\n{command}\n```\n\nwith {made_with}.",
        f"The runs were made by\n\n```\n{runs_made_by}\n```\n\n"
        "where every command goes on from what is finished, and adds seeds if asked for more. "
        "Times are those of these runs, on whatever else the machine was doing: no benchmark.",
        "Scores in percent, mean ± sample standard deviation over seeds; ACC and F1 after the best "
        "one-to-one map of clusters to classes. Training sees no label. **last** is the last "
        f"epoch, **{rule}** the evaluated epoch which that score prefers, without labels. "
        "**oracle** is the evaluated epoch with the best accuracy by the true labels, the protocol "
        "of most published numbers: nobody without labels can choose it. Published numbers were "
        "not measured here. In brackets: the protocol, where it is not the standard one, and "
        "settings that differ from the preset, except those that the command above gives to all.",
        f"## Seeds finished\n\n{progress(rows, datasets)}\n\nAn empty cell, or one below ten, is a "
        "run that was not made, or not finished. What is wanted for a graph and a model:\n\n```\n"
        "python -m fastclust.compare --datasets NAME --models MODEL --protocol standard,paper-code "
        "--seeds 0-9 --out runs/more\n```\n\nand `runs/more` among the folders collected above.",
        f"## Accuracy\n\n{overview(rows, datasets, rule, 'acc')}",
        f"## NMI\n\n{overview(rows, datasets, rule, 'nmi')}",
    ]
    parts += [f"## {dataset}\n\n{dataset_table(rows, dataset)}" for dataset in datasets]
    if plots:
        parts.append("## Plots\n\n" + "\n\n".join(f"![{Path(p).stem}]({p})" for p in plots))
    if failures:
        lines = "\n".join(f"- {title}: {why}" for title, why in failures.items())
        parts.append(f"## Not finished\n\n{lines}")
    return "\n\n".join(parts) + "\n"
