"""``python -m fastclust.compare``: every method on every graph, in tables that can be believed.

Each method is trained by ``python -m fastclust.train`` in a process and a run directory of its own;
what is compared is read from there afterwards, so that an interrupted comparison goes on where it
stopped and one training run serves every rule that chooses an epoch:

``last``
    The last epoch, as ``fit`` leaves it.
``inertia``, ``calinski-harabasz``, ``davies-bouldin``, ``modularity``, ``loss``
    The evaluated epoch that the rule prefers; no rule sees a label.
``oracle``
    The evaluated epoch with the best accuracy **by the true labels**. No user without labels can
    have it; it is here because most published numbers of the field were chosen so, and nowhere
    else in this package.

Floors, which need no training, stand beside them, and the published numbers, marked as such.

With ``--collect`` nothing is run: the tables are made of what earlier comparisons finished, each
method under the settings in which it differs from its preset. What an earlier ``--collect`` left,
rows and commands, can be collected again when its runs are gone; then it has no curves.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastclust import __version__, cli, metrics, ops, plot
from fastclust.cli import Interrupted, UsageError, note
from fastclust.datasets import DATASET_NAMES, Dataset, load_dataset
from fastclust.estimators import HSAN
from fastclust.files import write_atomically
from fastclust.info import versions
from fastclust.models.hsan import filtered_attributes
from fastclust.models.inputs import as_tensor
from fastclust.ops.infonce import PRECISIONS
from fastclust.report import LABEL_SCORES
from fastclust.rundir import read_toml
from fastclust.train import MODELS, parameter_types
from fastclust.training import SELECTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main"]

ORACLE = "oracle"
# Rules that every evaluation of a run has the score of; the silhouette is taken only on demand.
LABEL_FREE = tuple(rule for rule in SELECTIONS if rule not in ("last", "silhouette"))
GRAPHS = ("cora", "citeseer", "amap", "amac", "bat", "eat", "uat")

# What else than the protocols is worth comparing, by model: a name and what it sets.
ABLATIONS: dict[str, dict[str, dict[str, str]]] = {
    "hsan": {
        "hard weights": {"weights": "hard"},
        "stale hard weights": {"weights": "hard", "stale_weights": "true"},
        "no structure": {"structure": "false"},
        "hard weights, no structure": {"weights": "hard", "structure": "false"},
        "plain Adam": {"optimizer": "adam"},
        "plain Adam, hard weights": {"optimizer": "adam", "weights": "hard"},
    },
    "ecnmf": {
        "random head": {"head": "random"},
        "no SVD": {"second_view": "attributes"},
        "pseudo labels once": {"update_every": "1000000"},
        "adaptive rank": {"rank": "gavish-donoho"},
        "block, B 1024": {"recombine": "block", "batch_size": "1024"},
        "literal, B 1024": {"recombine": "literal", "batch_size": "1024"},
        "merge, B 1024": {"recombine": "merge", "batch_size": "1024"},
    },
    "ssgc": {
        "best of ten starts": {"consensus": "false", "n_init": "10"},
        "one view": {"recipe": "plain"},
        "back end by agreement": {"back_end": "auto"},
    },
}

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

COLUMNS = (
    "dataset", "model", "protocol", "selection", "seed", *LABEL_SCORES, "epochs", "seconds",
    "peak_memory_bytes", "variant", "selected_epoch",
)  # fmt: skip

# Hyper-parameters that an option decides: train_command gives it to every run.
OWN_OPTIONS = ("protocol", "precision", "device")

# What tells one row from another.
KEY = ("dataset", "model", "protocol", "variant", "selection", "seed")

DESCRIPTION = """\
Train every method on every graph and make the tables: last epoch, a rule that sees no label, and
the oracle (the epoch with the best accuracy by the true labels, as most papers report), with floors
and published numbers beside them. Interrupt it when you like: the same command goes on."""

EPILOG = """\
examples:
  python -m fastclust.compare --datasets bat,eat,uat --seeds 0-9 --out compare
  python -m fastclust.compare --datasets cora --models hsan --protocol standard,paper-code \\
      --ablation --seeds 0-2 --out ablation
  python -m fastclust.compare --datasets cora --models ecnmf --sweep rank=10,40,160 \\
      --sweep alpha=0.1,0.5,1 --seeds 0-2 --out sweep
  python -m fastclust.compare --collect compare ablation --out docs/results --page docs/results.md
      one document of what earlier comparisons finished; nothing is run

