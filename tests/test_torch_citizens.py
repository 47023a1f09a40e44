"""Operators and modules inside what torch offers: compile, autocast, checkpoint, DLPack."""

from __future__ import annotations

import contextlib
import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastclust as fc
from fastclust import nn, ops
from fastclust.models.hsan import confident_nodes
from fastclust.ops import lowrank_device

N, D = 24, 6


@pytest.fixture
def graph(two_blocks) -> fc.Graph:
    return fc.Graph(two_blocks[0][:N][:, :N])


@pytest.fixture
def z() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(2 * N, D), dim=1)


LABELS = torch.arange(N) % 3
CONFIDENT = torch.arange(N) % 4 > 0


def operators(graph: fc.Graph, z: torch.Tensor) -> dict[str, Any]:
    """Every operator as a function of one differentiable tensor."""
    weights = ops.hardness(z, None, 0.9, LABELS, CONFIDENT, 1.0)
    w = torch.linspace(-1, 1, D * 3).view(D, 3)
    return {
        "propagate": lambda x: ops.propagate(graph, x[:N], residual=x[:N], activation="relu"),
        "steps": lambda x: ops.propagate(graph, x[:N], steps=3),
        "infonce": lambda x: ops.hard_infonce(x, x, 0.7),
        "weighted": lambda x: ops.hard_infonce(x, None, 1.0, weights=weights),
        "matmul": lambda x: ops.matmul(x, w),
    }


NAMES = ["propagate", "steps", "infonce", "weighted", "matmul"]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph(name, graph, z):
    operator = operators(graph, z)[name]
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    values, gradients = [], []
    for f in (operator, compiled):
        x = z.clone().requires_grad_()
        out = f(x)
        out.square().sum().backward()
        values.append(out.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_operators_without_gradient_compile_in_one_graph(z):
    def cluster(x):
        result = ops.kmeans(x, 3, n_init=2)
        return result.labels, result.centers

    def factor(x):
        svd = ops.batched_svd(x, 2, batch_size=16)
        return svd.u @ torch.diag_embed(svd.s) @ svd.vh

    def hard(x):
        return ops.hardness(x, None, 0.9, LABELS, CONFIDENT, 1.0).range

    for function in (cluster, factor, hard):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), function(z))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_takes_half_precision(name, graph, z):
    operator = operators(graph, z)[name]
    with torch.autocast("cpu", torch.bfloat16):
        half = (z @ torch.eye(D)).requires_grad_()
        assert half.dtype == torch.bfloat16
        out = operator(half)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, operator(half.detach().float()))
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()
    with pytest.raises(TypeError, match="float32"):
        operator(half)


def test_autocast_does_not_reach_products(z):
    """What is made of float32 is float32, with the same bits; so are the steps on CUDA tensors."""
    weights = ops.hardness(z, None, 0.9, LABELS, CONFIDENT, 1.0)
    centers, square = z[:3].contiguous(), z.view(2, N, D)
    factors = ops.low_rank(z, 2)
    on_cuda = importlib.import_module("fastclust.ops.matmul")._on_cuda
    calls = [
        lambda: ops.matmul(z, z.t(), precision="bf16"),
        lambda: ops.dense_weights(weights),
        lambda: confident_nodes(z, centers, 0.5),
        lambda: factors.matmul(z.t()[:, :4]),
        factors.to_dense,
        lambda: lowrank_device.multiply(square, square.mT),
        lambda: on_cuda(z, z.t(), None),
        lambda: on_cuda(z, z.t(), z[:, 0]),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.float16):
            got = call()
        same(got, call())


