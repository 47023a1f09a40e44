"""The CUDA kernels of the propagation, executed on the CPU over an emulated block.

The kernel sources and launchers themselves, compiled by the C++ compiler, against the float64 twin:
every width of load, hub rows, masks, all options, bf16 storage.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from test_graph import random_adjacency
from test_propagate import randn, star

import fastclust.graph as graph_module
from fastclust import Graph, reference

NAMES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "Bf16"}
# Of the largest entry: rounding of the sums; for bf16 of what is stored, once.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-8}


class HubTables(ctypes.Structure):
    """Mirror of HubTables in csrc/propagate/propagate.h."""

    _fields_ = (
        ("hub_edges", ctypes.c_int64),
        ("n_segments", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("n_hubs", ctypes.c_int64),
        ("hubs", ctypes.c_void_p),
    )


class Params(ctypes.Structure):
    """Mirror of PropagateParams."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_nodes", "n_halo", "n_cols", "n_edges")),
        *(
            (name, ctypes.c_void_p)
            for name in ("indptr", "indices", "values", "row_scale", "col_scale")
        ),
        ("self_loops", ctypes.c_bool),
        ("n_tasks", ctypes.c_int64),
        ("task_rows", ctypes.c_void_p),
        ("hub", HubTables),
        ("h", ctypes.c_void_p),
        ("h_stride", ctypes.c_int64),
        ("h_mask", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        ("add_input", ctypes.c_bool),
        ("relu", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("out", "out_mask", "masked_h", "scratch")),
    )


