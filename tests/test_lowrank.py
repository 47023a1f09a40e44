"""Batched randomised SVD and low-rank reconstruction against exact float64 decompositions."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import bound

from fastclust import _C, ops, reference
from fastclust.datasets import load_dataset
from fastclust.ops import lowrank_device

READINGS = ("merge", "block", "per_batch", "literal")
fastclust_ops = torch.ops.fastclust


def decaying(n: int, d: int, decay: float = 0.9, seed: int = 0) -> torch.Tensor:
    """Random matrix float64 [n, d] with singular values decay^i, plus a mean."""
    g = torch.Generator().manual_seed(seed)
    k = min(n, d)
    u = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64)).Q
    s = 10 * decay ** torch.arange(k, dtype=torch.float64)
    return u * s @ v.T + torch.randn(d, generator=g, dtype=torch.float64)


def sparse_binary(n: int, d: int, density: float = 0.05, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, d, generator=g) < density).float()


def csr(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse_csr()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


# ----------------------------------------------------------------------------- against the twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "batch_size", "rank"),
    [(60, 20, None, 5), (60, 20, 16, 5), (61, 20, 20, 1), (130, 33, 64, 2), (40, 90, None, 12),
     (700, 24, 150, 24), (3, 5, None, 3), (2100, 17, None, 4)],
)  # fmt: skip
def test_matches_exact_svd(n, d, batch_size, rank, dtype):
    x = decaying(n, d, 0.5)
    got = ops.batched_svd(x.to(dtype), rank, batch_size=batch_size)
    eps = torch.finfo(dtype).eps
    for b, (u, s, vh, mean) in enumerate(reference.batched_svd(x, rank, batch_size)):
        torch_s = torch.linalg.svdvals((x.split(batch_size or n)[b] - mean).to(dtype))[:rank]
        allowed = bound("lowrank", float((torch_s - s).abs().max()), float(s.max()), dtype)
        solid = s > 64 * eps * s.max()
        assert (got.s[b][: len(s)] - s).abs().max() <= max(allowed, 1e-7 * float(s.max()))
        assert got.mean[b].double() == pytest.approx(mean, rel=4 * eps, abs=4 * eps)
        # Vectors are as well determined as their gap to the next singular value.
        wanted = u[:, solid] * s[solid] @ vh[solid]
        product = (got.u[b][: len(u)] * got.s[b] @ got.vh[b]).double()
        assert (product - wanted).abs().max() <= 2e-6 * float(s.max()) + 512 * eps * float(s.max())


def test_offsets_and_padding_of_a_ragged_batch():
    x = decaying(50, 12).float()
    svd = ops.batched_svd(x, 3, batch_size=20)
    assert svd.batch_offsets.tolist() == [0, 20, 40, 50]
    assert svd.u.shape == (3, 20, 3)
    assert svd.u[2, 10:].abs().max() == 0
    alone = ops.batched_svd(x[40:], 3)
    assert torch.allclose(svd.s[2], alone.s[0], rtol=1e-5)
    assert torch.allclose(svd.vh[2], alone.vh[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize("density", [0.02, 0.4])  # gathers; dense panels
def test_sparse_equals_dense(batch_size, density, dtype):
    x = sparse_binary(250, 60, density).to(dtype)
    dense = ops.batched_svd(x, 6, batch_size=batch_size, n_iter=16)
    sparse = ops.batched_svd(csr(x), 6, batch_size=batch_size, n_iter=16)
    scipy_csr = ops.batched_svd(sp.csr_array(x.numpy()), 6, batch_size=batch_size, n_iter=16)
    eps = torch.finfo(dtype).eps
    assert relative(sparse.s, dense.s) < 20 * eps
    assert relative(sparse.u * sparse.s[:, None] @ sparse.vh,
                    dense.u * dense.s[:, None] @ dense.vh) < 1e-3  # fmt: skip
    assert torch.equal(sparse.s, scipy_csr.s)
    assert torch.equal(sparse.u, scipy_csr.u)


@pytest.mark.parametrize("rank", [5, 20])
def test_error_is_near_the_eckart_young_bound(rank):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 120, generator=g)  # flat spectrum: the hard case
    centred = (x - x.mean(0)).double()
    best = torch.linalg.svdvals(centred)[rank:].norm()
    for source in (x, csr(x)):
        error = (centred - ops.low_rank(source, rank).to_dense().double()).norm()
        assert 1 - 1e-6 <= error / best < 1.005


@pytest.mark.parametrize("name", ["cora", "citeseer", "amap", "amac", "eat", "uat", "bat"])
@pytest.mark.slow
def test_error_on_the_graphs(name, data_root):
    x = load_dataset(name, root=data_root).features
    dense = torch.from_numpy(np.asarray(x.todense() if sp.issparse(x) else x)).double()
    centred = dense - dense.mean(0)
    energy = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).flip(0)
    for rank in (20, 40, 70, 95):
        if rank > min(x.shape):
            continue
        best = energy[rank:].sum().sqrt()
        error = (centred - ops.low_rank(x, rank).to_dense().double()).norm()
        assert error <= 1.005 * best + 1e-5 * energy[0].sqrt(), (rank, float(error / best - 1))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("n", "d", "batch"), [(4500, 200, 4500), (2100, 20, 2100), (300, 70, 128)])
def test_gram_matrix(n, d, batch, binary):
    """X_c^T X_c of every batch: several panels of rows, several tiles, any mean taken off."""
    x = decaying(n, d).float()
    x = (x > x.mean()).float() if binary else x
    mean = torch.stack([rows.mean(0) for rows in x.split(batch)]) + 0.125
    rows = csr(x)
    for source in (
        (x, None, None),
        (rows.values(), rows.crow_indices(), rows.col_indices().int()),
    ):
        got = fastclust_ops.lowrank_gram(*source, mean, d, batch)
        for b, part in enumerate(x.split(batch)):
            centred = part.double() - mean[b].double()
            wanted = centred.T @ centred
            assert relative(got[b], wanted) < 1e-6
            assert torch.equal(got[b], got[b].T)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 90),
    d=st.integers(1, 40),
    batch=st.one_of(st.none(), st.integers(1, 90)),
    rank=st.integers(1, 12),
    true_rank=st.integers(0, 40),
    density=st.sampled_from([0.05, 0.3, 1.0]),
    binary=st.booleans(),
    center=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_properties_of_any_matrix(n, d, batch, rank, true_rank, density, binary, center, seed):
    """Of every batch: orthonormal factors, the best error, exact zeros past the rank, signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, true_rank, generator=g) @ torch.randn(true_rank, d, generator=g)
    x = torch.where(torch.rand(n, d, generator=g) < density, x, 0.0)
    x = (x != 0).float() if binary else x
    size = min(batch or n, n)
    rank = min(rank, d, n % size or size)
    for source in (x, csr(x)):
        svd = ops.batched_svd(source, rank, batch_size=batch, center=center)
        for b, rows in enumerate(x.split(min(size, n))):
            u, s, vh = svd.u[b].double(), svd.s[b].double(), svd.vh[b].double()
            centred = rows.double() - (rows.double().mean(0) if center else 0)
            exact = torch.linalg.svdvals(centred)
            scale = max(float(rows.abs().max()) * (n * d) ** 0.5, 1e-6)
            best = float(exact[rank:].norm())
            error = float((centred - u[: len(rows)] * s @ vh).norm())
            assert error <= 1.01 * best + 1e-5 * scale
            assert (s.diff() <= 0).all() and (s >= 0).all()
            assert not u[len(rows) :].any()
            for factor in (u.T @ u, vh @ vh.T):
                lengths = factor.diagonal()
                assert (((lengths - 1).abs() < 1e-4) | (lengths == 0)).all()
                assert float((factor - torch.diag(lengths)).abs().max()) < 1e-4
            kept = vh[vh.abs().amax(1) > 0]
            assert (kept.gather(1, kept.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("n_iter", [0, 2, 4])
@pytest.mark.parametrize(("n", "d", "batch"), [(5, 7, None), (30, 40, None), (68, 40, 30)])
def test_batches_that_the_sketch_covers(n, d, batch, n_iter):
    """No more rows than its columns: exact to rounding, however small the last singular value.

    On the Gram matrix alone errors grow with the steps, up to 2e-3 here.
    """
    rank = min(batch or n, 30)
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g)
        svd = ops.batched_svd(x, rank, batch_size=batch, center=False, n_iter=n_iter)
        for b, rows in enumerate(x.split(batch or n)):
            found = (svd.u[b, : len(rows)].double() * svd.s[b].double()) @ svd.vh[b].double()
            assert float((rows.double() - found).norm()) <= 1e-6 * float(rows.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
def test_batches_of_few_rows_are_exact(layout, dtype):
    """A sketch of 20 columns would miss 1e-3 of these flat spectra."""
    x = torch.randn(95, 60, generator=torch.Generator().manual_seed(0), dtype=dtype)
    svd = ops.batched_svd(layout(x), 10, batch_size=30)
    for b, rows in enumerate(x.split(30)):
        rows = rows.double() - rows.double().mean(0)
        values = torch.linalg.svdvals(rows)[:10]
        kept = min(10, len(rows) - 1)  # the last batch has five rows
        tolerance = 20 * torch.finfo(dtype).eps * float(values[0])
        torch.testing.assert_close(svd.s[b, :kept].double(), values[:kept], rtol=0, atol=tolerance)
        best = float((rows.square().sum() - values.square().sum()).clamp(min=0).sqrt())
        found = (svd.u[b, : len(rows)].double() * svd.s[b].double()) @ svd.vh[b].double()
        assert float((rows - found).norm()) <= best + tolerance


def test_signs_and_order():
    svd = ops.batched_svd(decaying(80, 15).float(), 6, batch_size=30)
    assert (svd.s.diff(dim=1) <= 0).all()
    assert (svd.vh.gather(2, svd.vh.abs().argmax(2, keepdim=True)) > 0).all()


def test_without_centring_means_are_zero():
    x = decaying(40, 10)
    svd = ops.batched_svd(x, 10, center=False)
    assert svd.mean.abs().max() == 0
    assert torch.allclose(svd.s[0], torch.linalg.svdvals(x), rtol=1e-10)


def test_large_means_cost_no_accuracy():
    x = decaying(200, 20)
    moved = (x + 1000).float()
    exact = torch.linalg.svdvals(moved.double() - moved.double().mean(0))[:5]
    got = ops.batched_svd(moved, 5).s[0]
    assert relative(got, exact) < 1e-6


# --------------------------------------------------------------------------------- recombination


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("add_mean", [False, True])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("recombine", READINGS)
def test_readings_match_their_definitions(recombine, center, add_mean, dtype):
    x = decaying(70, 18, 0.6)
    x[20:40] *= 3
    kwargs = {"batch_size": 20, "recombine": recombine, "center": center, "add_mean": add_mean}
    wanted = reference.low_rank(x, 4, **kwargs)
    got = ops.low_rank(x.to(dtype), 4, **kwargs, n_iter=6)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert relative(got.to_dense(), wanted) < tolerance
    weight = torch.randn(18, 3, dtype=dtype)
    assert relative(got.matmul(weight), wanted @ weight.double()) < tolerance
    product = got.left @ got.right
    if add_mean and got.mean is not None:
        mean = got.mean
        product += mean if mean.dim() == 1 else mean.repeat_interleave(20, 0)[:70]
    assert relative(product, wanted) < tolerance
    if recombine != "per_batch":
        assert got.left.shape == (70, 4)


@pytest.mark.parametrize("recombine", READINGS)
def test_one_batch_makes_all_readings_equal(recombine):
    x = decaying(50, 12).float()
    plain = ops.low_rank(x, 5).to_dense()
    assert torch.equal(ops.low_rank(x, 5, recombine=recombine, batch_size=50).to_dense(), plain)
    assert relative(plain, reference.low_rank(x.double(), 5)) < 1e-4


def test_literal_mixes_batches_and_merge_does_not():
    x = decaying(90, 20, 0.95)
    centred = x - x.mean(0)
    error = {
        m: (centred - ops.low_rank(x, 6, batch_size=30, recombine=m).to_dense()).norm()
        for m in ("merge", "literal")
    }
    assert error["merge"] < centred.norm() < 2 * error["literal"]
    assert error["merge"] < error["literal"]


def test_matmul_is_differentiable_in_the_weight():
    for recombine in READINGS:
        factors = ops.low_rank(
            decaying(30, 8), 3, batch_size=12, recombine=recombine, add_mean=True
        )
        weight = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(factors.matmul, (weight,))


@pytest.mark.parametrize("recombine", READINGS)
def test_factors_multiply_to_the_whole(recombine):
    x = decaying(30, 8)
    for add_mean in (False, True):
        low = ops.low_rank(x, 3, batch_size=12, recombine=recombine, add_mean=add_mean)
        if add_mean and recombine != "merge":  # every batch has its own
            with pytest.raises(ValueError, match="add_mean must be False"):
                low.factors()
            continue
        left, right = low.factors()
        torch.testing.assert_close(left @ right, low.to_dense())


@pytest.mark.parametrize("recombine", READINGS)
def test_matmul_compiles(recombine):
    factors = ops.low_rank(decaying(30, 8).float(), 3, batch_size=12, recombine=recombine)
    weight = torch.randn(8, 2, requires_grad=True)
    compiled = torch.compile(lambda w: factors.matmul(w).square().sum(), backend="aot_eager")
    compiled(weight).backward()
    grad, weight.grad = weight.grad, None
    factors.matmul(weight).square().sum().backward()
    assert torch.allclose(grad, weight.grad, rtol=1e-5)


def test_matmul_checks_its_argument():
    factors = ops.low_rank(decaying(30, 8).float(), 3)
    with pytest.raises(ValueError, match=r"weight must have shape \[D, k\] with D = 8"):
        factors.matmul(torch.zeros(7, 2))
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got ndarray"):
        factors.matmul(np.ones((8, 2)))
    with pytest.raises(TypeError, match=r"weight must be torch\.float32"):
        factors.matmul(torch.zeros(8, 2, dtype=torch.float64))


# ------------------------------------------------------------------------------- degenerate data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_constant_data_give_exact_zeros(value, layout, dtype):
    x = layout(torch.full((50, 7), value, dtype=dtype))
    for batch_size in (None, 16):
        svd = ops.batched_svd(x, 2, batch_size=batch_size)
        assert not svd.s.any() and not svd.u.any() and not svd.vh.any()
    for recombine in READINGS:
        factors = ops.low_rank(x, 2, batch_size=16, recombine=recombine)
        assert not factors.to_dense().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
def test_rank_deficient_data_end_in_exact_zeros(layout, dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(80, 3, generator=g, dtype=dtype) @ torch.randn(3, 30, generator=g, dtype=dtype)
    x = x - x.mean(0)
    svd = ops.batched_svd(layout(x), 8, batch_size=40)
    assert (svd.s[:, :3] > 0).all()
    assert not svd.s[:, 3:].any() and not svd.u[:, :, 3:].any() and not svd.vh[:, 3:].any()
    assert torch.isfinite(svd.u).all() and torch.isfinite(svd.vh).all()
    dense = ops.low_rank(layout(x), 8).to_dense()
    assert relative(dense, x) < 40 * torch.finfo(dtype).eps


def test_single_rows_and_single_columns():
    assert not ops.low_rank(torch.randn(1, 5), 1).to_dense().any()
    x = torch.randn(1, 5)
    whole = ops.low_rank(x, 1, center=False).to_dense()
    assert torch.allclose(whole, x, atol=1e-6)
    assert torch.allclose(ops.low_rank(x, 1, add_mean=True).to_dense(), x)
    column = torch.randn(20, 1)
    assert torch.allclose(ops.low_rank(column, 1, add_mean=True).to_dense(), column, atol=1e-6)
    every_row_alone = ops.batched_svd(torch.randn(4, 3), 1, batch_size=1)
    assert not every_row_alone.s.any()


def test_constant_columns_stay_out_of_the_vectors():
    x = decaying(60, 9).float()
    x[:, 4] = 3.7
    svd = ops.batched_svd(x, 4)
    assert svd.vh[0, :, 4].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e2, 1e5, 1e7])
def test_orthonormality_at_any_condition(condition, dtype):
    n, width = 1024, 105
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(2, n, width, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(2, width, width, generator=g, dtype=torch.float64)).Q
    s = condition ** -torch.linspace(0, 1, width, dtype=torch.float64)
    y = (u * s @ v.mT).to(dtype)
    q, _ = fastclust_ops.lowrank_orthonormalize(y, None, None, 0.0, 2)
    left, values, right = fastclust_ops.lowrank_thin_svd(y, width)
    eye, eps = torch.eye(width, dtype=torch.float64), torch.finfo(dtype).eps
    for basis in (q, left):
        basis = basis.double()
        assert (basis.mT @ basis - eye).abs().max() < 16 * eps
        assert relative(basis @ (basis.mT @ y.double()), y) < 4 * eps + 1e-15
    assert (right @ right.mT - eye).abs().max() < 1e-12 + 0.1 * eps
    assert relative((left.double() * values[:, None]) @ right, y) < 4 * eps + 5e-14
    assert (values - torch.linalg.svdvals(y.double())).abs().max() < 4 * eps + 5e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thin_svd_of_dependent_columns(dtype):
    g = torch.Generator().manual_seed(0)
    y = torch.randn(3, 90, 21, generator=g, dtype=dtype)
    y[1, :, 5] = y[1, :, 6]
    y[2] = 0
    u, s, vt = fastclust_ops.lowrank_thin_svd(y, 21)
    eps = torch.finfo(dtype).eps
    scale = float(s.max())
    assert (s - torch.linalg.svdvals(y.double())).abs().max() < 16 * eps * scale
    assert (u.double() * s[:, None] @ vt - y).abs().max() < 16 * eps * scale
    eye = torch.eye(21, dtype=torch.float64)
    assert (u[0].double().T @ u[0].double() - eye).abs().max() < 16 * eps
    assert (u[1, :, :20].double().T @ u[1, :, :20].double() - eye[1:, 1:]).abs().max() < 16 * eps
    assert not vt[2].any() and not u[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_of_a_step_stays_below_the_eigenvalue(dtype):
    """What the shifts rest on: never above the l-th eigenvalue, and near it after a few steps."""
    values = 0.95 ** torch.arange(60, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64)).Q
    c = ((basis * values) @ basis.T).to(dtype)[None]
    v, bound = fastclust_ops.lowrank_normal(c, 1, 0, 60, 12, 0), None
    for root in (0.0, 0.1, 0.4, 0.9, 0.5):
        known = bound
        v, bound = fastclust_ops.lowrank_orthonormalize(c @ v, v, bound, root, 1)
        if root > 0.5:
            assert torch.equal(bound, known)
        assert 0 < float(bound) < 1.001 * float(values[11])
    assert float(bound) > 0.8 * float(values[11])


# ----------------------------------------------------------------------------------- determinism


def everything(x: torch.Tensor, **kwargs) -> list[torch.Tensor]:
    svd = ops.batched_svd(x, 9, **kwargs)
    return [svd.u, svd.s, svd.vh, svd.mean]


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
@pytest.mark.parametrize(("density", "n", "batch_size"), [(0.05, 2500, None), (0.3, 900, 90)])
def test_same_bits_for_any_number_of_threads(layout, density, n, batch_size):
    x = layout(sparse_binary(n, 70, density))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(x, batch_size=batch_size))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_seeds_and_batches_have_numbers_of_their_own():
    like = torch.empty(0)
    numbers = fastclust_ops.lowrank_normal(like, 2, 0, 300, 40, 7)
    assert torch.equal(numbers[1:], fastclust_ops.lowrank_normal(like, 1, 1, 300, 40, 7))
    assert not torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers, fastclust_ops.lowrank_normal(like, 2, 0, 300, 40, 8))
    assert abs(float(numbers.mean())) < 1e-3
    assert float(numbers.std()) * (300**0.5 + 40**0.5) == pytest.approx(1, abs=0.03)
    assert 0.9 < float(torch.linalg.matrix_norm(numbers, 2).max()) < 1.05
    x = sparse_binary(200, 40)
    assert all(map(torch.equal, everything(x, seed=3), everything(x, seed=3)))
    assert not torch.equal(everything(x, seed=3)[0], everything(x, seed=4)[0])


