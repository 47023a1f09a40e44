"""InfoNCE on a GPU against the float64 twin; everything here skips where torch sees none.

The kernels' index arithmetic is tested without a GPU in ``test_infonce_device_math.py``; these
tests add the hardware: its instructions, streams, graph capture, memory and repeatability.
"""

from __future__ import annotations

import pytest
import torch

from fastclust import ops, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

# Relative bounds of (loss, gradients) per precision; as in test_infonce_device_math.py.
BOUNDS = {
    None: (3e-7, 3e-5),
    "fp32": (3e-7, 3e-5),
    "bf16x3": (3e-7, 3e-5),
    "tf32": (1e-5, 3e-3),
    "bf16": (1e-4, 2e-2),
}


def views(n: int, dz: int, de: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(2 * n, dz, generator=g), dim=1)
    e = torch.nn.functional.normalize(torch.randn(2 * n, de, generator=g), dim=1)
    return z.cuda(), e.cuda()


def weights(n: int, dz: int, de: int, beta: float, refreshes: int = 1) -> ops.Hardness:
    w = None
    for seed in range(refreshes):
        z, e = views(n, dz, de, seed=100 + seed)
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 5, (n,), generator=g).cuda()
        confident = (torch.rand(n, generator=g) < 0.7).cuda()
        w = ops.hardness(z, e, 0.6 + 0.3 * seed, labels, confident, beta, previous=w)
    assert w is not None
    return w


def gradients(z, e, alpha, w, precision):
    leaves = [t.detach().clone().requires_grad_() for t in (z, e, alpha)]
    loss = ops.hard_infonce(*leaves, weights=w, precision=precision)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def double_twin(z, e, alpha, w, device="cpu"):
    """Loss and gradients in float64."""
    leaves = [t.detach().to(device, torch.float64).requires_grad_() for t in (z, e, alpha)]
    dense = None
    if w is not None:
        state = {
            k: v.cpu().double() if v.is_floating_point() else v.cpu()
            for k, v in w.state_dict().items()
        }
        dense = ops.dense_weights(ops.Hardness.from_state_dict(state))
    loss = reference.hard_infonce(*leaves, dense)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def check(z, e, alpha, w, precision, device="cpu") -> None:
    """Against the twin, run on `device`."""
    loss, grads = gradients(z, e, alpha, w, precision)
    want_loss, want = double_twin(z, e, alpha, w, device)
    loss_bound, grad_bound = BOUNDS[precision]
    assert abs(float(loss) - float(want_loss)) <= loss_bound * max(1, abs(float(want_loss)))
    for got, twin in zip(grads[:2], want[:2], strict=True):
        error = (got.to(twin) - twin).norm() / twin.norm().clamp_min(1e-2)
        assert float(error) <= grad_bound
    assert abs(float(grads[2]) - float(want[2])) <= grad_bound * max(0.1, abs(float(want[2])))


