"""``python -m fastclust.train``: cluster a graph; arguments in, run directory out."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastclust import cli, distributed, metrics, report
from fastclust._library import _C
from fastclust.cli import Interrupted, UsageError, note
from fastclust.datasets import Dataset
from fastclust.estimators.trained import data_digest
from fastclust.files import as_json, write_atomically
from fastclust.info import cpu_name, versions
from fastclust.memory import begin_peak_memory, peak_memory
from fastclust.ops.infonce import PRECISIONS
from fastclust.rundir import RunDirectory, read_history
from fastclust.settings import (
    MODELS,
    Plan,
    check_same_run,
    gather_settings,
    hyper_parameters,
    require_same,
    resolve,
)
from fastclust.training import SELECTIONS, internal_scores
from fastclust.validation import check_device, why_not_cuda

__all__ = ["main"]

DESCRIPTION = """\
Cluster the nodes of an attributed graph with ECN-MF, HSAN or SSGC. Labels, where the data has
them, are only used to score the result; training never sees them."""

EPILOG = """\
examples:
  python -m fastclust.train
      ECN-MF on scikit-learn's digits: needs no download
  python -m fastclust.train --dataset amac --out runs/amac
      Amazon Computers; scores, assignments, model and report.html go to runs/amac
  python -m fastclust.train --dataset cora --model hsan --seeds 0-9 --out runs/cora
      ten seeds; interrupt it when you like, the same command with --resume goes on
  python -m fastclust.train --edges edges.csv --features users.csv --n-clusters auto --out runs/mine
      a graph of your own, no labels needed; the number of clusters is estimated
  python -m fastclust.train --edges links.mtx --features words.npz --labels topic.csv
      matrices (Matrix Market, scipy.sparse.save_npz); scores against a file of labels
  python -m fastclust.train --dataset my_graph.npz --n-clusters 12
      adjacency, attributes and labels in one .npz file (formats: see fastclust.load_npz)
  python -m fastclust.train --dataset cora --set rank=20 --set lr=1e-3
      other hyper-parameters; --set help lists those of the model
  python -m fastclust.train --config runs/cora/config.toml
      repeat a run exactly
  torchrun --nproc-per-node=2 -m fastclust.train --dataset amac --model hsan --out runs/amac
      two processes share the graph, by rows; --resume may have another number of them

files of your own:
  --edges     two columns, the ends of each edge, and perhaps a third, its weight; or a matrix.
              Without it: the graph of nearest neighbours of the attributes
  --features  one row of numbers per node, with a header; or a matrix. A column named id, node or
              node_id (or --ids NAME), or an index without a name as pandas writes it, names the
              nodes, which --edges then calls by these names; otherwise nodes are 0, 1, 2, ... in
              the order of the rows
  --labels    a column of the attribute table, or a file: one label per node, or node and label
  tables: .csv .tsv .txt, .parquet (needs pyarrow); matrices: .npz of SciPy, .mtx, .npy

settings, each overriding the one before:
  preset of the data set < --config < --set < options with a name of their own

run directory (--out), for several seeds see seed-<S>/ below it:
  result.json  assignments.csv  model.safetensors  embedding.npy  history.jsonl  report.html
  config.toml  checkpoint/

