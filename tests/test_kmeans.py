"""k-means against scikit-learn, its float64 twin, the optimum of tiny data, and its own promises.

Faults seeded once, each turning the named test red:
- the tail tile left out of the assignment: test_same_start_as_sklearn;
- near ties decided by the rounded products: test_tight_clusters_far_apart;
- a moved point added but not subtracted: test_same_start_as_sklearn;
- no repair of empty clusters: test_empty_clusters_are_repaired;
- k-means++ forgetting all but the newest centre: test_plus_plus_draws_by_squared_distance;
- random numbers keyed by the place in a group of restarts: test_restarts_are_those_of_single_runs;
- sums of k-means++ gathered by thread: test_same_bits_for_any_thread_count.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from fastclust import _C, ops, reference

DTYPES = [torch.float32, torch.float64]


def blobs(n: int, d: int, k: int, separation: float, seed: int = 0) -> torch.Tensor:
    """Gaussian clusters [n, d], float64."""
    g = torch.Generator().manual_seed(seed)
    means = separation * torch.randn(k, d, generator=g, dtype=torch.float64)
    labels = torch.randint(k, (n,), generator=g)
    return means[labels] + torch.randn(n, d, generator=g, dtype=torch.float64)


def pick(x: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """K random rows of x as starting centres."""
    return x[torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))[:k]]


def square_distances(x: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Squared distances [N, K] in float64."""
    return (x.double()[:, None] - centers.double()[None]).square().sum(-1)


