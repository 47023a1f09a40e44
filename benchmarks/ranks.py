"""What sharing one graph over processes buys and costs: HSAN and ECN-MF on 1 to R ranks over gloo.

    python benchmarks/ranks.py --ranks 1 2 3 4

Processes run on this machine, one thread each, so that more of them than cores share cores: then
CPU seconds of the busiest rank tell more than seconds of the fastest step. A step is loss, gradient
and Adam, on a graph of fc.make_attributed_sbm with the degree of ogbn-arxiv; the first one is not
counted. *MB received* is what the loopback device carried, headers and all, by rank: run nothing
else over it. *By formula* is what docs/distributed.md counts. Memory is the high-water mark of a
rank over the steps, and how much of it was not there before the model was built. *At best* is what
CPU seconds of the busiest rank would allow, had each a core. The table stands in
docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import fastclust as fc
from fastclust import distributed
from fastclust.distributed import sharded
from fastclust.memory import begin_peak_memory, peak_memory
from fastclust.training import make_optimizer

WIDTH = {"hsan": 128, "ecnmf": 256}
METHODS = ("hsan", "hsan half-ring", "ecnmf")


def loopback_bytes() -> int:
    """What the loopback device has received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise RuntimeError("/proc/net/dev names no loopback device")


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def predicted_bytes(method: str, model: Any, n: int, k: int, ranks: int) -> float:
    """Bytes that this rank receives per step, by the formulas of docs/distributed.md."""
    share, m, w = (ranks - 1) / ranks, 2 * n, 2 * WIDTH["hsan"]
    common = sum(p.numel() for name, p in model.named_parameters() if name not in model.by_rows)
    total = 4 * 2 * common * share
    if method == "ecnmf":  # its views are one product each: no propagation
        return total + 4 * n * k * share / model.update_every
    # With gloo a reduce-scatter is an all-reduce: twice the bytes.
    rows = 3 * (ranks // 2) / ranks if "ring" in method else 3 * share
    halo = sum(model.graph.receive) * WIDTH["hsan"]
    return total + 4 * rows * m * w + 2 * 8 * m * share + 4 * 2 * 2 * halo


def measure(method: str, ds: Any, steps: int) -> dict[str, Any]:
    """On one of the ranks: build, step, count."""
    kind = method.split()[0]
    sharded.GATHER_UP_TO = 0 if "ring" in method else 4
    k, width = ds.n_clusters, WIDTH[kind]
    before = resident_bytes()
    make: Any = {"hsan": fc.HSAN, "ecnmf": fc.ECNMF}[kind]
    estimator = make(k, width=width, epochs=steps, n_init=1)
    features, graph, device = estimator._prepare(ds.features, ds.adjacency)
    model, _ = estimator._build(features, graph, device)
    ranks = model.ranks
    adam = make_optimizer(
        list(model.parameters()), estimator.resolved_["optimizer"], estimator.resolved_["lr"]
    )
    model.begin()
    begin_peak_memory()
    seconds, losses = [], []
    for epoch in range(steps + 1):
        if epoch == 1:
            cpu = time.process_time()
            carried = loopback_bytes()
            if ranks.size > 1:
                dist.barrier()
        began = time.perf_counter()
        adam.zero_grad(set_to_none=True)
        loss = model.loss()
        loss.backward()
        adam.step()
        model.after_step(epoch)
        losses.append(float(loss.detach()))
        if ranks.size > 1:
            dist.barrier()
        seconds.append(time.perf_counter() - began)
    cpu, carried = time.process_time() - cpu, loopback_bytes() - carried
    found = {
        "seconds": min(seconds[1:]),
        "cpu_seconds": cpu / steps,
        "received": carried / steps / ranks.size if ranks.size > 1 else 0.0,
        "formula": 0.0,
        "peak": peak_memory()["peak_memory_bytes"],
        "before": before,
        "loss": losses[-1],
    }
    if ranks.size > 1:
        found["formula"] = predicted_bytes(method, model, ds.n_nodes, k, ranks.size)
    everyone: list[Any] = [found]
    if ranks.size > 1:
        everyone = [None] * ranks.size
        dist.all_gather_object(everyone, found)
    merged = {key: max(one[key] for one in everyone) for key in found}
    merged["formula"] = float(np.mean([one["formula"] for one in everyone]))
    return merged


def work(nodes: int, steps: int, method: str) -> None:
    """One rank; the first prints."""
    torch.set_num_threads(1)
    ds = fc.make_attributed_sbm(nodes, round(6.887 * nodes), 128, 40, feature_noise=0.5)
    with distributed.session() as ranks:
        found = measure(method, ds, steps)
        if ranks.rank == 0:
            print(json.dumps(found), flush=True)


def launch(size: int, arguments: list[str]) -> dict[str, Any]:
    """Start the ranks on this machine; what the first printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a process of {size} failed")
    return json.loads(printed[0].splitlines()[-1])


def main() -> None:
    """Time every number of ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--nodes", type=int, default=8_000)
    parser.add_argument("--steps", type=int, default=3, help="of HSAN; ECN-MF does ten times those")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.nodes, args.steps, args.methods[0])
    print(
        "| method | ranks | seconds per step | speed-up | CPU seconds | speed-up at best "
        "| MB received | by formula | peak GB | for it |\n|" + " --- |" * 10
    )
    alone: dict[str, dict[str, Any]] = {}
    for method in args.methods:
        kind = method.split()[0]
        steps = args.steps * (10 if kind == "ecnmf" else 1)
        arguments = ["--nodes", str(args.nodes), "--steps", str(steps), "--methods", method]
        for size in args.ranks:
            if "ring" in method and size == 1:
                continue
            row = launch(size, arguments)
            base = alone.setdefault(kind, row)
            if abs(row["loss"] - base["loss"]) > 1e-3 * abs(base["loss"]):
                raise SystemExit(f"{method} on {size} ranks has another loss: {row}, {base}")
            print(
                f"| {method} | {size} | {row['seconds']:.3f} "
                f"| {base['seconds'] / row['seconds']:.2f} | {row['cpu_seconds']:.3f} "
                f"| {base['cpu_seconds'] / row['cpu_seconds']:.2f} "
                f"| {row['received'] / 1e6:.1f} | {row['formula'] / 1e6:.1f} "
                f"| {row['peak'] / 1e9:.2f} | {(row['peak'] - row['before']) / 1e9:.2f} |",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
