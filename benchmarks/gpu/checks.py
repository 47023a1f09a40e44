"""The parts that time nothing: tests on the device, the same bits every time, the sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gpu.graphs import randn, scratch
from gpu.processes import PROGRAM, call, environment, kill_tree
from gpu.report import ROOT, Report

# Those of the GPU first; what runs over emulated blocks (test_infonce_device_math.py) needs none.
TEST_FILES = [
    "test_infonce_cuda.py", "test_ops_on_device.py", "test_propagate.py", "test_kmeans.py",
    "test_lowrank.py", "test_infonce.py",
]  # fmt: skip


def tests(report: Report) -> None:
    """The op tests, on CUDA tensors where there are any."""
    files = [str(ROOT / "tests" / f) for f in TEST_FILES if (ROOT / "tests" / f).is_file()]
    select = (
        ["-k", "test_range_and_permutation or test_loss_on"]
        if report.tiny
        else ["-m", "not slow or gpu"]
    )
    workers, cores = 6, os.cpu_count() or 1
    parallel, threads = [], cores
    if importlib.util.find_spec("xdist") and not report.tiny:
        parallel, threads = ["-n", str(workers)], max(1, cores // 2 // workers)
        if importlib.util.find_spec("pytest_timeout"):
            # A kernel that hangs ends its worker, which says so and is replaced.
            parallel += ["--timeout", "90", "--timeout-method", "thread"]

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-x" if report.tiny else "--maxfail=40"]
        command += ["-p", "no:cacheprovider", *parallel, *select, *files]
        done = call(command, 140, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode not in (0, 5):  # 5: nothing selected, in a dry run
            raise RuntimeError(f"{lines[-1] if lines else 'no output'}: {'; '.join(failed[:10])}")
        return {"summary": lines[-1]}

    report.case("pytest", run)


def determinism(report: Report) -> None:
    """1000 runs of every kernel with the same bits, or what fits into its share of the time."""
    runs, seconds = (3, 60.0) if report.tiny else (1000, 120.0)
    hopper = report.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    calls = [(name, "0", step) for name, step in small_calls(report.device)]
    if hopper:
        calls += [
            (f"sm90 {name}", "1", step)
            for name, _, step in calls
            if name.startswith("infonce bf16")
        ]
    start = time.perf_counter()

    def repeat(step: Callable[[], list[Tensor]], until: float) -> dict[str, Any]:
        first = [t.clone() for t in step()]
        done = 0
        while done < runs and time.perf_counter() - start < until:
            done += 1
            if not all(torch.equal(a, b) for a, b in zip(first, step(), strict=True)):
                raise AssertionError(f"other bits in run {done}")
        return {"runs": done}

    for i, (name, path, step) in enumerate(calls):
        until = seconds * (i + 1) / len(calls)
        with environment(FASTCLUST_SM90=path):
            report.case("determinism", lambda s=step, u=until: repeat(s, u), kernel=name)


def small_calls(device: str) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Every kernel on shapes with ragged edges."""
    import scipy.sparse as sp

    from fastclust import Graph, ops

    n, dz, de = 150, 70, 37
    views = [normalize(randn(2 * n, d, device="cpu", seed=d)) for d in (dz, de)]
    labels = torch.arange(n) % 3
    for dtype in (torch.float32, torch.float64):
        z, e = (v.to(device, dtype).requires_grad_() for v in views)
        alpha = torch.tensor(0.7, device=device, dtype=dtype, requires_grad=True)
        w = ops.hardness(z, e, alpha, labels.to(device), (labels > 0).to(device), 1.5)
        kinds = ("fp32",) if dtype == torch.float64 else ("bf16", "tf32", "bf16x3")
        for precision in kinds:
            for weights in (None, w):

                def loss(
                    p: str = precision, w: Any = weights, v: Any = (z, e, alpha)
                ) -> list[Tensor]:
                    out = ops.hard_infonce(*v, weights=w, precision=p)
                    return [out.detach(), *torch.autograd.grad(out, v)]

                kind = "weighted" if weights is not None else "plain"
                yield f"infonce {precision} {kind} {str(dtype)[6:]}", loss
        rng = np.random.default_rng(0)
        upper = np.triu(rng.random((n, n)) < 0.1, 1)
        upper[0] = True
        upper[0, 0] = False
        graph = Graph(sp.csr_array((upper | upper.T).astype(np.float32))).to(device)
        for d in (1, 33, 128):
            h = randn(n, d, device="cpu", seed=d).to(device, dtype).requires_grad_()

            def spread(graph: Any = graph, h: Tensor = h) -> list[Tensor]:
                out = ops.propagate(graph, h, residual=h, activation="relu")
                return [out.detach(), *torch.autograd.grad(out, h, torch.ones_like(out))]

            yield f"propagate {d} {str(dtype)[6:]}", spread
        x = randn(n, 21, device="cpu").to(device, dtype)
        for init in (None, "random", "paper-code"):

            def cluster(x: Tensor = x, init: Any = init) -> list[Tensor]:
                result = ops.kmeans(x, 5, n_init=3, init=init)
                return [result.labels, result.centers]

            yield f"kmeans {init} {str(dtype)[6:]}", cluster

        def factors(x: Tensor = x) -> list[Tensor]:
            svd = ops.batched_svd(x, 6, batch_size=64)
            return [svd.u, svd.s, svd.vh]

        yield f"lowrank {str(dtype)[6:]}", factors