@pytest.fixture(params=["general", "hopper"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths; the one for Hopper where the card is one."""
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the path for Hopper needs compute capability 9.0")
    monkeypatch.setenv("FASTCLUST_SM90", "1" if request.param == "hopper" else "0")


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize(
    ("n", "dz", "de", "beta", "refreshes"),
    [(1, 3, 5, 1.0, 0), (64, 33, 16, 1.0, 0), (700, 100, 61, 1.0, 1), (1500, 500, 500, 2.0, 2)],
)
def test_matches_the_twin(n, dz, de, beta, refreshes, precision) -> None:
    z, e = views(n, dz, de)
    w = weights(n, dz, de, beta, refreshes) if refreshes else None
    for alpha in (0.7, 1.0001, -0.1):
        check(z, e, torch.tensor(alpha, device="cuda"), w, precision)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_several_panels(precision) -> None:
    """Rows that no workspace holds at once: two panels and more, forward and backward.

    Sums and gradients of one launch are then added to those of others: gradients in pairs, and one
    by one where the width is odd.
    """
    check(*views(4000, 2500, 1501), torch.tensor(0.7, device="cuda"), None, precision, "cuda")


def test_digits_of_a_long_sum_are_kept() -> None:
    """Rows that are alike; see the test of the same name in test_infonce_device_math.py."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1000, generator=g) + 0.33 * torch.randn(3000, 1000, generator=g)
    z = torch.nn.functional.normalize(z, dim=1).cuda()
    none, alpha = z.new_zeros(z.shape[0], 0), torch.tensor(1.0, device="cuda")
    loss, grads = gradients(z, none, alpha, None, "bf16x3")
    want_loss, want = double_twin(z, none, alpha, None)
    assert abs(float(loss) - float(want_loss)) <= 3e-7 * float(want_loss)
    error = (grads[0].cpu().double() - want[0]).norm() / want[0].norm()
    assert float(error) <= 1.5e-5
    s = z.double() @ z.double().T
    got = torch.ops.fastclust.similarity_range(z, none, alpha, 0).double()
    torch.testing.assert_close(got, torch.stack([s.min(), s.max()]), rtol=0, atol=2e-6)


def test_nan_made_by_the_gpu_reaches_the_loss() -> None:
    """Its mantissa is all ones, which rounding must not carry over to zero."""
    z, e = views(50, 20, 10)
    z[3] = z[3] * 0 / 0
    for precision in BOUNDS:
        assert ops.hard_infonce(z, e, 0.5, precision=precision).isnan()


def test_float64_is_exact() -> None:
    z, e = (t.double() for t in views(200, 40, 24))
    alpha = torch.tensor(0.4, dtype=torch.float64, device="cuda")
    loss, grads = gradients(z, e, alpha, None, None)
    want_loss, want = double_twin(z, e, alpha, None)
    torch.testing.assert_close(loss.cpu(), want_loss, rtol=1e-13, atol=1e-13)
    for got, twin in zip(grads, want, strict=True):
        torch.testing.assert_close(got.cpu(), twin, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_same_bits_every_time(precision) -> None:
    """With gradients that several launches add to: of so many rows a panel does not hold all."""
    z, e = views(3000, 120, 70)
    w = weights(3000, 120, 70, 1.0)
    alpha = torch.tensor(0.8, device="cuda")
    first = gradients(z, e, alpha, w, precision)
    for _ in range(200):
        loss, grads = gradients(z, e, alpha, w, precision)
        assert torch.equal(loss, first[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, first[1], strict=True))


def test_no_host_synchronisation_and_graph_capture() -> None:
    z, e = views(300, 64, 40)
    w = weights(300, 64, 40, 2.0)
    alpha = torch.tensor(0.8, device="cuda")
    expected = gradients(z, e, alpha, w, "bf16x3")
    leaves = [t.detach().clone().requires_grad_() for t in (z, e, alpha)]

    def step():
        loss = ops.hard_infonce(*leaves, weights=w, precision="bf16x3")
        return loss, torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


def test_rows_too_wide_for_the_offsets_are_refused() -> None:
    z = torch.zeros(2, 500_001, device="cuda")
    with pytest.raises(RuntimeError, match="at most 500,000 columns"):
        ops.hard_infonce(z, None, 1.0)


def test_memory_is_linear_in_the_rows() -> None:
    n, dz, de = 6000, 256, 256
    z, e = views(n, dz, de)
    alpha = torch.tensor(0.8, device="cuda")
    gradients(z, e, alpha, None, "bf16x3")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(z, e, alpha, None, "bf16x3")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    inputs = (z.numel() + e.numel()) * 4
    # clones of the leaves, gradients, and a workspace of at most 64 MB
    assert peak <= 2 * inputs + 64 * 10**6


def test_range_and_permutation_invariance() -> None:
    n = 500
    z, e = views(n, 90, 30)
    alpha = torch.tensor(0.3, device="cuda")
    s = reference.similarity(z.double(), e.double(), alpha.double())
    got = torch.ops.fastclust.similarity_range(z, e, alpha, 0).double()
    torch.testing.assert_close(got, torch.stack([s.min(), s.max()]), rtol=0, atol=1e-5)
    p = torch.randperm(n, generator=torch.Generator().manual_seed(1)).cuda()
    rows = torch.cat([p, p + n])
    one = ops.hard_infonce(z, e, alpha)
    other = ops.hard_infonce(z[rows], e[rows], alpha)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
