"""The CUDA infonce kernels, executed on the CPU.

``tests/device`` holds a small emulator of a CUDA block; here the very kernel sources, schedulers
and launch sequence are compiled over it with the ordinary C++ compiler, run, and compared with the
float64 twin. What a GPU alone can show (the instructions themselves, timing) is not shown here.

Faults seeded once into the sources, and the test that turned red:
    last tile dropped, diagonal tile counted twice, 1/r_k term skipped: matches_the_twin (among
    others); chunk table shifted: seams_of_panels_and_chunks; a barrier of the pipeline
    removed, or one copy too few waited for: no_race (and the twins); no swizzle: bank_conflict;
    all products added by the matrix unit: digits_of_a_long_sum;
    a tile on the diagonal or at the end taken for an ordinary one: matches_the_twin;
    Hopper's products without their fence, sums taken before their wait, barriers not made known to
    the copy engine: the emulator stops in hopper_has_no_race.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fastclust import reference

FP32, TF32, BF16X3, BF16 = 0, 1, 2, 3
FORWARD, BACKWARD, RANGE = 0, 1, 2


@pytest.fixture(scope="session")
def emulated(emulate: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernels over the emulator, as a shared library."""
    lib = emulate("infonce")
    lib.infonce_float.restype = lib.infonce_double.restype = ctypes.c_int64
    lib.patches_of.restype = lib.packed_byte.restype = ctypes.c_int64
    return lib


@dataclass
class Snapshots:
    """What Hardness holds, in float64."""

    z: list[torch.Tensor]
    e: list[torch.Tensor]
    alpha: list[float]
    labels: torch.Tensor  # [S, N]
    membership: torch.Tensor  # [N]
    beta: float

    def dense(self) -> torch.Tensor:
        """[2N, 2N] by the definition in infonce.h."""
        n = self.membership.numel()
        w = torch.ones(2 * n, 2 * n, dtype=torch.float64)
        for s in range(len(self.z)):  # a later refresh overwrites
            member = (self.membership >> s & 1).bool()
            w = reference.hardness(
                self.z[s], self.e[s], self.alpha[s], self.labels[s], member, self.beta, w
            )
        return w

    def ranges(self) -> torch.Tensor:
        """[S, 2]."""
        s = [reference.similarity(*views) for views in zip(self.z, self.e, self.alpha, strict=True)]
        return torch.tensor([[float(x.min()), float(x.max())] for x in s], dtype=torch.float64)


