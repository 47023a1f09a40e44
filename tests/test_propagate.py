"""ops.propagate against its float64 twin: values, gradients, properties, edge shapes.

Faults that were seeded, one at a time, and the test that turned red first: a hub segment without
its last edge, a hub table shifted by one segment (test_chunk_tables_cover_every_edge_once and
test_matches_the_twin); a backward without swapped scales, without the mask, without the residual
(test_matches_the_twin); a degree without the self loop
(test_scales_give_the_normalised_adjacency).
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graph import random_adjacency
from tolerances import bound
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastclust.graph as graph_module
from fastclust import _C, Graph, ops, reference
from fastclust.ops.propagate import propagate_any

LEVELS = ["portable", "avx2", "avx512"]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=LEVELS)
def level(request):
    """Run the test at one dispatch level."""
    before = _C.cpu_level()
    if _C.set_cpu_level(request.param) != request.param:
        _C.set_cpu_level(before)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C.set_cpu_level(before)


@pytest.fixture
def small_hubs(monkeypatch):
    """Make hubs of rows with more than 20 edges, and tasks of a few rows."""
    monkeypatch.setitem(graph_module.HUB_EDGES, "cpu", 20)
    monkeypatch.setattr(graph_module, "TASK_EDGES", 64)


def star(n: int) -> sp.csr_array:
    """Node 0 joined to all others."""
    edges = np.stack([np.zeros(n - 1, dtype=int), np.arange(1, n)])
    upper = sp.coo_array((np.ones(n - 1), edges), shape=(n, n))
    return sp.csr_array(upper + upper.T, dtype=np.float32)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def naive(graph, h, *, residual=None, activation="none", steps=1):
    """Torch in the dtype of h, one kernel after the other: the yardstick for errors."""
    abar = reference.dense_adjacency(graph).to(h.dtype)
    out = h
    for _ in range(steps):
        out = abar @ out
    if residual is not None:
        out = out + residual
    return torch.relu(out) if activation == "relu" else out


def check(graph, h, residual=None, **options):
    """Compare value and gradients with the twin, as strictly as torch itself allows."""
    inputs = [h] if residual is None or residual is h else [h, residual]
    grad = randn(*h.shape, dtype=torch.float64, seed=99)
    # where float64 lies this close to zero, another order of summation may decide relu otherwise
    if options.get("activation") == "relu":
        before = reference.propagate(
            graph, h, residual=residual, **{**options, "activation": "none"}
        )
        grad = grad * (before.detach().abs() > 1e-5)
    results = {}
    for name, function in (
        ("ours", ops.propagate),
        ("torch", naive),
        ("twin", reference.propagate),
    ):
        # not cloned: a clone of a slice has other strides
        leaves = {id(x): x.detach().requires_grad_() for x in inputs}
        res = None if residual is None else leaves[id(residual)]
        out = function(graph, leaves[id(h)], residual=res, **options)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        results[name] = [out.detach(), *gradients]
    for ours, torchs, twin in zip(*(results[k] for k in ("ours", "torch", "twin")), strict=True):
        assert ours.dtype == h.dtype and ours.shape == h.shape and ours.is_contiguous()
        error = (ours - twin).abs().max().item()
        torch_error = (torchs - twin).abs().max().item()
        assert error <= bound("propagate", torch_error, twin.abs().max().item(), h.dtype)


# ---- against the twin ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", ["none", "input", "other"])
@pytest.mark.parametrize("d", [1, 16, 33, 128, 150])
def test_matches_the_twin(d, residual, activation, dtype, level, small_hubs):
    graph = Graph(random_adjacency(70, 18), "rw")
    h = randn(70, d, dtype=dtype)
    other = {"none": None, "input": h, "other": randn(70, d, dtype=dtype, seed=1)}[residual]
    check(graph, h, other, activation=activation)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
def test_matches_the_twin_for_every_graph(norm, self_loops, weighted, level, small_hubs):
    graph = Graph(random_adjacency(60, 17, weighted=weighted), norm, self_loops)
    for dtype in DTYPES:
        h = randn(60, 21, dtype=dtype)
        check(graph, h, h, activation="relu")
        check(graph, h)


@pytest.mark.parametrize("d", [2, 3, 7, 8, 9, 15, 17, 31, 32, 63, 64, 65, 127, 129, 255, 257])
def test_every_tail_of_columns(d, level):
    graph = Graph(random_adjacency(20, 5), "sym")
    check(graph, randn(20, d), randn(20, d, seed=1), activation="relu")


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("residual", ["none", "input", "other"])
def test_steps(steps, residual):
    graph = Graph(random_adjacency(40, 6), "sym")
    h = randn(40, 10)
    other = {"none": None, "input": h, "other": randn(40, 10, seed=1)}[residual]
    check(graph, h, other, steps=steps)
    check(graph, h, other, steps=steps, activation="relu")


def test_zero_steps_do_not_alias_the_input():
    graph = Graph(random_adjacency(10, 3))
    h = randn(10, 4)
    out = ops.propagate(graph, h, steps=0)
    assert torch.equal(out, h) and out.data_ptr() != h.data_ptr()


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_the_result_is_contiguous(steps, residual, activation):
    graph = Graph(random_adjacency(10, 3))
    h = randn(4, 10).T
    out = ops.propagate(
        graph, h, residual=2 * h if residual else None, steps=steps, activation=activation
    )
    assert out.is_contiguous()


# ---- graphs at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("self_loops", [True, False])
def test_graph_without_edges(n, self_loops, level):
    for norm in ("rw", "sym", "none"):
        graph = Graph(sp.csr_array((n, n), dtype=np.float32), norm, self_loops)
        h = randn(n, 5)
        expected = h if self_loops else torch.zeros_like(h)
        assert torch.equal(ops.propagate(graph, h), expected)
        check(graph, h, h, activation="relu")


def test_isolated_nodes_among_others(level):
    adjacency = random_adjacency(30, 4).tolil()
    for node in (0, 7, 29):
        adjacency[node] = 0
        adjacency[:, node] = 0
    graph = Graph(adjacency.tocsr(), self_loops=False)
    h = randn(30, 19)
    out = ops.propagate(graph, h)
    assert (out[[0, 7, 29]] == 0).all()
    check(graph, h, activation="relu")


@pytest.mark.parametrize("n", [20, 22, 41, 42, 500])
def test_one_hub_joined_to_all(n, level, small_hubs):
    for norm in ("rw", "sym"):
        graph = Graph(star(n), norm)
        for d in (5, 140):
            h = randn(n, d)
            check(graph, h, h, activation="relu")


def test_hub_of_the_default_size():
    graph = Graph(star(20_000))
    assert len(graph._segments) == 3
    h = randn(20_000, 3, dtype=torch.float64)
    out = ops.propagate(graph, h)
    torch.testing.assert_close(out[0], h.mean(dim=0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(out[1:], (h[1:] + h[0]) / 2, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "layout",
    ["transposed", "column slice", "aligned slice", "row slice", "expanded", "every other column"],
)
@pytest.mark.parametrize("as_residual", [False, True])
def test_any_strides(layout, as_residual):
    graph = Graph(random_adjacency(24, 5))
    h = {
        "transposed": randn(33, 24).T,
        "column slice": randn(24, 80)[:, 5:38],
        "aligned slice": randn(24, 80)[:, 16:48],  # gathered where it lies
        "row slice": randn(48, 33)[::2],
        "expanded": randn(1, 33).expand(24, 33),
        "every other column": randn(24, 66)[:, ::2],
    }[layout]
    if as_residual:
        check(graph, randn(*h.shape, seed=3), h, activation="relu")
    else:
        check(graph, h, h, activation="relu")
        check(graph, h)


@pytest.mark.parametrize("wanted", ["both", "residual"])
@pytest.mark.parametrize("d", [32, 33])
def test_gradients_of_any_strides(wanted, d):
    """A gradient that is a slice of a wider array; also where only the mask is applied."""
    graph = Graph(random_adjacency(24, 5))
    h, r = randn(24, d).requires_grad_(wanted == "both"), randn(24, d, seed=1).requires_grad_()
    out = ops.propagate(graph, h, residual=r, activation="relu")
    grad = randn(24, d + 20, seed=2)[:, 3 : d + 3]
    leaves = [h, r] if wanted == "both" else [r]
    for got, want in zip(
        torch.autograd.grad(out, leaves, grad, retain_graph=True),
        torch.autograd.grad(out, leaves, grad.contiguous()),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert torch.equal(got, torch.where(out > 0, grad, 0))


def test_no_columns():
    graph = Graph(random_adjacency(10, 3))
    h = torch.empty(10, 0, requires_grad=True)
    out = ops.propagate(graph, h, residual=h, activation="relu")
    out.sum().backward()
    assert out.shape == (10, 0) and h.grad.shape == (10, 0)


def test_nan_spreads_to_neighbours_only(level):
    graph = Graph(sp.csr_array(np.eye(6, k=1) + np.eye(6, k=-1)))
    h = torch.ones(6, 3)
    h[0, 1] = float("nan")
    h.requires_grad_()
    out = propagate_any(graph, h, activation="relu")
    bad = torch.zeros(6, 3, dtype=torch.bool)
    bad[:2, 1] = True
    assert torch.equal(out.isnan(), bad)
    # the gradient passes where torch.relu lets it pass
    (grad,) = torch.autograd.grad(out, h, torch.ones_like(out))
    leaf = h.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(naive(graph, leaf, activation="relu").sum(), leaf)
    torch.testing.assert_close(grad, expected)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(norm, weighted, monkeypatch):
    monkeypatch.setitem(graph_module.HUB_EDGES, "cpu", 4)
    graph = Graph(random_adjacency(9, 8, weighted=weighted), norm)
    assert len(graph._hubs) > 0
    h = randn(9, 2, dtype=torch.float64).requires_grad_()
    r = randn(9, 2, dtype=torch.float64, seed=1).requires_grad_()
    for options in ({}, {"activation": "relu"}, {"steps": 2, "activation": "relu"}):
        assert torch.autograd.gradcheck(
            lambda h, r, o=options: ops.propagate(graph, h, residual=r, **o), (h, r)
        )
        assert torch.autograd.gradcheck(
            lambda h, o=options: ops.propagate(graph, h, residual=h, **o), (h,)
        )
        # squared, for a second derivative that is not zero
        assert torch.autograd.gradgradcheck(
            lambda h, r, o=options: ops.propagate(graph, h, residual=r, **o).square(), (h, r)
        )
        assert torch.autograd.gradgradcheck(
            lambda r, o=options: ops.propagate(graph, h.detach(), residual=r, **o).square(), (r,)
        )
        assert torch.autograd.gradgradcheck(
            lambda h, o=options: ops.propagate(graph, h, residual=h, **o).square(), (h,)
        )


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("want", ["h", "residual"])
def test_only_the_gradients_that_are_needed(want, activation, monkeypatch):
    graph = Graph(random_adjacency(15, 4))
    h, r = randn(15, 40), randn(15, 40, seed=1)
    leaf = {"h": h, "residual": r}[want].requires_grad_()
    out = ops.propagate(graph, h, residual=r, activation=activation)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    copies = [x.detach().double().requires_grad_() for x in (h, r)]
    twin = reference.propagate(graph, copies[0], residual=copies[1], activation=activation)
    expected = torch.autograd.grad(twin.square().sum(), copies)[want == "residual"]
    torch.testing.assert_close(grad, expected.float())


def test_no_mask_is_kept_without_need():
    graph = Graph(random_adjacency(15, 4))
    h = randn(15, 40)
    assert ops.propagate(graph, h, activation="relu").grad_fn is None
    with torch.no_grad():
        assert not ops.propagate(graph, h.requires_grad_(), activation="relu").requires_grad


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_opcheck(activation, small_hubs):
    relu = activation == "relu"
    for adjacency in (random_adjacency(40, 22), random_adjacency(12, 3, weighted=True)):
        graph = Graph(adjacency, "sym")
        n = graph.n_nodes
        args = ops.propagate.__globals__["_graph_args"](graph, torch.float32)
        h, r = randn(n, 37).requires_grad_(), randn(n, 37, seed=1).requires_grad_()
        for residual, add_input in ((r, False), (None, True), (None, False)):
            torch.library.opcheck(
                torch.ops.fastclust.propagate.default, (*args, h, residual, add_input, relu, relu)
            )
        mask = torch.randint(-(2**31), 2**31, (n, 2), dtype=torch.int32)
        mask[:, 1] &= 31
        grad = randn(n, 37)
        for want_residual in (False, True):
            torch.library.opcheck(
                torch.ops.fastclust.propagate_backward.default,
                (*args, grad, mask if relu else None, False, want_residual),
            )
        torch.library.opcheck(torch.ops.fastclust.mask_rows.default, (grad, mask))


def test_compiles_to_one_graph():
    graph = Graph(random_adjacency(20, 4), "sym")

    def layer(h, w):
        hidden = ops.propagate(graph, h @ w, residual=h, activation="relu")
        return ops.propagate(graph, hidden, residual=hidden, steps=2).square().sum()

    h, w = randn(20, 12), randn(12, 12, seed=1)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---- properties ----------------------------------------------------------------------------------


# From a copy; and where they lie, whole rows or, with more threads, parts of them.
@pytest.mark.parametrize(("degree", "d"), [(25, 70), (3, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, degree, d, level, small_hubs):
    graph = Graph(random_adjacency(300, degree), "sym")
    h = randn(300, d, dtype=dtype).requires_grad_()
    grad = randn(300, d, dtype=dtype, seed=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 3, 8):
            torch.set_num_threads(n)
            out = ops.propagate(graph, h, residual=h, activation="relu")
            results.append((out.detach(), *torch.autograd.grad(out, h, grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("degree", [3, 9])
@pytest.mark.parametrize("norm", ["rw", "sym"])
def test_columns_do_not_depend_on_their_neighbours(norm, degree, level, small_hubs):
    graph = Graph(random_adjacency(50, degree), norm)
    h = randn(50, 300)
    out = ops.propagate(graph, h, residual=h, activation="relu")
    for begin, end in ((0, 1), (31, 33), (100, 229)):
        part = h[:, begin:end]
        assert torch.equal(
            ops.propagate(graph, part, residual=part, activation="relu"), out[:, begin:end]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
def test_same_bits_from_a_copy_and_in_place(norm, weighted, dtype, level, small_hubs):
    """Few neighbours a node: rows are read, scaled and masked in place; many: from a copy."""
    n, m = 80, 120
    few = random_adjacency(n, 0.8, weighted=weighted).tolil()
    few[0, 1:30] = few[1:30, 0] = 1.0  # a hub
    few = sp.csr_array(few.tocsr())
    both = sp.csr_array(sp.block_diag((few, random_adjacency(m, 60, seed=1)), format="csr"))
    graphs = [Graph(few.astype(np.float32), norm), Graph(both.astype(np.float32), norm)]
    assert graphs[0].n_edges < 2 * n and graphs[1].n_edges > 8 * (n + m)
    for d in (1, 2, 7, 8, 16, 17, 33, 64, 150):
        for residual, activation in (("none", "none"), ("input", "relu"), ("other", "relu")):
            results = []
            for graph in graphs:
                rows = graph.n_nodes
                h, r, g = (randn(n + m, d, dtype=dtype, seed=s)[:rows] for s in (1, 2, 3))
                h.requires_grad_(), r.requires_grad_()
                other = {"none": None, "input": h, "other": r}[residual]
                out = ops.propagate(graph, h, residual=other, activation=activation)
                leaves = [h, r] if other is r else [h]
                results.append([out, *torch.autograd.grad(out, leaves, g)])
            for in_place, copied in zip(*results, strict=True):
                assert torch.equal(in_place, copied[:n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
def test_one_column_has_the_bits_of_many(norm, weighted, dtype, level):
    """One column has loops of its own, over rows side by side; with tails, hubs and strides."""
    n = 701
    a = random_adjacency(n, 3, weighted=weighted).tolil()
    a[0, 1:60] = a[1:60, 0] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graph_module.HUB_EDGES, "cpu", 20)
        graph = Graph(sp.csr_array(a.tocsr(), dtype=np.float32), norm)
    h, r, g = (randn(n, 33, dtype=dtype, seed=s) for s in (1, 2, 3))
    h[5, 0] = float("nan")
    h[60:90, 0] = -0.0
    for residual, activation in (("none", "none"), ("input", "relu"), ("other", "relu")):
        results = []
        for d, copied in ((33, False), (1, False), (1, True)):
            x, y, z = ((t[:, :d].clone() if copied else t[:, :d]).detach() for t in (h, r, g))
            x.requires_grad_(), y.requires_grad_()
            other = {"none": None, "input": x, "other": y}[residual]
            out = propagate_any(graph, x, residual=other, activation=activation)
            leaves = [x, y] if other is y else [x]
            results.append([out, *torch.autograd.grad(out, leaves, z)])
        for many, *ones in zip(*results, strict=True):
            for one in ones:
                assert torch.equal(many[:, :1].nan_to_num(7.0), one.nan_to_num(7.0))


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", ["rw", "sym"])
def test_not_a_byte_past_the_last_row_is_touched(norm, dtype, level, small_hubs):
    """Narrow rows are gathered where they lie, by wider vectors; behind them is no memory."""
    n = 20
    graph = Graph(random_adjacency(n, 5), norm)
    page = mmap.PAGESIZE
    for d in (1, 3, 7, 15, 17, 33, 50, 63):
        size = n * d * np.dtype(dtype).itemsize
        room = -(-size // page) * page
        memory = mmap.mmap(-1, room + page)
        h = np.frombuffer(memory, dtype, n * d, room - size).reshape(n, d)
        h[:] = np.random.default_rng(d).standard_normal((n, d))
        behind = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(behind, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        x = torch.from_numpy(h)
        out = ops.propagate(graph, x, residual=x, activation="relu")
        padded = torch.nn.functional.pad(x, (0, 80 - d))
        want = ops.propagate(graph, padded, residual=padded, activation="relu")[:, :d]
        assert torch.equal(out, want)


def test_permutation_equivariance(small_hubs):
    adjacency = random_adjacency(120, 15)
    order = np.random.default_rng(3).permutation(120)
    h = randn(120, 45, dtype=torch.float64)
    out = ops.propagate(Graph(adjacency), h, residual=h, activation="relu")
    permuted = Graph(sp.csr_array(adjacency[order][:, order]))
    h_p = h[torch.from_numpy(order)]
    out_p = ops.propagate(permuted, h_p, residual=h_p, activation="relu")
    torch.testing.assert_close(out_p, out[torch.from_numpy(order)], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stochastic_keeps_constants(dtype, level, small_hubs):
    graph = Graph(random_adjacency(200, 25), "rw")
    out = ops.propagate(graph, torch.ones(200, 9, dtype=dtype), steps=4)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_backward_is_the_adjoint(level, small_hubs):
    graph = Graph(random_adjacency(90, 25, weighted=True), "rw")
    h = randn(90, 35, dtype=torch.float64).requires_grad_()
    g = randn(90, 35, dtype=torch.float64, seed=1)
    out = ops.propagate(graph, h)
    (grad,) = torch.autograd.grad(out, h, g)
    torch.testing.assert_close((out * g).sum(), (h * grad).sum(), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 90),
    degree=st.floats(0, 30),
    d=st.sampled_from([1, 7, 16, 33, 64, 140]),
    norm=st.sampled_from(["rw", "sym", "none"]),
    self_loops=st.booleans(),
    weighted=st.booleans(),
    hub_edges=st.sampled_from([3, 16, 8192]),
    seed=st.integers(0, 2**20),
)
def test_properties_of_any_graph(n, degree, d, norm, self_loops, weighted, hub_edges, seed):
    adjacency = random_adjacency(n, degree, seed=seed, weighted=weighted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graph_module.HUB_EDGES, "cpu", hub_edges)
        patch.setattr(graph_module, "TASK_EDGES", 64)
        graph = Graph(adjacency, norm, self_loops)
        order = np.random.default_rng(seed).permutation(n)
        permuted = Graph(sp.csr_array(adjacency[order][:, order]), norm, self_loops)
    h = randn(n, d, dtype=torch.float64, seed=seed).requires_grad_()
    g = randn(n, d, dtype=torch.float64, seed=seed + 1)
    out = ops.propagate(graph, h)
    close = {"rtol": 1e-11, "atol": 1e-11}
    # A 1 = row sums
    ones = ops.propagate(graph, torch.ones(n, d, dtype=torch.float64))
    sums = reference.dense_adjacency(graph).sum(dim=1, keepdim=True).expand(n, d)
    torch.testing.assert_close(ones, sums, **close)
    # linear
    both = ops.propagate(graph, 3 * h.detach() - g)
    torch.testing.assert_close(both, 3 * out.detach() - ops.propagate(graph, g), **close)
    # the backward is the transpose
    (grad,) = torch.autograd.grad(out, h, g)
    transposed = reference.dense_adjacency(graph).T @ g
    torch.testing.assert_close(grad, transposed, **close)
    # nodes renamed
    renamed = ops.propagate(permuted, h.detach()[torch.from_numpy(order)])
    torch.testing.assert_close(renamed, out.detach()[torch.from_numpy(order)], **close)


def panels_of_any_width(n: int) -> sp.csr_array:
    """A ring with chords: 10 neighbours each, so that h is copied into panels."""
    rows = np.arange(n)
    steps = np.array([1, 2, 3, 7, 11])
    i, j = np.repeat(rows, 5), (rows[:, None] + steps).reshape(-1) % n
    upper = sp.coo_array((np.ones(5 * n), (i, j)), shape=(n, n))
    return sp.csr_array(upper + upper.T, dtype=np.float32)


@pytest.mark.parametrize(("n", "d"), [(9_000, 144), (20_000, 72), (40_000, 40), (70_000, 48)])
@pytest.mark.parametrize("norm", ["rw", "sym"])
def test_panels_of_every_width(n, d, norm, level):
    # 128 columns down to 16, the last panel ragged, prefetch off and on
    adjacency = panels_of_any_width(n)
    graph = Graph(adjacency, norm)
    abar = sp.csr_array(adjacency + sp.eye_array(n)).astype(np.float64) / 11  # 11-regular
    h = randn(n, d).requires_grad_()
    g = randn(n, d, seed=1)
    out = ops.propagate(graph, h, residual=h, activation="relu")
    exact = abar @ h.detach().double().numpy() + h.detach().double().numpy()
    np.testing.assert_allclose(out.detach().numpy(), np.maximum(exact, 0), rtol=0, atol=3e-6)
    (grad,) = torch.autograd.grad(out, h, g)
    passed = np.where(out.detach().numpy() > 0, g.double().numpy(), 0)
    np.testing.assert_allclose(grad.numpy(), abar @ passed + passed, rtol=0, atol=3e-6)


def test_output_beyond_the_cache(level):
    # from 64 MB on it is stored around the cache
    n, d = 140_000, 128
    graph = Graph(panels_of_any_width(n), "sym")
    h = randn(1, d).expand(n, d)
    torch.testing.assert_close(ops.propagate(graph, h), h, rtol=2e-6, atol=2e-6)


def test_errors_have_no_sign(level, small_hubs):
    # a dropped or doubled term shifts all entries of positive data the same way
    graph = Graph(random_adjacency(400, 30), "rw")
    h = randn(400, 130).abs().requires_grad_()
    out = ops.propagate(graph, h, residual=h, activation="relu")
    g = randn(400, 130, seed=5).abs()
    (grad,) = torch.autograd.grad(out, h, g)
    leaf = h.detach().double().requires_grad_()
    twin = reference.propagate(graph, leaf, residual=leaf, activation="relu")
    (twin_grad,) = torch.autograd.grad(twin, leaf, g.double())
    for ours, exact in ((out, twin), (grad, twin_grad)):
        bias = ((ours - exact) / exact).mean().abs().item()
        assert bias < 0.1 * torch.finfo(torch.float32).eps


def test_residual_is_added_last():
    # a residual far larger than the sum must cost the sum one rounding only
    graph = Graph(random_adjacency(100, 30), "none")
    h = randn(100, 16)
    r = torch.full((100, 16), 1000.0)
    exact = reference.propagate(graph, h, residual=r)
    error = (ops.propagate(graph, h, residual=r) - exact).abs().max().item()
    assert error <= 0.51 * torch.finfo(torch.float32).eps * 1024 + 1e-5


def test_real_graph(data_root):
    with np.load(data_root / "cora.npz") as file:
        n = len(file["adj_indptr"]) - 1
        adjacency = sp.csr_array(
            (np.ones(len(file["adj_indices"])), file["adj_indices"], file["adj_indptr"]),
            shape=(n, n),
        )
    h = randn(n, 50)
    check(Graph(adjacency, "sym"), h, h, activation="relu")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"graph": "g"}, TypeError, "graph must be a fastclust.Graph, got str"),
        ({"h": [[1.0, 1.0]] * 8}, TypeError, "h must be a torch.Tensor, got list"),
        (
            {"h": torch.ones(8, 2).to_sparse()},
            TypeError,
            "h must be dense, got layout torch.sparse_coo",
        ),
        ({"h": torch.ones(8, 2).half()}, TypeError, "h must be float32 or float64"),
        ({"h": torch.ones(8)}, ValueError, r"h must have shape \[N, d\], got \[8\]"),
        ({"h": torch.ones(7, 2)}, ValueError, r"one row per node of the graph \(8\), got 7"),
        ({"h": torch.ones(8, 2, device="meta")}, ValueError, "graph.to"),
        ({"residual": [[1.0, 1.0]] * 8}, TypeError, "residual must be a torch.Tensor"),
        ({"residual": torch.ones(8, 3)}, ValueError, "residual must have the shape of h"),
        ({"residual": torch.ones(8, 2).double()}, ValueError, "residual must have the dtype"),
        ({"activation": "gelu"}, ValueError, "activation must be 'none' or 'relu', got 'gelu'"),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"steps": True}, TypeError, "steps must be an integer, got True"),
        ({"h": torch.full((8, 2), torch.nan)}, ValueError, "h must be finite"),
        ({"h": torch.full((8, 2), torch.inf), "steps": 0}, ValueError, "h must be finite"),
        ({"residual": torch.full((8, 2), torch.nan)}, ValueError, "residual must be finite"),
    ],
)
def test_bad_input(change, error, match):
    arguments = {"graph": Graph(random_adjacency(8, 3)), "h": torch.ones(8, 2), **change}
    with pytest.raises(error, match=match):
        ops.propagate(arguments.pop("graph"), arguments.pop("h"), **arguments)


def test_numbers_of_numpy_and_large_values_are_no_mistakes():
    graph = Graph(random_adjacency(8, 3))
    h = torch.full((8, 2), 3e38)  # their sum is infinite
    out = ops.propagate(graph, h, steps=np.int64(2))
    assert torch.equal(out, ops.propagate(graph, h, steps=2))


def test_values_are_not_looked_at_where_they_cannot_be():
    graph = Graph(random_adjacency(8, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.propagate(graph, mode.from_tensor(torch.ones(8, 2))).shape == (8, 2)
    traced = make_fx(lambda h: ops.propagate(graph, h))(torch.ones(8, 2))
    assert traced(torch.full((8, 2), torch.nan)).isnan().all()


def test_the_operator_itself_rejects_what_does_not_fit():
    graph = Graph(random_adjacency(8, 3))
    args = ops.propagate.__globals__["_graph_args"](graph, torch.float32)
    for h in (torch.ones(7, 2), torch.ones(8), torch.ones(8, 2).double(), torch.ones(8, 2).half()):
        with pytest.raises(RuntimeError):
            torch.ops.fastclust.propagate(*args, h, None, False, False, False)


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 128, 500])
@pytest.mark.parametrize("weighted", [False, True])
def test_cuda_matches_the_twin(d, dtype, weighted):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none is visible")
    adjacency = random_adjacency(900, 30, weighted=weighted) + star(900)
    graph = Graph(adjacency, "sym")
    device_graph = graph.to("cuda")
    h = randn(900, d, dtype=dtype).requires_grad_()
    g = randn(900, d, dtype=dtype, seed=1)
    h_cuda = h.detach().cuda().requires_grad_()
    out = ops.propagate(device_graph, h_cuda, residual=h_cuda, activation="relu")
    twin = reference.propagate(graph, h, residual=h, activation="relu")
    grad_twin = torch.autograd.grad(twin, h, g.double())[0]
    grad = torch.autograd.grad(out, h_cuda, g.cuda())[0]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(out.cpu().double(), twin, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.cpu().double(), grad_twin, rtol=tolerance, atol=10 * tolerance)
    again = ops.propagate(device_graph, h_cuda, residual=h_cuda, activation="relu")
    assert torch.equal(out, again)
