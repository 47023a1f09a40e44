"""Whole training epochs: fastclust's models against the same networks in plain eager torch.

- ECN-MF on AMAC: two residual graph convolutions on X and on X_r. The peer multiplies the dense X
  and the dense X_r by the weights, and propagates through a torch sparse CSR matrix.
- HSAN on CORA: the peer holds the 2N x 2N similarities and weights as dense matrices.

Both sides run the same steps: loss, gradients, Adam; epochs of the peer are timed between those of
fastclust. ``pytest benchmarks/test_train.py`` prints ours; ``extra_info`` of the saved result (with
``--benchmark-json``) holds the peer's median, the ratio, the time of 1000 epochs extrapolated from
the median, and the time that the products alone would take at the fused multiply-add rate measured
in the same run. Threads: ``OMP_NUM_THREADS``. Needs FASTCLUST_DATA.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastclust import _C, ops
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


def ecnmf_inputs(dataset: Dataset, width: int, device: str) -> tuple[ECNMFModel, Tensor, Tensor]:
    """A model with its head set from k-means, X and the dense X_r."""
    dense = dataset.features.toarray() if sp.issparse(dataset.features) else dataset.features
    x = torch.from_numpy(np.asarray(dense, dtype=np.float32)).to(device)
    x_r = ops.low_rank(x, min(RANK, x.shape[1] // 2), seed=0)
    model = ECNMFModel(
        x,
        x_r,
        Graph(dataset.adjacency, norm="rw").to(device),
        n_clusters=int(dataset.n_clusters or 0),
        width=width,
        update_every=10**6,
    )
    model.begin()
    return model, x, x_r.to_dense()


def ecnmf_ours(dataset: Dataset, device: str = "cpu", width: int = WIDTH) -> Callable[[], float]:
    model, _, _ = ecnmf_inputs(dataset, width, device)
    epochs = iter(range(10**9))

    def loss() -> Tensor:
        model.after_step(next(epochs))
        return model.loss()

    return epoch_of(list(model.parameters()), loss)


def ecnmf_eager(dataset: Dataset, device: str = "cpu", width: int = WIDTH) -> Callable[[], float]:
    model, *views = ecnmf_inputs(dataset, width, device)
    abar = csr(dataset, "rw", device)
    transposed = abar.to_sparse_coo().t().to_sparse_csr()
    layers = list(zip(model.w, model.b, strict=True))  # view 1: layers 1, 2; view 2: layers 1, 2

    def loss() -> Tensor:
        encoded = []
        for view, (first, second) in zip(views, (layers[:2], layers[2:]), strict=True):
            z = SparseProduct.apply(abar, transposed, view @ first[0]) + first[1]
            h = torch.addmm(second[1], z, second[0])
            encoded.append(SparseProduct.apply(abar, transposed, h) + z)
        mean = nn.functional.normalize((encoded[0] + encoded[1]) / 2, dim=1)
        log_q = torch.log_softmax(torch.addmm(model.head_b, mean, model.head_w), dim=1)
        q = log_q.exp()
        p = target_distribution(q)
        divergence = (p * (p.clamp_min(1e-8).log() - log_q)).sum() / len(p)
        if model.pseudo is None:
            model.pseudo = model._pseudo_labels(q.detach())
        nodes, labels = model.pseudo
        one_hot = nn.functional.one_hot(labels, model.n_clusters).float()
        entropy = nn.functional.binary_cross_entropy(q[nodes].clamp(1e-8, 1 - 1e-7), one_hot)
        return nn.functional.mse_loss(*encoded) + divergence + entropy

    return epoch_of(list(model.parameters()), loss)


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


def run_against(
    benchmark: Any, ours: Callable[[], float], eager: Callable[[], float], rounds: int, every: int
) -> dict[str, float]:
    """Time `rounds` epochs of ours, and one of the peer before every `every`-th of them."""
    for _ in range(2):
        ours(), eager()
    peer: list[float] = []
    count = iter(range(10**9))

    def between() -> None:
        if next(count) % every == 0:
            start = time.perf_counter()
            eager()
            peer.append(time.perf_counter() - start)

    value = benchmark.pedantic(ours, setup=between, rounds=rounds)
    assert np.isfinite(value)
    threads = torch.get_num_threads()
    info = {
        "threads": threads,
        "epochs_timed": rounds,
        "eager_median_s": statistics.median(peer),
        "times_eager": statistics.median(peer) / benchmark.stats.stats.median,
        "1000_epochs_extrapolated_s": 1000 * benchmark.stats.stats.median,
        "fma_peak_gflops": threads * _C.fma_peak_gflops(),
    }
    benchmark.extra_info |= info
    print({key: round(value, 3) for key, value in info.items()})
    return info


@pytest.mark.benchmark(group="ECN-MF epoch, AMAC")
@pytest.mark.slow
def test_ecnmf_epoch(benchmark: Any) -> None:
    dataset = data("amac")
    n, n_features = dataset.n_nodes, dataset.n_features
    info = run_against(benchmark, ecnmf_ours(dataset), ecnmf_eager(dataset), 50, 10)
    # Forward and weight gradients of layer 1 of both views, all three products of layer 2.
    layers = 4 * n * (n_features + RANK) * WIDTH + 2 * 6 * n * WIDTH**2
    # What is left of them: both layers of a view as one product with a constant.
    joined = 4 * n * 2 * (n_features + 1 + RANK + 1) * WIDTH + 6 * (n_features + RANK) * WIDTH**2
    for name, flop in (("layer_by_layer", layers), ("joined", joined)):
        benchmark.extra_info[f"gflop_{name}"] = flop / 1e9
        benchmark.extra_info[f"floor_{name}_s"] = flop / 1e9 / info["fma_peak_gflops"]


@pytest.mark.benchmark(group="HSAN epoch, CORA")
@pytest.mark.slow
def test_hsan_epoch(benchmark: Any) -> None:
    dataset = data("cora")
    run_against(benchmark, hsan_ours(dataset), hsan_eager(dataset), 10, 3)


def test_both_sides_of_ecnmf_are_the_same_network() -> None:
    dataset = load_dataset("digits")
    ours, eager = ecnmf_ours(dataset, width=32), ecnmf_eager(dataset, width=32)
    expected = [eager(), eager(), eager()]
    assert [ours(), ours(), ours()] == pytest.approx(expected, rel=1e-5)


def test_both_sides_of_hsan_are_the_same_loss() -> None:
    dataset = load_dataset("digits")
    ours, eager = hsan_ours(dataset, 32), hsan_eager(dataset, 32)
    assert [ours(), ours()] == pytest.approx([eager(), eager()], rel=1e-4)