def test_a_batch_does_not_depend_on_its_company(monkeypatch):
    import fastclust.ops.lowrank as module

    x = sparse_binary(600, 30)
    for layout, batch in ((x, 100), (csr(x), 100), (x, 12), (csr(x), 12)):
        together = everything(layout, batch_size=batch)
        # groups of two batches
        monkeypatch.setattr(module, "_GRAM_BYTES", 2 * 30 * min(batch, 30) * 4)
        apart = everything(layout, batch_size=batch)
        monkeypatch.undo()
        assert all(map(torch.equal, together, apart))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
def test_more_batches_than_a_grid_has_blocks(monkeypatch, layout, center):
    import fastclust.ops.lowrank as module

    x = layout(sparse_binary(130, 30))  # 7 batches, the last a short one
    omega = torch.randn(7, 30, 12, generator=torch.Generator().manual_seed(0))
    native, seen = fastclust_ops, []

    class Watched:
        def __getattr__(self, name: str):
            def call(*args):
                out = getattr(native, name)(*args)
                seen.append(len(out if isinstance(out, torch.Tensor) else out[0]))
                return out

            return call

    for options in ({}, {"omega": omega}):
        together = everything(x, batch_size=20, center=center, **options)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_MOST_BATCHES", 3)
            patch.setattr(module.torch.ops, "fastclust", Watched())
            apart = everything(x, batch_size=20, center=center, **options)
        assert all(map(torch.equal, together, apart))
    assert max(seen) == 3