exit codes: 0 done, 1 internal error, 2 wrong usage or data, 130 interrupted (after a checkpoint,
with --out)"""


def build_parser() -> cli.Parser:
    """The arguments of CONTRACT, in groups."""
    parser = cli.Parser(prog="python -m fastclust.train", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument_group("what to cluster").add_argument
    add(
        "--dataset",
        metavar="NAME|PATH",
        help="cora, citeseer, amap, amac, eat, uat, bat, digits, or the path of a .npz file or "
        "of a folder from fastclust convert (default: digits)",
    )
    add("--edges", metavar="FILE", help="edges of your own graph: table or matrix, see below")
    add("--features", metavar="FILE", help="attributes of your own graph: table or matrix")
    add("--labels", metavar="COLUMN|FILE", help="known classes, to score the result with")
    add("--ids", metavar="COLUMN", help="column of the attribute table that names the nodes")
    add(
        "--data-root",
        metavar="DIR",
        help="folder to look in first; then $FASTCLUST_DATA, the user cache, a verified download",
    )
    add(
        "--n-clusters",
        type=cli.cluster_count,
        metavar="K|auto",
        help="number of clusters; auto estimates it without labels (default: the number of "
        "classes, where the data has labels)",
    )

    group = parser.add_argument_group("how")
    add = group.add_argument
    add("--model", choices=tuple(MODELS), help="the method (default: ecnmf)")
    add("--epochs", type=cli.count, metavar="N", help="training epochs (default: the preset's)")
    seeds = group.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=cli.parse_seeds, dest="seeds", metavar="S", help="random seed (default: 0)"
    )
    seeds.add_argument(
        "--seeds",
        type=cli.parse_seeds,
        dest="seeds",
        metavar="0-9",
        help="several seeds: 0-9, or 0,3,5",
    )
    add(
        "--selection",
        choices=tuple(SELECTIONS),
        help="how the epoch of the result is chosen; no rule sees a label (default: last)",
    )
    add(
        "--protocol",
        choices=("standard", "paper-code"),
        help="standard: as the papers say and sound practice asks; paper-code: as the released "
        "code of HSAN behaves (default: standard)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    add(
        "--precision",
        choices=tuple(PRECISIONS),
        help="arithmetic of the matrix products (default: fp32)",
    )
    add("--config", metavar="FILE.toml", help="settings from a file, one KEY = VALUE per line")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="a hyper-parameter of the model, any number of times; --set help lists them",
    )

    add = parser.add_argument_group("what comes out").add_argument
    add(
        "--out",
        type=cli.path,
        metavar="DIR",
        help="run directory for results, model, checkpoint and report",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the checkpoints in --out; finished seeds are kept, and settings you do "
        "not give are taken from that run",
    )
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--json", action="store_true", help="one JSON object on stdout instead of the table")
    return parser


# --- one seed ----------------------------------------------------------------------------------


class History:
    """``history.jsonl``: one line per epoch, appended as it happens.

    An evaluation's line also carries the scores against the labels, which the estimator never sees.
    A resumed run drops the lines of epochs that it will repeat.
    """

    def __init__(
        self, path: Path | None, labels: npt.NDArray[np.int64] | None, resume: bool
    ) -> None:
        self.path = path
        self.labels = labels
        self.rows: list[dict[str, Any]] = read_history(path) if path and resume else []
        self.started = False
        self.n_before: int | None = None  # all of them, until an epoch is run here
        self.writable = path is not None

    def __call__(self, event: Any) -> None:
        """Estimator callback."""
        if not self.started:
            self.started = True
            self.n_before = event.epoch - 1
            self.rows = [row for row in self.rows if row["epoch"] < event.epoch]
            self._write("w", self.rows)
        row = {"epoch": event.epoch, "loss": event.loss, "seconds": event.seconds}
        if event.evaluation is not None:
            scores = dict(event.evaluation)
            clusters = scores.pop("labels", None)
            row |= {key: value for key, value in scores.items() if np.isscalar(value)}
            if self.labels is not None and clusters is not None:
                row |= metrics.clustering_scores(self.labels, clusters)
        self.rows.append(row)
        self._write("a", [row])

    def _write(self, mode: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if not self.writable or self.path is None:
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(_json_line(row) for row in rows)
        except OSError as error:
            # The curve can be written again at the end; training goes on.
            self.writable = False
            note(f"cannot write {self.path}: {error.strerror}", kind="warning")

    def finish(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the estimator's whole history once more, atomically, with the scores added."""
        if self.path is None:
            return
        seen = {row["epoch"]: row for row in self.rows}
        lines = []
        for entry in entries:
            row = seen.get(entry["epoch"], {})
            scores = {name: row[name] for name in report.LABEL_SCORES if name in row}
            lines.append(_json_line({**entry, **scores}))
        write_atomically(self.path, "".join(lines))


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(as_json(row)) + "\n"