@pytest.fixture(scope="module")
def emulated(emulate: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernels and launchers as ordinary C++."""
    lib = emulate("propagate")
    lib.params_bytes.restype = lib.bf16_changes.restype = ctypes.c_int64
    assert lib.params_bytes() == ctypes.sizeof(Params)
    return lib


@pytest.fixture
def small_hubs(monkeypatch):
    """Make hubs of rows with more than 20 edges."""
    monkeypatch.setitem(graph_module.HUB_EDGES, "cpu", 20)


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def run(lib, graph, h, *, transposed=False, mask=None, residual=None, add_input=False, relu=False,
        want_masked=False, n_halo=0):  # fmt: skip
    """(out, mask of the activation, masked h) of one launch; what is not written stays NaN."""
    n, d = h.shape[0] - n_halo, h.shape[1]
    words = (d + 31) // 32
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    row, col = graph.scales(h.dtype)
    row, col = (col, row) if transposed else (row, col)
    out = torch.full((n, d), torch.nan, dtype=h.dtype)
    masked = torch.full((n, d), torch.nan, dtype=h.dtype) if want_masked else None
    bits = torch.full((n, words), -1, dtype=torch.int32) if relu else None
    scratch = torch.full((len(graph._segments), d), torch.nan, dtype=wide)
    params = Params(
        n, n_halo, d, graph.n_edges,
        *map(pointer, (graph.indptr, graph.indices, graph.values, row, col)),
        graph.self_loops, 0, None,
        HubTables(
            graph._hub_edges, len(graph._segments), pointer(graph._segments), len(graph._hubs),
            pointer(graph._hubs),
        ),
        pointer(h), h.stride(0), pointer(mask), pointer(residual),
        0 if residual is None else residual.stride(0), add_input, relu, pointer(out),
        pointer(bits), pointer(masked), pointer(scratch),
    )  # fmt: skip
    assert getattr(lib, f"propagate_{NAMES[h.dtype]}")(ctypes.byref(params)) == 0
    return out, bits, masked


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    largest = float(want.abs().max().clamp_min(1.0))
    assert float((got.double() - want).abs().max()) <= BOUNDS[got.dtype] * largest


def check(lib, graph, h, *, residual=None, add_input=False, relu=False):
    """Forward and backward of one layer against the twin, on the numbers as they are stored."""
    leaf = h.double().requires_grad_()
    other = None if residual is None else residual.double().requires_grad_()
    given = leaf if add_input else other
    sums = reference.propagate(graph, leaf, residual=given)
    twin = torch.relu(sums) if relu else sums
    out, bits, _ = run(lib, graph, h, residual=residual, add_input=add_input, relu=relu)
    close(out, twin.detach())
    grad = randn(*h.shape, dtype=torch.float64, seed=9).to(h.dtype)
    if relu:
        passed = torch.stack(
            [(bits[:, c // 32] >> (c % 32) & 1).bool() for c in range(h.shape[1])], dim=1
        )
        sure = sums.detach().abs() > 1e-5
        assert torch.equal(passed[sure], (sums > 0)[sure])
        tail = bits[:, -1] if h.shape[1] % 32 else torch.zeros(1, dtype=torch.int32)
        assert not (tail.long() & 0xFFFFFFFF).bitwise_right_shift(h.shape[1] % 32 or 32).any()
        masked_grad = torch.where(passed, grad, torch.zeros_like(grad))
    else:
        masked_grad = grad
    wanted = torch.autograd.grad(sums, leaf, masked_grad.double())[0]
    got, _, of_residual = run(
        lib, graph, grad, transposed=True, mask=bits, add_input=add_input, want_masked=True
    )
    close(got, wanted)
    assert torch.equal(of_residual, masked_grad)
    if bits is not None:
        rows = torch.full_like(grad, torch.nan)
        n, d = grad.shape
        getattr(lib, f"mask_rows_{NAMES[h.dtype]}")(
            ctypes.c_int64(n), ctypes.c_int64(d), ctypes.c_void_p(grad.data_ptr()),
            ctypes.c_int64(d), ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(rows.data_ptr()),
        )  # fmt: skip
        assert torch.equal(rows, masked_grad)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("d", [1, 31, 32, 33, 65, 68, 72, 128, 136, 260, 264, 516, 600])
def test_every_width_of_load(emulated, small_hubs, d, dtype):
    """One column a lane or 16 bytes, one to four slots, more than one slice, ragged ends."""
    graph = Graph(random_adjacency(24, 9) + star(24), "sym")
    assert len(graph._segments) > 1
    h = randn(24, d).to(dtype)
    check(emulated, graph, h, add_input=True, relu=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
def test_every_graph(emulated, small_hubs, norm, self_loops, weighted):
    graph = Graph(random_adjacency(60, 17, weighted=weighted), norm, self_loops)
    for dtype in NAMES:
        for d in (5, 72):
            h, r = randn(60, d).to(dtype), randn(60, d, seed=1).to(dtype)
            check(emulated, graph, h)
            check(emulated, graph, h, residual=r, relu=True)


@pytest.mark.parametrize("dtype", NAMES)
def test_rows_that_are_not_aligned(emulated, small_hubs, dtype):
    """Any distance of rows and any first column: single loads where 16 bytes would not do."""
    graph = Graph(random_adjacency(30, 8), "rw")
    wide = randn(30, 300).to(dtype)
    for h in (wide[:, 1:129], wide[:, :128], wide[:, 8:136], wide[:, :131]):
        r = randn(30, h.shape[1], seed=1).to(dtype)
        check(emulated, graph, h, residual=r, relu=True)


def test_isolated_nodes_and_no_edges(emulated):
    for n in (1, 3):
        graph = Graph(torch.zeros(n, n).numpy(), "sym")
        check(emulated, graph, randn(n, 7), add_input=True, relu=True)
        check(emulated, Graph(torch.zeros(n, n).numpy(), "rw", False), randn(n, 7))


def test_rows_of_other_processes_are_read_and_not_written(emulated):
    graph, h = Graph(random_adjacency(70, 18), "sym"), randn(70, 36)
    whole, _, _ = run(emulated, graph, h)
    part, _, _ = run(emulated, graph, h, n_halo=30)
    torch.testing.assert_close(part, whole[:40], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", NAMES)
def test_no_race(emulated, small_hubs, dtype):
    """The same bits whatever the progress of the warps."""
    graph = Graph(random_adjacency(70, 18), "sym")
    h = randn(70, 132).to(dtype)
    results = []
    for order in (0, 1, 2):
        emulated.set_warp_order(order)
        results.append(run(emulated, graph, h, add_input=True, relu=True)[:2])
    emulated.set_warp_order(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_passes_and_spreads_to_neighbours_only(emulated):
    graph = Graph(torch.diag(torch.ones(5), 1).add(torch.diag(torch.ones(5), -1)).numpy())
    for dtype in NAMES:
        h = torch.ones(6, 3, dtype=dtype)
        h[0, 1] = torch.nan
        out, bits, _ = run(emulated, graph, h, relu=True)
        assert out.isnan().nonzero().tolist() == [[0, 1], [1, 1]]
        assert (bits == 0b111).all()


def test_bf16_rounds_to_nearest_even(emulated):
    assert emulated.bf16_changes() == 0
    values = [*randn(500).tolist(), 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -(2.0**-130), 0.0]
    for value in values:
        want = torch.tensor(value).bfloat16().view(torch.int16).item() & 0xFFFF
        assert emulated.to_bf16(ctypes.c_float(value)) == want