def check_consistent(x: torch.Tensor, result: ops.KMeansResult, rtol: float = 1e-5) -> None:
    """Labels are nearest centres, and the inertia is theirs."""
    d = square_distances(x, result.centers)
    chosen = d.gather(1, result.labels[:, None])[:, 0]
    assert (chosen <= d.min(1).values * (1 + rtol) + rtol * d.mean()).all()
    assert result.inertia == pytest.approx(chosen.sum().item(), rel=rtol, abs=1e-9)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest):
    """Each dispatch level this machine has."""
    before = _C.cpu_level()
    if _C.set_cpu_level(request.param) != request.param:
        _C.set_cpu_level(before)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C.set_cpu_level(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [(1, 1, 1), (2, 3, 2), (63, 5, 3), (64, 16, 4), (65, 17, 7), (500, 33, 13), (1000, 130, 10)],
)
def test_same_start_as_sklearn(level, dtype, n, d, k):
    x = blobs(n, d, k, 0.4).to(dtype)
    init = pick(x, k)
    ours = ops.kmeans(x, k, init=init)
    theirs = KMeans(k, init=init.numpy(), n_init=1, algorithm="lloyd").fit(x.numpy())
    np.testing.assert_array_equal(ours.labels.numpy(), theirs.labels_)
    assert ours.n_iter == theirs.n_iter_
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_allclose(ours.centers.numpy(), theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert ours.labels.dtype == torch.int64
    assert ours.centers.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_twin(dtype):
    x = blobs(700, 40, 6, 0.5).to(dtype)
    init = pick(x, 6)
    ours = ops.kmeans(x, 6, init=init, tol=0.0)
    labels, centers, inertia, n_iter = reference.kmeans(x.double(), init.double(), tol=0.0)
    assert torch.equal(ours.labels, labels)
    assert ours.n_iter == n_iter
    assert ours.inertia == pytest.approx(inertia, rel=1e-6)
    torch.testing.assert_close(ours.centers.double(), centers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_optimum_of_tiny_data(seed):
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    least = min(
        sum(
            (x[[i for i in range(9) if a[i] == k]] - x[[i for i in range(9) if a[i] == k]].mean(0))
            .square()
            .sum()
            .item()
            for k in set(a)
        )
        for a in itertools.product(range(3), repeat=9)
        if a[0] == 0
    )
    assert ops.kmeans(x, 3, n_init=30).inertia == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("init", [None, "k-means++", "random"])
def test_as_good_as_sklearn(init):
    x = blobs(2000, 30, 8, 0.6).float()
    theirs = KMeans(8, n_init=20, random_state=0).fit(x.numpy()).inertia_
    assert ops.kmeans(x, 8, n_init=20, init=init).inertia <= theirs * 1.001


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("separation", [0.05, 0.15])  # hardly any clusters; overlapping ones
def test_as_good_as_sklearn_at_full_size(separation, seed):
    """AMAC's shape, 1000 columns: no inertia is more than 0.1 % above scikit-learn's."""
    x = blobs(13752, 1000, 10, separation, seed=seed).float()
    theirs = KMeans(10, n_init=20, random_state=seed).fit(x.numpy()).inertia_
    assert ops.kmeans(x, 10, n_init=20, seed=seed).inertia <= theirs * 1.001


def test_ties_go_to_the_lowest_index(level):
    x = torch.tensor([[-1.0], [0.0], [1.0], [0.0]])
    result = ops.kmeans(x, 2, init=torch.tensor([[1.0], [-1.0]]), max_iter=1)
    # the first assignment sends both zeros to centre 0
    assert result.centers[:, 0].tolist() == pytest.approx([1 / 3, -1.0])
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
    xc, _, _ = torch.ops.fastclust.kmeans_center(x)
    same = xc.new_zeros(1, 3, xc.shape[1])
    labels, _ = torch.ops.fastclust.kmeans_assign(xc, same)
    assert labels.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_the_origin(dtype):
    # Offsets that are exact in the dtype, so that the shifted data is the same data.
    near = (blobs(400, 6, 4, 2.0) * 64).round()
    far = near + 2.0**20
    init = pick(near, 4).to(dtype)
    a = ops.kmeans(near.to(dtype), 4, init=init)
    b = ops.kmeans(far.to(dtype), 4, init=init + 2.0**20)
    assert torch.equal(a.labels, b.labels)
    assert a.inertia == pytest.approx(b.inertia, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, p) for p in (-120, -90, 40, 90, 120)]
    + [(torch.float64, p) for p in (-1000, -600, 500, 600, 1000)],
)
@pytest.mark.parametrize("init", ["k-means++", "random", None])
def test_data_whose_squares_leave_the_range(dtype, power, init):
    """Squared distances would overflow or vanish: the same clusters as of the data scaled."""
    x = blobs(500, 5, 4, 3.0).to(dtype)
    start = pick(x, 4) if init is None else init
    want = ops.kmeans(x, 4, init=start, n_init=3)
    start = start * 2.0**power if init is None else init
    got = ops.kmeans(x * 2.0**power, 4, init=start, n_init=3)
    assert torch.equal(got.labels, want.labels) and got.n_iter == want.n_iter
    assert torch.equal(got.centers * 2.0**-power, want.centers)
    expected = (torch.tensor(want.inertia, dtype=torch.float64) * 2.0**power * 2.0**power).item()
    assert got.inertia == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("power", [-400, 400])
def test_paper_code_compares_movements_with_an_absolute_number(power):
    x = blobs(300, 3, 4, 0.5) * 2.0**power
    result = ops.kmeans(x, 4, init="paper-code")
    assert (result.n_iter == 1) == (power < 0)
    assert len(result.labels.unique()) == 4


def test_tight_clusters_far_apart():
    # Squared distances within a cluster are 1e-9 of those to the mean: the expanded form in
    # float32 sees only rounding there.
    g = torch.Generator().manual_seed(0)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x = corners.repeat_interleave(50, 0) * 1000
    x = x + (torch.arange(200) % 2 * 0.125)[:, None] + 0.001 * torch.randn(200, 2, generator=g)
    result = ops.kmeans(x, 8, n_init=10)
    check_consistent(x, result)
    truth = torch.arange(200) // 50 * 2 + torch.arange(200) % 2
    assert len(set(zip(result.labels.tolist(), truth.tolist(), strict=True))) == 8


