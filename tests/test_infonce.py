"""hard_infonce, hardness and dense_weights against their twins in fastclust.reference.

Faults planted once by hand in csrc/infonce/infonce_cpu.cpp, and the tests that each turned red:

- one tile dropped from the row sums: test_sizes (193, 500), test_confident_share,
  test_panels_of_tiles, test_no_signed_bias;
- diagonal tiles counted twice: the same, all sizes, and test_equals_nt_xent;
- the 1/r_k term left out of T: test_sizes (all), test_confident_share, test_panels_of_tiles,
  test_no_signed_bias;
- one chunk of the gradient product shifted by a sliver: as for the dropped tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BF16_ROUNDING, bound
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastclust import _C, Graph, ops, reference
from fastclust.datasets import load_dataset
from fastclust.models.hsan import HSANModel, filtered_attributes
from fastclust.ops.infonce import MAX_SNAPSHOTS, Hardness, StoredHardness

LEVELS = [
    name for name in ("portable", "avx2", "avx512") if name == "portable" or _C.cpu_features()[name]
]
needs_bf16 = pytest.mark.skipif(
    not _C.cpu_features()["avx512_bf16"], reason="this processor has no AVX-512 BF16"
)
TILE = 192  # rows of a tile of the CPU kernels; N = 96 fills one


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test at one dispatch level."""
    before = _C.cpu_level()
    assert _C.set_cpu_level(request.param) == request.param
    yield request.param
    _C.set_cpu_level(before)


def unit_rows(rng: np.random.Generator, rows: int, d: int, common: float = 0.5) -> Tensor:
    """Rows of length 1 with a common direction, so that similarities are not all near 0."""
    x = rng.normal(size=(rows, d)) + common
    return normalize(torch.from_numpy(x), dim=1)