def train_seed(
    plan: Plan,
    dataset: Dataset,
    seed: int,
    folder: Path | None,
    progress: cli.Progress,
    resume: bool,
    ranks: distributed.Ranks,
) -> tuple[dict[str, Any], Any, History]:
    """Fit one seed; returns its entry of ``runs``, the estimator and its history."""
    model = MODELS[plan.model]
    kept = folder / "history.jsonl" if folder and ranks.rank == 0 else None
    history = History(kept, dataset.labels, resume)
    accepted = inspect.signature(model).parameters
    owned: dict[str, Any] = {"random_state": seed}
    if "callbacks" in accepted:
        owned["callbacks"] = [history, progress]
    if folder is not None and "checkpoint_dir" in accepted:
        owned |= {"checkpoint_dir": str(folder / "checkpoint"), "resume": resume}
    estimator = model(**plan.parameters, **owned)

    begin_peak_memory()
    began = time.perf_counter()
    title = f"seed {seed}" + (
        f" ({plan.seeds.index(seed) + 1} of {len(plan.seeds)})" if len(plan.seeds) > 1 else ""
    )
    progress.start(title)
    try:
        estimator.fit(dataset.features, adjacency=dataset.adjacency)
    finally:
        progress.stop()
    seconds = time.perf_counter() - began
    # Epochs that an interrupted call had done count as well.
    seconds += sum(entry["seconds"] for entry in estimator.history_[: history.n_before])
    run = {
        "seed": seed,
        "metrics": ranks.from_first(
            lambda: score(dataset, estimator.labels_, estimator.embedding_)
        ),
        "epochs": int(estimator.n_iter_),
        "selected_epoch": getattr(estimator, "selected_epoch_", None),
        "seconds": seconds,
        **peak_memory(),
        "resolved": as_json(estimator.resolved_),
    }
    if estimator.n_clusters_evidence_ is not None:
        run["n_clusters_evidence"] = estimator.n_clusters_evidence_
    if getattr(estimator, "back_end_evidence_", None) is not None:
        run["back_end_evidence"] = estimator.back_end_evidence_
    return run, estimator, history


def score(
    dataset: Dataset, labels: npt.NDArray[np.int64], embedding: npt.NDArray[Any]
) -> dict[str, float]:
    """ACC, NMI, ARI, F1 where there are labels; otherwise what can be said without."""
    if dataset.labels is not None:
        return metrics.clustering_scores(dataset.labels, labels)
    scores = internal_scores(torch.from_numpy(embedding), labels, dataset.adjacency, "silhouette")
    return scores | {"conductance": metrics.conductance(dataset.adjacency, labels)}


# --- the run -----------------------------------------------------------------------------------