def test_repair_takes_the_lowest_of_equally_far_points():
    x = torch.tensor([0.0, -2.0, 0.0, 2.0, 0.0])[:, None]
    result = ops.kmeans(x, 2, init=torch.tensor([[0.0], [100.0]]), max_iter=1)
    assert result.centers[1].item() == -2.0


def test_a_repair_is_no_convergence():
    # The tolerance would accept any movement; the centre of the repaired cluster is one point.
    x = torch.tensor([0.0, 0.0, 0.0, 3.0, 4.0])[:, None]
    result = ops.kmeans(x, 2, init=torch.tensor([[0.0], [100.0]]), tol=1e9, max_iter=10)
    assert result.n_iter == 2
    assert result.centers[:, 0].tolist() == pytest.approx([0.0, 3.5], abs=1e-6)


@pytest.mark.parametrize("norm_rule", [False, True])
def test_both_rules_of_convergence(norm_rule):
    """Sum of squared movements <= tol; or, of the released code, (sum of movements)^2 < tol."""
    x = blobs(400, 6, 5, 1.0)
    xc, _, _ = torch.ops.fastclust.kmeans_center(x)
    centers = torch.ops.fastclust.kmeans_init(xc, 5, 1, 1, 0)
    zero, moves, c = torch.zeros((), dtype=torch.float64), [], centers
    for _ in range(8):
        moved, _, _ = torch.ops.fastclust.kmeans_lloyd(xc, c, zero, False, 1)
        lengths = (moved - c).norm(dim=-1).sum() if norm_rule else (moved - c).norm()
        moves.append(float(lengths**2))
        c = moved
    stops = [i for i in range(1, 8) if 0 < moves[i] < 0.99 * min(moves[:i])]
    assert len(stops) > 1
    for stop in stops:
        between = (moves[stop] * min(moves[:stop])) ** 0.5
        tolerance = torch.tensor(between, dtype=torch.float64)
        _, n_iter, converged = torch.ops.fastclust.kmeans_lloyd(
            xc, centers, tolerance, norm_rule, 50
        )
        assert n_iter.item() == stop + 1 and converged.item()


