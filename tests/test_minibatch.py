"""Batches of nodes: the exact method at full size, unbiased sums, the same numbers after a stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastclust as fc
from fastclust import ops
from fastclust.metrics import clustering_scores
from fastclust.models import inputs
from fastclust.models.ecnmf import EPSILON, target_distribution
from fastclust.models.inputs import sampled_kmeans
from fastclust.models.minibatch import (
    Batches,
    SampledECNMF,
    SampledHSAN,
    partition,
    sampled_infonce,
)

DS = fc.make_attributed_sbm(600, 3000, 16, 4, homophily=0.9, feature_noise=0.3)
SMALL: dict[str, Any] = {"n_clusters": 4, "epochs": 12, "width": 32, "eval_every": 6}


def fitted(estimator: Any, ds: Any = DS) -> Any:
    return estimator.fit(ds.features, adjacency=ds.adjacency)


def unit(rows: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (fc.HSAN, {"batch_size": 600}),
        (fc.HSAN, {"batch_size": 700, "n_negatives": 600, "batching": "partition"}),
        (fc.ECNMF, {"train_batch_size": 600}),
    ],
)
def test_all_nodes_in_a_batch_is_the_exact_method_to_the_bit(model: Any, sizes: Any) -> None:
    exact, batched = fitted(model(**SMALL)), fitted(model(**SMALL, **sizes))
    assert np.array_equal(exact.labels_, batched.labels_)
    assert np.array_equal(exact.embedding_, batched.embedding_)
    assert [row["loss"] for row in exact.history_] == [row["loss"] for row in batched.history_]


@pytest.mark.parametrize("order", [None, np.random.default_rng(3).permutation(103)])
def test_a_pass_takes_every_node_once(order: Any) -> None:
    batches = Batches(103, 20, seed=1, order=order)
    assert batches.per_pass == 6
    passes = [[batches(step).tolist() for step in range(6 * p, 6 * p + 6)] for p in range(3)]
    for one in passes:
        assert sorted(node for batch in one for node in batch) == list(range(103))
        assert max(map(len, one)) - min(map(len, one)) <= (1 if order is None else 4)
        assert all(batch == sorted(batch) for batch in one)
    assert passes[0] != passes[1]
    assert Batches(103, 20, seed=1, order=order)(7).tolist() == passes[1][1], (
        "the step alone counts"
    )


def test_no_batch_of_parts_is_empty() -> None:
    for n in range(3, 14):
        for batch_size in range(2, n):
            batches = Batches(n, batch_size, seed=n, order=np.arange(n))
            steps = [batches(step) for step in range(20 * batches.per_pass)]
            assert min(map(len, steps)) > 0, (n, batch_size)
            first_pass = torch.cat(steps[: batches.per_pass])
            assert first_pass.sort().values.tolist() == list(range(n))


def test_partition_keeps_edges_inside() -> None:
    graph = fc.Graph(DS.adjacency)
    order = partition(graph, 8, seed=0)
    assert np.array_equal(np.sort(order), np.arange(600))
    assert np.array_equal(order, partition(graph, 8, seed=0))
    part = np.empty(600, int)
    part[order] = np.arange(600) * 8 // 600
    rows = np.repeat(np.arange(600), np.diff(DS.adjacency.indptr))
    inside = (part[rows] == part[DS.adjacency.indices]).mean()
    assert inside > 2 / 8, "a random cut keeps one edge in eight"


def test_partition_of_a_graph_without_edges() -> None:
    graph = fc.Graph(np.zeros((9, 9)))
    assert np.array_equal(np.sort(partition(graph, 20, seed=0)), np.arange(9))


def exact_rows(z: torch.Tensor, e: torch.Tensor, alpha: float) -> torch.Tensor:
    s = alpha * z @ z.T + (1 - alpha) * e @ e.T
    return s.exp().sum(1) - s.diagonal().exp()


def test_row_sums_are_unbiased_and_the_bias_of_the_logarithm_is_as_stated() -> None:
    """z = 4 standard errors for the sums; the stated second-order term within a third."""
    n, m, draws = 60, 10, 4000
    z, e, alpha = unit(2 * n, 5, 0), unit(2 * n, 3, 1), 0.6
    exact = exact_rows(z, e, alpha)[0]
    s = alpha * z @ z.T + (1 - alpha) * e @ e.T
    rng = np.random.default_rng(0)
    own_rows = torch.tensor([0, n])
    logs = []
    for _ in range(draws):
        drawn = torch.from_numpy(rng.choice(n, m, replace=False))
        both = torch.cat([drawn, n + drawn])
        loss = sampled_infonce(
            z[own_rows], e[own_rows], z[both], e[both], torch.tensor(alpha).double(),
            drawn[None, :] == 0, n,
        )  # fmt: skip
        logs.append(float(loss + s[0, n]))  # mean over the two views of log R
    # One view of the pair at a time, so that the logarithm can be undone.
    sums = []
    for _ in range(draws):
        drawn = rng.choice(n, m, replace=False)
        columns = np.setdiff1d(np.concatenate([drawn, n + drawn]), [0, n])
        rest = s[0, torch.from_numpy(columns)].exp().sum() * (2 * n - 2) / columns.size
        sums.append(float(rest + s[0, n].exp()))
    error = np.std(sums) / math.sqrt(draws)
    assert abs(np.mean(sums) - float(exact)) < 4 * error
    pairs = s[[0, n]].exp()  # [2, 2N]
    pairs = (pairs[:, :n] + pairs[:, n:])[:, 1:] / 2  # both views of a node are drawn together
    v = pairs.var(1) / pairs.mean(1) ** 2
    predicted = float((v / (2 * m) * (1 - m / n)).mean())
    measured = float(exact_rows(z, e, alpha)[[0, n]].log().mean()) - np.mean(logs)
    assert measured == pytest.approx(predicted, rel=0.34)


def test_all_columns_sampled_is_the_exact_loss_and_gradient() -> None:
    n = 20
    z, e = unit(2 * n, 5, 0).requires_grad_(), unit(2 * n, 3, 1).requires_grad_()
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(n) % 3
    confident = torch.arange(n) % 4 > 0
    hard = (labels, labels, confident, confident, 2.0)
    weights = ops.hardness(z.detach(), e.detach(), alpha.detach(), labels, confident, 2.0)
    for given, snapshot in ((None, None), (hard, weights)):
        exact = ops.hard_infonce(z, e, alpha, weights=snapshot)
        own = torch.eye(n, dtype=torch.bool)
        loss = sampled_infonce(z, e, z, e, alpha, own, n, given)
        assert loss.item() == pytest.approx(float(exact), abs=1e-12)
        for a, b in zip(
            *(torch.autograd.grad(x, [z, e, alpha]) for x in (loss, exact)), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("structure", [True, False])
@pytest.mark.parametrize("n_negatives", [None, 200])
def test_rows_of_the_views_are_exact_and_the_loss_estimates_that_of_all(
    n_negatives: int | None, structure: bool
) -> None:
    x = torch.from_numpy(DS.features)
    graph = fc.Graph(DS.adjacency, norm="none", self_loops=False)
    model = SampledHSAN(
        x, graph, n_clusters=4, width=16, structure=structure, batch_size=200,
        n_negatives=n_negatives,
    )  # fmt: skip
    nodes = model.batches(0)
    z, e = model._rows(nodes)
    both = torch.cat([nodes, 600 + nodes])
    assert torch.allclose(z, model.attribute_views()[both], atol=1e-6)
    if structure:
        assert e is not None
        assert torch.allclose(e, model.structure_views()[both], atol=1e-6)
    full = float(ops.hard_infonce(model.attribute_views(), model.structure_views(), model.alpha))
    for weights in (False, True):
        if weights:
            model.after_step(0)
            assert model.refreshed is not None and int(model.refreshed[1].sum()) == 540
        losses = []
        for step in range(6):
            model.step = step
            losses.append(float(model.loss().detach()))
        assert weights or np.mean(losses) == pytest.approx(full, abs=0.02)
    model.loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_ecnmf_rows(activation: Any, n_layers: int) -> None:
    """Without ReLU, and in the first layer, rows of a batch are those of the whole."""
    x = torch.from_numpy(DS.features)
    model = SampledECNMF(
        x, ops.low_rank(x, 5), fc.Graph(DS.adjacency), n_clusters=4, width=16, batch_size=200,
        activation=activation, n_layers=n_layers, batching="partition",
    )  # fmt: skip
    model.begin()
    whole = model.views()
    nodes = model._nodes = model.batches(0)
    rows = model.views()
    for part, full in zip(rows, whole, strict=True):
        assert part.shape == (len(nodes), 16)
        if activation == "identity" or n_layers == 1:
            assert torch.allclose(part, full[nodes], atol=1e-5)
    model._nodes = None
    model.loss().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    labels, z = model.assign(0)
    assert labels.shape == (600,) and z.shape == (600, 16)


@pytest.mark.parametrize("kl", ["batchmean", "literal"])
def test_parts_of_ecnmf_are_means_over_the_batch(kl: Any) -> None:
    """Not over all nodes: a small batch would else make light of them beside the pseudo labels."""
    x = torch.from_numpy(DS.features)
    model = SampledECNMF(
        x, ops.low_rank(x, 5), fc.Graph(DS.adjacency), n_clusters=4, width=16, batch_size=200,
        activation="identity", kl=kl,
    )  # fmt: skip
    model.begin()
    for model.epoch in range(3):
        model._nodes = model.batches(model.epoch)
        with torch.no_grad():
            first, second = model.views()
            log_q = model.assignment(model.head_input(first, second))
        p = target_distribution(log_q.exp())
        ratio = p.clamp_min(EPSILON).log() - log_q.clamp_min(math.log(EPSILON))
        model.loss()
        parts = model.diagnostics()
        assert parts["mse"] == pytest.approx(float((first - second).square().mean()), rel=1e-4)
        mean = ratio.mean() if kl == "literal" else (p * ratio).sum(1).mean()
        assert parts["kl"] == pytest.approx(float(mean), rel=1e-3)


@pytest.mark.parametrize(
    "estimator",
    [
        fc.HSAN(4, batch_size=150, batching="partition", width=32, epochs=60, eval_every=60),
        fc.HSAN(4, batch_size=150, n_negatives=100, width=32, epochs=60, eval_every=60),
        fc.ECNMF(4, train_batch_size=150, width=32, epochs=100, eval_every=100, lr=1e-3),
    ],
    ids=["hsan-partition", "hsan-negatives", "ecnmf"],
)
def test_planted_clusters_are_found_and_new_nodes_are_placed(estimator: Any) -> None:
    model = fitted(estimator)
    assert clustering_scores(DS.labels, model.labels_)["nmi"] > 0.8
    again = model.predict(DS.features, adjacency=DS.adjacency)
    assert (again == model.labels_).mean() > 0.99


@pytest.mark.parametrize(
    "estimator",
    [
        fc.HSAN(batch_size=100, n_negatives=80, **SMALL),
        fc.HSAN(batch_size=100, **SMALL),
        fc.ECNMF(train_batch_size=100, **SMALL),
    ],
    ids=["negatives", "batch", "ecnmf"],
)
def test_resumed_is_uninterrupted_to_the_bit(estimator: Any, tmp_path: Path) -> None:
    whole = fitted(estimator)

    def stop(event: Any) -> None:
        if event.epoch == 7:
            raise RuntimeError("stop")

    kept = {"checkpoint_dir": str(tmp_path), "checkpoint_every": 1}
    params = estimator.get_params() | kept
    with pytest.raises(RuntimeError, match="stop"):
        fitted(type(estimator)(**params | {"callbacks": [stop]}))
    resumed = fitted(type(estimator)(**params | {"resume": True}))
    assert np.array_equal(whole.embedding_, resumed.embedding_)
    assert np.array_equal(whole.labels_, resumed.labels_)


def test_stale_weights_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="stale_weights must be False"):
        fitted(fc.HSAN(4, batch_size=100, protocol="paper-code"))


def test_kmeans_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(DS.features)
    exact = ops.kmeans(x, 4, n_init=3, seed=1)
    same = sampled_kmeans(x, 4, n_init=3, seed=1)
    assert torch.equal(exact.labels, same.labels)
    sampled = sampled_kmeans(x, 4, n_init=3, seed=1, rows=200)
    assert sampled.inertia < 1.02 * exact.inertia
    assert len(inputs.sample_rows(10, 20, 0)) == 10