SANITIZER_SECONDS = 135.0


def sanitizer(report: Report) -> None:
    """compute-sanitizer's four tools over every kernel on small shapes, side by side.

    Errors of initcheck and racecheck want a second look: up to the one of CUDA 13.0, initcheck does
    not see what bulk copies write, and racecheck reports some uses of mbarriers that are no race.
    """
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    child = [sys.executable, PROGRAM, "--small-calls", "--out", str(report.out)]
    if report.tiny:
        report.case("dry run", lambda: {"ok": not subprocess.run([*child, "--tiny"]).returncode})
        return
    running = {}
    for path_name, value in (("", "0"), ("sm90 ", "1")):
        for tool in tools:
            command = [path, *sanitizer_options(tool), "--port", str(49152 + 20 * len(running))]
            # Every tensor in an allocation of its own, so that overruns are seen.
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
            # not a pipe: nobody would read those of seven while the eighth is waited for
            written = scratch(report.out) / f"sanitizer-{len(running)}.txt"
            with contextlib.suppress(OSError), written.open("w") as output:
                process = subprocess.Popen(
                    [*command, *child],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | env | {"FASTCLUST_SM90": value},
                )
                running[path_name + tool] = process, written
    deadline = time.perf_counter() + SANITIZER_SECONDS

    def finish(process: subprocess.Popen[Any], written: Path) -> dict[str, Any]:
        late = False
        try:
            process.wait(timeout=max(1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            kill_tree(process)
            process.wait()
            late = True
        text = written.read_text(errors="replace")
        written.unlink()
        said = sanitizer_said(text)
        print("\n".join(said)[:8000], flush=True)
        if late:
            raise TimeoutError(f"not done in time, after {text.splitlines()[-1:]}")
        if process.returncode:  # the first error is the one to look at
            tail = said or text.splitlines()[-5:]
            raise RuntimeError(f"exit code {process.returncode}: {' | '.join(tail)}")
        return {"summary": sanitizer_summary(text)}

    for tool, parts in running.items():
        report.case(tool, lambda parts=parts: finish(*parts))
    if not running:
        report.errors.append(
            {"part": "sanitizer", "case": "all", "error": "compute-sanitizer is not here"}
        )
        report.write()


def sanitizer_options(tool: str) -> list[str]:
    """Options of compute-sanitizer 2023.3 or later."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    # By default it waits a minute for the first CUDA call, which may take longer to come beside
    # seven others, and then lets the program run unchecked.
    options += ["--launch-timeout", "0"]
    if tool != "initcheck":  # which has to see what torch's kernels write
        options += ["--kernel-name", "kns=fastclust"]
    if tool == "memcheck":  # torch asks for things that may fail; our own calls are all checked
        options += ["--report-api-errors", "no"]
    return options


def sanitizer_said(text: str) -> list[str]:
    """What compute-sanitizer told, without its headline and without what the program told."""
    lines = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
    return [line for line in lines if line and line != "COMPUTE-SANITIZER"]


def sanitizer_summary(text: str) -> str:
    """The line of compute-sanitizer that counts the errors; without one nothing was checked."""
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    if not summary:
        raise RuntimeError(f"no summary, so nothing was checked: {text[-500:]}")
    return summary[-1].strip("= ")
