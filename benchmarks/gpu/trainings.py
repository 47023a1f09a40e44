"""The parts that train: whole runs of the command line, and single epochs beside eager ones."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.graphs import dataset_path, graph_name, load, sibling
from gpu.processes import call
from gpu.report import Report
from gpu.timing import captured, measure

# model, graph, epochs, seeds, further options
RUNS = [
    ("ecnmf", "cora", 1000, "0-2", []),
    ("hsan", "cora", 400, "0-2", []),
    ("ecnmf", "amac", 1000, "0", []),
    ("hsan", "amac", 400, "0", ["--set", "width=500"]),
    ("hsan", "100k", 5, "0", ["--set", "width=200"]),  # for its memory: S alone would take 160 GB
]

TINY_RUNS = [("ecnmf", "tiny", 3, "0-1", []), ("hsan", "tiny", 3, "0-1", ["--set", "width=16"])]


def train(report: Report) -> None:
    """Trainings on the device."""
    for run in TINY_RUNS if report.tiny else RUNS:
        row = lambda r=run: train_row(train_once(r, report.device, report.out, 120))  # noqa: E731
        report.case(graph_name(run[1], report.out), row, model=run[0], what="training")


def train_cpu(report: Report) -> None:
    """The small trainings on the CPU: what the GPU's metrics must agree with."""
    for run in TINY_RUNS if report.tiny else RUNS[:2]:
        row = lambda r=run: train_row(train_once(r, "cpu", report.out, 400))  # noqa: E731
        report.case(graph_name(run[1], report.out), row, model=run[0])


def train_once(run: tuple[Any, ...], device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """``python -m fastclust.train`` in a process of its own; the JSON it prints."""
    model, name, epochs, seeds, options = run
    command = [
        sys.executable, "-m", "fastclust.train", "--dataset", dataset_path(name, folder),
        "--model", model, "--epochs", str(epochs), "--seeds", seeds, "--device", device, "--json",
        "--quiet", *options,
    ]  # fmt: skip
    done = call(command, seconds, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout)


def train_row(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics, seconds and memory of one result, per seed and on average."""
    runs = result["runs"]
    gpu = [run["peak_gpu_memory_bytes"] for run in runs if "peak_gpu_memory_bytes" in run]
    return {
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "epochs": runs[0]["epochs"],
        "seeds": len(runs),
        "acc": result["mean"]["acc"],
        "acc_std": result["std"]["acc"],
        "nmi": result["mean"]["nmi"],
        "nmi_std": result["std"]["nmi"],
        **({"peak_bytes": max(gpu)} if gpu else {}),
    }


def agreement(trained: list[dict[str, Any]], cpu: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether mean metrics on device and CPU differ by no more than the spread over seeds."""
    rows = []
    for row in [r for r in trained if r.get("what") == "training"]:
        same = [c for c in cpu if (c["case"], c["model"]) == (row["case"], row["model"])]
        for other in same:
            allowed = max(0.02, 2 * max(row["acc_std"] or 0, other["acc_std"] or 0))
            rows.append(
                {
                    "part": "train-cpu",
                    "case": row["case"],
                    "model": row["model"],
                    "what": "agreement",
                    "acc": row["acc"],
                    "acc_cpu": other["acc"],
                    "allowed": round(allowed, 4),
                    "agrees": abs(row["acc"] - other["acc"]) <= allowed,
                }
            )
    return rows


def epochs(report: Report) -> None:
    """One epoch of the models against an eager one, and as a CUDA graph."""
    bench = sibling("test_train")
    device, tiny = report.device, report.tiny
    for model, names, width in (
        ("ecnmf", ("amac", "cora"), 16 if tiny else 600),
        ("hsan", ("cora",), 16 if tiny else 1500),
        ("hsan", ("amac",), 16 if tiny else 500),
    ):
        for name in ("tiny",) if tiny else names:
            labels: dict[str, Any] = {"model": model, "what": "epoch", "width": width}

            def epoch(
                side: str, model: str = model, name: str = name, width: int = width
            ) -> dict[str, Any]:
                make = getattr(bench, f"{model}_{side}")
                return measure(make(load(name, report.out), device=device, width=width), device)

            def graph(model: str = model, name: str = name, width: int = width) -> dict[str, Any]:
                return captured_epoch(model, load(name, report.out), device, width)

            case = graph_name(name, report.out)
            report.case(case, lambda f=epoch: f("ours"), peer="fastclust", **labels)
            report.case(case, graph, peer="fastclust, CUDA graph", **labels)
            if (model, name) != ("hsan", "amac"):  # a dozen dense matrices of 3 GB
                report.case(case, lambda f=epoch: f("eager"), peer="eager torch", **labels)


def captured_epoch(model_name: str, dataset: Any, device: str, width: int) -> dict[str, Any]:
    """One epoch between refreshes (loss, gradients, Adam) as a CUDA graph, beside the eager one."""
    model = getattr(sibling("test_train"), f"{model_name}_inputs")(dataset, width, device)[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True, capturable=device == "cuda")

    def epoch() -> Tensor:
        adam.zero_grad(set_to_none=True)
        loss = model.loss()
        loss.backward()
        adam.step()
        return loss.detach()

    epoch()
    if model_name == "ecnmf":
        model.after_step(0)  # the pseudo labels stay: finding them waits for the device
    eager = measure(epoch, device)
    replayed = measure(captured(epoch), device) if device == "cuda" else eager
    return replayed | {"eager_ms": eager["ms"]}
