"""The command: arguments in, tables out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fastclust import cli
from fastclust.cli import UsageError, note
from fastclust.compare.figures import draw
from fastclust.compare.methods import LABEL_FREE, Method, methods
from fastclust.compare.results import Sources, read_results, write_csv
from fastclust.compare.runs import remember_command, run_all
from fastclust.compare.tables import overview, page
from fastclust.datasets import DATASET_NAMES, load_dataset
from fastclust.files import write_atomically
from fastclust.ops.infonce import PRECISIONS
from fastclust.settings import MODELS

# Hyper-parameters that an option decides: train_command gives it to every run.
OWN_OPTIONS = ("protocol", "precision", "device")
GRAPHS = ("cora", "citeseer", "amap", "amac", "bat", "eat", "uat")

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
    add("--out", type=cli.path, required=True, metavar="DIR", help="where the tables and runs go")
    add(
        "--page",
        type=cli.path,
        metavar="FILE",
        help="where the page goes (default: results.md in --out)",
    )
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


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