class Problem(ctypes.Structure):
    """Mirror of Problem in tests/device/infonce_emulated.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("n_nodes", "dz", "de")]
        + [(name, ctypes.c_void_p) for name in ("z", "e", "alpha")]
        + [("precision", ctypes.c_int32), ("n_snapshots", ctypes.c_int32)]
        + [
            (name, ctypes.c_void_p)
            for name in (
                "snapshot_z", "snapshot_e", "snapshot_alpha", "range", "snapshot_widths", "labels",
                "membership", "order",
            )
        ]
        + [("beta", ctypes.c_double)]
        + [
            (name, ctypes.c_void_p)
            for name in (
                "loss", "row_sums", "grad_loss", "grad_z", "grad_e", "grad_alpha", "out_range",
            )
        ]
        + [("window", ctypes.c_int64 * 3)]
    )  # fmt: skip


@dataclass
class Case:
    """One problem in the dtype of the kernel, with what it returned."""

    lib: ctypes.CDLL
    z: torch.Tensor
    e: torch.Tensor
    alpha: float
    snapshots: Snapshots | None
    dtype: torch.dtype
    precision: int
    problem: Problem = field(default_factory=Problem)
    kept: list = field(default_factory=list)
    guards: list = field(default_factory=list)
    workspace: int = 0

    def __post_init__(self) -> None:
        p = self.problem
        p.n_nodes, p.dz, p.de = self.z.shape[0] // 2, self.z.shape[1], self.e.shape[1]
        p.precision = self.precision
        p.z, p.e = self._keep(self.z), self._keep(self.e)
        p.alpha = self._keep(torch.tensor([self.alpha]))
        if self.snapshots is None:
            return
        s = self.snapshots
        p.n_snapshots = len(s.z)
        for name in ("z", "e"):
            pointers = [self._keep(t) for t in getattr(s, name)]
            array = (ctypes.c_void_p * len(pointers))(*pointers)
            self.kept.append(array)
            setattr(p, f"snapshot_{name}", ctypes.cast(array, ctypes.c_void_p).value)
        p.snapshot_alpha = self._keep(torch.tensor(s.alpha, dtype=torch.float64))
        p.range = self._keep(s.ranges())
        widths = [[z.shape[1], e.shape[1]] for z, e in zip(s.z, s.e, strict=True)]
        p.snapshot_widths = self._keep(torch.tensor(widths), torch.int64)
        p.labels = self._keep(s.labels, torch.int32)
        p.membership = self._keep(s.membership, torch.int64)
        order = torch.argsort(s.membership, descending=True, stable=True)
        p.order = self._keep(order, torch.int32)
        p.beta = s.beta

    def _keep(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
        tensor = tensor.to(dtype or self.dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _out(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """NaN, followed by -0, which becomes +0 even where a zero is added."""
        size = math.prod(shape)
        memory = torch.full((size + 256,), -0.0, dtype=dtype or self.dtype)
        self.guards.append(memory[size:])
        return memory[:size].fill_(torch.nan).view(shape)

    def _call(self, operation: int) -> None:
        double = self.dtype == torch.float64
        function = self.lib.infonce_double if double else self.lib.infonce_float
        self.workspace = function(ctypes.byref(self.problem), operation)
        assert self.workspace != -2, "a kernel wrote outside its workspace"
        assert self.workspace > 0
        for guard in self.guards:
            assert guard.signbit().all() and not guard.any(), "a kernel wrote past a result"

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.loss, self.row_sums = self._out(1), self._out(self.z.shape[0], dtype=torch.float64)
        self.problem.loss = self.loss.data_ptr()
        self.problem.row_sums = self.row_sums.data_ptr()
        self._call(FORWARD)
        return self.loss[0], self.row_sums

    def backward(self, grad: float = 1.0, need: tuple[bool, bool, bool] = (True,) * 3) -> list:
        outs = [self._out(*self.z.shape), self._out(*self.e.shape), self._out(1)]
        for name, out, wanted in zip(("z", "e", "alpha"), outs, need, strict=True):
            setattr(self.problem, f"grad_{name}", out.data_ptr() if wanted else None)
        self.problem.grad_loss = self._keep(torch.tensor([grad]))
        self._call(BACKWARD)
        return outs

    def range(self) -> torch.Tensor:
        out = self._out(2)
        self.problem.out_range = out.data_ptr()
        self._call(RANGE)
        return out


def unit_rows(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.normalize(x, dim=1)
    return x.float().double()  # exactly representable in float32


def make_case(
    lib: ctypes.CDLL,
    n: int,
    dz: int,
    de: int,
    *,
    alpha: float = 0.7,
    precision: int = BF16X3,
    dtype: torch.dtype = torch.float32,
    refreshes: int = 0,
    beta: float = 1.0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    z, e = unit_rows(2 * n, dz, g), unit_rows(2 * n, de, g)
    z[0] = 0  # a zero row stays right
    snapshots = None
    if refreshes:
        widths = [(dz, de), (dz + 3, max(de - 2, 0)), (2, de)][:refreshes]
        membership = torch.zeros(n, dtype=torch.int64)
        for s in range(refreshes):
            membership |= (torch.rand(n, generator=g) < 0.7).long() << s
        snapshots = Snapshots(
            z=[unit_rows(2 * n, w[0], g) for w in widths],
            e=[unit_rows(2 * n, w[1], g) for w in widths],
            alpha=[0.3, 1.02, -0.1][:refreshes],
            labels=torch.randint(0, 3, (refreshes, n), generator=g),
            membership=membership,
            beta=beta,
        )
    return Case(lib, z, e, float(np.float32(alpha)), snapshots, dtype, precision)


def expected(case: Case) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Loss, gradients and row sums in float64."""
    z, e = case.z.clone().requires_grad_(), case.e.clone().requires_grad_()
    alpha = torch.tensor(case.alpha, dtype=torch.float64, requires_grad=True)
    w = None if case.snapshots is None else case.snapshots.dense()
    loss = reference.hard_infonce(z, e, alpha, w)
    grads = torch.autograd.grad(loss, (z, e, alpha))
    with torch.no_grad():
        logits = reference.similarity(z, e, alpha) * (1 if w is None else w)
        row_sums = logits.exp().fill_diagonal_(0).sum(1)
    return loss.detach(), list(grads), row_sums


