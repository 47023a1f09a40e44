"""All parts: their order and limits, and how they run, one after another or side by side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpu import checks, kernels, profiles, trainings
from gpu.processes import PROGRAM, stop, wait_for
from gpu.report import Report

# part: function, time limit in seconds. The order is that of importance, short parts first: what is
# at the end may find no time left.
PARTS: dict[str, tuple[Callable[[Report], None], float]] = {
    "ceilings": (kernels.ceilings, 30),
    "tests": (checks.tests, 150),
    "determinism": (checks.determinism, 130),
    "sanitizer": (checks.sanitizer, 150),
    "infonce": (kernels.infonce, 90),
    "propagate": (kernels.propagate, 40),
    "lowrank": (kernels.lowrank, 40),
    "kmeans": (kernels.kmeans, 30),
    "infonce-hopper": (kernels.infonce_hopper, 60),
    "epochs": (trainings.epochs, 60),
    "train": (trainings.train, 190),
    "propagate-large": (kernels.propagate_large, 70),
    "profile": (profiles.profile, 120),
}
# They time nothing, and most of their time is the host's: side by side.
CHECKS = ("tests", "determinism", "sanitizer")
# One file per subject: parts of one subject share it, one after another ...
SUBJECTS = {
    "tests": "checks", "infonce-hopper": "infonce", "propagate-large": "propagate",
    "profile": "ceilings", "epochs": "train",
}  # fmt: skip
# ... or have their own until they are done, where another part of the subject runs beside them.
FOLDED = {"determinism": "checks", "sanitizer": "checks", "train-cpu": "train"}


def subject_of(name: str) -> str:
    """The name of the file where the rows of a part are in the end."""
    return FOLDED.get(name, SUBJECTS.get(name, name))


def report_of(name: str, out: Path, tiny: bool) -> Report:
    """The report of a part with the rows that its file holds."""
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    report = Report(SUBJECTS.get(name, name), name, out, device, tiny)
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((out / f"{report.subject}.json").read_text())
        report.rows, report.errors = before["rows"], before["errors"]
    return report


def run_part(name: str, out: Path, tiny: bool) -> int:
    """One part in this process; rows of another part of the same subject stay."""
    report = report_of(name, out, tiny)
    report.rows = [r for r in report.rows if r["part"] != name]
    report.errors = [e for e in report.errors if e["part"] != name]
    others = len(report.errors)
    function = trainings.train_cpu if name == "train-cpu" else PARTS[name][0]
    report.write()
    try:
        function(report)
    except Exception as error:  # outside of a case: the preparation of one
        message = f"{type(error).__name__}: {error}"[:500]
        report.errors.append({"part": name, "case": "preparation", "error": message})
    report.write()
    return 1 if report.errors[others:] else 0


def run_all(names: list[str], out: Path, tiny: bool, seconds: float) -> int:
    """Every part in a process of its own, within the time left; a summary at the end."""
    end = time.perf_counter() + seconds
    size = ["--tiny"] if tiny else []
    for old in set(map(subject_of, PARTS)) - {subject_of(n) for n in PARTS if n not in names}:
        (out / f"{old}.json").unlink(missing_ok=True)  # other files keep what other parts wrote
    stages: list[list[str]] = []
    for name in names:
        if name in CHECKS and stages and stages[-1][-1] in CHECKS:
            stages[-1].append(name)
        else:
            stages.append([name])
    started: list[subprocess.Popen[bytes]] = []
    summary = []
    with (
        tempfile.TemporaryDirectory(prefix="fastclust-bench-") as folder,
        (out / "log.txt").open("a") as log,
    ):
        threads = str(max(1, (os.cpu_count() or 2) // 2))  # trainings on the CPU have the others
        variables = {"OMP_NUM_THREADS": threads} | os.environ | {"FASTCLUST_BENCH_SCRATCH": folder}

        def start(name: str, where: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, PROGRAM, "--one", name, "--out", str(where), *size]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, preexec_fn=os.setpgrp
            )
            started.append(process)
            return process

        try:
            # beside everything else
            background = start("train-cpu", Path(folder)) if "train" in names else None
            for stage in stages:
                running = []
                for name in stage:
                    begun = time.perf_counter()
                    limit = min(PARTS[name][1], end - begun - 5)
                    if limit < 5:
                        summary.append((name, "not started: no time left", 0.0))
                        continue
                    print(f"== {name} (at most {limit:.0f} s)", file=log, flush=True)
                    running.append((name, start(name, out), begun, limit))
                for name, process, begun, limit in running:
                    word, wrong = wait_for(process, begun, limit)
                    if wrong:
                        report = report_of(name, out, tiny)
                        report.errors.append({"part": name, "case": "all", "error": wrong})
                        report.write()
                    summary.append((name, word, time.perf_counter() - begun))
                    print(f"{name}: {word}, {summary[-1][2]:.0f} s", flush=True)
                for name in stage:
                    fold_in(name, out, out)
            if background is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    background.wait(timeout=max(0.1, end - 5 - time.perf_counter()))
                stop(background)
                fold_in("train-cpu", Path(folder), out)
        finally:
            for process in started:
                stop(process)
    print_summary(out, names)
    return 0 if all(word == "ok" for _, word, _ in summary) else 1


def fold_in(name: str, source: Path, out: Path) -> None:
    """Move what a part beside others has written into the file of its subject."""
    path = source / f"{name}.json"
    if name not in FOLDED or not path.is_file():
        return
    target = out / f"{FOLDED[name]}.json"
    with contextlib.suppress(OSError, ValueError):
        part = json.loads(path.read_text())
        content = part | {"subject": FOLDED[name], "rows": [], "errors": []}
        if target.is_file():
            content = json.loads(target.read_text())
        for kept in ("rows", "errors"):  # but those of an earlier call
            content[kept] = [x for x in content[kept] if x["part"] != name]
        if name == "train-cpu":
            content["cpu_rows"] = part["rows"]
            content["rows"] += trainings.agreement(content["rows"], part["rows"])
        else:
            content["rows"] += part["rows"]
        content["errors"] += part["errors"]
        target.write_text(json.dumps(content, indent=1) + "\n")
    path.unlink()


def print_summary(out: Path, names: list[str]) -> None:
    """Rows and errors of every subject, a line each."""
    for subject in dict.fromkeys(map(subject_of, names)):
        try:
            content = json.loads((out / f"{subject}.json").read_text())
        except (OSError, ValueError):
            print(f"{subject}: no result")
            continue
        print(f"{subject}: {len(content['rows'])} rows, {len(content['errors'])} errors")
        for row in content["rows"]:
            print("   ", *(f"{k}={v}" for k, v in row.items() if k != "part" and v is not None))
        for error in content["errors"]:
            print("    ERROR", json.dumps(error)[:400])