def test_plus_plus_sees_a_point_beside_many_copies():
    # Its squared distance is below the rounding error of the expanded form; that of the copies,
    # 400 times as many, is exactly zero.
    g = torch.Generator().manual_seed(0)
    a, c = 10 * torch.randn(2, 60, generator=g)
    x = torch.cat([a.repeat(400, 1), (a + 1e-4)[None], c.repeat(400, 1)])
    xc, _, _ = torch.ops.fastclust.kmeans_center(x)
    starts = torch.ops.fastclust.kmeans_init(xc, 3, 20, 0, 0)
    assert all(len(torch.unique(rows, dim=0)) == 3 for rows in starts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_clusters_are_repaired(dtype):
    x = blobs(300, 8, 3, 3.0).to(dtype)
    init = pick(x, 5)
    init[2:] = 1e3  # three centres that no point is near
    result = ops.kmeans(x, 5, init=init)
    assert torch.bincount(result.labels, minlength=5).min() > 0
    check_consistent(x, result)
    labels, _, inertia, _ = reference.kmeans(x.double(), init.double())
    assert torch.equal(result.labels, labels)
    assert result.inertia == pytest.approx(inertia, rel=1e-5)


def test_equal_starting_centers():
    x = blobs(200, 4, 3, 3.0).float()
    result = ops.kmeans(x, 3, init=x[:1].expand(3, 4))
    assert torch.bincount(result.labels, minlength=3).min() > 0
    check_consistent(x, result)


@pytest.mark.parametrize("init", [None, "random", "paper-code"])
@pytest.mark.parametrize("k", [2, 3, 6])
def test_fewer_distinct_points_than_clusters(init, k, recwarn):
    x = torch.tensor([[0.1, 0.7], [5.3, 5.9]]).repeat(10, 1)
    result = ops.kmeans(x, k, init=init)
    assert len(recwarn) == 0
    assert result.inertia == pytest.approx(0.0, abs=1e-10)
    assert torch.isfinite(result.centers).all()
    assert result.labels.unique().numel() == 2


def test_constant_data():
    result = ops.kmeans(torch.full((70, 3), 0.1), 4)
    assert result.labels.eq(0).all()
    assert result.inertia == 0.0
    torch.testing.assert_close(result.centers, torch.full((4, 3), 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [None, "random", "paper-code"])
def test_as_many_clusters_as_points(dtype, init):
    x = blobs(67, 3, 4, 1.0).to(dtype)
    result = ops.kmeans(x, 67, init=init, n_init=2)
    assert result.labels.unique().numel() == 67
    assert result.inertia == pytest.approx(0.0, abs=1e-8)


def test_one_cluster():
    x = blobs(130, 5, 2, 1.0).float() + 100
    result = ops.kmeans(x, 1)
    torch.testing.assert_close(result.centers[0], x.mean(0))
    assert result.inertia == pytest.approx((x - x.mean(0)).double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("init", [None, "random", "paper-code"])
def test_same_bits_for_any_thread_count(init):
    x = blobs(3000, 24, 6, 0.5).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.kmeans(x, 6, init=init, n_init=4, seed=3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].labels, other.labels)
        assert torch.equal(results[0].centers, other.centers)
        assert results[0].inertia == other.inertia


def test_seed():
    x = blobs(500, 10, 8, 0.3).float()
    a, b = ops.kmeans(x, 8, n_init=1, seed=1), ops.kmeans(x, 8, n_init=1, seed=1)
    assert torch.equal(a.centers, b.centers)
    assert len({ops.kmeans(x, 8, n_init=1, seed=s).inertia for s in range(8)}) > 1


def test_restarts_are_those_of_single_runs():
    # Restart r depends on the seed and on r alone, not on how many run beside it.
    x = blobs(600, 12, 5, 0.3).float()
    xc, _, _ = torch.ops.fastclust.kmeans_center(x)
    many = torch.ops.fastclust.kmeans_init(xc, 5, 12, 0, 7)
    few = torch.ops.fastclust.kmeans_init(xc, 5, 3, 0, 7)
    assert torch.equal(many[:3], few)
    assert many.flatten(1).unique(dim=0).shape[0] == 12


def test_more_restarts_than_a_grid_has_blocks(monkeypatch):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    want = ops.kmeans(x, 6, n_init=7, seed=3)
    monkeypatch.setattr(sys.modules["fastclust.ops.kmeans"], "_MOST_STARTS", 2)
    got = ops.kmeans(x, 6, n_init=7, seed=3)
    assert torch.equal(got.labels, want.labels) and torch.equal(got.centers, want.centers)
    assert (got.inertia, got.n_iter) == (want.inertia, want.n_iter)


def test_more_restarts_are_not_worse():
    x = blobs(800, 10, 12, 0.4).float()
    inertia = [ops.kmeans(x, 12, n_init=n, seed=5).inertia for n in (1, 4, 16)]
    assert inertia[0] >= inertia[1] >= inertia[2]


def test_warm_start():
    x = blobs(900, 16, 5, 1.0).float()
    first = ops.kmeans(x, 5, tol=0.0)
    again = ops.kmeans(x, 5, init=first.centers, tol=0.0)
    assert again.n_iter <= 2
    assert torch.equal(first.labels, again.labels)


def test_paper_code_start():
    # Of 20 draws the one closest to the mean: its points have less than the average norm.
    x = blobs(400, 3, 4, 2.0)
    xc, _, _ = torch.ops.fastclust.kmeans_center(x)
    norms = xc.square().sum(1).mean()
    starts = torch.stack([torch.ops.fastclust.kmeans_init(xc, 4, 1, 2, s)[0] for s in range(30)])
    assert starts.square().sum(-1).mean() < 0.8 * norms
    random = torch.ops.fastclust.kmeans_init(xc, 4, 30, 1, 0)
    assert 0.8 * norms < random.square().sum(-1).mean() < 1.2 * norms
    result = ops.kmeans(x, 4, init="paper-code", max_iter=1, tol=1e9)
    assert result.n_iter > 1  # max_iter and tol are the protocol's own


def test_random_start_is_uniform():
    x = torch.arange(7, dtype=torch.float64)[:, None]
    xc, mean, _ = torch.ops.fastclust.kmeans_center(x)
    rows = (torch.ops.fastclust.kmeans_init(xc, 3, 4000, 1, 0)[:, :, 0] + mean).round().long()
    assert all(len(set(r)) == 3 for r in rows.tolist())
    share = torch.bincount(rows.flatten(), minlength=7) / rows.numel()
    torch.testing.assert_close(share, torch.full((7,), 1 / 7), atol=0.015, rtol=0)


def test_plus_plus_draws_by_squared_distance():
    # Points 0, 1 and 3: from a first centre 0 the second is 1 or 3 with odds 1 to 9 per trial; the
    # greedy choice among two trials takes 3 unless both are 1 (or 1 leaves less: it never does).
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    xc, mean, _ = torch.ops.fastclust.kmeans_center(x)
    pairs = (torch.ops.fastclust.kmeans_init(xc, 2, 20000, 0, 0)[:, :, 0] + mean).round()
    from_zero = pairs[pairs[:, 0] == 0]
    assert from_zero.shape[0] / 20000 == pytest.approx(1 / 3, abs=0.02)
    assert (from_zero[:, 1] == 1).double().mean().item() == pytest.approx(0.01, abs=0.005)
    from_one = pairs[pairs[:, 0] == 1]  # 0 at distance 1, 3 at distance 4
    assert (from_one[:, 1] == 0).double().mean().item() == pytest.approx(0.04, abs=0.01)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
    ],
)
def test_any_strides(view):
    x = blobs(200, 9, 3, 1.0).float()
    assert torch.equal(ops.kmeans(view(x), 3).labels, ops.kmeans(x, 3).labels)


