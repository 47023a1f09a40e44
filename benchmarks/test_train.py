"""Whole training epochs: fastclust's models against the same networks in plain eager torch.

- ECN-MF on AMAC: two residual graph convolutions on X and on X_r. The peer multiplies the dense X
  and the dense X_r by the weights, and propagates through a torch sparse CSR matrix.
- HSAN on CORA: the peer holds the 2N x 2N similarities and weights as dense matrices.

Both sides run the same steps: loss, gradients, Adam. Run with ``pytest benchmarks/test_train.py``;
pytest-benchmark prints the two sides of a group under each other. Needs FASTCLUST_DATA.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastclust import ops
from fastclust.datasets import Dataset, load_dataset
from fastclust.graph import Graph
from fastclust.models.ecnmf import ECNMFModel, target_distribution
from fastclust.models.hsan import HSANModel, filtered_attributes

WIDTH, RANK = 600, 70


def data(name: str) -> Dataset:
    if not os.environ.get("FASTCLUST_DATA"):
        pytest.skip("FASTCLUST_DATA is not set: it must name the folder of benchmark graphs")
    return load_dataset(name)


def epoch_of(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], float]:
    """One full-batch step; returns the loss so that it cannot be skipped."""
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def epoch() -> float:
        adam.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        adam.step()
        return float(value.detach())

    return epoch


def csr(dataset: Dataset, norm: str, device: str) -> Tensor:
    """D^-1 (A + I), or A, as a torch sparse CSR matrix [N, N]."""
    n = dataset.n_nodes
    dense_index = dataset.adjacency.tocoo()
    rows, cols = dense_index.row, dense_index.col
    values = np.ones(rows.size, np.float32)
    if norm == "rw":
        rows, cols = np.r_[rows, np.arange(n)], np.r_[cols, np.arange(n)]
        values = (1.0 / np.bincount(rows, minlength=n)[rows]).astype(np.float32)
    index = torch.from_numpy(np.stack([rows, cols]).astype(np.int64))
    matrix = torch.sparse_coo_tensor(index, torch.from_numpy(values), (n, n))
    return matrix.to(device).to_sparse_csr()


class SparseProduct(torch.autograd.Function):
    """A z with the transpose of A at hand, which torch's own backward would build every time."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, a_transposed: Tensor, z: Tensor) -> Tensor:
        ctx.a_transposed = a_transposed
        return a @ z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.a_transposed @ gradients[0]


def ecnmf_ours(dataset: Dataset, device: str = "cpu") -> Callable[[], float]:
    x = torch.from_numpy(np.asarray(dataset.features.todense(), dtype=np.float32)).to(device)
    model = ECNMFModel(
        x,
        ops.low_rank(x, RANK, seed=0),
        Graph(dataset.adjacency, norm="rw").to(device),
        n_clusters=int(dataset.n_clusters or 0),
        width=WIDTH,
        update_every=10**6,
    )
    model.begin()
    epochs = iter(range(10**9))

    def loss() -> Tensor:
        model.after_step(next(epochs))
        return model.loss()

    return epoch_of([p for p in model.parameters() if p.requires_grad], loss)


def ecnmf_eager(dataset: Dataset, device: str = "cpu") -> Callable[[], float]:
    x = torch.from_numpy(np.asarray(dataset.features.todense(), dtype=np.float32)).to(device)
    views = [x, ops.low_rank(x, RANK, seed=0).to_dense()]
    abar = csr(dataset, "rw", device)
    transposed = abar.to_sparse_coo().t().to_sparse_csr()
    k = int(dataset.n_clusters or 0)
    torch.manual_seed(0)
    layers = [[nn.Linear(x.shape[1], WIDTH), nn.Linear(WIDTH, WIDTH)] for _ in views]
    head = nn.Linear(WIDTH, k).to(device)
    for layer in [layer for pair in layers for layer in pair]:
        layer.to(device)
    pseudo = torch.arange(0, dataset.n_nodes, 2, device=device)
    one_hot = nn.functional.one_hot(torch.arange(len(pseudo), device=device) % k, k).float()

    def loss() -> Tensor:
        encoded = []
        for view, (first, second) in zip(views, layers, strict=True):
            z = SparseProduct.apply(abar, transposed, first(view))
            encoded.append(SparseProduct.apply(abar, transposed, second(z)) + z)
        mean = nn.functional.normalize((encoded[0] + encoded[1]) / 2, dim=1)
        log_q = torch.log_softmax(head(mean), dim=1)
        q = log_q.exp()
        p = target_distribution(q)
        divergence = (p * (p.clamp_min(1e-8).log() - log_q)).sum() / len(p)
        entropy = nn.functional.binary_cross_entropy(q[pseudo].clamp(1e-8, 1 - 1e-7), one_hot)
        return nn.functional.mse_loss(*encoded) + divergence + entropy

    parameters = [p for pair in layers for layer in pair for p in layer.parameters()]
    return epoch_of([*parameters, *head.parameters()], loss)


