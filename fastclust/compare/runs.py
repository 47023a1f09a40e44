"""Training by processes of their own, and what is noted down of them."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastclust import cli
from fastclust._version import __version__
from fastclust.cli import Interrupted, note
from fastclust.compare.methods import Method
from fastclust.files import write_atomically


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