@pytest.mark.parametrize("model", [fc.HSAN, fc.ECNMF, fc.SSGC])
def test_autocast_does_not_reach_an_estimator(two_blocks, model):
    adjacency, x, _ = two_blocks
    options = {} if model is fc.SSGC else {"epochs": 3}
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            estimator = model(2, **options).fit(x, adjacency=adjacency)
            found.append((estimator.embedding_, estimator.transform(x, adjacency=adjacency)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_functional_transforms(name, graph, z):
    """torch.func: grad, grad_and_value and vjp give what backward gives, to the bit."""
    operator = operators(graph, z)[name]

    def total(x):
        return operator(x).square().sum()

    x = z.clone().requires_grad_()
    value = total(x)
    value.backward()
    same(torch.func.grad(total)(z), x.grad)
    for got, want in zip(torch.func.grad_and_value(total)(z), (x.grad, value), strict=True):
        same(got, want)
    same(torch.func.vjp(total, z)[1](torch.ones(()))[0], x.grad)
    with torch.no_grad():
        same(total(x), value)


def test_functional_transforms_inside_each_other(z):
    """The inner transform takes no derivative of what the operator sees, the outer does."""

    def inner(w, x):
        return w * ops.matmul(x, x.T).square().sum()

    def outer(x):
        return torch.func.grad(inner)(torch.ones(()), x)

    same(torch.func.grad(outer)(z), torch.func.grad(lambda x: inner(torch.ones(()), x))(z))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name, graph, z):
    """Not zeros in place of derivatives."""
    operator = operators(graph, z)[name]
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(operator, (z,), (z,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        operator(forward_ad.make_dual(z, z))


def test_functional_call_of_a_module(graph, z):
    layer = nn.ResidualPropagation(D, D)
    parameters = dict(layer.named_parameters())

    def total(parameters):
        return torch.func.functional_call(layer, parameters, (graph, z[:N])).square().sum()

    gradients = torch.func.grad(total)(parameters)
    layer(graph, z[:N]).square().sum().backward()
    for key, parameter in parameters.items():
        same(gradients[key], parameter.grad)


def test_second_derivatives_of_the_loss_are_refused(z):
    def slope(x):
        return torch.func.grad(lambda y: ops.hard_infonce(y, None, 1.0))(x).sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(slope)(z)


def test_second_derivatives_of_the_product(z):
    def slope(x):
        return torch.func.grad(lambda y: ops.matmul(y, y.T).square().sum())(x).sum()

    x = z.double().requires_grad_()
    (first,) = torch.autograd.grad((x @ x.T).square().sum(), x, create_graph=True)
    expected = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(slope)(z.double()), expected)


def test_every_operator_is_checked():
    """Each has its torch.library.opcheck: schema, fake, autograd, and both under tracing."""
    torch.library.opcheck(
        torch.ops.fastclust.kmeans_fit.default, (torch.randn(20, 3), 2, 2, 10, 1e-4, None, None, 0)
    )
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))
    checked = set(re.findall(r"opcheck\(\s*(?:\w+\.)*?(\w+)(?:\.default)?,", text))
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    names = {name.split("::")[1] for name in schemas if name.startswith("fastclust::")}
    assert "kmeans_fit" in names and names <= checked, names - checked


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_recomputes_the_same(name, graph, z):
    operator = operators(graph, z)[name]
    gradients = []
    for f in (operator, lambda x: checkpoint(operator, x, use_reentrant=False)):
        x = z.clone().requires_grad_()
        f(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


class Foreign:
    """An array of another library: no tensor, no NumPy array, but it speaks DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape
        self.exported = 0

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.array.__dlpack__(**options)  # NumPy 1.26 refuses some, and is asked again
        self.exported += 1
        return capsule

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class ForeignMatrix:
    """A sparse matrix of another library, with the face of cupyx's."""

    format = "csr"

    def __init__(self, matrix: sp.csr_array) -> None:
        self.shape = matrix.shape
        self.has_canonical_format = True
        self.data, self.indices, self.indptr = map(
            Foreign, (matrix.data, matrix.indices, matrix.indptr)
        )
        self._host = matrix

    def tocsr(self) -> ForeignMatrix:
        return self

    def get(self) -> sp.csr_array:
        return self._host


ForeignMatrix.__module__ = "cupyx.scipy.sparse"


def test_foreign_arrays_pass_without_a_copy(graph, z):
    array = z.numpy()
    shared = fc.interop.from_foreign(Foreign(array))
    assert shared.data_ptr() == array.ctypes.data
    for x in (Foreign(array), array):
        half = Foreign(array[:N]) if isinstance(x, Foreign) else array[:N]
        same(ops.propagate(graph, half), ops.propagate(graph, z[:N]))
        same(ops.propagate(graph, half, residual=half), ops.propagate(graph, z[:N], residual=z[:N]))
        same(ops.hard_infonce(x, x, 0.5), ops.hard_infonce(z, z, 0.5))
        same(ops.kmeans(x, 3).labels, ops.kmeans(z, 3).labels)
        same(ops.batched_svd(x, 2).s, ops.batched_svd(z, 2).s)
        same(ops.matmul(x, array[:D, :3]), ops.matmul(z, z[:D, :3]))
    locked = array.copy()
    locked.flags.writeable = False
    same(ops.kmeans(locked, 3).labels, ops.kmeans(z, 3).labels)
    with pytest.raises(TypeError, match=r"h must be a torch.Tensor, got list"):
        ops.propagate(graph, [[1.0]])


def test_foreign_sparse_matrices(two_blocks):
    adjacency, x, _ = two_blocks
    assert fc.Graph(ForeignMatrix(adjacency)).n_edges == adjacency.nnz
    matrix = ForeignMatrix(sp.csr_array(x))
    same(ops.batched_svd(matrix, 2).s, ops.batched_svd(sp.csr_array(x), 2).s)
    assert matrix.data.exported == 1, "handed over, not copied out"


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# --- modules --------------------------------------------------------------------------------------


def test_loss_module_trains_alpha_and_keeps_its_weights(z):
    first, second = z.chunk(2)
    loss = nn.HardSampleInfoNCE(3, tau=0.5, n_init=2)
    plain = loss(first, second, second, first)
    expected = ops.hard_infonce(z, torch.cat([second, first]), loss.alpha)
    torch.testing.assert_close(plain, expected)
    labels = loss.refresh(first, second, second, first)
    assert labels.shape == (N,)
    hard = loss(first, second, second, first)
    assert hard.item() != plain.item()
    hard.backward()
    assert loss.alpha.grad.abs() > 0
    other = nn.HardSampleInfoNCE(3)
    other.load_state_dict(loss.state_dict())
    same(other(first, second, second, first), hard)
    with pytest.raises(ValueError, match="e1 and e2 must both"):
        loss(first, second, first)


def test_weights_of_the_loss_go_where_the_module_goes(z):
    loss, first, second = nn.HardSampleInfoNCE(3), z[:N], z[N:]
    loss.refresh(first, second)
    labels = loss.weights.labels
    want = loss(first, second)
    state = loss.state_dict()
    loss.double()
    assert loss.weights.z[0].dtype == torch.float64 and torch.equal(loss.weights.labels, labels)
    torch.testing.assert_close(loss(first.double(), second.double()), want.double())

    wide = nn.HardSampleInfoNCE(3).double()
    wide.load_state_dict(state)  # of another dtype, as of another device
    assert wide.weights.range.dtype == torch.float64 and wide.weights.labels.dtype == torch.int32
    torch.testing.assert_close(wide(first.double(), second.double()), want.double())


def test_layers_against_their_formulas(graph, two_blocks):
    x = torch.from_numpy(two_blocks[1][:N])
    dense = torch.eye(N) + torch.from_numpy(two_blocks[0].toarray()[:N, :N])
    dense = dense / dense.sum(1, keepdim=True)
    layer = nn.ResidualPropagation(8, 8)
    torch.testing.assert_close(layer(graph, x), torch.relu(dense @ layer.linear(x) + x))
    last = nn.ResidualPropagation(8, 3, activation="none")
    torch.testing.assert_close(last(graph, x), dense @ last.linear(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(graph, x).dtype == torch.float32

    view = nn.LowRankView(x, 3, add_mean=True)
    u, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    reconstruction = (u[:, :3] * s[:3]) @ vh[:3] + x.mean(0)
    torch.testing.assert_close(view(torch.eye(8)), reconstruction, atol=1e-3, rtol=1e-3)

    head = nn.SoftAssignment(8, 2)
    head.start(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32
    log_q = head(x)
    assert torch.equal(log_q.argmax(1), ops.kmeans(x, 2).labels)
    q = log_q.exp().detach()
    p = q**2 / q.sum(0)
    p = p / p.sum(1, keepdim=True)
    expected = (p * (p.clamp_min(1e-30).log() - log_q)).sum() / N
    torch.testing.assert_close(head.divergence(log_q), expected, atol=1e-5, rtol=1e-4)


def test_modules_train_in_a_loop_of_ones_own(two_blocks):
    adjacency, x, labels = two_blocks
    graph, features = fc.Graph(adjacency), torch.from_numpy(x)
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList(nn.ResidualPropagation(8, 16) for _ in range(2))
    loss = nn.HardSampleInfoNCE(2)
    optimizer = torch.optim.Adam([*encoders.parameters(), *loss.parameters()], 1e-2)
    for step in range(20):
        views = [encoder(graph, features) for encoder in encoders]
        value = loss(*views)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 10 == 0:
            loss.refresh(*views)
    found = loss.refresh(*views)
    assert fc.metrics.clustering_scores(labels, found.numpy())["acc"] > 0.9


def test_hsan_loss_in_a_torch_geometric_model():
    pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
    path = Path(__file__).parent.parent / "examples" / "hsan_loss_in_pyg.py"
    scores = runpy.run_path(str(path))["main"](epochs=12)
    assert scores["acc"] > 0.6


def test_estimators_take_torch_geometric_data(two_blocks):
    data = pytest.importorskip("torch_geometric.data")
    adjacency, x, _ = two_blocks
    coo = adjacency.tocoo()
    edge_index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    weighted = adjacency.copy()
    weighted.data = weighted.data * 2
    graph = data.Data(x=torch.from_numpy(x), edge_index=edge_index)
    assert np.array_equal(
        fc.SSGC(2).fit(graph).labels_, fc.SSGC(2).fit_predict(x, adjacency=adjacency)
    )
    graph.edge_weight = torch.full((coo.nnz,), 2.0)
    same(
        *(
            torch.from_numpy(m.embedding_)
            for m in (fc.SSGC(2).fit(graph), fc.SSGC(2).fit(x, adjacency=weighted))
        )
    )


# --- modes of torch that surround a call ---------------------------------------------------------


@pytest.mark.parametrize("model", [fc.HSAN, fc.ECNMF])
def test_fit_trains_whatever_surrounds_it(model: Any) -> None:
    """The same bits under no_grad, inference_mode and another default dtype; predict, too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 6)).astype(np.float32)
    plain = model(3, epochs=3, width=8, n_init=2, random_state=0).fit(x)

    @contextlib.contextmanager
    def default_dtype() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    for mode in (torch.no_grad, torch.inference_mode, default_dtype):
        with mode():
            other = model(3, epochs=3, width=8, n_init=2, random_state=0).fit(x)
            assert np.array_equal(other.predict(x), plain.predict(x))
        assert other.embedding_.tobytes() == plain.embedding_.tobytes()