# Relative error bounds of (loss, gradients), by arithmetic: fp32 grade, tf32, bf16, float64.
BOUNDS = {FP32: (2e-7, 2e-5), BF16X3: (2e-7, 2e-5), TF32: (5e-6, 2e-3), BF16: (4e-5, 1e-2)}
BOUNDS_FLOAT64 = (1e-14, 1e-12)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-2))


def check(case: Case) -> None:
    loss_bound, grad_bound = (
        BOUNDS_FLOAT64 if case.dtype == torch.float64 else BOUNDS[case.precision]
    )
    loss, grads, row_sums = expected(case)
    got_loss, got_rows = case.forward()
    got = case.backward()
    assert abs(float(got_loss) - float(loss)) <= loss_bound * max(1.0, abs(float(loss)))
    torch.testing.assert_close(got_rows, row_sums, rtol=10 * loss_bound, atol=0)
    for name, g, want in zip(("z", "e"), got, grads, strict=False):
        if want.numel():
            assert relative(g, want) <= grad_bound, name
            # A dropped tile or term is a bias that norms can hide.
            bias = float((g.double() - want).sum().abs() / want.abs().sum().clamp_min(1e-2))
            assert bias <= grad_bound, name
    # d alpha is a difference of two sums of order 1.
    assert abs(float(got[2]) - float(grads[2])) <= grad_bound * max(0.1, abs(float(grads[2])))


SHAPES = [
    # n, dz, de: one node; tile - 1, exact and + 1 rows; ragged widths; parts missing
    (1, 5, 3),
    (3, 1, 40),
    (64, 33, 0),
    (65, 0, 16),
    (130, 31, 70),
]


@pytest.mark.parametrize(("n", "dz", "de"), SHAPES)
@pytest.mark.parametrize("precision", [BF16X3, TF32, BF16])
def test_matches_the_twin_without_weights(emulated, n, dz, de, precision) -> None:
    check(make_case(emulated, n, dz, de, precision=precision))


@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.5, 1.0, 1.0001])
def test_alpha_outside_the_unit_interval(emulated, alpha) -> None:
    check(make_case(emulated, 20, 9, 12, alpha=alpha))
    check(make_case(emulated, 20, 9, 12, alpha=alpha, dtype=torch.float64, refreshes=1))


@pytest.mark.parametrize("precision", [FP32, TF32, BF16])
@pytest.mark.parametrize(("refreshes", "beta"), [(1, 1.0), (1, 2.0), (3, 0.0), (3, 2.5)])
def test_weights_from_snapshots(emulated, precision, refreshes, beta) -> None:
    case = make_case(emulated, 70, 20, 12, precision=precision, refreshes=refreshes, beta=beta)
    check(case)


@pytest.mark.parametrize("refreshes", [0, 3])
@pytest.mark.parametrize(("n", "dz", "de"), [(1, 2, 0), (33, 20, 5), (70, 17, 40)])
def test_float64_path(emulated, n, dz, de, refreshes) -> None:
    check(make_case(emulated, n, dz, de, dtype=torch.float64, refreshes=refreshes, beta=3.0))


@pytest.fixture(params=[(128, 128), (256, 128), (512, 512)], ids=str)
def small_limits(emulated, request):
    """Panels of one, two and four tiles; chunks of one tile or as long as the panel."""
    panel, chunk = request.param
    emulated.set_limits((ctypes.c_int64 * 4)(1 << 30, panel, chunk, 128))
    yield
    emulated.set_limits(None)


@pytest.mark.parametrize("precision", [BF16X3, TF32, BF16])
def test_seams_of_panels_and_chunks(emulated, small_limits, precision) -> None:
    """Three tiles of rows: patches on the diagonal, inside a panel and beyond it."""
    check(make_case(emulated, 130, 31, 120, precision=precision, refreshes=1))


def test_seams_with_several_snapshots(emulated, small_limits) -> None:
    check(make_case(emulated, 190, 9, 4, precision=BF16, refreshes=3))
    check(make_case(emulated, 190, 5, 3, dtype=torch.float64, refreshes=3))


