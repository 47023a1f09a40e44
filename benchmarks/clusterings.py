"""How much of a trained model's score is chance of k-means: clusters kept embeddings anew.

python benchmarks/clusterings.py runs/cora/hsan-standard runs/amap/hsan-standard --seeds 0-9

Takes run directories, with the embeddings of all their seeds, and clusters each of them once per
seed with the consensus that HSAN's default ends with, with fewer and more starts, and with the
least inertia of as many. Prints ACC in percent, its mean, its standard deviation over the seeds
of the clustering (pooled over embeddings) and that of the embeddings' means over those of the
training. Labels are read only to score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from fastclust import ops
from fastclust.cli import parse_seeds
from fastclust.datasets import load_dataset
from fastclust.metrics import clustering_scores
from fastclust.models.consensus import consensus_kmeans
from fastclust.models.leading import leading_directions
from fastclust.rundir import read_toml

STARTS = (50, 100, 200, 400)


def scores(z: torch.Tensor, y: np.ndarray, seeds: list[int]) -> dict[str, list[float]]:
    """ACC of every variant, per seed, from the embedding z [N, d] and the classes y [N]."""
    k = len(np.unique(y))
    found: dict[str, list[float]] = {}
    for seed in seeds:
        # HSANModel's own steps, with the seed in the place of those of training and epoch.
        x = ops.matmul(z, leading_directions(z, 2 * k, seed=seed))
        results = {
            f"consensus, {n} starts": consensus_kmeans(x, k, n_init=n, seed=seed) for n in STARTS
        }
        results["least inertia, 10 starts"] = ops.kmeans(x, k, n_init=10, seed=seed)
        results["least inertia, 100 starts"] = ops.kmeans(x, k, n_init=100, seed=seed)
        for variant, result in results.items():
            acc = clustering_scores(y, result.labels.numpy())["acc"]
            found.setdefault(variant, []).append(100 * acc)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--seeds", default="0-9", type=parse_seeds, help="of the clustering")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for run in arguments.runs:
        kept = sorted(run.rglob("embedding.npy"))
        if not kept:
            parser.error(f"{run} has no embedding.npy: give the directory of a finished run")
        y = load_dataset(read_toml(run / "config.toml")["dataset"]).labels
        if y is None:
            parser.error(f"{run} is of a graph without labels: there is nothing to score by")
        each = [scores(torch.from_numpy(np.load(z)).float(), y, arguments.seeds) for z in kept]
        print(f"{run}: {len(kept)} embeddings, {len(arguments.seeds)} clusterings of each")
        for variant in each[0]:
            acc = np.array([one[variant] for one in each])  # [embeddings, seeds]
            within = np.sqrt(acc.var(axis=1, ddof=1).mean()) if acc.shape[1] > 1 else 0.0
            between = acc.mean(axis=1).std(ddof=1) if acc.shape[0] > 1 else 0.0
            print(
                f"  {variant:28} {acc.mean():5.2f}   clustering +- {within:4.2f}   "
                f"training +- {between:4.2f}   least {acc.min():5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
