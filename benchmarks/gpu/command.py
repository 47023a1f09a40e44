"""The command line: ``python benchmarks/gpu``, which ``benchmarks/gpu.sh`` calls.

Every part runs in a process of its own with a time limit, since a faulty kernel takes the CUDA
context of its process with it, and writes its JSON after every case, so that a part cut short keeps
what it measured. Parts that time nothing run side by side, the others one after another::

    python benchmarks/gpu --out DIR                # all parts
    python benchmarks/gpu --out DIR infonce train  # some
    python benchmarks/gpu --out DIR --tiny         # on CPU tensors of tiny shapes: a dry run

A JSON holds ``subject``, ``card`` (name, clocks, driver), ``versions``, ``commit``, ``tiny``,
``rows`` (one measurement each) and ``errors`` (case and message). Times are medians in
milliseconds; rates count useful work, and ``share`` is the rate (for bf16x3 that of its three
products) over the card's own measured ceiling in the same arithmetic. Where there is a
``host_ms``, the time is that of the kernels alone and ``host_ms`` what the host takes to launch
them; other times are what a caller waits for. Nothing here changes a setting of the card.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gpu.checks import small_calls
from gpu.parts import PARTS, run_all, run_part
from gpu.profiles import profiled_calls


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; 0 when every part went through without an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="CPU tensors of tiny shapes")
    parser.add_argument("--seconds", type=float, default=560, help="for all parts together")
    parser.add_argument("--one", metavar="PART", help="run this part in this process")
    parser.add_argument("--small-calls", action="store_true", help="call every kernel once")
    parser.add_argument("--profile-calls", metavar="CALL", help="what a profile looks at, once")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    arguments = parser.parse_args(argv)
    unknown = sorted(
        {*arguments.parts, *([arguments.one] if arguments.one else [])} - {*PARTS, "train-cpu"}
    )
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    arguments.out = arguments.out.resolve()  # trainings run in another folder
    if os.environ.get("FASTCLUST_DATA"):
        os.environ["FASTCLUST_DATA"] = str(Path(os.environ["FASTCLUST_DATA"]).resolve())
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.small_calls:
        for name, step in small_calls("cpu" if arguments.tiny else "cuda"):
            step()
            print(name, flush=True)
        return 0
    if arguments.profile_calls:
        device = "cpu" if arguments.tiny else "cuda"
        profiled_calls(arguments.profile_calls, device, arguments.tiny)
        return 0
    if arguments.one:
        return run_part(arguments.one, arguments.out, arguments.tiny)
    return run_all(arguments.parts or list(PARTS), arguments.out, arguments.tiny, arguments.seconds)
