"""k-means of rows of several processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastclust import ops
from fastclust.ops.kmeans import (
    _MAX_FINAL_REPAIRS,
    _METHODS,
    _PAPER_CODE_ITERATIONS,
    _PAPER_CODE_TOLERANCE,
)

if TYPE_CHECKING:
    from fastclust.distributed.sharded import ShardedRanks

# k-means is started on at most this many rows, spread evenly; below it, as on one process.
START_ROWS = 1 << 16


def kmeans(
    ranks: ShardedRanks, x: Tensor, n_clusters: int, *, n_init: int = 10, max_iter: int = 300,
    tol: float = 1e-4, init: str | None = None, seed: int = 0,
) -> ops.KMeansResult:  # fmt: skip
    """Lloyd's iterations with rows x [n, d] of every rank, as :func:`fastclust.ops.kmeans`.

    Points are assigned by the kernel, each rank its own; the sums of the clusters are float64 and
    added over the ranks, so that every rank has the same centres. The start is drawn from all rows,
    or from evenly spaced rows where there are more than 65,536, on each rank alike.
    """
    native = torch.ops.fastclust
    n, width = ranks.n_nodes, x.shape[1]
    mean = ranks.add_up(x.double().sum(0)) / n  # [d]
    xc = torch.nn.functional.pad(x.double() - mean, (0, -width % 16)).to(x.dtype)  # [n, dp]
    variance = ranks.add_up(xc.double().square().sum()) / (n * width)
    _check_spread(variance.item() * width * n, x.dtype)
    released = init == "paper-code"
    if released:
        max_iter, n_init = _PAPER_CODE_ITERATIONS, 1
        tolerance = _PAPER_CODE_TOLERANCE
    else:
        tolerance = tol * variance.item()
    method = _METHODS[init or "k-means++"]
    centers = native.kmeans_init(_start(ranks, xc), n_clusters, n_init, method, seed % 2**63)

    moving = torch.arange(len(centers), device=x.device)
    n_iter = torch.zeros(len(centers), dtype=torch.int64, device=x.device)
    for _ in range(max_iter):
        moved, repaired = _lloyd_step(ranks, xc, centers[moving])
        lengths = (moved.double() - centers[moving].double()).square().sum(2)  # [R, K]
        centers[moving] = moved
        n_iter[moving] += 1
        done = (
            lengths.sqrt().sum(1).square() < tolerance if released else lengths.sum(1) <= tolerance
        )
        moving = moving[~(done & ~repaired)]
        if len(moving) == 0:
            break
    labels, inertia = native.kmeans_assign(xc, centers)
    best = int(ranks.add_up(inertia).argmin())
    labels, inertia, centers = labels[best], inertia[best], centers[best]
    # Between the last update and the last assignment a cluster can lose its last point.
    for _ in range(_MAX_FINAL_REPAIRS):
        counts = ranks.add_up(torch.bincount(labels, minlength=n_clusters))
        if bool((counts > 0).all()) or inertia.item() == 0.0:
            break
        centers = _lloyd_step(ranks, xc, centers[None])[0][0]
        n_iter[best] += 1
        one, inertia = native.kmeans_assign(xc, centers[None])
        labels, inertia = one[0], ranks.add_up(inertia)[0]
    return ops.KMeansResult(
        labels=labels.long(),
        centers=(centers[:, :width].double() + mean).to(x.dtype),
        inertia=inertia.item(),
        n_iter=int(n_iter[best]),
    )


def _check_spread(spread: float, dtype: torch.dtype) -> None:
    """Check the sum of squared distances to the mean."""
    if not math.isfinite(spread):
        raise ValueError("x must hold finite values, found NaN or infinity")
    if spread > torch.finfo(dtype).max / 16:
        raise ValueError(f"x is too widely spread for squared distances in {dtype}: scale it down")


def _start(ranks: ShardedRanks, xc: Tensor) -> Tensor:
    """Rows to draw the first centres from, the same on every rank."""
    stride = -(-ranks.n_nodes // START_ROWS)
    if stride == 1:
        return ranks.gather(xc)
    nodes = torch.arange(0, ranks.n_nodes, stride, device=xc.device)
    own, places = ranks.own_nodes(nodes, torch.arange(len(nodes), device=xc.device))
    chosen = xc.new_zeros(len(nodes), xc.shape[1])
    chosen[places] = xc[own]
    return ranks.add_up(chosen)


def _lloyd_step(ranks: ShardedRanks, xc: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration of every restart: centres [R, K, dp], and bool [R] whether it mended one."""
    restarts, k, width = centers.shape
    labels = torch.ops.fastclust.kmeans_assign(xc, centers)[0].long()  # [R, n]
    sums = xc.new_zeros(restarts * k, width + 1, dtype=torch.float64)  # and counts
    for rows, part in zip(xc.split(8192), labels.split(8192, dim=1), strict=True):
        members = torch.nn.functional.one_hot(part, k).transpose(1, 2).reshape(restarts * k, -1)
        members = members.double()
        sums[:, :width] += members @ rows.double()
        sums[:, width] += members.sum(1)
    sums = ranks.add_up(sums).view(restarts, k, width + 1)
    repaired = (sums[..., width] == 0).any(1)
    for r in repaired.nonzero()[:, 0].tolist():
        repaired[r] = _mend(ranks, xc, labels[r], centers[r], sums[r])
    counts = sums[..., width:]
    means = sums[..., :width] / counts.clamp_min(1.0)
    return torch.where(counts > 0, means, centers.double()).to(centers.dtype), repaired


def _mend(ranks: ShardedRanks, xc: Tensor, labels: Tensor, centers: Tensor, sums: Tensor) -> bool:
    """Move the point farthest from its centre into each empty cluster, in sums [K, dp + 1].

    Returns whether one was moved; where all lie on a centre, none is.
    """
    moved = False
    distance = (xc.double() - centers[labels].double()).square().sum(1)  # [n]
    for cluster in (sums[:, -1] == 0).nonzero()[:, 0].tolist():
        # This rank's candidate: distance, cluster, point.
        mine = sums.new_zeros(2 + xc.shape[1])
        i = int(torch.where(sums[labels, -1] > 1, distance, 0.0).argmax())
        if sums[labels[i], -1] > 1:
            mine[0], mine[1], mine[2:] = distance[i], labels[i], xc[i]
        found = ranks.from_each(mine)
        winner = int(found[:, 0].argmax())
        length, home, point = float(found[winner, 0]), int(found[winner, 1]), found[winner, 2:]
        if length <= 0:
            break
        moved = True
        sums[home, :-1] -= point
        sums[home, -1] -= 1
        sums[cluster, :-1], sums[cluster, -1] = point, 1.0
        if winner == ranks.rank:
            labels[i] = cluster
        distance = torch.minimum(distance, (xc.double() - point).square().sum(1))
    return moved
