"""Propagation against its peers: torch CSR (MKL) and scipy, with residual and relu, forward.

Run with ``pytest benchmarks/test_propagate.py``. Graphs are random with a power law of degrees and
ten communities (80 % of the edges inside), node ids shuffled. Every result carries, measured in the
same process, the copy and read bandwidth of the machine (``extra_info``), the error against float64
and the bytes gathered per second, so that runs compare as ratios.
"""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from fastclust import Graph, ops

# name: nodes, stored entries, columns
CASES = {
    "amac-600": (13_752, 491_722, 600),
    "amac-64": (13_752, 491_722, 64),
    "large-128": (200_000, 10_000_000, 128),
}


@functools.lru_cache(maxsize=1)
def community_graph(n: int, n_entries: int, n_communities: int = 10) -> sp.csr_array:
    """A symmetric graph with about n_entries entries, power-law degrees and communities."""
    rng = np.random.default_rng(0)
    community = rng.integers(0, n_communities, n)
    order = np.argsort(community, kind="stable")
    weight = np.cumsum(((rng.permutation(n) + 10.0) ** -0.5)[order])
    edges = np.searchsorted(community[order], np.arange(n_communities + 1))
    total = np.concatenate([[0.0], weight])[edges]

    def draw(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        points = low + rng.random(len(low)) * (high - low)
        return order[np.searchsorted(weight, points, side="right").clip(0, n - 1)]

    m = n_entries // 2 * 115 // 100
    everywhere = np.zeros(m), np.full(m, weight[-1])
    u = draw(*everywhere)
    inside = rng.random(m) < 0.8
    low = np.where(inside, total[community[u]], 0.0)
    high = np.where(inside, total[community[u] + 1], weight[-1])
    v = draw(low, high)
    keys = np.unique((np.minimum(u, v) * n + np.maximum(u, v))[u != v])
    keys = rng.permutation(keys)[: n_entries // 2]
    upper = sp.coo_array((np.ones(len(keys), np.float32), (keys // n, keys % n)), shape=(n, n))
    return sp.csr_array(upper + upper.T, dtype=np.float32)


@functools.cache
def bandwidth() -> dict[str, float]:
    """Copy (read + write) and read rate of memory in GB/s, best of five."""
    x = torch.ones(32 * 2**20)
    y = torch.empty_like(x)
    best = {"copy_gb_s": 0.0, "read_gb_s": 0.0}
    for _ in range(5):
        start = time.perf_counter()
        y.copy_(x)
        middle = time.perf_counter()
        x.sum()
        end = time.perf_counter()
        best["copy_gb_s"] = max(best["copy_gb_s"], 8 * x.numel() / (middle - start) / 1e9)
        best["read_gb_s"] = max(best["read_gb_s"], 4 * x.numel() / (end - middle) / 1e9)
    return best


def fastclust_call(adjacency: sp.csr_array, h: torch.Tensor):
    graph = Graph(adjacency)
    return lambda: ops.propagate(graph, h, residual=h, activation="relu")


def normalised(adjacency: sp.csr_array) -> sp.csr_array:
    with_loops = sp.csr_array(adjacency + sp.eye_array(adjacency.shape[0], dtype=np.float32))
    inverse = sp.diags_array(1.0 / np.asarray(with_loops.sum(axis=1)).reshape(-1))
    return sp.csr_array(inverse @ with_loops).astype(np.float32)


def torch_call(adjacency: sp.csr_array, h: torch.Tensor):
    matrix = normalised(adjacency)
    csr = torch.sparse_csr_tensor(
        torch.from_numpy(matrix.indptr).long(),
        torch.from_numpy(matrix.indices).long(),
        torch.from_numpy(matrix.data),
        size=matrix.shape,
        check_invariants=False,
    )
    return lambda: torch.relu(torch.sparse.mm(csr, h) + h)


def scipy_call(adjacency: sp.csr_array, h: torch.Tensor):
    matrix, array = normalised(adjacency), h.numpy()
    return lambda: torch.from_numpy(np.maximum(matrix @ array + array, 0))


CALLS = {"fastclust": fastclust_call, "torch": torch_call, "scipy": scipy_call}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("peer", CALLS)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, peer, threads, benchmark):
    n, n_entries, d = CASES[case]
    adjacency = community_graph(n, n_entries)
    h = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = CALLS[peer](adjacency, h)
        rows = np.linspace(0, n - 1, 200, dtype=int)  # enough to judge the error by
        exact = normalised(adjacency)[rows].astype(np.float64) @ h.double().numpy()
        exact = np.maximum(exact + h.double().numpy()[rows], 0)
        error = np.abs(call()[rows].double().numpy() - exact).max()
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(before)
    gathered = 4 * (adjacency.nnz * (d + 1) + 2 * n * d)
    benchmark.extra_info |= {
        "max_error": float(error),
        "gather_gb_s": gathered / benchmark.stats.stats.min / 1e9,
        **bandwidth(),
    }


@pytest.mark.parametrize("peer", ["fastclust", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, peer, benchmark):
    n, n_entries, d = CASES[case]
    h = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.ones(n, d)
    call = CALLS[peer](community_graph(n, n_entries), h)
    benchmark.pedantic(lambda: torch.autograd.grad(call(), h, grad), rounds=3, warmup_rounds=1)
    benchmark.extra_info |= bandwidth()
