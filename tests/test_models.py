"""The two networks against dense float64 formulas written out from the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from fastclust import ops
from fastclust.distributed import ONE, Ranks
from fastclust.graph import Graph
from fastclust.metrics import clustering_scores
from fastclust.models.ecnmf import ECNMFModel, choose_propagation, target_distribution
from fastclust.models.hsan import (
    STORED_BYTES,
    HSANModel,
    _storage_of,
    confident_nodes,
    filtered_attributes,
)
from fastclust.models.inputs import (
    as_tensor,
    derive_seed,
    stacked_unit_rows,
    unit_rows,
    weighted_rows,
)
from fastclust.synthetic import make_attributed_sbm
from fastclust.training import train

N, D, K = 37, 11, 3


@pytest.fixture
def graph_data() -> tuple[sp.csr_array, np.ndarray]:
    """A sparse random graph of N nodes, one of them isolated, and attributes [N, D]."""
    rng = np.random.default_rng(5)
    upper = np.triu(rng.random((N, N)) < 0.15, 1)
    upper[0], upper[:, 0] = False, False
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    return adjacency, rng.normal(size=(N, D)).astype(np.float32)


def dense_adjacency(adjacency: sp.csr_array) -> Tensor:
    return torch.from_numpy(adjacency.toarray()).double()


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_of_unit_length_where_the_squares_of_their_entries_overflow(dtype):
    rng = np.random.default_rng(0)
    plain = torch.from_numpy(rng.normal(size=(6, 5))).to(dtype)
    largest = torch.finfo(dtype).max
    scale = torch.tensor([1.0, largest**0.5, 1e-3, largest**0.75, 0.0, largest / 8], dtype=dtype)
    x = plain.clone().requires_grad_()
    views = (unit_rows(scale[:, None] * x), stacked_unit_rows(scale[:, None] * x, plain)[:6])
    expected = plain.double() / plain.double().norm(dim=1, keepdim=True)
    expected[4] = 0.0
    for got in views:
        torch.testing.assert_close(got, expected.to(dtype))
        assert torch.equal(got[[0, 2]], unit_rows((scale[:, None] * plain)[[0, 2]]))
        g = torch.from_numpy(rng.normal(size=(6, 5))).to(dtype)
        (gradient,) = torch.autograd.grad(got, x, g)
        y = plain.double().requires_grad_()
        (wanted,) = torch.autograd.grad(y / y.norm(dim=1, keepdim=True), y, g.double())
        wanted[4] = 0.0
        torch.testing.assert_close(gradient, wanted.to(dtype))


def test_rows_that_are_not_finite_stay_so():
    x = torch.tensor([[1.0, np.nan], [np.inf, 1.0], [3.0, 4.0]])
    for got in (unit_rows(x), stacked_unit_rows(x, x)[:3]):
        assert got[:2].isnan().any(1).all()
        assert torch.equal(got[2], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("sparse", [False, True])
def test_weighted_rows_of_large_attributes(sparse):
    x = np.array([[3e19, 4e19], [3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    got = weighted_rows(sp.csr_array(x) if sparse else x)
    got = got.toarray() if sparse else got
    np.testing.assert_allclose(got, [[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


# --- HSAN ----------------------------------------------------------------------------------------


def hsan(adjacency: sp.csr_array, x: np.ndarray, **keywords: Any) -> HSANModel:
    keywords = {"n_clusters": K, "width": 6, "n_init": 3, "seed": 1, **keywords}
    graph = Graph(adjacency, norm="none", self_loops=False)
    return HSANModel(torch.from_numpy(x).double(), graph, **keywords).double()


def dense_views(model: HSANModel, adjacency: Tensor) -> tuple[Tensor, Tensor]:
    """Section 1.2: Z^v = rownorm(act(X W_v + b_v)), E^v = rownorm(A V_v + c_v)."""

    def rownorm(x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt()

    z, e = [], []
    for v in range(2):
        pre = model.x @ model.w[v].T + model.b[v]
        z.append(rownorm(1 / (1 + torch.exp(-pre)) if model.activation == "sigmoid" else pre))
        e.append(rownorm(adjacency @ model.v[v] + model.c[v]))
    return torch.cat(z), torch.cat(e)


def dense_similarity(model: HSANModel, adjacency: Tensor) -> Tensor:
    z, e = dense_views(model, adjacency)
    if not model.structure:
        return z @ z.T
    return model.alpha * z @ z.T + (1 - model.alpha) * e @ e.T


def dense_loss(similarity: Tensor, weights: Tensor) -> Tensor:
    """Section 1.4: (1/2N) sum_i [ log sum_{k != i} exp(W_ik S_ik) - W_ip S_ip ]."""
    m = similarity.shape[0]
    logits = weights * similarity
    pair = torch.arange(m).roll(m // 2)
    off_diagonal = ~torch.eye(m, dtype=torch.bool)
    rows = [logits[i][off_diagonal[i]].exp().sum().log() - logits[i, pair[i]] for i in range(m)]
    return torch.stack(rows).sum() / m


def dense_refresh(
    similarity: Tensor, labels: Tensor, confident: Tensor, beta: float, weights: Tensor
) -> Tensor:
    """Section 1.5 written into a copy of ``weights``."""
    low, high = similarity.min(), similarity.max()
    labels, confident = labels.repeat(2), confident.repeat(2)
    out = weights.clone()
    same = (labels[:, None] == labels[None, :]).double()
    hard = (same - (similarity - low) / (high - low)).abs() ** beta
    both = confident[:, None] & confident[None, :]
    out[both] = hard[both]
    return out


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_filter_is_the_power_of_the_symmetric_propagation(graph_data, steps):
    adjacency, x = graph_data
    a = dense_adjacency(adjacency) + torch.eye(N, dtype=torch.float64)
    d = a.sum(1)
    s = a / (d[:, None] * d[None, :]).sqrt()
    expected = torch.linalg.matrix_power(s, steps) @ torch.from_numpy(x).double()
    for features in (x, sp.csr_array(x)):
        got = filtered_attributes(features, adjacency, filter_steps=steps, n_input=None)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_components_are_those_of_a_full_pca_up_to_sign():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)) @ rng.normal(size=(6, 30)) * 3 + rng.normal(size=(60, 30)) + 5
    x = x.astype(np.float32)
    alone = sp.csr_array((60, 60), dtype=np.float32)  # no edges: the filter changes nothing
    got = filtered_attributes(x, alone, filter_steps=1, n_input=5).numpy()
    expected = PCA(5, svd_solver="full").fit_transform(x)
    signs = np.sign((got * expected).sum(0))
    np.testing.assert_allclose(got * signs, expected, atol=2e-3 * np.abs(expected).max())
    again = filtered_attributes(x, alone, filter_steps=1, n_input=5).numpy()
    assert np.array_equal(got, again)


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
@pytest.mark.parametrize("structure", [True, False])
def test_hsan_loss_and_gradients_equal_the_formula(graph_data, activation, structure):
    adjacency, x = graph_data
    a = dense_adjacency(adjacency)
    model = hsan(adjacency, x, activation=activation, structure=structure, tau=0.5, beta=2.0)
    weights = torch.ones(2 * N, 2 * N, dtype=torch.float64)
    for alpha in (0.99999, 0.4, 1.07):
        if structure:
            model.alpha.data.fill_(alpha)
            similarity = dense_similarity(model, a)
        else:
            z = model.attribute_views()
            similarity = z @ z.T
        expected = dense_loss(similarity, weights)
        got = model.loss()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        parameters = list(model.parameters())
        want = torch.autograd.grad(expected, parameters)
        have = torch.autograd.grad(got, parameters)
        for h, w in zip(have, want, strict=True):
            torch.testing.assert_close(h, w, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("storage", ["snapshots", "stored"])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_refreshed_weights_equal_the_formula(graph_data, stale, tau, storage):
    adjacency, x = graph_data
    a = dense_adjacency(adjacency)
    model = hsan(adjacency, x, tau=tau, beta=1.5, stale_weights=stale, weight_storage=storage)
    ones = torch.ones(2 * N, 2 * N, dtype=torch.float64)
    weights = ones
    for epoch in (0, 10, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(
                    parameter.shape,
                    generator=torch.Generator().manual_seed(epoch),
                    dtype=torch.float64,
                )
        model.loss()  # parameters changed
        model.after_step(epoch)
        result, z = model._cluster(epoch)
        confident = confident_nodes(z, result.centers, tau)
        similarity = dense_similarity(model, a)
        weights = dense_refresh(
            similarity, result.labels, confident, 1.5, weights if stale else ones
        )
        torch.testing.assert_close(
            ops.dense_weights(model.weights), weights.detach(), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            model.loss(), dense_loss(similarity, weights.detach()), rtol=1e-9, atol=0
        )


def test_weights_are_refreshed_after_the_first_epoch_and_then_every_tenth(graph_data):
    model = hsan(*graph_data)
    seen = []
    for epoch in range(21):
        before = model.weights
        model.after_step(epoch)
        if model.weights is not before:
            seen.append(epoch)
    assert seen == [0, 10, 20]
    model = hsan(*graph_data, weights="none")
    model.after_step(0)
    assert model.weights is None


def test_how_weights_are_held(graph_data):
    """Stale ones are stored where that can be and is small, others are not unless asked for."""

    def held(**keywords: Any) -> str:
        return hsan(*graph_data, **keywords).weight_storage

    stale = {"stale_weights": True}
    assert held() == held(**stale, weights="none") == "snapshots"
    assert held(**stale) == held(weight_storage="stored") == "stored"
    assert held(**stale, weight_storage="snapshots") == "snapshots"
    with pytest.raises(ValueError, match="weight_storage must be 'auto', 'snapshots' or 'stored'"):
        held(weight_storage="dense")

    def chosen(n: int, wish: Any = "auto", device: str = "cpu", size: int | None = None) -> str:
        x = torch.empty(1, 1, device=device).expand(n, 1)
        ranks = ONE
        if size is not None:
            ranks = Ranks()
            ranks.size = size
        return _storage_of(wish, x, stale=True, ranks=ranks)

    most = 11520
    assert ops.StoredHardness.n_bytes(most) <= STORED_BYTES
    assert chosen(most) == chosen(most + 1, "stored") == "stored"
    assert chosen(most + 1) == chosen(5, device="meta") == chosen(5, size=2) == "snapshots"
    assert chosen(5, size=1) == "snapshots", "one rank of a launch holds its weights as all do"
    for where in ({"device": "meta"}, {"size": 2}):
        with pytest.raises(ValueError, match=r"one process on the CPU.*take weight_"):
            chosen(5, "stored", **where)


@pytest.mark.parametrize("storage", ["snapshots", "stored"])
def test_paper_code_accumulates_gradients_and_keeps_stale_weights(graph_data, storage):
    """The loop equals one written by hand: Adam on the running sum of dense gradients."""
    adjacency, x = graph_data
    a = dense_adjacency(adjacency)
    settings: dict[str, Any] = {"tau": 0.6, "beta": 2.0, "kmeans": "paper-code"}
    settings |= {"stale_weights": True, "weight_storage": storage}
    settings["refresh_every"] = 2
    model, twin = hsan(adjacency, x, **settings), hsan(adjacency, x, **settings)
    train(model, epochs=6, lr=0.05, adjacency=adjacency, optimizer="accumulated", eval_every=3)

    parameters = list(twin.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    weights = torch.ones(2 * N, 2 * N, dtype=torch.float64)
    for epoch in range(6):
        gradients = torch.autograd.grad(dense_loss(dense_similarity(twin, a), weights), parameters)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                total[i] += g
                first[i] = 0.9 * first[i] + 0.1 * total[i]
                second[i] = 0.999 * second[i] + 0.001 * total[i] ** 2
                mean = first[i] / (1 - 0.9 ** (epoch + 1))
                root = (second[i] / (1 - 0.999 ** (epoch + 1))).sqrt()
                p -= 0.05 * mean / (root + 1e-8)
            if epoch % 2 == 0:
                twin._clustered = None
                result, z = twin._cluster(epoch)
                confident = confident_nodes(z, result.centers, 0.6, released=True)
                similarity = dense_similarity(twin, a)
                weights = dense_refresh(similarity, result.labels, confident, 2.0, weights)
    for p, q in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_averaged_step_uses_means_over_all_gradients(graph_data):
    adjacency, x = graph_data
    a = dense_adjacency(adjacency)
    model = hsan(adjacency, x, weights="none", clamp_alpha=True)
    twin = hsan(adjacency, x, weights="none")
    train(model, epochs=5, lr=0.01, adjacency=adjacency, optimizer="averaged")

    parameters = list(twin.parameters())
    history: list[list[Tensor]] = []
    for _ in range(5):
        ones = torch.ones(2 * N, 2 * N, dtype=torch.float64)
        history.append(
            list(torch.autograd.grad(dense_loss(dense_similarity(twin, a), ones), parameters))
        )
        with torch.no_grad():
            for i, p in enumerate(parameters):
                past = torch.stack([gradients[i] for gradients in history])
                p -= 0.01 * past.mean(0) / (past.square().mean(0).sqrt() + 1e-8)
            twin.alpha.clamp_(0, 1)
    for p, q in zip(model.parameters(), parameters, strict=True):
        # betas of 0.99999 are means up to about epochs x 1e-5
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert 0 <= model.alpha.item() <= 1


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_confident_nodes_against_the_formula(tau):
    rng = np.random.default_rng(2)
    z, centers = rng.normal(size=(50, 4)), rng.normal(size=(3, 4))
    squared = ((z[:, None] - centers[None]) ** 2).sum(2)
    score = 1 / np.exp(squared - squared.min(1, keepdims=True)).sum(1)
    got = confident_nodes(torch.from_numpy(z), torch.from_numpy(centers), tau).numpy()
    kept = int(np.floor(tau * 50 + 1e-9))
    assert got.sum() == kept
    assert set(np.flatnonzero(got)) == set(np.argsort(score)[:kept])
    released = confident_nodes(
        torch.from_numpy(z), torch.from_numpy(centers), tau, released=True
    ).numpy()
    n_low = int(50 * (1 - tau))
    threshold = np.sort(score)[::-1][n_low - 1] if n_low else np.inf
    assert np.array_equal(released, score <= threshold * (1 + 1e-12))


def test_extra_state_restores_the_weights(graph_data):
    model, other = hsan(*graph_data, beta=3.0), hsan(*graph_data, beta=3.0)
    model.after_step(0)
    other.load_extra_state(model.extra_state())
    assert torch.equal(model.loss(), other.loss())
    other.load_extra_state({})
    assert other.weights is None


def test_derived_seeds_differ_by_path_and_repeat():
    seeds = {derive_seed(s, *path) for s in range(3) for path in ((0,), (1, 0), (1, 1), (1, 10))}
    assert len(seeds) == 12
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) >= 0


# --- ECN-MF --------------------------------------------------------------------------------------


def ecnmf(
    adjacency: sp.csr_array,
    x: Any,
    *,
    rank: int = 4,
    norm: str = "rw",
    add_mean: bool = False,
    **keywords: Any,
) -> ECNMFModel:
    common = {"n_clusters": K, "width": 6, "n_init": 3, "seed": 1, "beta": 1.0, "tau": 0.5}
    features = as_tensor(x)
    low_rank = ops.low_rank(features, rank, add_mean=add_mean, seed=0)
    return ECNMFModel(features, low_rank, Graph(adjacency, norm=norm), **common | keywords)


def dense_ecnmf(model: ECNMFModel, abar: Tensor, x: Tensor, x_r: Tensor) -> dict[str, Tensor]:
    """Eqs. 10 to 16 in dense float64."""
    act = torch.relu if model.activation == "relu" else (lambda h: h)
    views = []
    for view, features in enumerate((x, x_r)):
        layers = slice(view * model.n_layers, (view + 1) * model.n_layers)
        weights, biases = ([p.double() for p in ps[layers]] for ps in (model.w, model.b))
        z = act(abar @ features @ weights[0] + biases[0])
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            z = act(abar @ (z @ weight + bias) + z)
        views.append(z)
    z = (views[0] + views[1]) / 2
    if model.row_normalise:
        z = z / z.norm(dim=1, keepdim=True)
    q = torch.softmax(z @ model.head_w.double() + model.head_b.double(), 1)
    f = q.sum(0)
    p = (q**2 / f) / (q**2 / f).sum(1, keepdim=True)
    return {"view": (views[0] - views[1]) ** 2, "z": z, "q": q, "p": p}


def dense_pseudo_labels(q: Tensor, n_top: int, within_argmax: bool) -> dict[int, int]:
    """Node -> label by a plain loop over clusters."""
    best: dict[int, int] = {}
    for k in range(q.shape[1]):
        order = sorted(range(q.shape[0]), key=lambda i: (-float(q[i, k]), i))
        if within_argmax:
            order = [i for i in order if int(q[i].argmax()) == k]
        for i in order[:n_top]:
            if i not in best or q[i, k] > q[i, best[i]]:
                best[i] = k
    return best


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"activation": "relu", "row_normalise": False, "head": "random"},
        {"norm": "sym", "n_layers": 3, "view_loss": "nodes", "kl": "sum", "bce": "positive"},
        {"norm": "none", "add_mean": True, "kl": "literal", "members": "argmax", "bias": False},
        {"alpha": 0.3, "beta": 0.7, "tau": 0.01, "n_layers": 1},
    ],
)
def test_ecnmf_loss_equals_the_formula(graph_data, keywords, sparse):
    adjacency, x = graph_data
    x = x * (np.random.default_rng(0).random(x.shape) < 0.4).astype(np.float32)
    model = ecnmf(adjacency, sp.csr_array(x) if sparse else x, **keywords)
    model.begin()

    a = dense_adjacency(adjacency) + torch.eye(N, dtype=torch.float64)
    d = a.sum(1)
    abar = {"rw": a / d[:, None], "sym": a / (d[:, None] * d).sqrt(), "none": a}[
        keywords.get("norm", "rw")
    ]
    x64 = torch.from_numpy(x).double()
    mean = x64.mean(0)
    u, s, v = torch.linalg.svd(x64 - mean, full_matrices=False)
    x_r = u[:, :4] * s[:4] @ v[:4]
    if keywords.get("add_mean"):
        x_r = x_r + mean
    dense = dense_ecnmf(model, abar, x64, x_r)
    q, p = dense["q"], dense["p"].detach()

    view = dense["view"].mean()
    if keywords.get("view_loss") == "nodes":
        view = dense["view"].sum(1).mean()
    floor = np.log(1e-8)
    ratio = p.clamp_min(1e-8).log() - q.log().clamp_min(floor)
    kl = {"batchmean": (p * ratio).sum() / N, "sum": (p * ratio).sum(), "literal": ratio.mean()}[
        keywords.get("kl", "batchmean")
    ]
    n_top = max(1, round(keywords.get("tau", 0.5) * N / K))
    pseudo = dense_pseudo_labels(q.detach(), n_top, keywords.get("members") == "argmax")
    nodes, labels = torch.tensor(list(pseudo)), torch.tensor(list(pseudo.values()))
    chosen = q[nodes].clamp(1e-8, 1 - 1e-7)
    one_hot = torch.nn.functional.one_hot(labels, K).double()
    bce = -(one_hot * chosen.log() + (1 - one_hot) * (1 - chosen).log()).mean()
    if keywords.get("bce") == "positive":
        bce = -chosen[torch.arange(len(labels)), labels].log().mean()
    expected = keywords.get("alpha", 1.0) * view + keywords.get("beta", 1.0) * kl + bce

    got = model.loss()
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    have = torch.autograd.grad(got, parameters)
    want = torch.autograd.grad(expected, parameters)
    scale = max(float(w.abs().max()) for w in want)
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h, w.to(h), rtol=5e-3, atol=2e-4 * scale)
    assert not keywords.get("bias", True) or len(parameters) == len(list(model.parameters()))


def test_propagation_is_chosen_by_the_evenness_of_clusters(degrees_only):
    """Where attributes only say the degree, dividing by it leaves little to cluster."""
    adjacency, one_hot = degrees_only
    for features in (one_hot, sp.csr_array(one_hot)):
        assert choose_propagation(as_tensor(features), adjacency, 4) == "none"
        assert choose_propagation(as_tensor(features), adjacency, 1) == "rw"

    blocks = make_attributed_sbm(150, 600, 300, 4, homophily=0.9, feature_noise=0.3)
    x = as_tensor(np.asarray(blocks.features))  # more columns than are looked at
    assert choose_propagation(x, blocks.adjacency, 4) == "rw"


@pytest.mark.parametrize("norm", ["rw", "sym", "none"])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("row_normalise", [True, False])
def test_joined_layers_and_the_loss_in_place_are_exact(
    graph_data, norm, n_layers, activation, row_normalise
):
    """In float64 the rewritten network agrees with the plain one far below float32 rounding."""
    adjacency, x = graph_data
    x64 = torch.from_numpy(x).double()
    low_rank = ops.low_rank(x64, 4, add_mean=True, seed=0)
    settings: dict[str, Any] = {"alpha": 0.7, "beta": 1.0, "activation": activation}
    settings |= {"row_normalise": row_normalise, "n_layers": n_layers}
    graph = Graph(adjacency, norm=norm)
    model = ECNMFModel(x64, low_rank, graph, n_clusters=K, width=6, **settings).double()
    for b in model.b:
        b.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    joined = [type(view).__name__ == "LinearView" for view in model.inputs]
    assert joined == [activation == "identity" and n_layers > 1] * 2

    a = dense_adjacency(adjacency) + torch.eye(N, dtype=torch.float64)
    d = a.sum(1)
    abar = {"rw": a / d[:, None], "sym": a / (d[:, None] * d).sqrt(), "none": a}[norm]
    for _ in range(2):  # the second time in memory that is already there
        dense = dense_ecnmf(model, abar, x64, low_rank.to_dense())
        got = model.loss()
        nodes, labels = model.pseudo
        one_hot = torch.nn.functional.one_hot(labels, K).double()
        chosen = dense["q"][nodes].clamp(1e-8, 1 - 1e-7)
        expected = (
            0.7 * dense["view"].mean()
            + (dense["p"].detach() * (dense["p"].detach().log() - dense["q"].log())).sum() / N
            + torch.nn.functional.binary_cross_entropy(chosen, one_hot)
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)
        parameters = list(model.parameters())
        want = torch.autograd.grad(expected, parameters)
        have = torch.autograd.grad(got, parameters)
        for h, w in zip(have, want, strict=True):
            torch.testing.assert_close(h, w, rtol=1e-8, atol=1e-12)


def test_a_loss_whose_memory_was_taken_again_refuses_its_gradient(graph_data):
    model = ecnmf(*graph_data)
    first = model.loss()
    model.loss()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_target_distribution_sharpens_and_survives_an_empty_cluster():
    q = torch.tensor([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    p = target_distribution(q)
    f = q.sum(0)
    for i in range(3):
        row = [float(q[i, j] ** 2 / f[j]) if f[j] > 0 else 0.0 for j in range(3)]
        np.testing.assert_allclose(p[i].numpy(), np.array(row) / sum(row), rtol=1e-5)
    assert torch.isfinite(p).all()


def test_head_from_kmeans_assigns_to_the_nearest_centre(graph_data):
    model = ecnmf(*graph_data, head="kmeans")
    model.begin()
    with torch.no_grad():
        z = model.head_input(*model.views())
        result = ops.kmeans(z, K, n_init=3, seed=derive_seed(1, 1))
        g = N / float(result.inertia)
        expected = torch.softmax(-g * torch.cdist(z, result.centers) ** 2, 1)
        torch.testing.assert_close(model.assignment(z).exp(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(model.assign(0)[0], result.labels)


def test_consensus_in_leading_directions_assigns_to_the_nearest_centre_in_z():
    """What lies outside of the span of the directions moves no node to another centre."""
    blocks = make_attributed_sbm(300, 2000, 24, 3, homophily=0.9, feature_noise=0.1)
    model = HSANModel(
        as_tensor(np.asarray(blocks.features)),
        Graph(blocks.adjacency, norm="none", self_loops=False),
        n_clusters=3,
        width=32,
        n_init=2,
    )
    labels, z = model.assign(0)
    assert clustering_scores(blocks.labels, labels.numpy())["acc"] > 0.8
    assert torch.equal(model.predict()[0], labels)
    torch.testing.assert_close(torch.cdist(z, model.centers).argmin(1), labels)
    again, _ = model.assign(7)  # other starts
    assert clustering_scores(labels.numpy(), again.numpy())["ari"] > 0.9


def test_spectral_head_finds_planted_clusters_whatever_the_other_directions_hold():
    """The leading singular vectors are what is clustered; the head assigns to the means in Z."""
    blocks = make_attributed_sbm(400, 3000, 40, 4, homophily=0.9, feature_noise=0.5)
    x = as_tensor(np.asarray(blocks.features))
    model = ECNMFModel(
        x,
        ops.low_rank(x, 8),
        Graph(blocks.adjacency, norm="rw"),
        n_clusters=4,
        width=64,
        n_init=2,
    )
    model.begin()
    labels, z = model.assign(0)
    assert clustering_scores(blocks.labels, labels.numpy())["acc"] > 0.95
    with torch.no_grad():
        means = torch.stack([z[labels == k].mean(0) for k in range(4)])
    nearest = torch.cdist(z, means).argmin(1)
    assert (nearest == labels).float().mean() > 0.98


@pytest.mark.parametrize("width", [200, 300, 400])
def test_head_is_the_same_for_any_number_of_threads(width):
    """Above 32768 elements torch's sum over all of them depends on the number of threads."""
    rng = np.random.default_rng(width)
    x = as_tensor(rng.normal(size=(500, 30)).astype(np.float32))
    upper = np.triu(rng.random((500, 500)) < 0.02, 1)
    graph = Graph(sp.csr_array((upper | upper.T).astype(np.float32)), norm="rw")
    heads, before = set(), torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 4, 8):
            torch.set_num_threads(n_threads)
            model = ECNMFModel(x, ops.low_rank(x, 8), graph, n_clusters=4, width=width, n_init=1)
            model.begin()
            heads.add(model.head_w.detach().numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(heads) == 1


def test_pseudo_labels_and_target_follow_their_periods(graph_data):
    model = ecnmf(*graph_data, update_every=4, target_every=3, pseudo_start=2)
    model.begin()
    pseudo, targets = [], []
    for epoch in range(9):
        before = model.pseudo, model.target
        model.loss()
        if model.pseudo is not before[0]:
            pseudo.append(epoch)
        if model.target is not before[1]:
            targets.append(epoch)
        model.after_step(epoch)
    assert pseudo == [2, 4, 8]
    assert targets == [0, 3, 6]


def test_ecnmf_extra_state_round_trip(graph_data):
    model, other = ecnmf(*graph_data, update_every=5), ecnmf(*graph_data, update_every=5)
    model.begin()
    model.loss()
    model.after_step(0)
    other.load_state_dict(model.state_dict())
    other.load_extra_state(model.extra_state())
    assert torch.equal(model.loss(), other.loss())


def test_bf16_stays_close_to_fp32(graph_data):
    full, half = ecnmf(*graph_data), ecnmf(*graph_data, precision="bf16")
    full.begin()
    half.load_state_dict(full.state_dict())
    torch.testing.assert_close(full.loss(), half.loss(), rtol=0.05, atol=0.01)
    half.loss().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())