def test_range_over_patches(emulated, small_limits) -> None:
    case = make_case(emulated, 190, 30, 7, alpha=1.2)
    s = reference.similarity(case.z, case.e, case.alpha)
    want = torch.stack([s.min(), s.max()])
    torch.testing.assert_close(case.range().double(), want, rtol=0, atol=2**-16)


@pytest.mark.parametrize("refreshes", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_of_the_triangle(emulated, dtype, refreshes) -> None:
    """Every output of a window is the share of its tiles: row bands and a rectangle."""
    n = 200
    case = make_case(emulated, n, 6, 3, dtype=dtype, refreshes=refreshes)
    loss_bound, grad_bound = BOUNDS_FLOAT64 if dtype == torch.float64 else BOUNDS[BF16X3]
    loss, _, row_sums = expected(case)
    order = torch.arange(n)
    w: float | torch.Tensor = 1.0
    if case.snapshots is not None:
        order = torch.argsort(case.snapshots.membership, descending=True, stable=True)
        w = case.snapshots.dense()
    s = reference.similarity(case.z, case.e, case.alpha)
    p = (w * s).exp().fill_diagonal_(0)
    pairs = torch.eye(2 * n, dtype=torch.float64).roll(n, 0)
    t = p * w * (1 / row_sums[:, None] + 1 / row_sums) - 2 * pairs * w
    row_of = torch.stack([order, order + n], 1).flatten()  # position -> row
    total = 0.0
    for window in ([0, 384, 0], [384, 400, 384], [0, 384, 384]):
        position = torch.arange(2 * n)
        rows = (position >= window[0]) & (position < window[1])
        upper = rows[:, None] & (position >= window[2]) & (position >= position[:, None])
        both = upper | upper.T
        held = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
        held[row_of[:, None], row_of] = both
        case.problem.window = (ctypes.c_int64 * 3)(*window)
        part, sums = case.forward()
        torch.testing.assert_close(sums, (p * held).sum(1), rtol=10 * loss_bound, atol=0)
        positives = (pairs * w * s * held).sum() / (2 * n)
        assert abs(float(part) + float(positives)) <= 10 * loss_bound
        total += float(part) * (window[2] == window[0])
        sums.copy_(row_sums)
        grads = case.backward(2.0)
        share = t * held / n
        want = [case.alpha * share @ case.z, (1 - case.alpha) * share @ case.e]
        for got, g in zip(grads, want, strict=False):
            assert relative(got, g) <= grad_bound
        slope = (share * (case.z @ case.z.T - case.e @ case.e.T)).sum() / 2
        assert abs(float(grads[2]) - float(slope)) <= grad_bound * max(0.1, abs(float(slope)))
        plain = torch.stack([position[:n], position[n:]], 1).flatten()  # no weights, no order
        of_window = s[plain[:, None], plain][both]
        extremes = torch.stack([of_window.min(), of_window.max()])
        torch.testing.assert_close(case.range().double(), extremes, rtol=0, atol=2**-16)
    assert abs(float(row_sums.log().mean()) + total - float(loss)) <= 10 * loss_bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.5), (40, 1.2), (70, -0.2)])
def test_range_of_the_similarity(emulated, n, alpha, dtype) -> None:
    case = make_case(emulated, n, 30, 7, alpha=alpha, dtype=dtype)
    s = reference.similarity(case.z, case.e, case.alpha)
    want = torch.stack([s.min(), s.max()])
    # hi + lo carries 17 bits, and the errors of a row's product with itself do not average out
    tolerance = 2**-17 * (abs(alpha) + abs(1 - alpha)) if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(case.range().double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", ["general", "hopper"])
def test_digits_of_a_long_sum_are_kept(emulated, path) -> None:
    """Rows that are alike: the matrix unit would cut every small product off at the large sum.

    Added up by it alone, row sums of 1000 columns come out 5e-6 (general) and 3e-6 too small, and
    the range errs by 7e-6.
    """
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1000, generator=g, dtype=torch.float64)
    z = z + 0.33 * torch.randn(140, 1000, generator=g, dtype=torch.float64)
    z = torch.nn.functional.normalize(z, dim=1).float().double()
    case = Case(emulated, z, z[:, :0], 1.0, None, torch.float32, BF16X3)
    _, grads, row_sums = expected(case)
    emulated.set_hopper(path == "hopper")
    try:
        _, got = case.forward()
        grad_z = case.backward()[0]
    finally:
        emulated.set_hopper(0)
    error = got / row_sums - 1
    assert abs(float(error.mean())) <= 3e-7
    assert float(error.abs().max()) <= 1e-6
    assert relative(grad_z, grads[0]) <= 1e-5  # of operands with 17 bits
    s = z @ z.T
    want = torch.stack([s.min(), s.max()])
    torch.testing.assert_close(case.range().double(), want, rtol=0, atol=2e-6)