def test_result_is_detached():
    x = blobs(50, 4, 2, 1.0).float().requires_grad_()
    result = ops.kmeans(x, 2)
    assert not result.centers.requires_grad
    assert not result.labels.requires_grad


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 90), d=st.integers(1, 20), k=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_properties(n, d, k, seed):
    k = min(k, n)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    init = pick(x, k, seed)
    start = square_distances(x, init).min(1).values.sum().item()
    results = [ops.kmeans(x, k, init=init, max_iter=m, tol=0.0) for m in (1, 3, 50)]
    inertia = [r.inertia for r in results]
    assert start * (1 + 1e-6) >= inertia[0] >= inertia[1] * (1 - 1e-6)
    assert inertia[1] >= inertia[2] * (1 - 1e-6)
    for result in results:
        check_consistent(x, result)
        assert torch.bincount(result.labels, minlength=k).min() > 0
    # The order of the points does not matter but for rounding.
    order = torch.randperm(n, generator=g)
    permuted = ops.kmeans(x[order], k, init=init, max_iter=1)
    torch.testing.assert_close(permuted.centers, results[0].centers, rtol=1e-4, atol=1e-5)


def test_opcheck():
    x = torch.randn(70, 5)
    xc, _, variance = torch.ops.fastclust.kmeans_center(x)
    centers = torch.ops.fastclust.kmeans_init(xc, 3, 2, 0, 0)
    lib = torch.ops.fastclust
    torch.library.opcheck(lib.kmeans_center.default, (x,))
    torch.library.opcheck(lib.kmeans_init.default, (xc, 3, 2, 0, 0))
    torch.library.opcheck(lib.kmeans_lloyd.default, (xc, centers, variance, False, 10))
    torch.library.opcheck(lib.kmeans_assign.default, (xc, centers))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor", {"x": [[0.0, 0.0]] * 3}),
        (TypeError, "x must be float32 or float64", {"x": torch.zeros(3, 2, dtype=torch.int64)}),
        (TypeError, "x must be dense", {"x": torch.eye(3).to_sparse()}),
        (ValueError, "x must have shape", {"x": torch.zeros(3)}),
        (ValueError, "x must have shape", {"x": torch.zeros(0, 3)}),
        (ValueError, "finite", {"x": torch.tensor([[0.0, float("nan")], [1.0, 2.0]])}),
        (ValueError, "finite", {"x": torch.tensor([[0.0, float("inf")], [1.0, 2.0]])}),
        (ValueError, "scale it down", {"x": torch.tensor([[3e38], [3e38], [-3e38]])}),
        (ValueError, "n_clusters must not exceed", {"n_clusters": 5}),
        (ValueError, "n_clusters must be at least 1", {"n_clusters": 0}),
        (TypeError, "n_clusters must be an integer", {"n_clusters": 2.0}),
        (ValueError, "n_init", {"n_init": 0}),
        (ValueError, "max_iter", {"max_iter": 0}),
        (ValueError, "tol", {"tol": -1.0}),
        (ValueError, "tol", {"tol": float("nan")}),
        (ValueError, "init must be None", {"init": "kmeans"}),
        (ValueError, "init must have shape", {"init": torch.zeros(3, 2)}),
        (TypeError, "init must hold floating", {"init": torch.zeros(2, 2, dtype=torch.int64)}),
        (ValueError, "init must hold finite", {"init": torch.full((2, 2), float("nan"))}),
    ],
)
def test_errors(error, match, arguments):
    call = {"x": torch.arange(8.0).reshape(4, 2), "n_clusters": 2, **arguments}
    with pytest.raises(error, match=match):
        ops.kmeans(call.pop("x"), call.pop("n_clusters"), **call)


