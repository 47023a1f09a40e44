"""Time of the InfoNCE loss, forward and backward, beside its peers in the same process.

Peers: the dense formulation in eager torch, torch.compile of it, and the machine's own limits: the
measured FMA rate of a core and torch's matrix product. Random unit rows, dz = de = 500, 70 % of the
nodes confident, weights on::

    pytest benchmarks/test_infonce.py                      # N = 2708
    FASTCLUST_BENCH_LONG=1 pytest benchmarks/test_infonce.py  # also N = 7650 and 13752

``extra_info`` of each result holds Gflop/s, counted as 4 M^2 D plus 2 M^2 D for the share of pairs
that need a separate snapshot, and that rate as a share of the float32 FMA rate times the threads,
read right before and after (bf16 dot products run at twice the FMA rate on Zen 4). Peak memory of a
step stands in ``extra_info`` of ``test_peak_memory``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastclust import _C, ops

LONG = bool(os.environ.get("FASTCLUST_BENCH_LONG"))
SIZES = [2708, 7650, 13752] if LONG else [2708]
DENSE_LIMIT = 8000  # the dense peers hold about six arrays of 2N x 2N: 18 GB at N = 13752
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


def timed(
    benchmark: Any, gflop: float, threads: int, step: Callable[[], object], rounds: int, warmup: int
) -> None:
    """Time a step; state its rate, and its share of the FMA rate measured before and after."""
    peaks = [_C.fma_peak_gflops()]
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=warmup)
    peaks.append(_C.fma_peak_gflops())
    rate = gflop / benchmark.stats.stats.median
    peak = sum(peaks) / 2 * threads
    benchmark.extra_info.update(gflops=rate, fma_peak=peak, share_of_peak=rate / peak)


KINDS = [("none", 1.0), ("current", 1.0), ("snapshot", 1.0), ("snapshot", 2.0)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fastclust(
    benchmark: Any, n: int, kind: str, beta: float, precision: str, threads: int
) -> None:
    """This package at the best dispatch level."""
    problem = Problem(n, beta)
    weights = problem.weights(kind)
    benchmark.group = f"loss N={n} threads={threads}"

    def loss(z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
        return ops.hard_infonce(z, e, alpha, weights=weights, precision=precision)

    small = n == SIZES[0]
    gflop = problem.gflop(kind)
    timed(benchmark, gflop, threads, lambda: problem.step(loss), 3 if small else 1, int(small))


@pytest.mark.parametrize("kind", ["none", "snapshot"])
def test_level(benchmark: Any, kind: str, threads: int, level: str) -> None:
    """The dispatch levels, N = 2708."""
    problem = Problem(SIZES[0], 1.0)
    weights = problem.weights(kind)
    benchmark.group = f"levels threads={threads}"

    def loss(z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
        return ops.hard_infonce(z, e, alpha, weights=weights)

    timed(benchmark, problem.gflop(kind), threads, lambda: problem.step(loss), 2, 0)


@pytest.mark.parametrize("n", [n for n in SIZES if n <= DENSE_LIMIT])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_dense(benchmark: Any, n: int, how: str, threads: int) -> None:
    """The dense peers, their weights given to them ready-made."""
    problem = Problem(n, 1.0)
    w = ops.dense_weights(problem.weights("snapshot"))
    dense = torch.compile(dense_loss) if how == "compiled" else dense_loss
    benchmark.group = f"loss N={n} threads={threads}"
    small = n == SIZES[0]
    timed(
        benchmark,
        problem.gflop("none"),
        threads,
        lambda: problem.step(lambda z, e, a: dense(z, e, a, w)),
        3 if small else 1,
        int(small or how == "compiled"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_matrix_product(benchmark: Any, dtype: torch.dtype, threads: int) -> None:
    """The library product that the dense peers stand on."""
    a = torch.randn(4096, 4096).to(dtype)
    benchmark.group = f"matrix product threads={threads}"
    timed(benchmark, 2 * 4096**3 / 1e9, threads, lambda: torch.mm(a, a), 3, 1)


PEAK_MEMORY = """
import sys
sys.path.insert(0, "benchmarks")
from test_infonce import Problem
from fastclust import ops
from fastclust.memory import peak_memory
before = peak_memory()["peak_memory_bytes"]
problem = Problem(int(sys.argv[1]), 1.0)
weights = problem.weights("snapshot")
problem.old = ()
problem.step(
    lambda z, e, a: ops.hard_infonce(z, e, a, weights=weights, precision=sys.argv[2])
)
print(before, peak_memory()["peak_memory_bytes"])
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak_memory(benchmark: Any, precision: str) -> None:
    """Resident bytes that a step with snapshot weights takes, its inputs and gradients included.

    In a fresh process; what the imported libraries take (``import_bytes``) is not the step's.
    """
    n = SIZES[-1]
    benchmark.group = f"peak memory N={n}"
    command = [sys.executable, "-c", PEAK_MEMORY, str(n), precision]

    def run() -> list[int]:
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return [int(word) for word in done.stdout.split()]

    before, peak = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(import_bytes=before, step_bytes=peak - before)
    assert peak - before < 1e9
