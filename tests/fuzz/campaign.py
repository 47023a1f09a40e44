"""Fuzz the targets of targets.py: mutations of good input, with limits on time and memory.

    python tests/fuzz/campaign.py --cases 1000000          a campaign over all targets
    python tests/fuzz/campaign.py npz config --cases 5000  some targets
    python tests/fuzz/campaign.py npz --atheris            guided by coverage, until interrupted

Case i of a target depends on the seed and i alone: a finding is printed with the arguments that
repeat it, and ``--cases 1`` with them shows its input. The exit code is the number of findings.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--atheris" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["fastclust"]):
        from targets import TARGETS, Target
else:
    from targets import TARGETS, Target

from fastclust.memory import begin_peak_memory, peak_memory  # once it may be instrumented

SECONDS = 10  # of one case
GROWTH = 256 << 20  # bytes that one case may add to the process's greatest memory
ROOM = 4 << 30  # bytes of address space, so that a finding does not take the machine down

_WORDS = [0, 1, -1, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32, 2**63 - 1]
_TEXT = [
    *(b"9" * 400, b"[" * 400, b"nan", b"inf", b"1e999", b"none", b"true", b"null", b"\\u0000"),
    *(b"0", b"-1", b"\xff", b"\xe2\x82", b"{", b'"', b"=", b",", b"-", b"--", b"\n", b"\0"),
]


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A few random edits of bytes, words and text."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(out) + 1)
        size = min(rng.choice((1, 1, 2, 4, 8, 16, 64)), len(out) - at)
        match rng.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                width = rng.choice((1, 2, 4, 8))
                word = rng.choice(_WORDS) % (1 << 8 * width)
                out[at : at + width] = word.to_bytes(width, rng.choice(("little", "big")))
            case 3:
                out[at:at] = rng.choice(_TEXT)
            case 4:
                out[at : at + size] = rng.choice(_TEXT)
            case 5:
                del out[at : at + size]
            case 6:
                out[at:at] = out[at : at + size]
            case 7:
                del out[at:]
            case 8:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                out[at : at + size] = other[start : start + rng.choice((1, 4, 16, 64, 4096))]
    return bytes(out[: 1 << 20])


class Hang(Exception):
    """A case took longer than SECONDS."""


def _out_of_time(number: int, frame: Any) -> None:
    raise Hang(f"still at work after {SECONDS} s")


@dataclass
class Report:
    """What a number of cases came to."""

    cases: int = 0
    slowest: float = 0.0
    findings: list[str] = field(default_factory=list)


def _problem(target: Target, data: bytes) -> str:
    """What an undocumented exception or a hang has to tell; empty where there was none."""
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.run(data)
        finally:  # before the exception is told, which takes its own time
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception:
        return traceback.format_exc()
    return ""


def fuzz(name: str, cases: int, *, seed: int = 0, first: int = 0) -> Report:
    """Run cases first .. first + cases - 1 of a target; the first of them are the corpus itself."""
    target, report = TARGETS[name], Report()
    corpus = target.corpus()
    previous = signal.signal(signal.SIGALRM, _out_of_time)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, limits[1]))
    try:
        for item in corpus:
            target.run(item)  # imports and caches belong to nobody's time
        for i in range(first, first + cases):
            rng = random.Random(f"{name} {seed} {i}")
            data = corpus[i] if i < len(corpus) else mutate(rng.choice(corpus), corpus, rng)
            if cases == 1:
                print(data)
            begin_peak_memory()  # a case must not hide behind an earlier one's peak
            before = peak_memory()["peak_memory_bytes"]
            began = time.perf_counter()
            problem = _problem(target, data)
            grown = peak_memory()["peak_memory_bytes"] - before
            if grown > GROWTH:
                problem += f"memory grew by {grown >> 20} MiB\n"
            if problem:
                report.findings.append(f"{name} --seed {seed} --first {i}\n{problem}")
            report.cases += 1
            report.slowest = max(report.slowest, time.perf_counter() - began)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, previous)
    return report


def guided(name: str, flags: list[str]) -> None:
    """Hand one target to atheris (pip install atheris), whose mutations follow the coverage."""
    for item in TARGETS[name].corpus():
        TARGETS[name].run(item)  # imports and caches belong to nobody's time
    atheris.Setup([sys.argv[0], f"-timeout={SECONDS}", *flags], TARGETS[name].run)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--cases", type=int, default=100_000, help="in all, over the targets")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", nargs=argparse.REMAINDER, metavar="FLAG",
                        help="use atheris, with flags of libFuzzer")  # fmt: skip
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if options.atheris is not None:
        guided(names[0], options.atheris)
        return 0
    total = sum(TARGETS[name].share for name in names)
    findings = 0
    warnings.simplefilter("ignore")
    for name in names:
        cases = -(-options.cases * TARGETS[name].share // total)
        began = time.perf_counter()
        report = fuzz(name, cases, seed=options.seed, first=options.first)
        seconds, found = time.perf_counter() - began, len(report.findings)
        print(
            f"{name:14} {report.cases:8} cases  {seconds:7.1f} s  slowest {report.slowest:.2f} s  "
            f"{found} findings",
            flush=True,
        )
        for finding in report.findings[:5]:
            print(finding, flush=True)
        findings += len(report.findings)
    return min(findings, 100)


if __name__ == "__main__":
    sys.exit(main())
