"""The part that asks Nsight Compute which unit of the card a kernel keeps busy."""

from __future__ import annotations

import csv
import os
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from gpu.graphs import SHAPES, randn, sibling
from gpu.processes import PROGRAM, call
from gpu.report import Report

# What Nsight Compute says of a kernel, by the names of its report, and as rows hold it.
PROFILE = {
    "Duration": "us",
    "Compute (SM) Throughput": "sm_percent",
    "Memory Throughput": "memory_percent",
    "L1/TEX Cache Throughput": "l1_percent",
    "L2 Cache Throughput": "l2_percent",
    "DRAM Throughput": "dram_percent",
    "Issue Slots Busy": "issue_percent",
    "Achieved Occupancy": "occupancy_percent",
    "Registers Per Thread": "registers",
}

MICROSECONDS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}


def profile(report: Report) -> None:
    """The main kernels under Nsight Compute: which unit of the card each keeps busy."""
    found = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    path = shutil.which("ncu") or (str(found[-1]) if found else "/usr/local/cuda/bin/ncu")
    sections = ["SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats"]
    command = [path, "--clock-control", "none", "--csv", "--page", "details"]
    command += [word for section in sections for word in ("--section", section)]
    # Not torch's own; and the first patches of a loss are as good as all of them.
    ours = "(forward|tile|product|pack|sum|finish|gram|apply|cholesky|jacobi|center|shifted)_kernel"
    # cuBLAS calls its own products nvjet on Hopper.
    command += ["--kernel-name", f"regex:^{ours}|^propagate_|gemm|nvjet", "--launch-count", "96"]
    for name, hopper in (
        ("bf16", "1"), ("bf16x3", "1"), ("bf16", "0"), ("bf16x3", "0"),
        ("propagate", "0"), ("lowrank", "0"),
    ):  # fmt: skip
        child = [sys.executable, PROGRAM, "--profile-calls", name]
        child += ["--out", str(report.out), *(["--tiny"] if report.tiny else [])]
        rows: list[dict[str, Any]] = [{"ok": True}] if report.tiny else []

        def run(child: list[str] = child, hopper: str = hopper, rows: Any = rows) -> None:
            done = call(
                [*([] if report.tiny else command), *child], 60,
                env=os.environ | {"FASTCLUST_SM90": hopper},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(
                    f"exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"
                )
            rows.extend(kernel_rows(done.stdout))
            if not rows:  # perhaps without leave to read the card's counters
                raise RuntimeError(f"no kernel was profiled: {(done.stdout + done.stderr)[-400:]}")

        labels = {"call": name, "sm90": hopper == "1"}
        report.case("profile", run, **labels)
        for row in rows:
            report.case("profile", lambda row=row: row, **labels)


def profiled_calls(name: str, device: str, tiny: bool) -> None:
    """The call behind one profile: the loss, a propagation or a low-rank factorisation at AMAC."""
    from fastclust import Graph, ops

    n, entries, width, _, k, rank = SHAPES["tiny" if tiny else "amac"]
    if name.startswith("bf16"):
        z, e = (
            normalize(randn(2 * n, 500, device=device, seed=s)).requires_grad_() for s in (0, 1)
        )
        alpha = torch.tensor(0.7, device=device, requires_grad=True)
        loss = ops.hard_infonce(z, e, alpha, precision=name)
        torch.autograd.grad(loss, (z, e, alpha))
    elif name == "propagate":
        graph = Graph(sibling("test_propagate").community_graph.__wrapped__(n, entries, k))
        h = randn(n, 500, device=device)
        ops.propagate(graph.to(device), h, residual=h, activation="relu")
    else:
        ops.batched_svd(randn(n, width, device=device), rank, batch_size=min(n, 1024))


def kernel_rows(text: str) -> list[dict[str, Any]]:
    """Means over the launches of each kernel, the longest first, from Nsight Compute's CSV."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, list[float]]] = {}
    for line in csv.DictReader(lines[start:]):
        key = PROFILE.get(line.get("Metric Name") or "")
        if key is None:
            continue
        try:
            value = float(line["Metric Value"].replace(",", ""))
        except ValueError:  # not available on this card
            continue
        value *= MICROSECONDS.get(line["Metric Unit"], 1.0) if key == "us" else 1.0
        name = kernel_name(line["Kernel Name"])
        launches.setdefault(name, {}).setdefault(key, []).append(value)
    rows: list[dict[str, Any]] = [
        {"kernel": name, "launches": len(next(iter(values.values())))}
        | {key: statistics.mean(numbers) for key, numbers in values.items()}
        for name, values in launches.items()
    ]
    return sorted(rows, key=lambda row: -row["launches"] * row.get("us", 0.0))[:12]


def kernel_name(text: str) -> str:
    """A kernel without result, namespaces and parameters: ``tile_kernel<(bool)1>``."""
    depth = end = 0
    if text.endswith(")"):  # template arguments have parentheses, too
        for end in range(len(text) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(text[end], 0)
            if depth == 0:
                text = text[:end]
                break
    text = re.sub(r"(\w+|<unnamed>|\(anonymous namespace\))::", "", text.removeprefix("void "))
    return text if len(text) <= 100 else text[:97] + "..."
