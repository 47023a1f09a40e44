"""Propagation against its peers: torch CSR (MKL) and scipy, with residual and relu, forward.

Run with ``pytest benchmarks/test_propagate.py``. Graphs are random with a power law of degrees and
ten communities (80 % of the edges inside), node ids shuffled. Every result carries, measured in the
same process (``extra_info``): the copy and read bandwidth of the machine, the rate at which it sums
random rows of the same size (``row_sum_gb_s``, the limit), the error against float64 and the bytes
gathered per second, so that runs compare as ratios.

``FASTCLUST_BENCH_LONG=1`` adds one step on 1M nodes and 100M stored entries (50M edges), d = 128,
in a process of its own, whose peak memory may be 10 % above its inputs and outputs.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

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


@functools.cache
def row_sum_rate(n: int, n_entries: int, d: int, threads: int) -> float:
    """GB/s at which torch's embedding_bag sums random rows of an [n, d] table, best of five."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(n, d, generator=generator)
    rows = torch.randint(n, (n_entries,), generator=generator, dtype=torch.int32)
    offsets = torch.arange(n, dtype=torch.int64).mul(n_entries).div(n, rounding_mode="floor")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    try:
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.embedding_bag(rows, table, offsets.int(), mode="sum")
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 4 * (n_entries * (d + 1) + n * d) / min(seconds) / 1e9


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
        "row_sum_gb_s": row_sum_rate(n, n_entries, d, threads),
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


STEP = """
import sys

import numpy as np
import scipy.sparse as sp
import torch

from fastclust import Graph, ops

N, HALF, D = 1_000_000, 50, 128


def status(key):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def graph():
    # node i is joined to i + s and i - s for 50 steps s: 100 neighbours each
    steps = np.random.default_rng(0).choice(np.arange(1, N // 2), HALF, replace=False)
    steps = np.concatenate([steps, -steps])
    indices = np.empty((N, 2 * HALF), np.int32)
    for rows in np.array_split(np.arange(N), 100):
        indices[rows] = np.sort((rows[:, None] + steps) % N, axis=1)
    indptr = np.arange(0, 2 * HALF * (N + 1), 2 * HALF, dtype=np.int32)
    data = np.ones(indices.size, np.float32)
    return Graph(sp.csr_array((data, indices.reshape(-1), indptr), shape=(N, N)))


ops.propagate(Graph(np.eye(4, k=1) + np.eye(4, k=-1)), torch.ones(4, 16))  # libraries, threads
before = status("VmRSS")
graph = graph()
h = torch.randn(N, D)
inputs = [graph.indptr, graph.indices, graph.row_scale, h]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
with torch.no_grad():
    out = ops.propagate(graph, h, residual=h, activation="relu")
size = sum(t.numel() * t.element_size() for t in [*inputs, out])
print(size, status("VmHWM") - before, float(out.mean()))
"""


@pytest.mark.skipif(
    not os.environ.get("FASTCLUST_BENCH_LONG"), reason="FASTCLUST_BENCH_LONG=1 asks for it"
)
def test_memory_of_one_step_at_a_million_nodes(record_property):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a part of a process is read from Linux's /proc")
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size, peak, _ = done.stdout.split()
    report = {"inputs_and_outputs_mb": int(size) / 1e6, "peak_mb": int(peak) / 1e6}
    for name, value in report.items():
        record_property(name, value)
    print(report)
    assert int(peak) <= 1.1 * int(size)
