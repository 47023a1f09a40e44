"""The command: edge lists in, a folder out."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence

from fastclust import cli
from fastclust.convert.passes import convert
from fastclust.datasets.folder import DIRECTORY_META

DESCRIPTION = """\
Convert an edge list of any length, and the attributes of its nodes, to a folder of arrays that
--dataset and fastclust.load_dataset map into memory."""

EPILOG = """\
examples:
  python -m fastclust.convert graph --edges edges.csv.gz --features features.npy
  python -m fastclust.convert graph --edges part-0.parquet part-1.parquet --n-nodes 2449029
  python -m fastclust.train --dataset graph/ --model ssgc --n-clusters 47

edges:     .txt .csv .tsv (.gz): two node numbers from 0 on and perhaps a weight per line;
           .npy .npz: integers [E, 2] or [2, E]; .parquet (needs pyarrow)
features:  .npy [N, D]; .npz of scipy.sparse.save_npz; .parquet with D numeric columns;
           without --features every node gets the same constant attribute
labels:    .npy or text, one whole number per node; used for scores only

Disk: 16 bytes per edge while it works, then 8 bytes per edge and 8 per node."""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; returns the exit code."""
    parser = cli.Parser(prog="python -m fastclust.convert", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("out", type=cli.path, metavar="DIR", help="the folder to make")
    parser.add_argument("--edges", nargs="+", required=True, metavar="FILE", help="edge lists")
    parser.add_argument("--features", metavar="FILE", help="attributes of the nodes")
    parser.add_argument("--labels", metavar="FILE", help="known classes")
    parser.add_argument("--n-nodes", type=cli.count, metavar="N", help="number of nodes")
    parser.add_argument(
        "--memory",
        type=_size,
        default=1 << 30,
        metavar="SIZE",
        help="memory for blocks and buckets, as 512M or 2G (default: 1G)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    folder = convert(
        arguments.out,
        arguments.edges,
        features=arguments.features,
        labels=arguments.labels,
        n_nodes=arguments.n_nodes,
        memory=arguments.memory,
        progress=None if arguments.quiet else _Lines(),
    )
    meta = json.loads((folder / DIRECTORY_META).read_text())
    print(
        f"{folder}: {meta['n_nodes']} nodes, {meta['n_edges'] // 2} edges, "
        f"{cli.duration(time.perf_counter() - began)}"
    )
    return 0


class _Lines:
    """Progress on stderr: at most a line a second, over itself on a terminal."""

    def __init__(self) -> None:
        self.what, self.shown = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self.what and done < total and now - self.shown < 1.0:
            return
        over = sys.stderr.isatty() and what == self.what
        self.what, self.shown = what, now
        share = 100.0 * done / max(1, total)
        if sys.stderr.isatty():
            start = "\r" if over else "\n"
            print(f"{start}{what}  {share:.0f} %", end="", file=sys.stderr, flush=True)
        else:
            cli.note(f"{what}  {share:.0f} %")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"must be a size such as 512M or 2G, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