class Case:
    """Inputs in float64: current views, a snapshot, labels, confident nodes."""

    def __init__(
        self,
        n: int,
        dz: int = 5,
        de: int | None = 4,
        alpha: float = 0.7,
        beta: float | None = 1.0,
        share: float = 0.7,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.alpha, self.beta = n, alpha, beta
        self.z = unit_rows(rng, 2 * n, dz)
        self.e = None if de is None else unit_rows(rng, 2 * n, de)
        self.old_z = unit_rows(rng, 2 * n, dz)
        self.old_e = None if de is None else unit_rows(rng, 2 * n, de)
        self.labels = torch.from_numpy(rng.integers(0, 3, n))
        self.confident = torch.from_numpy(rng.random(n) < share)

    def snapshot(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of hardness, in a dtype."""
        old_e = None if self.old_e is None else self.old_e.to(dtype)
        return self.old_z.to(dtype), old_e, 0.9 * self.alpha, self.labels, self.confident, self.beta

    def run(self, dtype: torch.dtype, twin: bool, precision: str | None = None) -> list[Tensor]:
        """Loss and gradients with respect to z, e and alpha, as float64."""
        z = self.z.to(dtype).clone().requires_grad_()
        e = None if self.e is None else self.e.to(dtype).clone().requires_grad_()
        alpha = torch.tensor(self.alpha, dtype=dtype, requires_grad=True)
        if twin:
            weights = None if self.beta is None else reference.hardness(*self.snapshot(dtype))
            loss = reference.hard_infonce(z, e, alpha, weights)
        else:
            held = None if self.beta is None else ops.hardness(*self.snapshot(dtype))
            loss = ops.hard_infonce(z, e, alpha, weights=held, precision=precision)
        loss.backward()
        grads = [x.grad for x in (z, e, alpha) if x is not None]
        return [loss.detach().double(), *(g.double() for g in grads if g is not None)]


def assert_accurate(case: Case, dtype: torch.dtype) -> None:
    """Error at most twice that of torch in the same dtype, plus rounding (tolerances.py)."""
    exact = case.run(torch.float64, twin=True)
    ours = case.run(dtype, twin=False)
    torchs = case.run(dtype, twin=True)
    for name, x, y, t in zip(("loss", "z", "e", "alpha"), exact, ours, torchs, strict=False):
        # What is summed is of order 1 in the loss and in dalpha, 1 / 2N in a gradient's entries,
        # even where it cancels.
        terms = 1.0 if name in ("loss", "alpha") else 1.0 / (2 * case.n)
        largest = max(float(x.abs().max()), terms)
        torch_error = float((t - x).abs().max())
        if dtype == torch.float64:  # the twin is torch itself: its own error is not zero
            torch_error = 16 * torch.finfo(dtype).eps * largest
        allowed = bound("infonce", torch_error, largest, dtype)
        assert float((y - x).abs().max()) <= allowed, name


DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 23, 24, 25, 95, 96, 97, 193, 500])
def test_sizes(level: str, dtype: torch.dtype, n: int) -> None:
    """Numbers of nodes around slivers, tiles and panels."""
    assert_accurate(Case(n), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dz", "de"), [(1, 1), (7, 9), (15, 17), (48, 33), (130, 50), (3, None)])
def test_widths(level: str, dtype: torch.dtype, dz: int, de: int | None) -> None:
    """Widths that fill no vector, that make a sliver straddle Z and E, and no E at all."""
    assert_accurate(Case(100, dz, de), dtype)


@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.5, 1.0, 1.0001, 3.0])
@pytest.mark.parametrize("beta", [None, 1.0])
def test_alpha(level: str, alpha: float, beta: float | None) -> None:
    """The mix may leave [0, 1]."""
    assert_accurate(Case(110, alpha=alpha, beta=beta), torch.float32)
    assert_accurate(Case(110, alpha=alpha, beta=beta), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0, 0.5, 1, 2, 2.5, 3, 5, 37, 70])
def test_beta(level: str, dtype: torch.dtype, beta: float) -> None:
    """Zero, integer and other exponents."""
    assert_accurate(Case(100, beta=beta), dtype)


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_confident_share(level: str, share: float) -> None:
    """Nobody, a few and everybody confident."""
    assert_accurate(Case(220, share=share, beta=2.0), torch.float64)
    assert_accurate(Case(220, share=share, beta=2.0), torch.float32)


def test_panels_of_tiles(level: str) -> None:
    """More tile rows than a panel holds, the last one ragged."""
    assert_accurate(Case(5 * TILE // 2 + 11, dz=6, de=None), torch.float64)


def test_zero_rows(level: str) -> None:
    """Rows of zeros, as normalize leaves for isolated nodes."""
    case = Case(60)
    for x in (case.z, case.e, case.old_z, case.old_e):
        assert x is not None
        x[::7] = 0
    assert_accurate(case, torch.float32)
    assert_accurate(case, torch.float64)


def test_all_rows_equal(level: str) -> None:
    """A snapshot whose similarities are all equal has scaled similarity 0."""
    case = Case(20)
    case.old_z = torch.zeros_like(case.old_z)
    case.old_e = None
    held = ops.hardness(case.old_z, None, 1.0, case.labels, case.confident, 1.0)
    expected = reference.hardness(case.old_z, None, 1.0, case.labels, case.confident, 1.0)
    assert torch.equal(ops.dense_weights(held), expected)
    loss = ops.hard_infonce(case.z, case.e, 0.7, weights=held)
    torch.testing.assert_close(loss, reference.hard_infonce(case.z, case.e, 0.7, expected))


def test_non_contiguous(level: str) -> None:
    """Transposed and sliced inputs give what their copies give."""
    case = Case(40, 6, 5)
    assert case.e is not None
    z = case.z.T.contiguous().T
    e = torch.cat([case.e, case.e], dim=1)[:, :5]
    assert not z.is_contiguous() and not e.is_contiguous()
    z.requires_grad_()
    loss = ops.hard_infonce(z, e, 0.6)
    loss.backward()
    copy = case.z.clone().requires_grad_()
    expected = ops.hard_infonce(copy, case.e, 0.6)
    expected.backward()
    assert torch.equal(loss, expected)
    assert z.grad is not None and copy.grad is not None
    assert torch.equal(z.grad, copy.grad)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_missing_gradients(level: str, wanted: tuple[int, int, int]) -> None:
    """Any subset of gradients is the same as within the full set."""
    case = Case(120, 10, 7)
    assert case.e is not None
    weights = ops.hardness(*case.snapshot(torch.float64))
    inputs = [case.z, case.e, torch.tensor(0.7, dtype=torch.float64)]
    full = [x.clone().requires_grad_() for x in inputs]
    ops.hard_infonce(*full, weights=weights).backward()
    part = [x.clone().requires_grad_(bool(w)) for x, w in zip(inputs, wanted, strict=True)]
    ops.hard_infonce(*part, weights=weights).backward()
    for x, y, w in zip(part, full, wanted, strict=True):
        if w:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-13, atol=1e-16)
        else:
            assert x.grad is None


def test_unneeded_gradients_are_empty() -> None:
    """The backward operator returns nothing where nothing was asked for."""
    case = Case(10)
    z, e, alpha = case.z, case.e, torch.tensor(0.7, dtype=torch.float64)
    none = ([], [], None, None, None, None, None, 0.0, 0)
    loss, sums = torch.ops.fastclust.hard_infonce(z, e, alpha, *none)
    grads = torch.ops.fastclust.hard_infonce_backward(
        torch.ones_like(loss), z, e, alpha, sums, *none, False, False, True
    )
    assert [g.shape for g in grads] == [(0,), (0,), ()]


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(level: str, weighted: bool) -> None:
    """Analytic against numerical gradients in float64."""
    case = Case(7, 4, 3)
    assert case.e is not None
    weights = ops.hardness(*case.snapshot(torch.float64)) if weighted else None
    inputs = (
        case.z.clone().requires_grad_(),
        case.e.clone().requires_grad_(),
        torch.tensor(0.6, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda z, e, a: 3 * ops.hard_infonce(z, e, a, weights=weights), inputs
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    """Schemas, fakes and autograd registration of the three operators."""
    case = Case(6, 4, 3)
    assert case.e is not None
    alpha = torch.tensor(0.6, dtype=torch.float64)
    weights: tuple[Any, ...] = ([], [], None, None, None, None, None, 0.0)
    if weighted:
        w = ops.hardness(*case.snapshot(torch.float64))
        weights = (list(w.z), list(w.e), w.alpha, w.range, w.labels, w.membership, w.order, w.beta)
    z, e = case.z.clone().requires_grad_(), case.e.clone().requires_grad_()
    op = torch.ops.fastclust
    torch.library.opcheck(op.hard_infonce, (z, e, alpha.requires_grad_(), *weights, 0))
    torch.library.opcheck(op.similarity_range, (case.z, case.e, alpha.detach(), 0))
    loss, sums = op.hard_infonce(case.z, case.e, alpha.detach(), *weights, 0)
    args = (torch.ones_like(loss), case.z, case.e, alpha.detach(), sums, *weights, 0)
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(op.hard_infonce_backward, (*args, *need))


def test_second_derivative_is_refused() -> None:
    """Differentiating the gradient says what to do instead."""
    z = unit_rows(np.random.default_rng(0), 8, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ops.hard_infonce(z, None, 1.0), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_compile() -> None:
    """torch.compile takes the loss, weights included, in one graph."""
    case = Case(30, 6, 5)
    weights = ops.hardness(*case.snapshot(torch.float32))
    assert case.e is not None

    def loss(z: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
        return 2 * ops.hard_infonce(z, e, alpha, weights=weights)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        z = case.z.float().clone().requires_grad_()
        e = case.e.float().clone().requires_grad_()
        alpha = torch.tensor(0.7, requires_grad=True)
        f(z, e, alpha).backward()
        results.append((z.grad, e.grad, alpha.grad))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_equals_nt_xent(level: str) -> None:
    """Without weights: NT-Xent at temperature 1, by torch's cross entropy."""
    n = 130
    z = unit_rows(np.random.default_rng(3), 2 * n, 12)
    logits = (z @ z.T).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    expected = cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))
    torch.testing.assert_close(ops.hard_infonce(z, None, 1.0), expected, rtol=1e-13, atol=0)