# ---- the kernels for Hopper ----------------------------------------------------------------------


@pytest.fixture
def hopper(emulated):
    """The kernels of infonce_sm90.cuh: barriers, bulk copies and wgmma in emulation."""
    emulated.set_hopper(1)
    yield
    emulated.set_hopper(0)


@pytest.mark.parametrize(("n", "dz", "de"), [(1, 5, 3), (64, 33, 0), (65, 0, 16), (130, 70, 130)])
@pytest.mark.parametrize("precision", [BF16X3, BF16])
def test_hopper_matches_the_twin(emulated, hopper, n, dz, de, precision) -> None:
    check(make_case(emulated, n, dz, de, precision=precision))


@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.5, 1.0, 1.0001])
def test_hopper_alpha_outside_the_unit_interval(emulated, hopper, alpha) -> None:
    check(make_case(emulated, 20, 9, 12, alpha=alpha))


@pytest.mark.parametrize("precision", [FP32, BF16])
@pytest.mark.parametrize(("refreshes", "beta"), [(1, 1.0), (3, 2.5)])
def test_hopper_weights_from_snapshots(emulated, hopper, precision, refreshes, beta) -> None:
    check(make_case(emulated, 70, 20, 12, precision=precision, refreshes=refreshes, beta=beta))


@pytest.mark.parametrize("precision", [BF16X3, BF16])
def test_hopper_seams_of_panels_and_chunks(emulated, hopper, small_limits, precision) -> None:
    """Several tiles for each of the emulator's persistent blocks, many rounds of the ring."""
    check(make_case(emulated, 130, 31, 120, precision=precision, refreshes=1))


