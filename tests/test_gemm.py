"""The matrix product inside the CPU kernels, against numpy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastclust import _C

LEVELS = [
    name for name in ("portable", "avx2", "avx512") if name == "portable" or _C.cpu_features()[name]
]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test at one dispatch level."""
    before = _C.cpu_level()
    assert _C.set_cpu_level(request.param) == request.param
    yield request.param
    _C.set_cpu_level(before)


def strided(rng: np.random.Generator, shape: tuple[int, int], form: str, dtype: type) -> np.ndarray:
    """A matrix whose memory is laid out in one of four ways."""
    m, n = shape
    if form == "rows":
        return rng.normal(size=(m, n)).astype(dtype)
    if form == "columns":
        return rng.normal(size=(n, m)).astype(dtype).T
    if form == "padded":
        return rng.normal(size=(m, n + 3)).astype(dtype)[:, :n]
    return rng.normal(size=(2 * m, 2 * n)).astype(dtype)[::2, ::2]  # "both"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("parallel", [False, True])
def test_shapes(level: str, dtype: type, parallel: bool) -> None:
    """Every edge of the register tile, the slivers and the blocks."""
    rng = np.random.default_rng(0)
    sizes_m, sizes_n, sizes_k = (1, 3, 8, 9, 191, 193), (1, 15, 17, 48, 49, 193), (1, 7, 256, 257)
    forms = itertools.cycle(itertools.product(("rows", "columns", "padded", "both"), repeat=2))
    scales = itertools.cycle([(1.0, 0.0), (1.5, 1.0), (-2.0, 0.5)])
    eps = np.finfo(dtype).eps
    for m, n, k in itertools.product(sizes_m, sizes_n, sizes_k):
        form_a, form_b = next(forms)
        alpha, beta = next(scales)
        a, b = strided(rng, (m, k), form_a, dtype), strided(rng, (k, n), form_b, dtype)
        c = strided(rng, (m, n), "padded", dtype)
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        expected = alpha * wide_a @ wide_b + beta * c.astype(np.float64)
        bound = (
            eps * (k + 2) * (abs(alpha) * np.abs(wide_a) @ np.abs(wide_b) + abs(beta) * np.abs(c))
        )
        if beta == 0:
            c[:] = np.nan  # must not be read
        _C.gemm(alpha, a, b, beta, c, parallel=parallel)
        assert np.all(np.abs(c - expected) <= bound), (m, n, k, form_a, form_b)


def test_no_terms(level: str) -> None:
    """An empty sum leaves beta C."""
    c = np.full((3, 4), 2.0)
    _C.gemm(1.0, np.empty((3, 0)), np.empty((0, 4)), 0.5, c)
    assert np.array_equal(c, np.full((3, 4), 1.0))


def test_many_columns_and_terms(level: str) -> None:
    """More than one block of columns and of terms."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 600)), rng.normal(size=(600, 2000))
    c = np.empty((50, 2000))
    _C.gemm(1.0, a, b, 0.0, c, parallel=True)
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=1e-11)


def test_same_bits_for_any_thread_count(level: str) -> None:
    """The split of the work depends on sizes alone."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=(500, 300)).astype(np.float32)
    b = rng.normal(size=(300, 400)).astype(np.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            c = np.empty((500, 400), np.float32)
            _C.gemm(1.0, a, b, 0.0, c, parallel=True)
            results.append(c)
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(results[0], c) for c in results[1:])


def test_wrong_shapes() -> None:
    """Shapes that do not fit are named."""
    with pytest.raises(ValueError, match="shapes"):
        _C.gemm(1.0, np.zeros((2, 3)), np.zeros((4, 5)), 0.0, np.zeros((2, 5)))
