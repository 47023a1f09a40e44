"""Every operator on the tensors of a device against its float64 twin or its CPU self.

Runs on the CPU anywhere and on CUDA where torch sees a GPU: one body, so that what a machine
without a GPU checks of these tests themselves is what a GPU then runs.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.nn.functional import normalize

from fastclust import Graph, ops, reference
from fastclust.ops.propagate import _graph_args

DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def graph_with_hub(n: int, hub: int, weighted: bool = False) -> sp.csr_array:
    """Random edges, node 0 joined to `hub` others, the last node isolated."""
    rng = np.random.default_rng(n)
    upper = np.triu(rng.random((n, n)) < min(0.2, 8 / n), 1)
    upper[0, 1 : hub + 1] = True
    upper[:, -1] = False
    values = upper * (rng.random((n, n)) + 0.5 if weighted else 1.0)
    return sp.csr_array((values + values.T).astype(np.float32))


def close(got: torch.Tensor, want: torch.Tensor, eps: float) -> None:
    """Relative error in the norm, and no sign of a bias."""
    assert got.isfinite().all()
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    difference = got - want
    assert float(difference.norm()) <= eps * max(float(want.norm()), 1e-2)
    assert float(difference.sum().abs()) <= eps * max(float(want.abs().sum()), 1e-2)


# ---- loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.5, 1.0, 1.0001])
@pytest.mark.parametrize(("n", "dz", "de"), [(1, 1, 0), (3, 7, 5), (64, 8, 8), (65, 33, 70)])
def test_loss_on(device: str, n: int, dz: int, de: int, alpha: float, dtype: torch.dtype) -> None:
    z, e = (normalize(randn(2 * n, d, seed=d), dim=1) for d in (dz, de))
    z[0] = 0
    labels, confident = torch.arange(n) % 2, torch.arange(n) % 3 > 0
    for beta in (None, 0.0, 1.0, 2.5):
        leaves = [
            t.to(device, dtype).requires_grad_() for t in (z, e, torch.tensor(alpha, dtype=dtype))
        ]
        weights = dense = None
        if beta is not None:
            weights = ops.hardness(*leaves, labels.to(device), confident.to(device), beta)
            dense = ops.dense_weights(weights).cpu().double()
        loss = ops.hard_infonce(*leaves, weights=weights)
        grads = torch.autograd.grad(loss, leaves)
        twins = [t.detach().cpu().double().requires_grad_() for t in leaves]
        want = reference.hard_infonce(*twins, dense)
        eps = 3e-6 if dtype == torch.float32 else 1e-12
        close(loss, want.detach(), eps)
        wanted = torch.autograd.grad(want, twins)
        for got, twin in zip(grads[:2], wanted[:2], strict=True):
            close(got, twin, 10 * eps)
        scale = max(0.1, abs(float(wanted[2])))  # a difference of two sums of order 1
        assert abs(float(grads[2]) - float(wanted[2])) <= 10 * eps * scale


# ---- propagation --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 31, 32, 33, 64, 127, 129, 257])
def test_propagate_every_tail_on(device: str, d: int, dtype: torch.dtype) -> None:
    graph = Graph(graph_with_hub(90, 60))
    check_propagate(device, graph, randn(90, d, dtype=dtype), residual=True, activation="relu")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
@pytest.mark.parametrize("hub", [3, 512, 513])
def test_propagate_every_graph_on(device, norm, self_loops, weighted, hub) -> None:
    adjacency = graph_with_hub(1200, hub, weighted)
    graph = Graph(adjacency, norm=norm, self_loops=self_loops)
    check_propagate(device, graph, randn(1200, 17, dtype=torch.float32), residual=False, steps=2)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_propagate_without_edges_on(device: str, n: int) -> None:
    graph = Graph(sp.csr_array((n, n), dtype=np.float32))
    check_propagate(device, graph, randn(n, 5, dtype=torch.float32), residual=True)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [3, 128, 500])
def test_propagate_stored_as_bf16_on_cuda(d: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    graph = Graph(graph_with_hub(1200, 600))
    h = randn(1200, d).bfloat16()
    leaf, twin = h.cuda().requires_grad_(), h.double().requires_grad_()
    out = ops.propagate(graph.to("cuda"), leaf, residual=leaf, activation="relu")
    want = reference.propagate(graph, twin, residual=twin, activation="relu")
    seed = (want.detach().abs() > 1e-5).double()
    assert out.dtype == torch.bfloat16
    close(out, want, 2.0**-9)
    grad = torch.autograd.grad(out, leaf, seed.bfloat16().cuda())[0]
    close(grad, torch.autograd.grad(want, twin, seed)[0], 2.0**-8)


def check_propagate(device, graph, h, *, residual, activation="none", steps=1) -> None:
    results = []
    for function, on, dtype in (
        (ops.propagate, device, h.dtype),
        (reference.propagate, "cpu", None),
    ):
        leaf = h.to(on, dtype or torch.float64).requires_grad_()
        out = function(
            graph.to(on), leaf, residual=leaf if residual else None,
            activation=activation, steps=steps,
        )  # fmt: skip
        seed = torch.ones_like(out)
        if activation == "relu":  # where a sum is this close to zero its sign is open
            seed = seed * (out.detach().abs() > 1e-5)
        results.append((out.detach(), torch.autograd.grad(out, leaf, seed)[0]))
    eps = 1e-6 if h.dtype == torch.float32 else 1e-14
    for got, want in zip(*results, strict=True):
        close(got, want, eps)


# ---- k-means and low rank -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [None, "random", "paper-code"])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (70, 3, 70), (129, 17, 4), (700, 130, 33)])
def test_kmeans_equals_the_cpu_on(device: str, n: int, d: int, k: int, init, dtype) -> None:
    x = randn(n, d, dtype=dtype) + 4.0 * randn(k, d, seed=1, dtype=dtype)[torch.arange(n) % k]
    got = ops.kmeans(x.to(device), k, n_init=3, init=init, seed=1)
    want = ops.kmeans(x, k, n_init=3, init=init, seed=1)
    assert torch.equal(got.labels.cpu(), want.labels)
    assert got.inertia == pytest.approx(want.inertia, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got.centers.cpu(), want.centers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("n", "d", "batch"), [(300, 40, None), (300, 40, 128), (50, 130, 20)])
def test_low_rank_error_on(device: str, n: int, d: int, batch: int | None, sparse, dtype) -> None:
    """As near to the best approximation as on the CPU, orthonormal, signs fixed."""
    x = randn(n, 8, seed=1) @ randn(8, d, seed=2) + 0.1 * randn(n, d, seed=3)
    if sparse:
        x = torch.where(randn(n, d, seed=4) > 0.8, x, 0.0)
    x = x.to(dtype)
    given = (x.to_sparse_csr() if sparse else x).to(device)
    svd = ops.batched_svd(given, 6, batch_size=batch)
    for i, rows in enumerate(x.split(batch or n)):
        centred = rows.double() - rows.double().mean(0)
        u, s, vh = (t[i].double().cpu() for t in (svd.u, svd.s, svd.vh))
        kept = min(6, *rows.shape)
        best = float(torch.linalg.svdvals(centred)[kept:].square().sum().sqrt())
        error = float((centred - (u[: len(rows)] * s) @ vh).norm())
        assert error <= 1.01 * best + 1e-5 * float(centred.norm())
        gram = vh[:kept] @ vh[:kept].T
        torch.testing.assert_close(gram, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_arrays_of_cupy_are_taken_where_they_are() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    cupy = pytest.importorskip("cupy")
    sparse = pytest.importorskip("cupyx.scipy.sparse")
    graph = Graph(graph_with_hub(60, 3)).to("cuda")
    x = randn(60, 12, dtype=torch.float32).clamp_min(0)
    on_cupy, on_cuda = cupy.asarray(x.numpy()), x.cuda()
    want = ops.propagate(graph, on_cuda)
    assert torch.equal(ops.propagate(graph, on_cupy), want)
    assert torch.equal(ops.kmeans(on_cupy, 3).centers, ops.kmeans(on_cuda, 3).centers)
    rows = sparse.csr_matrix(sp.csr_matrix(x.numpy()))
    got, want = (ops.batched_svd(m, 4) for m in (rows, on_cuda.to_sparse_csr()))
    assert torch.equal(got.s, want.s) and torch.equal(got.u, want.u) and got.u.is_cuda


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused() -> None:
    """A direct call has none of the checks of the functions in Python."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    native = torch.ops.fastclust
    x, centers = randn(8, 16), randn(1, 2, 16)
    graph, h = Graph(graph_with_hub(20, 3)), randn(20, 4)
    z, e, alpha = randn(16, 4).cuda(), randn(16, 4), torch.tensor(0.5)
    calls = [
        lambda: native.kmeans_assign(x.cuda(), centers),
        lambda: native.kmeans_assign(x, centers.cuda()),
        lambda: native.lowrank_center(x.cuda(), None, None, centers[:, 0], 16, 8),
        lambda: native.lowrank_orthonormalize(centers.cuda(), centers, None, 0.1, 1),
        lambda: native.propagate(*_graph_args(graph, h.dtype), h.cuda(), None, False, False, False),
        lambda: native.mask_rows(h.cuda(), torch.ones(20, 1, dtype=torch.int32)),
        lambda: native.similarity_range(z, e, alpha.cuda(), 0),
        lambda: native.similarity_range(z, e.cuda(), alpha, 0),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="all tensors must be on one device"):
            call()