# --- the CUDA kernels, executed on the CPU over an emulated block ---------------------------------


@pytest.fixture(scope="module")
def device(emulate: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """The CUDA kernels and launchers compiled as ordinary C++."""
    return emulate("kmeans")


def run_on_device(device, x, k, *, restarts=1, init=-1, seed=0, starts=None, tol=1e-4, max_iter=50):
    """(starts, centers, n_iter, labels, inertia), all centred and padded."""
    n, d = x.shape
    dp = (d + 15) // 16 * 16
    xc, mean = x.new_empty(n, dp), torch.empty(d, dtype=torch.float64)
    variance, inertia = torch.empty((), dtype=torch.float64), torch.empty(restarts).double()
    centers = x.new_empty(restarts, k, dp)
    starts = torch.empty_like(centers) if starts is None else starts.clone()
    n_iter, converged = torch.empty(restarts).long(), torch.empty(restarts).bool()
    labels = torch.empty(restarts, n).int()
    solve = device.kmeans_double if x.dtype == torch.float64 else device.kmeans_float

    def at(t: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(t.data_ptr())

    def integer(value: int) -> ctypes.c_int64:
        return ctypes.c_int64(value)

    solve(
        *(at(x), integer(n), integer(d), integer(k), integer(restarts), ctypes.c_int(init)),
        *(integer(seed), ctypes.c_double(tol), integer(max_iter), at(xc), integer(dp), at(mean)),
        *(at(variance), at(centers), at(starts), at(n_iter), at(converged), at(labels)),
        at(inertia),
    )
    return starts, centers, n_iter, labels, inertia


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "k", "restarts", "init"),
    [
        (1, 1, 1, 1, 0),
        (65, 3, 2, 3, 0),
        (65, 3, 2, 3, 1),
        (65, 3, 2, 3, 2),
        (130, 20, 10, 7, 0),
        (90, 5, 70, 2, 0),
        (550, 18, 3, 2, 0),
        (200, 40, 4, 1, 1),  # four groups of threads share the rows; one; two blocks of columns
        (70, 150, 3, 1, 1),
        (70, 260, 3, 1, 1),
    ],
)
def test_cuda_kernels_agree_with_the_cpu(device, dtype, n, d, k, restarts, init):
    x = (blobs(n, d, max(2, k // 2), 1.0) + 5).to(dtype)
    starts, centers, n_iter, labels, inertia = run_on_device(
        device, x, k, restarts=restarts, init=init, seed=3
    )
    lib = torch.ops.fastclust
    xc, _, variance = lib.kmeans_center(x)
    cpu_starts = lib.kmeans_init(xc, k, restarts, init, 3)
    torch.testing.assert_close(starts, cpu_starts, rtol=1e-5, atol=1e-5)
    cpu_centers, cpu_iter, _ = lib.kmeans_lloyd(xc, starts, variance * 1e-4, False, 50)
    cpu_labels, cpu_inertia = lib.kmeans_assign(xc, cpu_centers)
    assert torch.equal(labels, cpu_labels)
    assert torch.equal(n_iter, cpu_iter)
    torch.testing.assert_close(centers, cpu_centers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inertia, cpu_inertia, rtol=1e-5, atol=1e-9)


def test_cuda_kernels_repair_empty_clusters_and_break_ties(device):
    x = blobs(120, 4, 3, 3.0)
    xc, _, variance = torch.ops.fastclust.kmeans_center(x)
    starts = xc[None, :5].clone()
    starts[:, 2] = 1e3
    starts[:, 4] = starts[:, 0]  # equal centres: all ties
    _, centers, n_iter, labels, _ = run_on_device(device, x, 5, starts=starts)
    cpu_centers, cpu_iter, _ = torch.ops.fastclust.kmeans_lloyd(
        xc, starts, variance * 1e-4, False, 50
    )
    assert torch.equal(n_iter, cpu_iter)
    torch.testing.assert_close(centers, cpu_centers)
    assert torch.bincount(labels[0], minlength=5).min() > 0


def test_cuda_kernels_have_no_race(device):
    x = blobs(200, 20, 10, 0.3).float()
    results = []
    for order in (0, 1, 2):  # ascending, descending, random progress of the warps
        device.set_warp_order(order)
        results.append(run_on_device(device, x, 10, restarts=3, init=0))
    device.set_warp_order(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("large", [torch.nan, 1e30])
@pytest.mark.parametrize("init", [0, 1, 2])
@pytest.mark.parametrize(("k", "restarts"), [(1, 64), (3, 2)])
def test_cuda_kernels_stay_in_bounds_without_distances(device, large, init, k, restarts):
    """Rows that the function refuses, given to the operators: any row will do, no other place."""
    x = torch.full((130, 3), large)
    x[::2] = 0
    starts, _, _, labels, _ = run_on_device(device, x, k, restarts=restarts, init=init, max_iter=1)
    assert labels.min() >= 0
    assert labels.max() < k
    if large == 1e30:
        assert (starts[:, :, :3].abs() == 5e29).all()
        assert (starts[:, :, 3:] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 7, 10, 33, 64, 65, 1000])
def test_cuda_index_maps(device, k):
    device.group_of.restype = device.chunk_rows.restype = device.begin_of.restype = ctypes.c_int64
    group = device.group_of(ctypes.c_int64(k))
    assert group >= 1
    assert group == 1 or group * k <= 64 < (group + 1) * k
    rows = device.chunk_rows(ctypes.c_int64(k))
    assert k * 8 * 8 <= rows  # at most 1/8 byte of partial sums per element of x
    n = 2**40 + k
    at = [
        device.begin_of(ctypes.c_int64(n), ctypes.c_int64(256), ctypes.c_int64(p))
        for p in range(257)
    ]
    assert at[0] == 0
    assert at[-1] == n
    assert max(b - a for a, b in itertools.pairwise(at)) <= n // 256 + 1