def value_and_gradient(z: Tensor, e: Tensor, weights: Hardness | None) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = ops.hard_infonce(z, e, 0.8, weights=weights)
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 140), seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_node_permutation(n: int, seed: int, share: float) -> None:
    """The order of the nodes does not matter."""
    case = Case(n, seed=seed, share=share)
    assert case.e is not None
    old_z, old_e, alpha, labels, confident, beta = case.snapshot(torch.float64)
    p = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    rows = torch.cat([p, p + n])
    loss, grad = value_and_gradient(
        case.z, case.e, ops.hardness(old_z, old_e, alpha, labels, confident, beta)
    )
    moved = ops.hardness(old_z[rows], old_e[rows], alpha, labels[p], confident[p], beta)
    loss_p, grad_p = value_and_gradient(case.z[rows], case.e[rows], moved)
    torch.testing.assert_close(loss_p, loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad_p, grad[rows], rtol=1e-11, atol=1e-15)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 120), seed=st.integers(0, 10**6))
def test_view_swap_and_rotation(n: int, seed: int) -> None:
    """Swapping the views and rotating the embedding leave the loss alone."""
    case = Case(n, seed=seed)
    assert case.e is not None
    snapshot = case.snapshot(torch.float64)
    loss, grad = value_and_gradient(case.z, case.e, ops.hardness(*snapshot))
    rows = torch.arange(2 * n).roll(n)
    swapped = ops.hardness(snapshot[0][rows], snapshot[1][rows], *snapshot[2:])
    loss_s, grad_s = value_and_gradient(case.z[rows], case.e[rows], swapped)
    torch.testing.assert_close(loss_s, loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad_s, grad[rows], rtol=1e-11, atol=1e-15)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))
    loss_q, grad_q = value_and_gradient(case.z @ q, case.e, ops.hardness(*snapshot))
    torch.testing.assert_close(loss_q, loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad_q, grad @ q, rtol=1e-9, atol=1e-13)