@pytest.mark.parametrize("precision", [BF16X3, BF16])
def test_hopper_agrees_with_the_general_path(emulated, precision) -> None:
    """The same packed operands and order of tiles: only roundings inside a product differ."""
    results = []
    for on in (0, 1):
        emulated.set_hopper(on)
        case = make_case(emulated, 130, 70, 40, precision=precision, refreshes=1)
        loss, rows = case.forward()
        results.append((loss, rows, *case.backward()))
    emulated.set_hopper(0)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("n", "dz", "de", "refreshes"),
    # the second: fewer steps a tile than stages, so that a warp may be a tile ahead of others
    [(70, 150, 40, 2), (190, 20, 5, 0)],
)
@pytest.mark.parametrize("precision", [BF16X3, BF16])
def test_hopper_has_no_race(emulated, hopper, precision, n, dz, de, refreshes) -> None:
    """The same bits however warps progress, whenever bulk copies land and products are done."""
    results = []
    try:
        for order in (0, 1, 2):
            for late in (0, 1):
                emulated.emulate(order, late)
                case = make_case(emulated, n, dz, de, precision=precision, refreshes=refreshes)
                loss, rows = case.forward()
                results.append((loss, rows, *case.backward()))
    finally:
        emulated.emulate(0, 1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_hopper_follows_the_flop_count(emulated, hopper) -> None:
    report = (ctypes.c_int64 * 5)()
    case = make_case(emulated, 130, 64, 128)  # 3 tile rows, 3 steps of 64 columns
    emulated.take_report(report)
    case.forward()
    emulated.take_report(report)
    per_step = 2 * 4 * 3  # warpgroups, 16 k each, products
    assert report[2] == 6 * 3 * per_step
    case.backward()
    emulated.take_report(report)
    assert report[2] == 9 * 3 * per_step + 3 * 2 * (384 // 64) * per_step


def test_only_wanted_gradients_are_written_and_scaled(emulated) -> None:
    case = make_case(emulated, 70, 140, 20)
    case.forward()
    full = case.backward(grad=2.0)
    for need in [(True, False, False), (False, True, False), (False, False, True)]:
        some = case.backward(grad=1.0, need=need)
        for wanted, part, whole in zip(need, some, full, strict=True):
            if wanted:
                torch.testing.assert_close(2 * part, whole, rtol=1e-6, atol=1e-9)
            else:
                assert part.isnan().all()


@pytest.mark.parametrize("precision", [BF16X3, TF32])
def test_no_race_and_no_bank_conflict(emulated, precision) -> None:
    """The same bits however warps progress and whenever asynchronous copies land."""
    results = []
    try:
        for order in (0, 1, 2):
            for late in (0, 1):
                emulated.emulate(order, late)
                case = make_case(emulated, 70, 70, 40, precision=precision, refreshes=2)
                loss, rows = case.forward()
                results.append((loss, rows, *case.backward(), case.range()))
    finally:
        emulated.emulate(0, 1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    report = (ctypes.c_int64 * 5)()
    emulated.take_report(report)
    assert report[3] > 0
    assert report[4] == 0


def test_matrix_instructions_follow_the_flop_count(emulated) -> None:
    """The upper triangle only, and three products per k step: nothing is computed twice."""
    report = (ctypes.c_int64 * 5)()
    case = make_case(emulated, 130, 64, 32)  # 260 rows: 3 tile rows; 96 columns: 6 steps of 16
    emulated.take_report(report)
    case.forward()
    emulated.take_report(report)
    per_step = (128 // 16) * (128 // 8)
    assert report[2] == 6 * 6 * 3 * per_step
    case.backward()
    emulated.take_report(report)
    # One panel: all of T, then T [Z | E] over 384 rows for one tile of columns per tile row.
    assert report[2] == 9 * 6 * 3 * per_step + 3 * (384 // 16) * 3 * per_step
    emulated.set_limits((ctypes.c_int64 * 4)(1 << 30, 128, 128, 128))
    try:
        case.forward()
        emulated.take_report(report)
        assert report[2] == 6 * 6 * 3 * per_step
        case.backward()
        emulated.take_report(report)
        # Panels of one tile: T is computed once for both sides, 4 M^2 D in all with the forward.
        assert report[2] == 6 * 6 * 3 * per_step + 3 * (384 // 16) * 3 * per_step
    finally:
        emulated.set_limits(None)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 3), (16, 16), (17, 40), (100, 33)])
def test_tiles_of_a_patch_are_visited_once(emulated, rows, columns) -> None:
    out = (ctypes.c_int32 * 2)()
    seen = set()
    for index in range(rows * columns):
        emulated.tile_of(index, rows, columns, out)
        assert 0 <= out[0] < rows and 0 <= out[1] < columns
        seen.add((out[0], out[1]))
    assert len(seen) == rows * columns


@pytest.mark.parametrize(("panel", "chunk"), [(1, 1), (4, 1), (4, 3), (7, 7), (64, 16)])
@pytest.mark.parametrize("tiles", [1, 2, 7, 30])
def test_patches_cover_the_triangle_once(emulated, tiles, panel, chunk) -> None:
    """Every pair of tiles at or above the diagonal once, no chunk across a panel's end."""
    sizes = [ctypes.c_int64(128 * v) for v in (tiles, panel, chunk)]
    count = emulated.patches_of(*sizes, None)
    out = (ctypes.c_int64 * (4 * count))()
    emulated.patches_of(*sizes, out)
    seen: dict[tuple[int, int], int] = {}
    for p in range(count):
        row, rows, column, columns = (v // 128 for v in out[4 * p : 4 * p + 4])
        assert 0 < rows <= panel and 0 < columns <= chunk
        assert column >= row
        assert column + columns <= row + rows or column >= row + rows
        for i in range(row, row + rows):
            for j in range(column, column + columns):
                if j >= i:
                    seen[i, j] = seen.get((i, j), 0) + 1
    assert seen == {(i, j): 1 for i in range(tiles) for j in range(i, tiles)}


def test_packed_layout_is_a_permutation_without_bank_conflicts(emulated) -> None:
    byte = emulated.packed_byte
    args = [ctypes.c_int64(v) for v in (3,)]
    seen = {
        byte(*args, ctypes.c_int64(row), ctypes.c_int64(column))
        for row in range(256)
        for column in range(0, 384, 16)
    }
    assert seen == set(range(0, 2 * 3 * 16384, 16))
    for row in range(0, 128, 8):  # eight rows of one chunk lie in eight different chunks of banks
        for column in range(0, 128, 16):
            banks = {
                byte(*args, ctypes.c_int64(row + r), ctypes.c_int64(column)) // 16 % 8
                for r in range(8)
            }
            assert len(banks) == 8
    # 64-bit beyond 2 GB
    assert byte(ctypes.c_int64(48), ctypes.c_int64(2_000_000), ctypes.c_int64(0)) > 2**33


def test_tf32_operand_reads_hit_all_banks(emulated) -> None:
    assert emulated.n_major_tf32_conflicts() == 0


@pytest.mark.parametrize("rows", [128, 5504, 27520, 200_064, 4_000_000])
@pytest.mark.parametrize("entry_bytes", [0.0625, 2.0, 4.0])
@pytest.mark.parametrize("row_bytes", [256, 2048, 8192, 24576])
def test_cut_fits_and_fills_the_workspace(emulated, rows, entry_bytes, row_bytes) -> None:
    out = (ctypes.c_int64 * 2)()
    emulated.cut_of(
        ctypes.c_int64(rows), ctypes.c_int64(0), ctypes.c_int64(row_bytes),
        ctypes.c_double(entry_bytes), ctypes.c_int64(4 if entry_bytes < 1 else 1), out,
    )  # fmt: skip
    panel, chunk = out
    assert panel % 128 == 0 and chunk % 128 == 0 and 0 < chunk <= panel <= rows
    used = (panel + chunk) * row_bytes + panel * chunk * entry_bytes
    assert used <= 60e6
    assert panel == rows or panel >= 1024  # launches hold work
    assert entry_bytes < 1 or chunk == panel


def test_widest_rows_stay_within_offsets_of_32_bits(emulated) -> None:
    """Float64 and as many columns as the operators take (infonce_cuda_ops.cu)."""
    row_bytes = 8 * (500_000 + 2 * 128)  # z and e padded
    out = (ctypes.c_int64 * 2)()
    emulated.cut_of(
        ctypes.c_int64(200_064), ctypes.c_int64(0), ctypes.c_int64(row_bytes),
        ctypes.c_double(8.0), ctypes.c_int64(1), out,
    )  # fmt: skip
    assert out[0] * row_bytes < 2**32


@pytest.mark.parametrize("precision", [FP32, TF32, BF16])
@pytest.mark.parametrize("n", [13_752, 100_000])
@pytest.mark.parametrize("refreshes", [0, 1])
def test_workspace_at_amac_and_100k_is_under_64_mb(emulated, n, refreshes, precision) -> None:
    """Counted by the very code that lays the workspace out; D = 1000, all gradients wanted."""
    case = make_case(emulated, 2, 500, 500, precision=precision, refreshes=refreshes)
    p = case.problem
    p.n_nodes = n  # nothing is read when only measuring
    p.grad_z = p.grad_e = p.grad_alpha = case.problem.z
    emulated.set_only_measure(1)
    try:
        sizes = [emulated.infonce_float(ctypes.byref(p), operation) for operation in range(3)]
    finally:
        emulated.set_only_measure(0)
    assert all(1e6 < size <= 64e6 for size in sizes), sizes


def test_number_formats(emulated) -> None:
    out = (ctypes.c_float * 3)()
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000):  # the first is the NaN of a GPU
        emulated.formats(ctypes.c_float.from_buffer(ctypes.c_uint32(bits)), out)
        assert math.isnan(out[2])
    for value in [*values.tolist(), 0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-9, 2.0**-100]:
        emulated.formats(ctypes.c_float(value), out)
        hi = torch.tensor(value).bfloat16().float()
        assert out[0] == float(hi)
        assert out[1] == float((torch.tensor(value) - hi).bfloat16().float())
        assert abs(out[2] - np.float32(value)) <= 2.0**-11 * abs(value)
        assert np.float32(out[2]).view(np.uint32) & 0x1FFF == 0