what comes out:
  DIR/results.csv   one row per run and selection; scores in [0, 1]
  DIR/results.md    the tables
  DIR/*.svg, *.png  accuracy by epoch, by method and by what was swept, t-SNE of embeddings
  DIR/commands.txt  every command that added runs, with its commit
  DIR/runs/         the run directories of fastclust.train, one per method and graph"""


@dataclass(frozen=True)
class Method:
    """One way to cluster that is compared: a model, its protocol and what else is set."""

    model: str
    protocol: str = "standard"
    variant: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """As the tables name it."""
        parts = [p for p in (self.variant, self.protocol) if p and p != "standard"]
        return self.model + (f" ({', '.join(parts)})" if parts else "")

    @property
    def folder(self) -> str:
        """As its run directory is called."""
        parts = (self.model, self.protocol, self.variant)
        return "-".join("".join(c if c.isalnum() else "_" for c in p) for p in parts if p)


# --- running -----------------------------------------------------------------------------------


def methods(
    models: Sequence[str],
    protocols: Sequence[str],
    ablation: bool,
    settings: Mapping[str, str],
    sweeps: Sequence[tuple[str, str]] = (),
) -> list[Method]:
    """What is to be run; SSGC has one protocol only, and variants start from the standard one.

    ``sweeps`` are single settings, each of which makes a variant of every model that has it.
    """
    common = tuple(settings.items())
    found: dict[Method, None] = {}
    for model in models:
        for protocol in protocols if model != "ssgc" else ["standard"]:
            found[Method(model, protocol, settings=_accepted(model, common))] = None
        if ablation:
            for variant, changes in ABLATIONS[model].items():
                merged = _accepted(model, common) + tuple(changes.items())
                found[Method(model, variant=variant, settings=merged)] = None
        for key, value in _accepted(model, sweeps):
            merged = (*_accepted(model, common), (key, value))
            found[Method(model, variant=f"{key} {value}", settings=merged)] = None
    return list(found)


def _accepted(model: str, settings: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The settings that this model has; what no model has is refused by :func:`main`."""
    names = MODELS[model]().get_params()
    return tuple((key, value) for key, value in settings if key in names)


def train_command(
    method: Method, dataset: str, folder: Path, arguments: argparse.Namespace
) -> list[str]:
    """The command line that trains one method on one graph; what is finished is kept."""
    command = [sys.executable, "-m", "fastclust.train", "--dataset", dataset]
    command += ["--model", method.model, "--out", str(folder), "--resume", "--quiet"]
    command += ["--seeds", ",".join(map(str, arguments.seeds)), "--device", arguments.device]
    if arguments.data_root is not None:
        command += ["--data-root", arguments.data_root]
    if method.model != "ssgc":
        command += ["--protocol", method.protocol, "--precision", arguments.precision]
        if arguments.epochs is not None:
            command += ["--epochs", str(arguments.epochs)]
    for key, value in method.settings:
        command += ["--set", f"{key}={value}"]
    return command


def run_method(command: Sequence[str], title: str, quiet: bool) -> str | None:
    """Run one training command; returns what went wrong, or None."""
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 130:
        raise Interrupted(f"{title}: interrupted; the same command goes on from there")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        note(f"{title} failed: {lines[-1]}", kind="error")
        return lines[-1]
    if not quiet:
        note(f"{title}: {cli.duration(time.monotonic() - began)}")
    return None


def commit() -> str:
    """The commit of this package's checkout, or its version where it is no checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"fastclust {__version__}"
    return f"commit {found}"


def remember_command(out: Path, command: str) -> None:
    """Add a command and its commit to those that made this comparison."""
    path = out / "commands.txt"
    known = path.read_text().splitlines() if path.exists() else []
    line = f"{command}  # {commit()}"
    if line not in known:
        write_atomically(path, "\n".join([*known, line]) + "\n")


# --- reading what the runs left ------------------------------------------------------------------


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
        history = read_history(place)
        for rule in (*LABEL_FREE, ORACLE):
            chosen = select(history, rule)
            if chosen is not None:
                scores = {name: chosen[name] for name in LABEL_SCORES}
                yield row | scores | {"selection": rule, "selected_epoch": chosen["epoch"]}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The evaluated epochs of one seed, with their scores against the labels."""
    try:
        lines = (folder / "history.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [entry for entry in map(json.loads, lines) if "acc" in entry]


def select(history: Sequence[Mapping[str, Any]], rule: str) -> Mapping[str, Any] | None:
    """The entry that a rule prefers, the first of equals; None without any score."""
    key, more_is_better = ("acc", True) if rule == ORACLE else (rule, SELECTIONS[rule])
    scored = [entry for entry in history if entry.get(key) is not None]
    if not scored:
        return None
    return (max if more_is_better else min)(scored, key=lambda entry: float(entry[key]))


# --- floors ------------------------------------------------------------------------------------


def _degree_bins(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    degree = np.asarray(dataset.adjacency.sum(axis=1)).reshape(-1)
    rank = np.empty(degree.size, dtype=np.int64)
    rank[np.argsort(degree, kind="stable")] = np.arange(degree.size)
    return rank * int(dataset.n_clusters or 1) // degree.size


def _kmeans_attributes(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    x = dataset.features
    return _kmeans(x.toarray() if isinstance(x, sp.csr_array) else x, dataset, seed)


def _kmeans_filtered(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    steps = HSAN.for_dataset(dataset.name).filter_steps
    x = filtered_attributes(dataset.features, dataset.adjacency, filter_steps=steps, n_input=None)
    return _kmeans(np.asarray(x), dataset, seed)


def _kmeans(x: npt.NDArray[np.float32], dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    result = ops.kmeans(as_tensor(x, "cpu"), int(dataset.n_clusters or 1), seed=seed)
    return np.asarray(result.labels)


FLOORS: dict[str, Callable[[Dataset, int], npt.NDArray[np.int64]]] = {
    "nodes ranked by degree, K equal bins": _degree_bins,
    "k-means on X": _kmeans_attributes,
    "k-means on S^t X": _kmeans_filtered,
}


def floor_rows(dataset: Dataset, path: Path, seeds: Sequence[int] | None) -> list[dict[str, Any]]:
    """Rows of the clusterings that need no training; kept in ``path`` once they are known.

    Without ``seeds``: those that are known.
    """
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = []
    if seeds is None:
        return list(known)
    rows = {(row["model"], row["seed"]): row for row in known}
    for name, cluster in FLOORS.items():
        for seed in seeds if cluster is not _degree_bins else seeds[:1]:
            if (name, seed) in rows:
                continue
            began = time.perf_counter()
            scores = metrics.clustering_scores(dataset.labels, cluster(dataset, seed))
            rows[name, seed] = {
                "dataset": dataset.name,
                "model": name,
                "protocol": "floor",
                "selection": "last",
                "seed": seed,
                **scores,
                "epochs": 0,
                "seconds": time.perf_counter() - began,
                "peak_memory_bytes": None,
                "variant": "",
                "selected_epoch": 0,
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(list(rows.values())))
    return [row for (_, seed), row in rows.items() if seed in seeds]


# --- all results ------------------------------------------------------------------------------


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
        if curves := [curve for curve in map(read_history, places) if curve]:
            histories[name].setdefault(method.title, []).extend(curves)
        if _with_preset(method.variant) and (folder / "embedding.npy").exists():
            embeddings[name].setdefault(method.title, folder)
    rows += [row for row in sources.rows if row["dataset"] in names]
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        first.setdefault(tuple(row[key] for key in KEY), row)
    return Results(list(first.values()), histories, embeddings)


# --- tables ------------------------------------------------------------------------------------


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


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of shares, in percent.

    Examples
    --------
    >>> spread([0.5, 0.52]), spread([0.5])
    ('51.00 ± 1.41', '50.00')
    """
    mean = f"{100 * np.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.2f}"


def _grouped(
    rows: Iterable[Mapping[str, Any]], *names: str
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *lines])


def _title(model: str, protocol: str, variant: str) -> str:
    return model if protocol == "floor" else Method(model, protocol, variant).title


def overview(
    rows: Sequence[Mapping[str, Any]], datasets: Sequence[str], rule: str, score: str
) -> str:
    """One score of every method: graphs as columns; last, label-free and oracle as rows."""
    lines = []
    kept = [row for row in rows if row["selection"] in ("last", rule, ORACLE)]
    groups = _grouped(kept, "model", "protocol", "variant", "selection")
    for (model, protocol, variant, selection), members in groups.items():
        cells = []
        for dataset in datasets:
            values = [row[score] for row in members if row["dataset"] == dataset]
            cells.append(spread(values) if values else "")
        name = _title(model, protocol, variant)
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
    for key, members in _grouped(rows, "model", "protocol", "variant", "selection").items():
        *method, selection = key
        cells = [spread([row[score] for row in members]) for score in LABEL_SCORES]
        seconds = float(np.mean([row["seconds"] for row in members]))
        memory = [row["peak_memory_bytes"] for row in members if row["peak_memory_bytes"]]
        lines.append(
            [
                _title(*method),
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


def _with_preset(variant: str) -> bool:
    """Whether nothing but the precision differs from the preset."""
    return re.fullmatch(r"(precision \w+)?", variant) is not None


def progress(rows: Sequence[Mapping[str, Any]], datasets: Sequence[str]) -> str:
    """How many seeds of every method, with its preset, in any precision, each graph has."""
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for row in rows:
        if row["selection"] == "last" and _with_preset(row["variant"]):
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


# --- plots -------------------------------------------------------------------------------------


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
    groups = _grouped(rows, "model", "protocol", "variant")
    titles = [_title(*key) for key in groups]
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
    groups = _grouped(rows, "variant")
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


# --- the command -------------------------------------------------------------------------------


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of allowed names, each once; ``all`` is all."""

    def parse(text: str) -> list[str]:
        names = list(allowed) if text == "all" else [part.strip() for part in text.split(",")]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"must be names out of {', '.join(allowed)}, joined by commas, got {name!r}"
                    + cli.did_you_mean(name, allowed)
                )
        return list(dict.fromkeys(names))

    return parse


def build_parser() -> cli.Parser:
    """The arguments of CONTRACT and what serves them."""
    parser = cli.Parser(prog="python -m fastclust.compare", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--datasets", type=_names(DATASET_NAMES), default=list(GRAPHS), metavar="A,B",
        help="graphs with labels (default: cora,citeseer,amap,amac,bat,eat,uat)")  # fmt: skip
    add("--models", type=_names(tuple(MODELS)), default=list(MODELS), metavar="A,B",
        help="hsan, ecnmf, ssgc (default: all three)")  # fmt: skip
    add("--protocol", type=_names(("standard", "paper-code")), default=["standard"], metavar="A,B",
        help="standard, paper-code or both (default: standard)")  # fmt: skip
    add("--seeds", type=cli.parse_seeds, default=[*range(10)], metavar="0-9", help="default: 0-9")
    add("--ablation", action="store_true", help="also the variants that leave something out")
    add("--sweep", action="append", default=[], metavar="KEY=A,B", dest="sweeps",
        help="also variants with each of these values, from the standard protocol")  # fmt: skip
    add("--label-free", choices=LABEL_FREE, default="inertia", metavar="RULE",
        help=f"the rule of the tables' middle column: {', '.join(LABEL_FREE)} (default: inertia); "
        "results.csv has them all")  # fmt: skip
    add("--epochs", type=cli.count, metavar="N", help="default: the presets'")
    add("--precision", choices=tuple(PRECISIONS), default="fp32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--data-root", metavar="DIR", help="folder of the graphs, as for fastclust.train")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a hyper-parameter for every model that has it")  # fmt: skip
    add("--jobs", type=cli.count, default=1, metavar="N",
        help="training processes at once; share the cores by OMP_NUM_THREADS")  # fmt: skip
    add("--collect", nargs="+", default=[], metavar="DIR",
        help="run nothing: tables of what comparisons in these folders finished")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="where the tables and runs go")
    add("--page", metavar="FILE", help="where the page goes (default: results.md in --out)")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def run_all(
    tasks: Sequence[tuple[str, Method, Path]], arguments: argparse.Namespace
) -> dict[str, str]:
    """Train every method on every graph; returns what failed, and why."""
    failures: dict[str, str] = {}

    def work(task: tuple[str, Method, Path]) -> None:
        name, method, folder = task
        title = f"{method.title} on {name}"
        command = train_command(method, name, folder, arguments)
        problem = run_method(command, title, arguments.quiet)
        if problem is not None:
            failures[title] = problem

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for _ in pool.map(work, tasks):
                pass
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failures


def _settings(
    option: str, texts: Iterable[str], models: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Hyper-parameters and values from the texts of an option."""
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not any(key in MODELS[m]().get_params() for m in models):
            raise UsageError(f"{option} must be KEY=VALUE with a hyper-parameter, got {text!r}")
        if key in OWN_OPTIONS:
            raise UsageError(f"use --{key} instead of {option} {key}")
        if key == "selection":
            raise UsageError(
                f"{option} selection is not for comparisons: they train to the last epoch, and "
                f"results.csv has the epoch of every rule"
            )
        yield key, value


def _wanted(arguments: argparse.Namespace) -> list[Method]:
    settings = dict(_settings("--set", arguments.settings, arguments.models))
    sweeps = [
        (key, value)
        for key, values in _settings("--sweep", arguments.sweeps, arguments.models)
        for value in values.split(",")
    ]
    return methods(arguments.models, arguments.protocol, arguments.ablation, settings, sweeps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison as the arguments say; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(given)
    wanted = _wanted(arguments)
    datasets = [load_dataset(name, root=arguments.data_root) for name in arguments.datasets]
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must be a directory, got {str(out)!r}: {error.strerror}") from None

    command = shlex.join(["python", "-m", "fastclust.compare", *given])
    failures: dict[str, str] = {}
    if arguments.collect:
        sources = Sources.collected(arguments.collect)
        datasets = [dataset for dataset in datasets if dataset.name in sources.graphs]
    else:
        remember_command(out, command)
        tasks = [
            (dataset.name, method, out / "runs" / dataset.name / method.folder)
            for dataset in datasets
            for method in wanted
        ]
        failures = run_all(tasks, arguments)
        sources = Sources([out], tasks, [], arguments.seeds)

    results = read_results(sources, datasets)
    write_csv(results.rows, out / "results.csv")
    target = out / "results.md" if arguments.page is None else Path(arguments.page)
    plots = [
        Path(os.path.relpath(path, target.parent)).as_posix()
        for path in draw(out, datasets, results)
    ]
    commands = sources.commands()
    if arguments.collect:
        commands = list(dict.fromkeys(commands))
        write_atomically(out / "commands.txt", "".join(f"{line}\n" for line in commands))
    rule, names = arguments.label_free, [dataset.name for dataset in datasets]
    write_atomically(target, page(results.rows, names, rule, command, commands, failures, plots))
    print(overview(results.rows, names, rule, "acc"), flush=True)
    if not arguments.quiet:
        note("oracle: the epoch with the best accuracy by the true labels; no user can choose it")
        note(f"tables: {target}, {out / 'results.csv'}")
    return 2 if failures else 0


if __name__ == "__main__":
    cli.run(main)
