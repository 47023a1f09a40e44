"""Time of the InfoNCE loss, forward and backward, beside its peers in the same process.

Peers: the dense formulation in eager torch, torch.compile of it, and the machine's own limits: the
measured FMA rate of a core and torch's matrix product. Random unit rows, dz = de = 500, 70 % of the
nodes confident, weights on::

    pytest benchmarks/test_infonce.py                      # N = 2708
    FASTCLUST_BENCH_LONG=1 pytest benchmarks/test_infonce.py  # also N = 7650 and 13752

``extra_info`` of each result holds Gflop/s, counted as 4 M^2 D plus 2 M^2 D for the share of pairs
that need a separate snapshot, and that rate as a share of the FMA rate times the threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastclust import _C, ops

LONG = bool(os.environ.get("FASTCLUST_BENCH_LONG"))
SIZES = [2708, 7650, 13752] if LONG else [2708]
DENSE_LIMIT = 8000  # the dense peers hold about six arrays of 2N x 2N: 35 GB at N = 13752
WIDTH = 500
CONFIDENT = 0.7
LEVELS = [
    name for name in ("avx512", "avx2", "portable") if name == "portable" or _C.cpu_features()[name]
]


class Problem:
    """Random inputs of one size, with weights from an older snapshot and from the current state."""

    def __init__(self, n: int, beta: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def rows() -> Tensor:
            return normalize(torch.randn(2 * n, WIDTH, generator=generator), dim=1)

        self.n = n
        self.z, self.e = rows().requires_grad_(), rows().requires_grad_()
        self.alpha = torch.tensor(0.7, requires_grad=True)
        self.labels = torch.randint(0, 7, (n,), generator=generator)
        self.confident = torch.rand(n, generator=generator) < CONFIDENT
        self.beta = beta
        self.old = (rows(), rows(), 0.69)

    def weights(self, kind: str) -> Any:
        """None, or weights of a separate snapshot, or of the current embeddings."""
        if kind == "none":
            return None
        views = self.old if kind == "snapshot" else (self.z, self.e, self.alpha)
        return ops.hardness(*views, self.labels, self.confident, self.beta)

    def gflop(self, kind: str) -> float:
        """Work of one step."""
        products = 4 + (2 * CONFIDENT**2 if kind == "snapshot" else 0)
        return products * (2 * self.n) ** 2 * 2 * WIDTH / 1e9

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Forward and backward."""
        self.z.grad = self.e.grad = self.alpha.grad = None
        loss(self.z, self.e, self.alpha).backward()


def dense_loss(z: Tensor, e: Tensor, alpha: Tensor, w: Tensor) -> Tensor:
    """The straightforward formulation, written to keep few 2N x 2N arrays alive."""
    m = z.shape[0]
    logits = w * (alpha * (z @ z.T) + (1 - alpha) * (e @ e.T))
    positive = torch.cat([logits.diagonal(m // 2), logits.diagonal(-(m // 2))])
    p = logits.exp()
    return ((p.sum(1) - p.diagonal()).log() - positive).mean()


@pytest.fixture(params=[1, torch.get_num_threads()] if torch.get_num_threads() > 1 else [1])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads that torch and the kernels may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Dispatch level of the kernels."""
    before = _C.cpu_level()
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level(before)


def record(benchmark: Any, gflop: float, threads: int) -> None:
    """State the rate, and its share of the FMA rate measured beside it."""
    rate = gflop / benchmark.stats.stats.min
    peak = _C.fma_peak_gflops() * threads
    benchmark.extra_info.update(gflops=rate, fma_peak=peak, share_of_peak=rate / peak)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("kind", "beta"), [("none", 1.0), ("current", 1.0), ("snapshot", 1.0), ("snapshot", 2.0)]
)
def test_fastclust(
    benchmark: Any, n: int, kind: str, beta: float, threads: int, level: str
) -> None:
    """This package, at each dispatch level."""
    if n > 2708 and level != LEVELS[0]:
        pytest.skip("lower levels are timed at N = 2708")
    problem = Problem(n, beta)
    weights = problem.weights(kind)
    benchmark.group = f"loss N={n} threads={threads}"
    benchmark.pedantic(
        problem.step,
        args=(lambda z, e, a: ops.hard_infonce(z, e, a, weights=weights),),
        rounds=3,
        warmup_rounds=1 if n == 2708 else 0,
    )
    record(benchmark, problem.gflop(kind), threads)


@pytest.mark.parametrize("n", [n for n in SIZES if n <= DENSE_LIMIT])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_dense(benchmark: Any, n: int, how: str, threads: int) -> None:
    """The dense peers, their weights given to them ready-made."""
    problem = Problem(n, 1.0)
    w = ops.dense_weights(problem.weights("snapshot"))
    loss = torch.compile(dense_loss) if how == "compiled" else dense_loss
    benchmark.group = f"loss N={n} threads={threads}"
    benchmark.pedantic(
        problem.step,
        args=(lambda z, e, a: loss(z, e, a, w),),
        rounds=3 if n == 2708 else 1,
        warmup_rounds=1 if n == 2708 or how == "compiled" else 0,
    )
    record(benchmark, problem.gflop("none"), threads)


def test_torch_matrix_product(benchmark: Any, threads: int) -> None:
    """The library product that the dense peers stand on."""
    a = torch.randn(4096, 4096)
    benchmark.group = f"matrix product threads={threads}"
    benchmark.pedantic(torch.mm, args=(a, a), rounds=3, warmup_rounds=1)
    record(benchmark, 2 * 4096**3 / 1e9, threads)
