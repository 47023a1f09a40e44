"""Commands in processes of their own, each with a time limit for all that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What Python runs to be this program: a part alone, or what a sanitizer or a profiler looks at.
PROGRAM = str(Path(__file__).resolve().parent)


def call(command: list[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, with a time limit for all that it starts.

    ``subprocess.run`` ends the command alone: the program below a profiler, or a worker of pytest,
    would keep the device busy beside all that is timed later.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        out, err = process.communicate()
        raise TimeoutError(f"not done in {seconds:.0f} s: {(out + err)[-400:]}") from None
    except BaseException:
        kill_tree(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_for(process: subprocess.Popen[Any], begun: float, limit: float) -> tuple[str, str]:
    """How a part ended, within its seconds, and what went wrong that it has not written itself."""
    try:
        code = process.wait(timeout=max(0.1, begun + limit - time.perf_counter()))
    except subprocess.TimeoutExpired:
        stop(process)
        return "cut off", f"cut off after {limit:.0f} s"
    word = "ok" if code == 0 else "with errors"
    return word, "" if code in (0, 1) else f"ended with exit code {code}"


def stop(process: subprocess.Popen[Any]) -> None:
    """End a part with all that it started, what has lost its parent included."""
    if process.poll() is None:
        kill_tree(process)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End a process and everything below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    tree = [process.pid]
    for pid in tree:
        tree += children.get(pid, [])
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