def test_same_bits_for_any_thread_count(level: str) -> None:
    """One, two and three threads, forward and backward, with weights."""
    case = Case(5 * TILE // 2 + 30, 40, 30)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 3):
            torch.set_num_threads(n)
            results.append(case.run(torch.float32, twin=False))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_no_signed_bias(level: str) -> None:
    """Errors have no sign: a dropped or repeated tile shifts every entry the same way."""
    case = Case(300, 24, 20, beta=None)
    exact = case.run(torch.float64, twin=True)
    ours = case.run(torch.float32, twin=False)
    for x, y in zip(exact[1:3], ours[1:3], strict=True):
        # Project on the sum of all rows, where what other rows contribute adds up.
        direction = normalize(case.z.sum(0) if x.shape[1] == 24 else case.e.sum(0), dim=0)
        error, size = ((y - x) @ direction), (x @ direction).abs()
        assert error.mean().abs() <= 1e-6 * size.mean()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_current_snapshot_equals_separate_one(level: str, precision: str) -> None:
    """Weights of the current embeddings take the short way, or none in bf16, to the same bits."""
    case = Case(150, 20, 10)
    assert case.e is not None
    z, e, alpha = case.z.float(), case.e.float(), torch.tensor(0.7)
    same = ops.hardness(z, e, alpha, case.labels, case.confident, 2.0)
    # One more column of zeros changes no product but keeps the snapshot from being recognised.
    wide = ops.hardness(
        torch.cat([z, torch.zeros(300, 1)], 1), e, alpha, case.labels, case.confident, 2.0
    )
    results = []
    for weights in (same, wide):
        x = z.clone().requires_grad_()
        loss = ops.hard_infonce(x, e, alpha, weights=weights, precision=precision)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("change", ["alpha", "e", "z"])
def test_a_snapshot_that_differs_in_one_part_only(level: str, change: str) -> None:
    """Is not taken for the current embeddings."""
    case = Case(60)
    case.old_z, case.old_e = case.z, case.e
    assert case.e is not None
    if change == "e":
        case.old_e = case.e.roll(1, 0)
    elif change == "z":
        case.old_z = case.z.roll(1, 0)
    snapshot = list(case.snapshot(torch.float64))
    if change != "alpha":
        snapshot[2] = case.alpha
    loss = ops.hard_infonce(case.z, case.e, case.alpha, weights=ops.hardness(*snapshot))
    expected = reference.hard_infonce(case.z, case.e, case.alpha, reference.hardness(*snapshot))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_range(level: str) -> None:
    """Least and greatest similarity, diagonal included, around the edges of tiles."""
    for n in (1, 24, 96, 97, 230):
        for alpha in (-0.1, 0.5, 1.2):
            case = Case(n, alpha=alpha)
            s = reference.similarity(case.z, case.e, alpha)
            found = ops.hardness(case.z, case.e, alpha, case.labels, case.confident, 1.0).range
            torch.testing.assert_close(found[0], torch.stack([s.min(), s.max()]))


def refresh(
    rng: np.random.Generator, n: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """Random arguments of one refresh; which nodes are confident drifts at random."""
    z, e = (unit_rows(rng, 2 * n, d).to(dtype) for _ in range(2))
    labels = torch.from_numpy(rng.integers(0, 4, n))
    confident = torch.from_numpy(rng.random(n) < rng.uniform(0.2, 0.9))
    return z, e, float(rng.uniform(0.3, 1.1)), labels, confident


def check_stale_weights(n: int, d: int, refreshes: int, every: int) -> None:
    """Compare with a stored 2N x 2N array that is overwritten as the released code does."""
    rng = np.random.default_rng(5)
    stored: Tensor | None = None
    held: Hardness | None = None
    for k in range(refreshes):
        z, e, alpha, labels, confident = refresh(rng, n, d, torch.float64)
        stored = reference.hardness(z, e, alpha, labels, confident, 2.0, previous=stored)
        held = ops.hardness(z, e, alpha, labels, confident, 2.0, previous=held)
        if k % every == every - 1:
            torch.testing.assert_close(ops.dense_weights(held), stored, rtol=1e-12, atol=1e-13)
            x = unit_rows(rng, 2 * n, d).requires_grad_()
            y = x.detach().clone().requires_grad_()
            loss = ops.hard_infonce(x, e, 0.9, weights=held)
            expected = reference.hard_infonce(y, e, 0.9, stored)
            (loss + expected).backward()
            torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-15)


def test_stale_weights(level: str) -> None:
    """40 refreshes; more rows than a tile."""
    check_stale_weights(100, 4, 40, every=10)


@pytest.mark.slow
def test_stale_weights_at_cora_size() -> None:
    """40 refreshes at N = 2708."""
    check_stale_weights(2708, 16, 40, every=20)


@pytest.mark.slow
def test_stale_weights_of_a_training_on_cora(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 refreshes as the released code does them, on CORA's own attributes, edges and clusters.

    The array that the released code keeps, [2N, 2N], is held beside the snapshots, and compared
    after the last refresh, with the loss and its gradients.
    """
    dataset = load_dataset("cora")
    x = filtered_attributes(dataset.features, dataset.adjacency, filter_steps=2, n_input=None)
    graph = Graph(dataset.adjacency, norm="none", self_loops=False)
    model = HSANModel(
        x, graph, n_clusters=7, width=24, tau=0.7, beta=2.0, stale_weights=True,
        refresh_every=1, kmeans="paper-code", weight_storage="snapshots",
    )  # fmt: skip
    stored: list[Tensor | None] = [None]
    hardness = ops.hardness

    def hold_both(z: Tensor, e: Tensor, alpha: Tensor, labels: Tensor, confident: Tensor,
                  beta: float, previous: Hardness | None, storage: str) -> Hardness:  # fmt: skip
        assert storage == "snapshots"
        stored[0] = reference.hardness(
            z.double(), e.double(), float(alpha), labels, confident, beta, previous=stored[0]
        )
        return hardness(z, e, alpha, labels, confident, beta, previous=previous)

    monkeypatch.setattr(ops, "hardness", hold_both)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(40):
        adam.zero_grad()
        model.loss().backward()
        adam.step()
        model.after_step(epoch)
    held, dense = model.weights, stored[0]
    assert held is not None and dense is not None
    found = ops.dense_weights(held).double()
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        z, e = model.attribute_views(), model.structure_views()
    assert e is not None
    ours = [t.clone().requires_grad_() for t in (z, e)]
    twin = [t.double().requires_grad_() for t in (z, e)]
    loss = ops.hard_infonce(*ours, 0.9, weights=held)
    expected = reference.hard_infonce(*twin, 0.9, dense)
    (loss + expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, twin, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()
    # Weights of earlier refreshes are still in force: no refresh alone explains the array.
    assert len(held.z) > 5


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 23, 95, 96, 97, 100, 193]),
    beta=st.sampled_from([0, 1, 2, 2.5]),
    refreshes=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_stored_weights_hold_what_snapshots_hold(
    n: int, beta: float, refreshes: int, seed: int
) -> None:
    """Whatever the confident sets, nobody and everybody included."""
    rng = np.random.default_rng(seed)
    held: Hardness | None = None
    stored: StoredHardness | None = None
    for _ in range(refreshes):
        z, e, alpha, labels, _ = refresh(rng, n, 4, torch.float64)
        confident = torch.from_numpy(rng.random(n) < rng.choice([0.0, 0.05, 0.5, 1.0]))
        arguments = (z, e, alpha, labels, confident, beta)
        held = ops.hardness(*arguments, previous=held)
        stored = ops.hardness(*arguments, previous=stored, storage="stored")
    assert held is not None and stored is not None
    torch.testing.assert_close(
        ops.dense_weights(stored), ops.dense_weights(held), rtol=1e-12, atol=1e-13
    )
    assert torch.equal(StoredHardness.from_snapshots(held).tiles, stored.tiles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 95, 96, 97, 500])
def test_stored_weights(level: str, n: int, tau: float, dtype: torch.dtype) -> None:
    """Loss and gradients after several refreshes: as near to the twin as torch in the same type."""
    rng = np.random.default_rng(n)
    dense: dict[torch.dtype, Tensor | None] = {torch.float64: None, dtype: None}
    held: StoredHardness | None = None
    for _ in range(3):
        z, e, alpha, labels, _ = refresh(rng, n, 6, dtype)
        confident = torch.from_numpy(rng.permutation(n) < round(tau * n))
        for kind, previous in dense.items():
            dense[kind] = reference.hardness(
                z.to(kind), e.to(kind), alpha, labels, confident, 2.5, previous=previous
            )
        held = ops.hardness(z, e, alpha, labels, confident, 2.5, previous=held, storage="stored")
    assert held is not None
    x, y = (unit_rows(rng, 2 * n, d).to(dtype) for d in (7, 3))

    def run(kind: torch.dtype, ours: bool = False) -> list[Tensor]:
        leaves = [x.to(kind), y.to(kind), torch.tensor(0.7, dtype=kind)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        if ours:
            loss = ops.hard_infonce(*leaves, weights=held)
        else:
            loss = reference.hard_infonce(*leaves, dense[kind])
        return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, leaves))]

    results = zip(run(torch.float64), run(dtype, ours=True), run(dtype), strict=True)
    for name, (exact, ours, torchs) in zip(("loss", "z", "e", "alpha"), results, strict=True):
        largest = max(float(exact.abs().max()), 1.0 if exact.dim() == 0 else 1.0 / (2 * n))
        torch_error = float((torchs - exact).abs().max())
        if dtype == torch.float64:
            torch_error = 16 * torch.finfo(dtype).eps * largest
        assert float((ours - exact).abs().max()) <= bound("infonce", torch_error, largest, dtype), (
            name
        )


def stored_case(n: int, dz: int = 5, de: int = 4) -> tuple[Case, StoredHardness]:
    """A case in float32 with stored weights of two refreshes."""
    case = Case(n, dz, de)
    old = case.snapshot(torch.float32)
    held = ops.hardness(*old, storage="stored")
    refreshed = (old[0].roll(1, 0), old[1], 0.5, case.labels, ~case.confident, case.beta)
    return case, ops.hardness(*refreshed, previous=held, storage="stored")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_stored_weights_same_bits_for_any_thread_count(level: str, precision: str) -> None:
    """Refreshes, forward and backward, with one, two and three threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            case, held = stored_case(5 * TILE // 2 + 30, 40, 30)
            assert case.e is not None
            z, e = (t.float().requires_grad_() for t in (case.z, case.e))
            loss = ops.hard_infonce(z, e, 0.8, weights=held, precision=precision)
            loss.backward()
            results.append([held.tiles, loss.detach(), z.grad, e.grad])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_bf16
@pytest.mark.parametrize("n", [1, 2, 96, 97, 400])
def test_stored_weights_in_bf16(n: int) -> None:
    """The weights are of float32 grade; the rounding of the operands bounds the rest."""
    case, held = stored_case(n, 40, 30)
    assert case.e is not None
    dense = ops.dense_weights(held).double()
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (case.z, case.e, torch.tensor(0.7))]
        if dtype == torch.float64:
            loss = reference.hard_infonce(*leaves, dense)
        else:
            loss = ops.hard_infonce(*leaves, weights=held, precision="bf16")
        gradients = torch.autograd.grad(loss, leaves)
        results.append([t.detach().double() for t in (loss, *gradients)])
    for x, y in zip(*results, strict=True):
        largest = max(float(x.abs().max()), 1.0 if x.dim() == 0 else 1.0 / (2 * n))
        assert float((y - x).abs().max()) <= BF16_ROUNDING * largest


def test_stored_weights_of_another_level() -> None:
    """A checkpoint may come from a processor with other vectors: tiles look alike."""
    before = _C.cpu_level()
    found = []
    try:
        for name in LEVELS:
            _C.set_cpu_level(name)
            found.append(stored_case(130)[1])
        for held in found:
            torch.testing.assert_close(held.tiles, found[0].tiles, rtol=1e-4, atol=1e-5)
    finally:
        _C.set_cpu_level(before)


def test_stored_weights_are_handed_on() -> None:
    """A refresh has no second copy, and no backward pass takes new weights for old."""
    case, held = stored_case(30)
    assert case.e is not None
    z, e = case.z.float().requires_grad_(), case.e.float()
    loss = ops.hard_infonce(z, e, 0.5, weights=held)
    everybody = torch.ones(30, dtype=torch.bool)
    arguments = (case.z.float(), e, 0.5, case.labels, everybody, case.beta)
    later = ops.hardness(*arguments, previous=held, storage="stored")
    assert later.tiles.data_ptr() == held.tiles.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stored_weights_state_dict() -> None:
    """They survive a checkpoint, and what was read is not written to."""
    case, held = stored_case(100)
    state = held.state_dict()
    again = StoredHardness.from_state_dict(state)
    assert torch.equal(again.tiles, held.tiles) and again.beta == held.beta
    before = held.tiles.clone()
    old = case.snapshot(torch.float32)
    after = ops.hardness(old[0].roll(2, 0), *old[1:], previous=again, storage="stored")
    assert torch.equal(held.tiles, before) and not torch.equal(after.tiles, before)
    for change, message in (
        ({"tiles": held.tiles[1:]}, "must have shape"),
        ({"n_nodes": torch.tensor(2)}, "must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            StoredHardness.from_state_dict(state | change)
    with pytest.raises(ValueError, match="beta"):
        StoredHardness.from_state_dict({"tiles": held.tiles, "n_nodes": torch.tensor(100)})


def test_stored_weights_gradcheck_and_opcheck(level: str) -> None:
    """Gradients in float64; schemas, fakes, mutation and autograd registration."""
    case = Case(7, 4, 3)
    assert case.e is not None
    held = ops.hardness(*case.snapshot(torch.float64), storage="stored")
    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    inputs = (case.z.clone().requires_grad_(), case.e.clone().requires_grad_(), alpha)
    assert torch.autograd.gradcheck(
        lambda z, e, a: 3 * ops.hard_infonce(z, e, a, weights=held), inputs
    )
    op = torch.ops.fastclust
    none = ([], [], None, None, None, None, None, 0.0)
    torch.library.opcheck(op.hard_infonce, (*inputs, *none, 0, [], held.tiles))
    z, e, a = (t.detach() for t in inputs)
    loss, sums = op.hard_infonce(z, e, a, *none, 0, [], held.tiles)
    arguments = (torch.ones_like(loss), z, e, a, sums, *none, 0, True, True, True, [], held.tiles)
    torch.library.opcheck(op.hard_infonce_backward, arguments)
    extremes = op.similarity_range(z, e, a, 0)
    refreshed = (held.tiles, z, e, a, extremes, case.labels.int(), case.confident, 2.0)
    torch.library.opcheck(op.update_stored_weights, refreshed)


def test_stored_weights_compiled() -> None:
    """torch.compile takes them in one graph."""
    case, held = stored_case(30)
    assert case.e is not None
    e = case.e.float()

    def loss(z: Tensor) -> Tensor:
        return ops.hard_infonce(z, e, 0.6, weights=held)

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        z = case.z.float().clone().requires_grad_()
        f(z).backward()
        results.append(z.grad)
    assert torch.equal(*results)


def test_stored_weights_refuse_what_does_not_fit() -> None:
    """Each wrong argument is named."""
    case, held = stored_case(30)
    old = case.snapshot(torch.float32)
    with pytest.raises(ValueError, match="storage must be"):
        ops.hardness(*old, storage="dense")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="previous must be of storage='snapshots'"):
        ops.hardness(*old, previous=held)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="previous must be of storage='stored'"):
        ops.hardness(*old, previous=ops.hardness(*old), storage="stored")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="previous must have dtype"):
        ops.hardness(*case.snapshot(torch.float64), previous=held, storage="stored")
    with pytest.raises(ValueError, match="previous must have beta"):
        ops.hardness(*old[:5], 7.0, previous=held, storage="stored")
    with pytest.raises(ValueError, match="previous must be for the same nodes"):
        ops.hardness(
            torch.ones(4, 2), None, 1.0, case.labels[:2], case.confident[:2], 1.0,
            previous=held, storage="stored",
        )  # fmt: skip
    with pytest.raises(ValueError, match="weights must be for the nodes"):
        ops.hard_infonce(torch.ones(4, 3), None, 1.0, weights=held)
    with pytest.raises(ValueError, match="weights must have dtype"):
        ops.hard_infonce(case.z, case.e, 1.0, weights=held)
    meta = [t.to("meta") for t in (case.z, case.labels, case.confident)]
    with pytest.raises(ValueError, match='take storage="snapshots"'):
        ops.hardness(meta[0], None, 1.0, meta[1], meta[2], 1.0, storage="stored")


def test_unreachable_snapshots_are_dropped() -> None:
    """A refresh with everybody confident leaves nothing of the earlier ones."""
    case = Case(30)
    held: Hardness | None = None
    for _ in range(MAX_SNAPSHOTS + 5):
        everybody = torch.ones(30, dtype=torch.bool)
        held = ops.hardness(case.z, case.e, 0.5, case.labels, everybody, 1.0, previous=held)
        assert len(held.z) == 1


def test_too_many_snapshots() -> None:
    """More live refreshes than a mask has bits are refused with a reason."""
    case = Case(MAX_SNAPSHOTS + 2)
    held: Hardness | None = None
    with pytest.raises(ValueError, match="previous"):
        for k in range(MAX_SNAPSHOTS + 2):
            one = torch.zeros(case.n, dtype=torch.bool)
            one[k] = True
            held = ops.hardness(case.z, case.e, 0.5, case.labels, one, 1.0, previous=held)


def test_state_dict() -> None:
    """Weights survive a checkpoint."""
    case = Case(20)
    first = ops.hardness(*case.snapshot(torch.float64))
    held = ops.hardness(case.z, case.e, 0.5, case.labels, ~case.confident, 1.0, previous=first)
    state = held.state_dict()
    assert all(isinstance(x, Tensor) for x in state.values())
    again = Hardness.from_state_dict(state)
    assert torch.equal(ops.dense_weights(again), ops.dense_weights(held))
    del state["membership"]
    with pytest.raises(ValueError, match="membership"):
        Hardness.from_state_dict(state)


def test_snapshot_is_a_copy() -> None:
    """Later changes of the embeddings do not reach the weights."""
    case = Case(20)
    z = case.z.clone()
    held = ops.hardness(z, case.e, 0.5, case.labels, case.confident, 1.0)
    before = ops.dense_weights(held)
    z.zero_()
    assert torch.equal(ops.dense_weights(held), before)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3"])
def test_named_precisions_are_fp32_on_the_cpu(precision: str) -> None:
    """Same bits as the default."""
    case = Case(50)
    results = [case.run(torch.float32, twin=False, precision=p) for p in (None, precision)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@needs_bf16
@pytest.mark.parametrize("dropped", ["avx2", "portable"])
def test_bf16_without_the_instruction_is_fp32(dropped: str) -> None:
    """A level without bf16 dot products computes in float32, to the same bits."""
    case = Case(50)
    _C.set_cpu_level(dropped)
    try:
        results = [case.run(torch.float32, twin=False, precision=p) for p in ("fp32", "bf16")]
    finally:
        _C.set_cpu_level("avx512")
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not torch.equal(results[0][1], case.run(torch.float32, twin=False, precision="bf16")[1])


BF16_CASES = [
    *({"n": n} for n in (1, 2, 3, 25, 96, 97, 193, 500)),
    *({"n": 5 * TILE // 2 + 11, "beta": beta} for beta in (None, 0.5, 2.0)),
    *({"n": 100, "dz": dz, "de": de} for dz, de in ((1, 1), (7, 9), (65, 33), (130, 50))),
    {"n": 100, "dz": 3, "de": None},
    *({"n": 110, "alpha": alpha} for alpha in (-0.1, 0.0, 0.5, 1.0, 1.0001, 3.0)),
    *({"n": 220, "share": share} for share in (0.0, 0.02, 1.0)),
]


@needs_bf16
@pytest.mark.parametrize("arguments", BF16_CASES, ids=str)
def test_bf16(arguments: dict[str, Any]) -> None:
    """The rounding of the operands bounds the error, whatever the shape."""
    case = Case(**arguments)
    factors = abs(case.alpha) + abs(1 - case.alpha)
    exact = case.run(torch.float64, twin=True)
    ours = case.run(torch.float32, twin=False, precision="bf16")
    for name, x, y in zip(("loss", "z", "e", "alpha"), exact, ours, strict=False):
        terms = 1.0 if name in ("loss", "alpha") else 1.0 / (2 * case.n)
        largest = max(float(x.abs().max()), terms)
        assert float((y - x).abs().max()) <= BF16_ROUNDING * factors * largest, name


@needs_bf16
@pytest.mark.parametrize("beta", [None, 1.0, 2.0])
def test_bf16_at_full_width(beta: float | None) -> None:
    """At the widths of HSAN: far nearer to the twin than torch's own bf16 (autocast)."""
    case = Case(400, 500, 500, beta=beta)
    assert case.e is not None
    exact = case.run(torch.float64, twin=True)
    ours = case.run(torch.float32, twin=False, precision="bf16")
    z, e = case.z.float().requires_grad_(), case.e.float().requires_grad_()
    weights = None if beta is None else reference.hardness(*case.snapshot(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference.hard_infonce(z, e, case.alpha, weights)
    loss.backward()
    assert (ours[0] - exact[0]).abs() <= 2e-6 * exact[0]
    for x, y, t in zip(exact[1:3], ours[1:3], (z.grad, e.grad), strict=True):
        assert t is not None
        assert (y - x).norm() <= 2e-4 * x.norm()
        assert (y - x).norm() <= 0.2 * (t.double() - x).norm()
        # The terms of this sum cancel to a tenth; a dropped tile would shift it by more than that.
        direction = normalize(case.z.sum(0) if x is exact[1] else case.e.sum(0), dim=0)
        assert ((y - x) @ direction).mean().abs() <= 1e-3 * (x @ direction).abs().mean()


@needs_bf16
def test_bf16_same_bits_for_any_thread_count() -> None:
    """One, two and three threads."""
    case = Case(5 * TILE // 2 + 30, 41, 30)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(case.run(torch.float32, twin=False, precision="bf16"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


BAD = [
    ({"z": [1.0]}, TypeError, "z must be a torch.Tensor"),
    ({"z": torch.zeros(4, 3, dtype=torch.float16)}, TypeError, "z must be float32 or float64"),
    ({"z": torch.zeros(4)}, ValueError, "z must have shape"),
    ({"z": torch.zeros(3, 2)}, ValueError, "2N"),
    ({"z": torch.zeros(0, 2)}, ValueError, "2N"),
    ({"z": torch.full((4, 3), torch.nan)}, ValueError, "z must be finite"),
    ({"e": torch.zeros(6, 3)}, ValueError, "e must have as many rows"),
    ({"e": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "e must have the dtype"),
    ({"e": torch.full((4, 3), torch.inf)}, ValueError, "e must be finite"),
    ({"alpha": "1"}, TypeError, "alpha must be a number"),
    ({"alpha": torch.zeros(2)}, ValueError, "alpha must be a number"),
    ({"alpha": torch.tensor(1)}, TypeError, "alpha must be of floating point"),
    ({"weights": torch.ones(4, 4)}, TypeError, "weights must come from"),
    ({"precision": "fp16"}, ValueError, "precision must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each wrong argument is named before any kernel runs."""
    args: dict[str, Any] = {"z": torch.ones(4, 3), "e": torch.ones(4, 2), "alpha": 0.5} | change
    with pytest.raises(error, match=message):
        ops.hard_infonce(**args)


def test_numbers_of_numpy_are_numbers() -> None:
    z = torch.eye(4)
    labels, confident = torch.tensor([0, 1]), torch.tensor([True, True])
    plain = ops.hard_infonce(
        z, None, 0.5, weights=ops.hardness(z, None, 0.5, labels, confident, 2.0)
    )
    for kind in (np.float32, np.float64):
        w = ops.hardness(z, None, kind(0.5), labels, confident, kind(2.0))
        assert torch.equal(ops.hard_infonce(z, None, kind(0.5), weights=w), plain)


def test_bad_weights() -> None:
    """Weights of other nodes, another dtype or with wrong labels."""
    z = torch.ones(4, 3)
    labels, confident = torch.tensor([0, 1]), torch.tensor([True, True])
    with pytest.raises(ValueError, match="weights must be for the nodes"):
        ops.hard_infonce(
            torch.ones(6, 3), None, 1.0, weights=ops.hardness(z, None, 1.0, labels, confident, 1)
        )
    with pytest.raises(ValueError, match="weights must have dtype"):
        ops.hard_infonce(
            z.double(), None, 1.0, weights=ops.hardness(z, None, 1.0, labels, confident, 1)
        )
    with pytest.raises(ValueError, match="float64"):
        ops.hard_infonce(z.double(), None, 1.0, precision="bf16")
    with pytest.raises(ValueError, match=r"labels must have shape \[2\]"):
        ops.hardness(z, None, 1.0, torch.zeros(3, dtype=torch.int64), confident, 1)
    with pytest.raises(TypeError, match="confident must have dtype"):
        ops.hardness(z, None, 1.0, labels, labels, 1)
    with pytest.raises(ValueError, match="beta"):
        ops.hardness(z, None, 1.0, labels, confident, -1)


# --- what the exponential cannot hold ------------------------------------------------------------


LOGITS = [(torch.float32, 70), (torch.float64, 670)]


@pytest.mark.parametrize(("dtype", "limit"), LOGITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_out_of_range_are_refused(dtype: torch.dtype, limit: int, sign: float) -> None:
    """All logits of these rows are the same, on both sides of the stated limit."""
    z = torch.ones(8, 1, dtype=dtype) * 0.85 * limit**0.5
    loss = ops.hard_infonce(z, None, 0.8 * sign)  # 0.58 of it
    torch.testing.assert_close(loss, reference.hard_infonce(z, z[:, :0], 0.8 * sign))
    for alpha in (2.0 * sign, 100.0 * sign):
        with pytest.raises(ValueError, match=f"must give logits below {limit} in absolute value"):
            ops.hard_infonce(z, None, alpha)


@pytest.mark.parametrize(("dtype", "limit"), LOGITS)
@pytest.mark.parametrize("n", [1, 2000])
def test_logits_up_to_the_stated_limit_are_taken(dtype: torch.dtype, limit: int, n: int) -> None:
    z = torch.ones(2 * n, 1, dtype=dtype)
    for logit in (-limit, limit):
        loss = ops.hard_infonce(z, None, float(logit))
        want = reference.hard_infonce(z, z[:, :0], float(logit))
        torch.testing.assert_close(loss, want, rtol=0, atol=abs(logit) * torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize("alpha", [200.0, -200.0, 1000.0, -1000.0])
def test_a_compiled_loss_out_of_range_is_no_number(alpha: float) -> None:
    """A compiled graph does not look at values: what it returns must not pass for a loss."""
    z = torch.ones(8, 1, requires_grad=True)
    loss = torch.compile(lambda z: ops.hard_infonce(z, None, alpha), backend="aot_eager")(z)
    assert not loss.isfinite()
    (grad,) = torch.autograd.grad(loss, z)
    assert not grad.isfinite().any()


@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 80), (torch.float64, 700)])
def test_gradient_of_a_weighted_loss_with_large_logits(
    dtype: torch.dtype, most: int, weight: float
) -> None:
    """The weight of the loss over a row sum may be below the least normal number."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(60, 4, generator=generator, dtype=torch.float64)
    z = (torch.nn.functional.normalize(z, dim=1) * (0.99 * most) ** 0.5).to(dtype)
    got, want = z.clone().requires_grad_(), z.double().requires_grad_()
    (weight * ops.hard_infonce(got, None, 1.0)).backward()
    (weight * reference.hard_infonce(want, None, 1.0)).backward()
    error = float((got.grad.double() - want.grad).abs().max() / want.grad.abs().max())
    assert error < 40 * most**0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("storage", ["snapshots", "stored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarities_too_close_to_tell_apart_give_weights_in_range(
    dtype: torch.dtype, storage: str
) -> None:
    """The width of their range has no inverse: it counts as no range at all."""
    tiny = torch.finfo(dtype).tiny
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    z = z * (0.01 * tiny) ** 0.5
    labels, confident = torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, True, False])
    for beta in (1.0, 0.5, 65.0):
        w = ops.hardness(z, None, 1.0, labels, confident, beta, storage=storage)
        least, greatest = torch.ops.fastclust.similarity_range(
            z, z[:, :0], torch.ones((), dtype=dtype), 0
        )
        assert 0 < greatest - least < tiny
        weights = ops.dense_weights(w)
        assert (weights >= 0).all() and (weights <= 1).all()
        got, want = z.clone().requires_grad_(), z.clone().requires_grad_()
        loss = ops.hard_infonce(got * 1e3, None, 1.0, weights=w)
        expected = reference.hard_infonce(want * 1e3, None, 1.0, weights)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=0)


def test_labels_beyond_int32_are_told_apart() -> None:
    z = torch.nn.functional.normalize(torch.randn(8, 3), dim=1)
    confident = torch.ones(4, dtype=torch.bool)
    small, large, least = (torch.tensor([0, 1, 0, 1]) * step for step in (1, 2**32, -(2**63)))
    for storage in ("snapshots", "stored"):
        one, *others = (
            ops.dense_weights(ops.hardness(z, None, 1.0, y, confident, 1.0, storage=storage))
            for y in (small, large, least)
        )
        assert all(torch.equal(one, other) for other in others)


def test_dense_weights_wants_weights() -> None:
    with pytest.raises(TypeError, match=r"w must come from hardness\(\), got NoneType"):
        ops.dense_weights(None)