def test_omega_replaces_the_random_sketch():
    x = sparse_binary(100, 30)
    omega = fastclust_ops.lowrank_normal(x, 1, 0, 30, 19, 0)
    default, given = everything(x), everything(x, omega=omega)
    assert all(map(torch.equal, given, everything(x, omega=4 * omega[0], seed=5)))
    assert torch.allclose(default[1], given[1], rtol=1e-3)  # the same space, in another basis
    assert not torch.equal(given[0], everything(x, omega=torch.randn_like(omega))[0])
    with pytest.raises(ValueError, match="omega must have shape"):
        ops.batched_svd(x, 9, omega=omega[:, :, :5])
    with pytest.raises(TypeError, match=r"omega must be torch\.float32"):
        ops.batched_svd(x, 9, omega=omega.double())


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_dispatch_levels_agree(level):
    x = sparse_binary(300, 50)
    wanted = ops.low_rank(x, 6, n_iter=6).to_dense()
    before = _C.cpu_level()
    try:
        if _C.set_cpu_level(level) != level:
            pytest.skip(f"this processor has no {level}")
        for source in (x, csr(x)):
            assert relative(ops.low_rank(source, 6, n_iter=6).to_dense(), wanted) < 1e-4
    finally:
        _C.set_cpu_level(before)


