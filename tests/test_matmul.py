"""The dense product: values, gradients, refusals. Shapes and edges of its kernel: test_gemm.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import bound
from torch import Tensor

from fastclust import ops, reference


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wide(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.longdouble)


VECTORS = [(1, 70, 300), (50, 1, 301), (4100, 1, 7), (1, 4100, 300), (5, 1, 1), (1, 3, 2000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 0), (50, 70, 300), (60, 49, 2000), *VECTORS])
def test_against_the_twin(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Plain, transposed and every-other-row factors, with and without bias and memory given."""
    m, n, k = shape
    bias = randn(n, dtype=dtype, seed=2)
    plain = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)
    turned = randn(k, m, dtype=dtype).t(), randn(n, k, dtype=dtype, seed=1).t()
    spread = randn(2 * m, k, dtype=dtype)[::2], randn(k, 2 * n, dtype=dtype, seed=1)[:, ::2]
    for a, b in (plain, turned, spread):
        for extra in (None, bias):
            expected = wide(a) @ wide(b) + (0 if extra is None else wide(extra))
            in_torch = wide(reference.matmul(a, b, extra))
            largest = float(np.abs(expected).max())
            allowed = bound("matmul", float(np.abs(in_torch - expected).max()), largest, dtype)
            out = torch.full((m, n), torch.nan, dtype=dtype)
            for got in (ops.matmul(a, b, bias=extra), ops.matmul(a, b, bias=extra, out=out)):
                assert got.is_contiguous()
                assert got.shape == (m, n)
                assert np.abs(wide(got) - expected).max() <= allowed
            assert got is out


def test_a_bias_of_any_stride() -> None:
    a, b = randn(4, 3), randn(3, 5, seed=1)
    for bias in (randn(1).expand(5), randn(10)[::2]):
        torch.testing.assert_close(ops.matmul(a, b, bias=bias), a @ b + bias)
        out = torch.empty(4, 5)
        torch.testing.assert_close(ops.matmul(a, b, bias=bias, out=out), a @ b + bias)


def test_gradcheck_and_opcheck() -> None:
    a, b, bias = (
        x.requires_grad_()
        for x in (
            randn(4, 3, dtype=torch.float64),
            randn(3, 5, dtype=torch.float64, seed=1),
            randn(5, dtype=torch.float64, seed=2),
        )
    )
    assert torch.autograd.gradcheck(lambda a, b, c: ops.matmul(a, b, bias=c), (a, b, bias))
    assert torch.autograd.gradgradcheck(ops.matmul, (a, b))
    for extra in (None, bias):
        torch.library.opcheck(torch.ops.fastclust.matmul.default, (a, b, extra))
    out = torch.empty(4, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.fastclust.matmul_out.default, (out, a, b, None))


def test_only_the_gradients_that_are_needed() -> None:
    a, b = randn(20, 30), randn(30, 10, seed=1).requires_grad_()
    (got,) = torch.autograd.grad(ops.matmul(a, b).square().sum(), b)
    (want,) = torch.autograd.grad((a @ b).square().sum(), b)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bf16_error_is_the_stated_one() -> None:
    a, b, bias = randn(100, 400), randn(400, 60, seed=1), randn(60, seed=2)
    full = a.double() @ b.double() + bias
    out = torch.empty(100, 60)
    for got in (
        ops.matmul(a, b, bias=bias, precision="bf16"),
        ops.matmul(a, b, bias=bias, out=out, precision="bf16"),
    ):
        assert got.dtype == torch.float32
        assert 1e-4 < float((got - full).norm() / full.norm()) < 4e-3


def test_same_bits_for_any_thread_count() -> None:
    a, b = randn(2000, 300), randn(2000, 130, seed=1)
    x, y = randn(1, 2000, seed=2), randn(300, 1, seed=3)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            factors = ((a.t(), b), (x, a), (a, y), (a.t(), x.t()), (y.t(), a.t()))
            results.append([ops.matmul(*pair) for pair in factors])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_a_vector_does_not_depend_on_the_rows_beside_it() -> None:
    a, x = randn(1000, 77), randn(77, 1, seed=1)
    whole = ops.matmul(a, x)
    for begin, end in ((0, 1), (3, 8), (5, 999)):
        assert torch.equal(ops.matmul(a[begin:end], x), whole[begin:end])


def test_refusals_name_the_argument() -> None:
    a, b = randn(3, 4), randn(4, 5)
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got list"):
        ops.matmul(a, [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a must be float32 or float64, got torch\.int64"):
        ops.matmul(a.long(), b)
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[5, 4\]"):
        ops.matmul(a, b.t())
    with pytest.raises(ValueError, match=r"bias must have shape \[5\], got \[3\]"):
        ops.matmul(a, b, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="b must have the dtype and device of a"):
        ops.matmul(a, b.double())
    with pytest.raises(ValueError, match="out must be contiguous"):
        ops.matmul(a, b, out=torch.empty(5, 3).t())
    with pytest.raises(ValueError, match="out takes no part in autograd"):
        ops.matmul(a.requires_grad_(), b, out=torch.empty(3, 5))
