"""``fastclust COMMAND ...``: the same as ``python -m fastclust.COMMAND ...``."""

from __future__ import annotations

import importlib
import sys

from fastclust import cli
from fastclust._version import __version__

COMMANDS = {
    "train": "cluster a graph; arguments in, run directory out",
    "compare": "tables of results: data sets by models by seeds",
    "convert": "edge lists of any length to a folder of arrays",
    "info": "versions, CPU features, CUDA library and GPUs",
}

USAGE = "\n".join(
    [
        "usage: fastclust COMMAND ...    (or python -m fastclust.COMMAND ...)",
        "",
        "Clustering of attributed graphs with HSAN, ECN-MF and SSGC.",
        "",
        *(f"  {name:<8}  {text}" for name, text in COMMANDS.items()),
        "",
        "fastclust COMMAND --help explains a command; the shortest way to a result is",
        "  fastclust train --edges edges.csv --features nodes.csv --n-clusters auto --out run",
    ]
)


def main() -> None:
    """Run the command that the first argument names; leaves the process."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]

    def run() -> int:
        if command in ("-h", "--help", "--version"):
            print(f"fastclust {__version__}" if command == "--version" else USAGE)
            return 0
        if command not in COMMANDS:
            raise cli.UsageError(
                f"the command must be one of {', '.join(COMMANDS)}, got {command!r}"
                + cli.did_you_mean(command, COMMANDS)
            )
        return int(importlib.import_module(f"fastclust.{command}").main(arguments))

    cli.run(run)


if __name__ == "__main__":
    main()
