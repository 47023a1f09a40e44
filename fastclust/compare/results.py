"""Rows of scores from what the runs left, and files of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastclust import cli
from fastclust.cli import UsageError
from fastclust.compare.floors import floor_rows
from fastclust.compare.methods import LABEL_FREE, ORACLE, Method, methods, with_preset
from fastclust.datasets import Dataset
from fastclust.files import write_atomically
from fastclust.report import LABEL_SCORES
from fastclust.rundir import read_history, read_toml
from fastclust.settings import MODELS, parameter_types
from fastclust.training import SELECTIONS

COLUMNS = (
    "dataset", "model", "protocol", "selection", "seed", *LABEL_SCORES, "epochs", "seconds",
    "peak_memory_bytes", "variant", "selected_epoch",
)  # fmt: skip

# What tells one row from another.
KEY = ("dataset", "model", "protocol", "variant", "selection", "seed")


def finished_runs(root: Path) -> Iterator[tuple[str, Method, Path]]:
    """Graph, method and folder of every run directory of a comparison.

    A method's ``variant`` is extended by the settings in which it differs from its preset, whoever
    asked for them.
    """
    named = {m.folder: m for m in methods(list(MODELS), ("standard", "paper-code"), True, {})}
    plain = {m.folder: m for m in methods(list(MODELS), ("standard", "paper-code"), False, {})}
    for folder in sorted((root / "runs").glob("*/*")):
        method = named.get(folder.name)
        if method is None:  # of a sweep: told by its settings
            method = next((m for f, m in plain.items() if folder.name.startswith(f + "-")), None)
        if method is None or not (folder / "result.json").exists():
            continue
        config = read_toml(folder / "config.toml")
        hints = parameter_types(MODELS[method.model])
        settings = {key: cli.convert(key, text, hints[key]) for key, text in method.settings}
        if method.model != "ssgc":
            settings["protocol"] = method.protocol
        preset = MODELS[method.model].for_dataset(folder.parent.name, **settings).get_params()
        changes = [
            f"{key} {config[key]}"
            for key in sorted(config.keys() & hints.keys() - {"device"})
            if str(config[key]).lower() != str(preset[key]).lower()
        ]
        parts = [part for part in (method.variant, *changes) if part]
        yield folder.parent.name, replace(method, variant=", ".join(parts)), folder


def method_rows(
    method: Method, dataset: str, folder: Path, seeds: Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    """One row per finished seed (of ``seeds``, if given) and rule of one run directory."""
    try:
        runs = json.loads((folder / "result.json").read_text())["runs"]
    except (OSError, ValueError, KeyError):
        return
    for position, run in enumerate(runs):
        if seeds is not None and run["seed"] not in seeds:
            continue
        row = {
            "dataset": dataset,
            "model": method.model,
            "protocol": method.protocol,
            "variant": method.variant,
            "seed": run["seed"],
            "epochs": run["epochs"],
            "seconds": run["seconds"],
            "peak_memory_bytes": run["peak_memory_bytes"],
        }
        scores = {name: run["metrics"][name] for name in LABEL_SCORES}
        yield row | scores | {"selection": "last", "selected_epoch": run["epochs"]}
        place = folder if position == 0 else folder / f"seed-{run['seed']}"
        history = scored_epochs(place)
        for rule in (*LABEL_FREE, ORACLE):
            chosen = select(history, rule)
            if chosen is not None:
                scores = {name: chosen[name] for name in LABEL_SCORES}
                yield row | scores | {"selection": rule, "selected_epoch": chosen["epoch"]}


def scored_epochs(folder: Path) -> list[dict[str, Any]]:
    """The evaluated epochs of one seed, with their scores against the labels."""
    return [entry for entry in read_history(folder / "history.jsonl") if "acc" in entry]


def select(history: Sequence[Mapping[str, Any]], rule: str) -> Mapping[str, Any] | None:
    """The entry that a rule prefers, the first of equals; None without any score."""
    key, more_is_better = ("acc", True) if rule == ORACLE else (rule, SELECTIONS[rule])
    scored = [entry for entry in history if entry.get(key) is not None]
    if not scored:
        return None
    return (max if more_is_better else min)(scored, key=lambda entry: float(entry[key]))


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All rows, in the columns of :data:`COLUMNS`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row.get(name, "") for name in COLUMNS} for row in rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of :func:`write_csv`; none where there is no file."""
    try:
        with path.open(newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except OSError:
        return []
    for row in rows:
        for name in ("seed", "epochs", "selected_epoch", "peak_memory_bytes"):
            row[name] = int(row[name]) if row[name] else None
        for name in (*LABEL_SCORES, "seconds"):
            row[name] = float(row[name])
    return rows


@dataclass(frozen=True)
class Sources:
    """Where finished results lie."""

    roots: list[Path]  # of comparisons
    runs: list[tuple[str, Method, Path]]  # graph, method and run directory
    rows: list[dict[str, Any]]  # whose runs are gone
    seeds: list[int] | None  # those that count; None: all

    @classmethod
    def collected(cls, folders: Sequence[str]) -> Sources:
        """What earlier comparisons left in these folders."""
        roots = [Path(folder) for folder in folders]
        runs = [run for root in roots for run in finished_runs(root)]
        gone = [root for root in roots if not (root / "runs").is_dir()]
        rows = [row for root in gone for row in read_csv(root / "results.csv")]
        if not runs and not rows:
            raise UsageError(f"--collect must be directories with runs, got {list(folders)}")
        return cls(roots, runs, rows, None)

    @property
    def graphs(self) -> set[str]:
        """Names of the graphs that were clustered."""
        return {name for name, _, _ in self.runs} | {row["dataset"] for row in self.rows}

    def commands(self) -> list[str]:
        """The commands that made them."""
        paths = [root / "commands.txt" for root in self.roots]
        return [line for p in paths if p.exists() for line in p.read_text().splitlines()]


@dataclass(frozen=True)
class Results:
    """What was read: rows, and by graph and method curves and the folder of an embedding."""

    rows: list[dict[str, Any]]
    histories: dict[str, dict[str, list[list[dict[str, Any]]]]]
    embeddings: dict[str, dict[str, Path]]


def read_results(sources: Sources, datasets: Sequence[Dataset]) -> Results:
    """The results on these graphs; of equal runs the first."""
    names = [dataset.name for dataset in datasets]
    rows: list[dict[str, Any]] = []
    histories: dict[str, dict[str, list[list[dict[str, Any]]]]] = {name: {} for name in names}
    embeddings: dict[str, dict[str, Path]] = {name: {} for name in names}
    for dataset in datasets:
        for root in sources.roots:
            known = root / "floors" / f"{dataset.name}.json"
            if sources.seeds is not None or known.exists():
                rows += floor_rows(dataset, known, sources.seeds)
    for name, method, folder in sources.runs:
        if name not in names:
            continue
        rows += method_rows(method, name, folder, sources.seeds)
        places = [folder, *sorted(folder.glob("seed-*"))]
        if curves := [curve for curve in map(scored_epochs, places) if curve]:
            histories[name].setdefault(method.title, []).extend(curves)
        if with_preset(method.variant) and (folder / "embedding.npy").exists():
            embeddings[name].setdefault(method.title, folder)
    rows += [row for row in sources.rows if row["dataset"] in names]
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        first.setdefault(tuple(row[key] for key in KEY), row)
    return Results(list(first.values()), histories, embeddings)