def hsan_inputs(dataset: Dataset, width: int, device: str) -> tuple[HSANModel, Tensor, Tensor]:
    """A model with weights, and the labels and confident nodes that they come from."""
    n_input = 500 if dataset.n_features > 500 else None
    x = filtered_attributes(
        dataset.features, dataset.adjacency, filter_steps=2, n_input=n_input, device=device
    )
    graph = Graph(dataset.adjacency, norm="none", self_loops=False).to(device)
    model = HSANModel(x, graph, n_clusters=int(dataset.n_clusters or 0), width=width)
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, model.n_clusters, dataset.n_nodes)).to(device)
    confident = torch.from_numpy(rng.random(dataset.n_nodes) < 0.9).to(device)
    with torch.no_grad():
        model.weights = ops.hardness(
            model.attribute_views(),
            model.structure_views(),
            model.alpha,
            labels,
            confident,
            1.0,
        )
    return model, labels, confident


def hsan_ours(dataset: Dataset, width: int = 1500, device: str = "cpu") -> Callable[[], float]:
    model, _, _ = hsan_inputs(dataset, width, device)
    return epoch_of(list(model.parameters()), model.loss)


def hsan_eager(dataset: Dataset, width: int = 1500, device: str = "cpu") -> Callable[[], float]:
    model, _, _ = hsan_inputs(dataset, width, device)
    assert model.weights is not None
    weights = ops.dense_weights(model.weights)  # [2N, 2N]
    adjacency = csr(dataset, "none", device)
    n = dataset.n_nodes
    other = torch.arange(2 * n, device=device).roll(n)
    diagonal = torch.eye(2 * n, dtype=torch.bool, device=device)

    def loss() -> Tensor:
        z = model.attribute_views()
        structure = [
            nn.functional.normalize(SparseProduct.apply(adjacency, adjacency, v) + c, dim=1)
            for v, c in zip(model.v, model.c, strict=True)
        ]
        e = torch.cat(structure)
        s = weights * (model.alpha * (z @ z.T) + (1 - model.alpha) * (e @ e.T))
        positive = s.gather(1, other[:, None])[:, 0]
        return (torch.logsumexp(s.masked_fill(diagonal, -torch.inf), dim=1) - positive).mean()

    return epoch_of(list(model.parameters()), loss)


@pytest.mark.benchmark(group="ECN-MF epoch, AMAC", min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("side", [ecnmf_ours, ecnmf_eager])
@pytest.mark.slow
def test_ecnmf_epoch(benchmark: Any, side: Callable[[Dataset], Callable[[], float]]) -> None:
    assert np.isfinite(benchmark(side(data("amac"))))


@pytest.mark.benchmark(group="HSAN epoch, CORA", min_rounds=3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("side", [hsan_ours, hsan_eager])
@pytest.mark.slow
def test_hsan_epoch(benchmark: Any, side: Callable[[Dataset], Callable[[], float]]) -> None:
    assert np.isfinite(benchmark(side(data("cora"))))


def test_both_sides_of_hsan_are_the_same_loss() -> None:
    dataset = load_dataset("digits")
    ours, eager = hsan_ours(dataset, 32), hsan_eager(dataset, 32)
    assert [ours(), ours()] == pytest.approx([eager(), eager()], rel=1e-4)