def summarise(
    plan: Plan, dataset: Dataset, runs: list[dict[str, Any]], digest: str
) -> dict[str, Any]:
    """The content of ``result.json``; of one run at least."""
    resolved = runs[0]["resolved"]
    # A score that is not defined, such as the silhouette of one cluster, is None as in the file.
    columns = {
        name: [math.nan if (score := run["metrics"].get(name)) is None else score for run in runs]
        for name in runs[0]["metrics"]
    }
    return {
        "dataset": plan.dataset,
        "model": plan.model,
        "protocol": plan.parameters.get("protocol", "standard"),
        "selection": plan.parameters.get("selection", "last"),
        "device": check_device(plan.parameters["device"]).type,
        "precision": plan.parameters.get("precision", "fp32"),
        "n_nodes": dataset.n_nodes,
        "n_edges": dataset.n_edges,
        "n_features": dataset.n_features,
        # Estimated, it may differ between seeds: then it is that of the first.
        "n_clusters": resolved["n_clusters"],
        "labelled": dataset.labels is not None,
        "data": digest,
        "complete": len(runs) == len(plan.seeds),
        "runs": runs,
        "mean": {name: float(np.mean(values)) for name, values in columns.items()},
        # The sample standard deviation; one run has none.
        "std": {
            name: float(np.std(values, ddof=1)) if len(values) > 1 else None
            for name, values in columns.items()
        },
        # With what the first seed took for settings that leave the choice to the method.
        "config": plan.parameters | resolved,
        "machine": {
            "cpu": cpu_name(),
            "cpu_level": str(_C.cpu_level()),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(),
    }


def run(
    plan: Plan,
    dataset: Dataset,
    directory: RunDirectory | None,
    *,
    resume: bool,
    quiet: bool,
    ranks: distributed.Ranks = distributed.ONE,
) -> tuple[dict[str, Any], OSError | None]:
    """Train every seed that is not finished; returns the result and what could not be written.

    Of several ranks the first reads and writes the directory.
    """
    before = ranks.from_first(directory.read_result) if directory is not None and resume else None
    finished = {run["seed"]: run for run in before["runs"]} if before else {}
    digest = data_digest(dataset.features, dataset.adjacency, dataset.labels)
    if directory is not None and before and finished and before.get("data", digest) != digest:
        raise UsageError(
            f"--resume must go on with the same data: the data of {directory.root} have changed "
            f"since its finished seeds were trained; begin anew in another directory"
        )
    if directory is not None:
        # Seeds of an earlier call stay in the results.
        seeds = list(dict.fromkeys([*plan.seeds[:1], *finished, *plan.seeds]))
        plan = replace(plan, seeds=seeds)
        ranks.from_first(partial(directory.begin, plan.seeds, plan.config()))
    progress = cli.make_progress(quiet)
    failure: OSError | None = None
    for seed in plan.seeds:
        if directory is not None and seed in finished:
            again = partial(make_again, plan.model, directory, seed, dataset)
            whole, error = ranks.from_first(again)
            failure = error or failure
            if whole:
                continue
        folder = None
        if directory is not None:
            folder = ranks.from_first(partial(open_folder, directory, seed))
        try:
            entry, estimator, history = train_seed(
                plan, dataset, seed, folder, progress, resume, ranks
            )
        except KeyboardInterrupt as interrupt:
            if ranks.rank > 0:  # the first rank tells
                raise SystemExit(130) from None
            if directory is None:
                advice = "without --out DIR nothing is kept"
            else:
                advice = "the same command with --resume goes on from there"
            what = str(interrupt) or "interrupted"
            raise Interrupted(f"seed {seed}: {what}; {advice}") from None
        finished[seed] = as_json(entry)
        runs = [finished[other] for other in plan.seeds if other in finished]
        if directory is not None:
            result = as_json(summarise(plan, dataset, runs, digest))
            # Where it fails the scores are still shown; the checkpoint holds the trained state.
            keep = partial(keep_seed, directory, seed, estimator, dataset, history, result)
            failure = ranks.from_first(keep) or failure
    runs = [finished[seed] for seed in plan.seeds]
    return as_json(summarise(plan, dataset, runs, digest)), failure


def open_folder(directory: RunDirectory, seed: int) -> Path:
    """Where the files of one seed lie, made if need be."""
    folder = directory.folder(seed)
    folder.mkdir(exist_ok=True)
    return folder


def make_again(
    model: str, directory: RunDirectory, seed: int, dataset: Dataset
) -> tuple[bool, OSError | None]:
    """Write files of a finished seed that are gone; whether that could be, and what went wrong.

    All of them follow from its model. Without that the seed has to be trained to its end once more.
    """
    lost = directory.missing(seed)
    if not lost:
        return True, None
    folder = directory.folder(seed)
    what = f"seed {seed}: {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} gone from {folder}"
    try:
        estimator = MODELS[model].load(folder)
    except ValueError:
        note(f"{what}; training goes on from its checkpoint, or begins anew without one")
        return False, None
    note(f"{what}; made again from its model")
    history = History(folder / "history.jsonl", dataset.labels, resume=True)
    try:
        directory.write_seed(seed, estimator, dataset.node_names)
        if not history.rows:
            history.finish(estimator.history_)
    except OSError as error:
        return True, error
    return True, None


def keep_seed(
    directory: RunDirectory,
    seed: int,
    estimator: Any,
    dataset: Dataset,
    history: History,
    result: dict[str, Any],
) -> OSError | None:
    """Write all files of a finished seed; returns what went wrong."""
    try:
        directory.write_seed(seed, estimator, dataset.node_names)
        history.finish(estimator.history_)
        directory.write_result(result)
    except OSError as error:
        return error
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if "help" in arguments.settings:
        print(hyper_parameters(arguments.model or "ecnmf"))
        return 0
    if arguments.resume and arguments.out is None:
        raise UsageError("--resume needs --out DIR, the directory of the run to go on with")
    try:
        with distributed.session() as ranks, contextlib.ExitStack() as stack:
            directory = None
            if arguments.out is not None:
                directory = ranks.from_first(lambda: RunDirectory(arguments.out))
                # Only the first rank holds it; where it cannot, the others fail with it.
                hold = directory.held()
                ranks.from_first(lambda: stack.enter_context(hold))
            return train_all(arguments, directory, ranks)
    except (distributed.RankLostError, KeyboardInterrupt) as error:
        contexts = distributed.with_contexts(error)
        lost = next((e for e in contexts if isinstance(e, distributed.RankLostError)), None)
        if lost is None:
            raise
        advice = "without --out DIR nothing is kept"
        if arguments.out is not None:
            advice = (
                f"what {arguments.out} holds is whole, and the same command with --resume goes on "
                f"from its last checkpoint, with any number of processes"
            )
        raise Interrupted(f"{lost}; {advice}") from None


def train_all(
    arguments: argparse.Namespace, directory: RunDirectory | None, ranks: distributed.Ranks
) -> int:
    """What :func:`main` does, on one of the processes that share the work."""
    first = ranks.rank == 0
    quiet = arguments.quiet or not first
    saved = None
    if directory is not None and arguments.resume:
        saved = ranks.from_first(directory.read_config)
    settings = gather_settings(arguments, saved)
    if directory is not None and saved is not None:
        # Told first: saved settings of one model are not settings of another.
        require_same("model", saved.get("model"), settings.get("model"), directory.root)
    plan, dataset = resolve(settings)
    if ranks.size > 1 and plan.model == "ssgc":
        raise UsageError(
            "ssgc has no training that several processes could share: start it with python -m "
            "fastclust.train, without torchrun"
        )
    if directory is not None:
        if saved is not None:
            check_same_run(plan, saved, directory.root)
        elif not arguments.resume:
            moved = ranks.from_first(directory.set_aside)
            if moved is not None and first:
                note(f"moved the earlier run in {directory.root} to {moved}")
        elif first:
            note(f"{directory.root} holds no run yet: starting from the beginning")
    if not quiet:
        announce(plan, dataset, ranks.size)
    result, failure = run(
        plan, dataset, directory, resume=saved is not None, quiet=quiet, ranks=ranks
    )
    if not first:
        return 0 if failure is None else 2
    if directory is None:
        advice = "without --out DIR nothing is kept: give it, or another place for the output"
    elif failure is not None:
        advice = "make room, then the same command with --resume goes on from the checkpoint"
    else:
        advice = f"{directory.root} has the results, the same command with --resume shows them"
    cli.show(json.dumps(result) if arguments.json else report.table(result), advice)
    if failure is not None:
        raise failure
    if directory is not None:
        write_report(directory, result, dataset, quiet)
    return 0


def announce(plan: Plan, dataset: Dataset, n_processes: int) -> None:
    """Tell what is about to run."""
    k, where = plan.parameters["n_clusters"], place(plan.parameters["device"])
    if n_processes > 1:
        where += f", {n_processes} processes"
    note(
        report.headline(plan.model, dataset, "an estimated number of" if k == "auto" else k, where)
    )


def place(device: str) -> str:
    """Where the run takes place, and why not on a GPU."""
    if check_device(device).type == "cuda":
        return f"on {torch.cuda.get_device_name()}"
    level = f"{_C.cpu_level()}, {torch.get_num_threads()} threads"
    if device != "auto":
        return f"on the CPU ({level})"
    why = why_not_cuda() if torch.cuda.is_available() else "no GPU seen"
    return f"on the CPU ({level}; {why})"


def write_report(
    directory: RunDirectory, result: Mapping[str, Any], dataset: Dataset, quiet: bool
) -> None:
    """Write the page; the results are safe, so that a failure here is no more than a warning."""
    try:
        report.write_page(directory.root, result, dataset)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the results in {directory.root} are complete, report.html is not written"
        ) from None
    except Exception as error:
        if cli.debugging():
            raise
        note(f"report.html could not be written: {cli.explain(error)[1]}", kind="warning")
        return
    if not quiet:
        note(f"results and report.html are in {directory.root}")


if __name__ == "__main__":
    cli.run(main)
