"""What mini-batches cost: quality beside full batches, and the bias of HSAN's sampled row sums.

::

    python benchmarks/minibatch.py quality --datasets bat,eat --seeds 3
    python benchmarks/minibatch.py quality --hsan weights=hard width=256 epochs=200 precision=fp32
    python benchmarks/minibatch.py bias --dataset cora

``--hsan`` and ``--ecnmf`` replace or add keywords of the method, ``--cases`` names some columns.
The scores need labels, training sees none. Tables of both stand in docs/scale.md.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fastclust as fc
from fastclust.training import train

HSAN: dict[str, Any] = {"width": 64, "epochs": 100, "precision": "bf16", "weights": "none"}
ECNMF: dict[str, Any] = {"width": 256, "epochs": 300}
NEGATIVES = 512  # at most: their similarities are held, 2B x 2M


def cases(
    name: str, batch: int, hsan: dict[str, Any], ecnmf: dict[str, Any]
) -> dict[str, Callable[[int], Any]]:
    """Full and mini-batch forms of both trained methods, all with the same number of steps."""

    def make(kind: type, common: dict[str, Any], **changes: Any) -> Callable[[int], Any]:
        keywords = {"eval_every": common["epochs"], **common, **changes}
        return lambda seed: kind.for_dataset(name, random_state=seed, **keywords)

    return {
        "hsan full": make(fc.HSAN, hsan),
        "hsan random": make(fc.HSAN, hsan, batch_size=batch),
        "hsan partition": make(fc.HSAN, hsan, batch_size=batch, batching="partition"),
        "hsan random, negatives": make(
            fc.HSAN, hsan, batch_size=batch, n_negatives=min(batch, NEGATIVES)
        ),
        "ecnmf full": make(fc.ECNMF, ecnmf),
        "ecnmf random": make(fc.ECNMF, ecnmf, train_batch_size=batch),
        "ecnmf partition": make(fc.ECNMF, ecnmf, train_batch_size=batch, batching="partition"),
    }


def quality(
    datasets: list[str], seeds: int, hsan: dict[str, Any], ecnmf: dict[str, Any], only: str
) -> None:
    """Print ACC, NMI and CPU seconds a run of every case, a batch being a quarter of the nodes."""
    for name in datasets:
        data = fc.load_dataset(name)
        for case, make in cases(name, data.n_nodes // 4, hsan, ecnmf).items():
            if not case.startswith(only):
                continue
            scores, began = [], time.process_time()
            for seed in range(seeds):
                model = make(seed).fit(data.features, adjacency=data.adjacency)
                found = fc.metrics.clustering_scores(data.labels, model.labels_)
                scores.append([100 * found["acc"], 100 * found["nmi"]])
            seconds = (time.process_time() - began) / seeds
            mean = np.mean(scores, axis=0)
            spread = np.std(scores, axis=0, ddof=1) if seeds > 1 else np.zeros(2)
            cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, spread, strict=True)]
            print(
                f"{name}, {case}: ACC {cells[0]}, NMI {cells[1]}, {seeds} seeds, {seconds:.1f} s",
                flush=True,
            )


def bias(dataset: str, steps: tuple[int, ...] = (1, 60), draws: int = 400) -> None:
    """Print the measured bias of log row sums over m sampled nodes beside v / 2m (1 - m / N)."""
    data = fc.load_dataset(dataset)
    n = data.n_nodes
    for epochs in steps:
        estimator = fc.HSAN.for_dataset(dataset, width=256, epochs=epochs, eval_every=epochs)
        features, graph, device = estimator._prepare(data.features, data.adjacency)
        model, _ = estimator._build(features, graph, device)
        lr, optimizer = estimator.resolved_["lr"], estimator.resolved_["optimizer"]
        train(model, epochs=epochs, adjacency=graph, lr=lr, optimizer=optimizer, eval_every=epochs)
        rows = torch.arange(0, n, 27)
        with torch.no_grad():
            z, e, alpha = model.attribute_views(), model.structure_views(), float(model.alpha)
            similarity = alpha * z[rows] @ z.T + (1 - alpha) * e[rows] @ e.T
        terms = similarity.double().exp()
        own = torch.zeros(len(rows), n, dtype=torch.bool)
        own[torch.arange(len(rows)), rows] = True
        positive = terms[torch.arange(len(rows)), n + rows]
        pairs = (terms[:, :n] + terms[:, n:]).masked_fill(own, 0)  # both views of the other nodes
        exact = torch.log(positive + pairs.sum(1))
        mean = pairs.sum(1) / (n - 1)
        variance = ((pairs - mean[:, None]) ** 2).masked_fill(own, 0).sum(1) / (n - 1)
        v = float((variance / mean**2).mean())
        rng = np.random.default_rng(0)
        for m in (32, 128, 512):
            logs = []
            for _ in range(draws):
                drawn = torch.from_numpy(rng.choice(n, m, replace=False))
                counted = m - own[:, drawn].sum(1)
                sums = pairs[:, drawn].sum(1) * (n - 1) / counted
                logs.append(torch.log(positive + sums))
            estimates = torch.stack(logs)
            measured = float((exact - estimates.mean(0)).mean())
            predicted = v / (2 * m) * (1 - m / n)
            spread = float(estimates.std(0).mean())
            print(
                f"{epochs} steps, v {v:.4f}, m {m}: bias {measured:.1e}, formula {predicted:.1e}, "
                f"spread of one draw {spread:.1e}",
                flush=True,
            )


def keywords(given: list[str]) -> dict[str, Any]:
    """Values are Python's, or else words."""
    found: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    first = actions.add_parser("quality")
    first.add_argument("--datasets", default="bat,eat")
    first.add_argument("--seeds", type=int, default=3)
    first.add_argument("--cases", default="", help="only those whose name begins so")
    for method, common in (("hsan", HSAN), ("ecnmf", ECNMF)):
        text = " ".join(f"{key}={value}" for key, value in common.items())
        first.add_argument(f"--{method}", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    second = actions.add_parser("bias")
    second.add_argument("--dataset", default="cora")
    options = parser.parse_args()
    if options.action == "quality":
        hsan, ecnmf = HSAN | keywords(options.hsan), ECNMF | keywords(options.ecnmf)
        quality(options.datasets.split(","), options.seeds, hsan, ecnmf, options.cases)
    else:
        bias(options.dataset)


if __name__ == "__main__":
    main()
