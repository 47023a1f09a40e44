"""The CUDA infonce kernels, executed on the CPU.

``tests/device`` holds a small emulator of a CUDA block; here the very kernel sources, schedulers
and launch sequence are compiled over it with the ordinary C++ compiler, run, and compared with the
float64 twin. What a GPU alone can show (the instructions themselves, timing) is not shown here.

Faults seeded once into the sources, and the test that turned red:
    last tile dropped, diagonal tile counted twice, 1/r_k term skipped: matches_the_twin (among
    others); chunk table shifted: seams_of_panels_chunks_and_splits; a barrier of the pipeline
    removed, or one copy too few waited for: no_race (and the twins); no swizzle: bank_conflict.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from fastclust import reference

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

FP32, TF32, BF16X3, BF16 = 0, 1, 2, 3
FORWARD, BACKWARD, RANGE = 0, 1, 2


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels over the emulator, as a shared library."""
    library = tmp_path_factory.mktemp("device") / "infonce_emulated.so"
    command = [
        CXX, "-std=c++20", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas",
        "-I", ROOT / "csrc", "-I", ROOT / "tests",
        ROOT / "tests" / "device" / "infonce_emulated.cpp", "-o", library,
    ]  # fmt: skip
    subprocess.run([str(c) for c in command], check=True)
    lib = ctypes.CDLL(str(library))
    lib.infonce_float.restype = lib.infonce_double.restype = ctypes.c_int64
    lib.tile_count.restype = ctypes.c_int64
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
        out = torch.full(shape, torch.nan, dtype=dtype or self.dtype)
        self.kept.append(out)
        return out

    def _call(self, operation: int) -> None:
        double = self.dtype == torch.float64
        function = self.lib.infonce_double if double else self.lib.infonce_float
        self.workspace = function(ctypes.byref(self.problem), operation)
        assert self.workspace != -2, "a kernel wrote outside its workspace"
        assert self.workspace > 0

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


@pytest.fixture
def small_limits(emulated):
    """Bands of one group, panels of one tile row, chunks of one tile, up to 16 splits."""
    emulated.set_limits((ctypes.c_int64 * 6)(1, 1, 1 << 30, 1, 1000, 32))
    yield
    emulated.set_limits(None)


@pytest.mark.parametrize("precision", [BF16X3, TF32, BF16])
def test_seams_of_panels_chunks_and_splits(emulated, small_limits, precision) -> None:
    check(make_case(emulated, 130, 31, 120, precision=precision, refreshes=1))


def test_seams_of_bands(emulated, small_limits) -> None:
    """More tile rows than one group: two bands of row sums."""
    check(make_case(emulated, 530, 5, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.5), (40, 1.2), (70, -0.2)])
def test_range_of_the_similarity(emulated, n, alpha, dtype) -> None:
    case = make_case(emulated, n, 30, 7, alpha=alpha, dtype=dtype)
    s = reference.similarity(case.z, case.e, case.alpha)
    want = torch.stack([s.min(), s.max()])
    # hi + lo carries 17 bits, and the errors of a row's product with itself do not average out
    tolerance = 2**-17 * (abs(alpha) + abs(1 - alpha)) if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(case.range().double(), want, rtol=0, atol=tolerance)


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
    # Full rows of T, then T [Z | E] over 384 rows for one tile of columns per tile row.
    assert report[2] == 9 * 6 * 3 * per_step + 3 * (384 // 16) * 3 * per_step


@pytest.mark.parametrize("n_tiles", [1, 2, 15, 16, 17, 33, 70])
def test_schedule_visits_the_triangle_once(emulated, n_tiles) -> None:
    out = (ctypes.c_int64 * 2)()
    count = emulated.tile_count(ctypes.c_int64(n_tiles))
    assert count == n_tiles * (n_tiles + 1) // 2
    seen = set()
    for index in range(count):
        emulated.tile_of(ctypes.c_int64(index), ctypes.c_int64(n_tiles), out)
        i, j = out
        assert 0 <= i <= j < n_tiles
        seen.add((i, j))
    assert len(seen) == count


def test_schedule_is_exact_beyond_32_bits(emulated) -> None:
    n_tiles = 200_000
    count = emulated.tile_count(ctypes.c_int64(n_tiles))
    assert count == n_tiles * (n_tiles + 1) // 2 > 2**32
    out = (ctypes.c_int64 * 2)()
    seen = set()
    for index in [*range(count - 200, count), *range(count // 2, count // 2 + 200)]:
        emulated.tile_of(ctypes.c_int64(index), ctypes.c_int64(n_tiles), out)
        assert 0 <= out[0] <= out[1] < n_tiles
        seen.add((out[0], out[1]))
    assert len(seen) == 400
    assert (n_tiles - 1, n_tiles - 1) in seen


def test_every_slot_has_one_writer(emulated) -> None:
    tile, n_tiles = 4, 37
    n_rows = tile * n_tiles
    out = (ctypes.c_int64 * 2)()
    for first, end in [(0, 16), (16, 32), (32, 37)]:
        rows, columns = set(), set()
        for i in range(first, end):
            for j in range(i, n_tiles):
                for r in range(tile):
                    emulated.slots_of(
                        *map(ctypes.c_int64, (first, end, tile, n_rows, i, j)),
                        ctypes.c_int64(i * tile + r), ctypes.c_int64(j * tile + r), out,
                    )  # fmt: skip
                    assert out[0] not in rows
                    rows.add(out[0])
                    if i != j:
                        assert out[1] not in columns
                        columns.add(out[1])
        assert max(rows) < n_tiles * (end - first) * tile
        assert max(columns) < (end - first) * n_rows


def test_tf32_operand_reads_hit_all_banks(emulated) -> None:
    assert emulated.n_major_tf32_conflicts() == 0


@pytest.mark.parametrize("rows", [128, 5504, 27520, 200_064, 2_000_000])
@pytest.mark.parametrize("t_bytes", [2, 4])
@pytest.mark.parametrize(("dz", "de"), [(512, 512), (1504, 1504), (8192, 0)])
def test_gradient_workspace_stays_within_64_mb(emulated, rows, t_bytes, dz, de) -> None:
    out = (ctypes.c_int64 * 5)()
    rows = -(-rows // 128) * 128
    emulated.cut_of(
        *map(ctypes.c_int64, (rows, 128, t_bytes, dz, de)), 1, 1, out,
    )  # fmt: skip
    panel, chunk, splits, first, tiles = out
    assert panel % 128 == 0 and chunk % 128 == 0 and first == 0
    assert tiles * 128 >= dz + de
    assert panel * chunk * t_bytes + splits * panel * tiles * 128 * 4 <= 64 * 2**20


def test_number_formats(emulated) -> None:
    out = (ctypes.c_float * 3)()
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10
    for value in [*values.tolist(), 0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-9, 2.0**-100]:
        emulated.formats(ctypes.c_float(value), out)
        hi = torch.tensor(value).bfloat16().float()
        assert out[0] == float(hi)
        assert out[1] == float((torch.tensor(value) - hi).bfloat16().float())
        assert abs(out[2] - np.float32(value)) <= 2.0**-11 * abs(value)
        assert np.float32(out[2]).view(np.uint32) & 0x1FFF == 0