# -------------------------------------------------------------------------------------- interface


def test_non_contiguous_and_other_inputs():
    x = decaying(40, 16).float()
    wanted = ops.batched_svd(x, 3)
    spread = torch.zeros(40, 32)
    spread[:, ::2] = x
    others = [spread[:, ::2], x.T.contiguous().T, x.numpy(), x.to_sparse_coo()]
    for other in others:
        got = ops.batched_svd(other, 3)
        assert torch.allclose(got.s, wanted.s, rtol=1e-5)
    whole = torch.randint(0, 2, (40, 16))
    assert torch.equal(ops.batched_svd(whole, 3).s, ops.batched_svd(whole.float(), 3).s)
    assert torch.equal(ops.batched_svd(whole.bool().numpy(), 3).s, ops.batched_svd(whole, 3).s)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rank": 9}, ValueError, "rank must not exceed the 8 columns"),
        ({"rank": 4, "batch_size": 3}, ValueError, "nor the 3 rows of a batch"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 2, "center": "no"}, TypeError, "center must be True or False"),
        ({"rank": 1.5}, ValueError, r"fractional rank must lie in \(0, 1\)"),
        ({"rank": "elbow"}, ValueError, "'gavish-donoho'"),
        ({"rank": None}, TypeError, "rank must be an integer"),
        ({"rank": True}, TypeError, "rank must be an integer"),
        ({"rank": 2, "batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"rank": 2, "n_iter": -1}, ValueError, "n_iter must be at least 0"),
        ({"rank": 2, "oversample": 1.5}, TypeError, "oversample must be an integer"),
        ({"rank": 2, "seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    for function in (ops.batched_svd, ops.low_rank):
        with pytest.raises(error, match=message):
            function(torch.randn(30, 8), **kwargs)


def test_add_mean_is_a_bool():
    with pytest.raises(TypeError, match="add_mean must be True or False, got 'no'"):
        ops.low_rank(torch.randn(30, 8), 2, add_mean="no")


def test_bad_data():
    x = torch.randn(30, 8)
    x[3, 4] = float("nan")
    for bad in (x, csr(x), x.numpy(), sp.csr_array(x.numpy())):
        with pytest.raises(ValueError, match=r"x must be finite.* got 1 bad"):
            ops.low_rank(bad, 2)
    with pytest.raises(ValueError, match="must not require grad"):
        ops.low_rank(torch.randn(5, 4, requires_grad=True), 2)
    with pytest.raises(ValueError, match="non-empty matrix"):
        ops.low_rank(torch.randn(5), 2)
    with pytest.raises(ValueError, match="non-empty matrix"):
        ops.low_rank(torch.randn(0, 5), 2)
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        ops.low_rank(torch.randn(5, 4).bfloat16(), 2)
    with pytest.raises(TypeError, match="got str"):
        ops.low_rank("x", 2)
    with pytest.raises(ValueError, match="recombine must be"):
        ops.low_rank(torch.randn(5, 4), 2, recombine="mean")


# ----------------------------------------------------------------------------------- adaptive rank


@pytest.mark.parametrize(
    ("n", "d", "batch", "rank"), [(131, 40, 64, 20), (65, 30, 64, 30), (61, 7, 20, 7)]
)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
def test_last_batch_with_fewer_rows_than_the_rank(layout, n, d, batch, rank):
    """Its triplets beyond its own rank are zero, and its rows beyond the last."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    svd = ops.batched_svd(layout(x), rank, batch_size=batch)
    last = x[n // batch * batch :]
    centred, rows = (last - last.mean(0)).double(), len(last)
    u, s, vh = (part[-1].double() for part in (svd.u, svd.s, svd.vh))
    own = torch.linalg.svdvals(centred)
    torch.testing.assert_close(s[:rows], own, rtol=1e-6, atol=1e-5)
    for part in (s[rows:], u[rows:], u[:, s == 0], vh[s == 0]):
        assert not part.any()
    torch.testing.assert_close((u * s @ vh)[:rows], centred, rtol=0, atol=1e-5)
    for recombine in ("merge", "block", "literal", "per_batch"):
        low = ops.low_rank(layout(x), rank, batch_size=batch, recombine=recombine)
        assert torch.isfinite(low.to_dense()).all()


@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, p) for p in (-90, -70, -20, 20, 70, 110)]
    + [(torch.float64, p) for p in (-900, -290, 290, 900)],
)
@pytest.mark.parametrize("rank", [5, 0.5, "gavish-donoho"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
def test_products_that_leave_the_range(layout, rank, dtype, power):
    """Entries far from 1, to which their products would overflow or vanish: the same factors."""
    x = torch.randn(100, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, :3] *= 8
    want = ops.batched_svd(layout(x), rank)
    got = ops.batched_svd(layout(x * 2.0**power), rank)
    assert torch.equal(got.u, want.u) and torch.equal(got.vh, want.vh)
    assert torch.equal(got.s * 2.0**-power, want.s)
    assert torch.equal(got.mean * 2.0**-power, want.mean)
    for batch_size in (None, 60):
        options = {"rank": rank, "batch_size": batch_size, "add_mean": True}
        dense = ops.low_rank(layout(x * 2.0**power), **options).to_dense()
        assert torch.equal(dense * 2.0**-power, ops.low_rank(layout(x), **options).to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
def test_a_batch_does_not_depend_on_the_scale_of_the_others(layout, dtype):
    x = torch.randn(100, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    powers = (0, 100, -64, -100)  # the last of fewer rows
    parts = [part * 2.0**p for part, p in zip(x.split(30), powers, strict=True)]
    want = ops.batched_svd(layout(x), 5, batch_size=30)
    got = ops.batched_svd(layout(torch.cat(parts)), 5, batch_size=30)
    assert torch.equal(got.u, want.u) and torch.equal(got.vh, want.vh)
    for b, power in enumerate(powers):
        assert torch.equal(got.s[b] * 2.0**-power, want.s[b])
        assert torch.equal(got.mean[b] * 2.0**-power, want.mean[b])


@pytest.mark.parametrize("recombine", ["merge", "per_batch"])
def test_rank_from_a_relative_residual(recombine):
    x = decaying(120, 30, 0.8)
    for fraction in (0.5, 0.1):
        got = ops.low_rank(x, fraction, n_iter=8, recombine=recombine)
        centred = x - x.mean(0)
        residual = float((centred - got.to_dense()).norm() / centred.norm())
        values = torch.linalg.svdvals(centred)
        r = got.right.shape[0]
        assert residual < fraction * (1 + 1e-6)
        assert values[r - 1 :].norm() / values.norm() >= fraction
    batched = ops.batched_svd(x, 0.3, batch_size=50)
    parts = [b - b.mean(0) for b in x.split(50)]
    total = sum(p.norm() ** 2 for p in parts)
    r = batched.s.shape[1]
    tail = [sum(torch.linalg.svdvals(p)[k:].norm() ** 2 for p in parts) / total for k in (r - 1, r)]
    assert tail[1] < 0.09 <= tail[0]


def test_rank_from_the_optimal_hard_threshold():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 100, generator=g)
    signal = torch.randn(400, 5, generator=g) @ torch.randn(5, 100, generator=g) * 2
    assert ops.batched_svd(noise + signal, "gavish-donoho").s.shape[1] == 5
    # omega(1) = 2.858 in the paper's table; the threshold scales the median.
    from fastclust.ops.lowrank import _rank_by_threshold

    spectrum = torch.tensor([[4.0, 2.87, 2.84] + [1.0] * 97], dtype=torch.float64)
    assert _rank_by_threshold(spectrum, 100, 100) == 2


# ---------------------------------------------------------------------------- the operators proper


def test_opcheck():
    x = sparse_binary(20, 9)
    compressed = csr(x)
    parts = (
        compressed.values().clone(),
        torch.tensor(compressed.crow_indices().tolist()),
        torch.tensor(compressed.col_indices().tolist(), dtype=torch.int32),
    )
    mean = fastclust_ops.lowrank_mean(x, None, None, 9, 8)
    v = torch.randn(3, 9, 4)
    for rows in ((x, None, None), parts):
        torch.library.opcheck(fastclust_ops.lowrank_mean, (*rows, 9, 8))
        torch.library.opcheck(fastclust_ops.lowrank_center, (*rows, mean, 9, 8))
        torch.library.opcheck(fastclust_ops.lowrank_gram, (*rows, mean, 9, 8))
        torch.library.opcheck(fastclust_ops.lowrank_project, (*rows, mean, 9, 8, v))
        q = torch.randn(3, 8, 4)
        torch.library.opcheck(fastclust_ops.lowrank_project_transposed, (*rows, mean, 9, 8, q))
    torch.library.opcheck(fastclust_ops.lowrank_multiply, (v, torch.randn(3, 4, 2)))
    torch.library.opcheck(fastclust_ops.lowrank_orthonormalize, (v, v, None, 0.5, 2))
    torch.library.opcheck(fastclust_ops.lowrank_thin_svd, (v, 3))
    torch.library.opcheck(fastclust_ops.lowrank_normal, (x, 2, 0, 5, 3, 1))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("n", "d", "batch"), [(1100, 13, 600), (1500, 5, 1500), (7, 130, 3)])
def test_products_of_the_centred_rows(n, d, batch, center, layout):
    for density, value in ((0.05, 1.0), (0.5, 1.0), (0.05, 1.5), (0.5, -0.5)):
        x = sparse_binary(n, d, density) * value
        x[0, 0] = value
        source = layout(x)
        rows = rows_of(source)
        m = -(-n // batch)
        padded = torch.zeros(m * batch, d, dtype=torch.float64)
        padded[:n] = x
        mean = fastclust_ops.lowrank_mean(*rows, d, batch) if center else None
        for b in range(m):
            part = padded[b * batch : min(n, (b + 1) * batch)]
            if center:
                assert torch.allclose(mean[b].double(), part.mean(0), atol=1e-7)
                part -= part.mean(0)
        padded = padded.view(m, batch, d)
        v = torch.randn(m, d, 21)
        w = fastclust_ops.lowrank_project(*rows, mean, d, batch, v)
        assert (w - padded @ v.double()).abs().max() < 1e-4
        q = torch.randn(m, batch, 21)
        z = fastclust_ops.lowrank_project_transposed(*rows, mean, d, batch, q)
        assert (z - padded.mT @ q.double()).abs().max() < 5e-4
        c = fastclust_ops.lowrank_gram(*rows, mean, d, batch)
        assert (c - padded.mT @ padded).abs().max() < 1e-5 * c.abs().max()
        assert torch.equal(c, c.mT)


# --- the CUDA kernels, executed on the CPU over an emulated block ---------------------------------


class Device:
    """The CUDA kernels and launchers compiled as ordinary C++, under the names of the operators."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def call(self, name: str, dtype: torch.dtype, *args: object) -> None:
        suffix = "double" if dtype == torch.float64 else "float"
        given = []
        for a in args:
            if a is None or isinstance(a, torch.Tensor):
                given.append(ctypes.c_void_p(None if a is None else a.data_ptr()))
            else:
                given.append(ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a))
        getattr(self.library, f"{name}_{suffix}")(*given)

    def lowrank_center(self, values, indptr, indices, mean, n_cols, batch):
        n = len(values) if indptr is None else len(indptr) - 1
        out = values.new_full((-(-n // batch), batch, n_cols), float("nan"))
        self.call(
            *("center", values.dtype, values, indptr, indices, mean, n, n_cols, batch),
            out,
        )
        return out

    def lowrank_mean(self, values, indptr, indices, n_cols, batch):
        n = len(values) if indptr is None else len(indptr) - 1
        if indptr is not None:
            values = self.lowrank_center(values, indptr, indices, None, n_cols, batch)
        out = values.new_empty(-(-n // batch), n_cols)
        self.call("mean", values.dtype, values, n, n_cols, batch, out)
        return out

    def lowrank_normal(self, like, m, first, n, width, seed):
        out = like.new_empty(m, n, width)
        self.call("normal", like.dtype, m, first, n, width, seed, out)
        return out

    def lowrank_orthonormalize(self, y, v, bound, root, passes):
        m, n, width = y.shape
        y, v = y.contiguous(), None if v is None else v.contiguous()
        q, new_bound = torch.empty_like(y), torch.empty(m, dtype=torch.float64)
        self.call(
            *("orthonormalize", y.dtype, m, n, width, passes, float(root), y, v, bound),
            *(q, new_bound),
        )
        return q, new_bound

    def lowrank_thin_svd(self, y, rank):
        m, n, width = y.shape
        u, s = y.new_empty(m, n, rank), torch.empty(m, width, dtype=torch.float64)
        vt = torch.empty(m, width, width, dtype=torch.float64)
        self.call("thin_svd", y.dtype, m, n, width, rank, y.contiguous(), u, s, vt)
        return u, s, vt

    def __getattr__(self, name: str):
        return getattr(lowrank_device, name.removeprefix("lowrank_"))


@pytest.fixture(scope="module")
def device(emulate: Callable[[str], ctypes.CDLL]) -> Device:
    return Device(emulate("lowrank"))


def rows_of(source: torch.Tensor) -> tuple:
    if source.layout == torch.strided:
        return source, None, None
    return source.values(), source.crow_indices().long(), source.col_indices().int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
@pytest.mark.parametrize("batch", [8, 30])
def test_device_rows_and_numbers_equal_the_native_ones(device, batch, layout, dtype):
    rows, m = rows_of(layout(sparse_binary(30, 37, 0.3).to(dtype))), -(-30 // batch)
    tolerance = 4 * torch.finfo(dtype).eps
    mean = fastclust_ops.lowrank_mean(*rows, 37, batch)
    assert torch.allclose(device.lowrank_mean(*rows, 37, batch), mean, atol=tolerance)
    for mu in (mean, None):
        wanted = fastclust_ops.lowrank_center(*rows, mu, 37, batch)
        assert torch.allclose(device.lowrank_center(*rows, mu, 37, batch), wanted, atol=tolerance)
    wanted = fastclust_ops.lowrank_normal(rows[0], m, 2, 9, 5, 3)
    got = device.lowrank_normal(rows[0], m, 2, 9, 5, 3)
    assert torch.allclose(got, wanted, atol=100 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(  # the last beyond shared memory
    ("m", "n", "width"), [(1, 1, 1), (2, 7, 3), (2, 300, 33), (1, 600, 70), (1, 300, 120)]
)
def test_device_factorisations_equal_the_native_ones(device, m, n, width, dtype):
    g = torch.Generator().manual_seed(n)
    y = torch.randn(m, n, width, generator=g, dtype=dtype) * 0.9 ** torch.arange(width, dtype=dtype)
    v = torch.linalg.qr(torch.randn(m, n, width, generator=g, dtype=dtype)).Q.contiguous()
    if width > 2:
        y[0, :, 2] = 2 * y[0, :, 1]  # dependent
    eps = torch.finfo(dtype).eps
    bound = torch.full((m,), 0.01, dtype=torch.float64)
    for args in ((y, None, None, 0.0, 2), (y, v, bound, 0.3, 1), (y, v, bound, 0.9, 2)):
        q, new_bound = device.lowrank_orthonormalize(*args)
        wanted, native_bound = fastclust_ops.lowrank_orthonormalize(*args)
        assert torch.allclose(new_bound, native_bound, rtol=1e-3, atol=1e-6)
        if args[1] is None:  # the dependent column is exactly zero in both
            assert torch.allclose(q, wanted, atol=1e4 * eps)
            assert (q[0].norm(dim=0) == 0).sum() == (width > 2)
        defect = (q.double().mT @ q.double() - torch.eye(width).double()).abs()
        kept = q.norm(dim=1) > 0
        defect = defect * (kept[:, :, None] & kept[:, None, :])
        assert defect.max() < (16 * eps if args[4] == 2 else 1e-2)
    rank = max(1, width - 2)
    u, s, vt = device.lowrank_thin_svd(y, rank)
    _, native, _ = fastclust_ops.lowrank_thin_svd(y, rank)
    size = float(native.max())
    assert (s - native).abs().max() < 64 * eps * size
    best = native[:, rank:].square().sum(1).sqrt()
    left = (y.double() - u.double() * s[:, None, :rank] @ vt[:, :rank]).flatten(1).norm(dim=1)
    assert (left - best).abs().max() < 64 * eps * size


@pytest.mark.parametrize("width", [6, 120])  # the second beyond shared memory
def test_device_numbers_that_overflow_stay_in_their_batch(device, width):
    y = torch.randn(2, 130, width, generator=torch.Generator().manual_seed(0))
    y[0, 5, 2] = math.inf
    both, alone = device.lowrank_thin_svd(y, 4), device.lowrank_thin_svd(y[1:], 4)
    assert both[1][0].isnan().all()
    assert all(torch.equal(a[1:], b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, csr])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("batch", [7, 20, 50])
@pytest.mark.parametrize("rows_at_a_time", [1, 6, 30, 1000])
def test_device_products_hold_few_dense_rows(monkeypatch, rows_at_a_time, batch, mean, layout):
    n, d = 50, 9
    rows = rows_of(layout(sparse_binary(n, d, 0.3).double()))
    m = -(-n // batch)
    mu = fastclust_ops.lowrank_mean(*rows, d, batch) if mean else None
    g = torch.Generator().manual_seed(0)
    v, q = (torch.randn(m, k, 4, generator=g, dtype=torch.float64) for k in (d, batch))
    monkeypatch.setattr(lowrank_device, "_DENSE_BYTES", rows_at_a_time * d * 8)
    held = []
    native = fastclust_ops

    class Watched:
        def __getattr__(self, name: str):
            def call(*args):
                out = getattr(native, name)(*args)
                held.append(min(n, args[5] * len(out)) if name == "lowrank_center" else 0)
                return out

            return call

    monkeypatch.setattr(lowrank_device.torch.ops, "fastclust", Watched())
    args = (*rows, mu, d, batch)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(lowrank_device.gram(*args), native.lowrank_gram(*args))
    close(lowrank_device.project(*args, v), native.lowrank_project(*args, v))
    close(lowrank_device.project_transposed(*args, q), native.lowrank_project_transposed(*args, q))
    if rows[1] is not None:
        means = lowrank_device.csr_mean(*rows, d, batch)
        close(means, native.lowrank_mean(*rows, d, batch))
    assert 0 < max(held) <= rows_at_a_time


def test_device_kernels_have_no_race(device):
    y = torch.randn(2, 290, 35)
    results = []
    for order in (0, 1, 2):  # ascending, descending, random progress of the warps
        device.library.set_warp_order(order)
        results.append((*device.lowrank_orthonormalize(y, y, None, 0.2, 2),
                        *device.lowrank_thin_svd(y, 30)))  # fmt: skip
    device.library.set_warp_order(0)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_device_runs_the_whole_algorithm(device, monkeypatch):
    import fastclust.ops.lowrank as module

    x = sparse_binary(90, 40, 0.2)
    steep = decaying(60, 20, 0.5).float()
    wanted = [ops.low_rank(s, 6, batch_size=40).to_dense() for s in (x, csr(x), steep)]
    native = fastclust_ops
    monkeypatch.setattr(module.torch.ops, "fastclust", device)
    monkeypatch.setattr(Device, "lowrank_center", lambda self, *a: native.lowrank_center(*a))
    for source, result in zip((x, csr(x), steep), wanted, strict=True):
        assert relative(ops.low_rank(source, 6, batch_size=40).to_dense(), result) < 1e-3
    assert not ops.low_rank(torch.full((50, 7), 0.1), 2, batch_size=16).to_dense().any()


@pytest.mark.parametrize("n", [2, 6, 80])
def test_device_index_maps(device, n):
    library = device.library
    library.pair.restype = library.tile_row.restype = ctypes.c_int64
    met = set()
    for turn in range(n - 1):
        pairs = [
            divmod(library.pair(*map(ctypes.c_int64, (n, turn, i))), 10**6) for i in range(n // 2)
        ]
        assert sorted(itertools.chain(*pairs)) == list(range(n))  # disjoint
        met |= set(pairs)
    assert met == set(itertools.combinations(range(n), 2))
    tiles = [divmod(library.tile_row(ctypes.c_int64(i)), 10**6) for i in range(n * (n + 1) // 2)]
    assert tiles == [(i, j) for j in range(n) for i in range(j + 1)]


@pytest.mark.parametrize(
    ("norms", "places"),
    [
        ([1.0, 4.0, 0.0, 4.0], [2, 0, 3, 1]),
        ([math.nan, 1.0, math.nan, math.inf], [2, 1, 3, 0]),
        ([math.nan] * 3, [0, 1, 2]),
    ],
)
def test_device_rows_have_places_of_their_own(device, norms, places):
    """Also where lengths overflowed: a place left out is read as an index nobody wrote."""
    given = (ctypes.c_double * len(norms))(*norms)
    place = device.library.place
    place.restype = ctypes.c_int64
    n = ctypes.c_int64(len(norms))
    assert [place(given, n, ctypes.c_int64(i)) for i in range(len(norms))] == places
