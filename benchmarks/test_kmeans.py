"""k-means against scikit-learn: same data, same threads, interleaved in one process.

Run with ``pytest benchmarks/test_kmeans.py -s``. Each case reports the ratio of times, the ratio of
inertias, the iterations of both, and how far Lloyd's iterations are from the time of their matrix
products alone (torch's, over the centres of all restarts at once). Random data only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from sklearn.cluster import KMeans

from fastclust import ops

N, K, RESTARTS = 13752, 10, 20
CASES = {
    "unclusterable": 0.05,  # distance of the means in units of the noise, per column
    "overlapping": 0.15,
    "separated": 0.35,
}


def timed(f: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def blobs(d: int, separation: float) -> torch.Tensor:
    """Gaussian clusters [N, d]."""
    g = torch.Generator().manual_seed(1)
    means = separation * torch.randn(K, d, generator=g)
    return means[torch.randint(K, (N,), generator=g)] + torch.randn(N, d, generator=g)


@pytest.mark.parametrize("d", [500, 1000])
@pytest.mark.parametrize("case", CASES)
def test_twenty_restarts(case, d, record_property):
    x = blobs(d, CASES[case])
    lib = torch.ops.fastclust
    ops.kmeans(x[:1000], K)  # warm up
    ours = [timed(lambda: ops.kmeans(x, K, n_init=RESTARTS))]
    peer = KMeans(K, n_init=RESTARTS, random_state=0)
    theirs = timed(lambda: peer.fit(x.numpy()))
    ours.append(timed(lambda: ops.kmeans(x, K, n_init=RESTARTS)))
    result = ops.kmeans(x, K, n_init=RESTARTS)

    xc, _, variance = lib.kmeans_center(x)
    starts = lib.kmeans_init(xc, K, RESTARTS, 0, 0)
    begin = time.perf_counter()
    _, n_iter, _ = lib.kmeans_lloyd(xc, starts, variance * 1e-4, False, 300)
    lloyd = time.perf_counter() - begin
    centers = torch.randn(RESTARTS * K, d)
    product = min(timed(lambda: x @ centers.T) for _ in range(3))
    report = {
        "seconds": min(ours),
        "sklearn_seconds": theirs,
        "speedup": theirs / min(ours),
        "inertia_ratio": result.inertia / peer.inertia_,
        "iterations_a_restart": n_iter.double().mean().item(),
        "lloyd_over_products": lloyd / (product * n_iter.sum().item() / RESTARTS),
        "product_gflops": 2e-9 * N * RESTARTS * K * d / product,
    }
    for name, value in report.items():
        record_property(name, value)
    print(f"\n{case} d={d}: " + ", ".join(f"{k} {v:.5g}" for k, v in report.items()))
    assert result.inertia <= peer.inertia_ * 1.001


def test_warm_start(record_property):
    """One run from the last centres against ten fresh ones, as at a refresh of HSAN."""
    x = torch.nn.functional.normalize(blobs(500, CASES["overlapping"]), dim=1)
    last = ops.kmeans(x, K)
    moved = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    fresh = timed(lambda: ops.kmeans(moved, K, n_init=10))
    warm = timed(lambda: ops.kmeans(moved, K, init=last.centers))
    record_property("fresh_seconds", fresh)
    record_property("warm_seconds", warm)
    print(f"\nten restarts {fresh:.4g} s, warm start {warm:.4g} s")
