"""Trainings on a CUDA device that is made of CPU memory: the Python path of a GPU, without one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pretended_cuda as pretended
import pytest
import scipy.sparse as sp
import torch
from pretended_cuda import OnCuda, capturing, pretended_cuda

import fastclust as fc
from fastclust import cli, nn, ops, train
from fastclust.models.consensus import cluster_means
from fastclust.models.ecnmf import ECNMFModel
from fastclust.models.hsan import HSANModel
from fastclust.models.inputs import as_tensor
from fastclust.models.minibatch import SampledECNMF, SampledHSAN

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")

SMALL = ("--set", "width=16", "--set", "n_init=2")
HSAN = ("--model", "hsan", *SMALL, "--epochs")
ECNMF = ("--model", "ecnmf", *SMALL, "--set", "rank=4", "--epochs")
RUNS = {
    "ecnmf": (*ECNMF, "4"),
    "ecnmf-bf16": (*ECNMF, "4", "--set", "precision=bf16"),
    "ecnmf-batches": (*ECNMF, "2", "--set", "train_batch_size=64"),
    "hsan": (*HSAN, "12"),
    "hsan-paper-code": (*HSAN, "12", "--protocol", "paper-code"),
    "hsan-batches": (*HSAN, "2", "--set", "batch_size=64"),
    "ssgc": ("--model", "ssgc"),
    "ssgc-cut": ("--model", "ssgc", "--set", "back_end=auto"),
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three planted blocks with sparse binary attributes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    upper = np.triu(rng.random((120, 120)) < np.where(labels[:, None] == labels, 0.3, 0.02), 1)
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    likely = rng.random((3, 30)) ** 3
    x = sp.csr_array((rng.random((120, 30)) < likely[labels]).astype(np.float32))
    path = tmp_path_factory.mktemp("data") / "blocks.npz"
    np.savez(
        path, adj_indptr=adjacency.indptr, adj_indices=adjacency.indices, x_indptr=x.indptr,
        x_indices=x.indices, x_data=x.data, shape_x=np.array(x.shape), labels=labels,
    )  # fmt: skip
    return path


def test_the_device_keeps_to_itself() -> None:
    with pretended_cuda():
        x = torch.ones(3).cuda()
        assert isinstance(x, OnCuda) and x.is_cuda and x.device == torch.device("cuda", 0)
        assert isinstance(x + 1, OnCuda) and isinstance(torch.zeros(2, device="cuda"), OnCuda)
        assert not isinstance(x.cpu(), OnCuda) and (x * torch.tensor(2.0)).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match=r"add on cuda:0 got a tensor \[3\] on the CPU"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match=r"matmul on cuda:0 got a tensor \[2, 2\]"):
            torch.ops.fastclust.matmul(torch.ones(2, 2).cuda(), torch.ones(2, 2), None)
        with pytest.raises(TypeError, match=r"\.cpu\(\) comes first"):
            x.numpy()
        for sums in (
            lambda: x.cumsum(0),
            lambda: x.index_add(0, torch.tensor([0, 1, 0]).cuda(), x),
        ):
            with pytest.raises(RuntimeError, match="adds in no fixed order"):
                sums()
        leaf = torch.ones(3, device="cuda", requires_grad=True)
        (leaf * x).sum().backward()
        assert isinstance(leaf.grad, OnCuda)
    assert not torch.cuda.is_available()


def test_a_capture_waits_for_nothing() -> None:
    with pretended_cuda():
        x, mask = torch.ones(3).cuda(), torch.tensor([True, False, True]).cuda()
        with capturing():
            x[:2] = 0.0
            assert isinstance(torch.where(mask, x, 0.0).sum(), OnCuda)
            for waits in (
                lambda: bool(mask.any()),
                lambda: x[mask],
                lambda: x.cpu(),
                lambda: torch.ones(3).cuda(),
                lambda: x.copy_(torch.ones(3)),
                lambda: x.__setitem__(0, 1.0),  # torch copies the number
            ):
                with pytest.raises(RuntimeError, match="cuda:0, which is capturing"):
                    waits()


@pytest.mark.parametrize("batch_size", [None, 12, 50, 64, 73])  # 73: a short last batch
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_a_capture_of_batched_svd(batch_size: int | None, layout: str) -> None:
    x = torch.randn(150, 21, generator=torch.Generator().manual_seed(0)).relu()
    x = x if layout == "dense" else as_tensor(sp.csr_array(x.numpy()))
    with pretended_cuda():
        on_device = x.cuda()
        with capturing():
            svd = ops.batched_svd(on_device, 6, batch_size=batch_size)
        assert isinstance(svd.u, OnCuda)


@pytest.mark.parametrize("model", ["ecnmf", "ecnmf-relu", "ecnmf-low-rank", "hsan", "hsan-stale"])
def test_a_capture_of_an_epoch(two_blocks, model: str) -> None:
    """Between refreshes: the loss and its gradients."""
    adjacency, features, _ = two_blocks
    with pretended_cuda():
        x = torch.from_numpy(features).cuda()
        sizes = {"n_clusters": 2, "width": 4}
        if model.startswith("hsan"):
            graph = fc.Graph(adjacency, norm="none", self_loops=False).to("cuda")
            trained = HSANModel(x, graph, stale_weights=model == "hsan-stale", **sizes)
        else:
            view = ops.low_rank(x, 3) if model == "ecnmf-low-rank" else None
            activation = "relu" if model == "ecnmf-relu" else "identity"
            graph = fc.Graph(adjacency).to("cuda")
            trained = ECNMFModel(x, view, graph, activation=activation, **sizes)
        trained.begin()
        trained.loss()
        trained.after_step(0)
        with capturing():
            trained.loss().backward()
        assert all(p.grad is not None for p in trained.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_does_not_reach_matmul(bias: bool) -> None:
    """Forward and backward, where the backward pass runs under autocast as well."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for enabled in (False, True):
        with pretended_cuda(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            a, b = (t.cuda().requires_grad_() for t in (x, x.t()))
            out = ops.matmul(a, b, bias=b.detach()[0] if bias else None)
            out.square().sum().backward()
            assert isinstance(out, OnCuda)
            found.append([t.detach().cpu() for t in (out, a.grad, b.grad)])
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype == torch.float32 and torch.equal(got, want)


def test_weights_of_the_loss_go_where_the_module_goes() -> None:
    views = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    loss = nn.HardSampleInfoNCE(3)
    loss.refresh(*views)
    want, state = float(loss(*views).detach()), loss.state_dict()
    with pretended_cuda():
        for module in (loss, nn.HardSampleInfoNCE(3)):
            module.cuda()
            module.load_state_dict(state)
            assert isinstance(module.weights.z[0], OnCuda)
            assert isinstance(module.weights.labels, OnCuda)
            assert float(module(*(v.cuda() for v in views)).detach()) == want


def test_cluster_means_in_blocks(monkeypatch) -> None:
    g = torch.Generator().manual_seed(0)
    z, labels = torch.randn(100, 5, generator=g), torch.randint(0, 3, (100,), generator=g)
    want = cluster_means(z, labels, 4)  # one cluster is empty
    monkeypatch.setattr("fastclust.models.consensus._MEAN_ROWS", 30)
    with pretended_cuda():
        got = cluster_means(z.cuda(), labels.cuda(), 4)
        assert isinstance(got, OnCuda)
    torch.testing.assert_close(got.inner, want)


@pytest.mark.parametrize("rank", [0.5, "gavish-donoho"])
def test_an_adaptive_rank_on_the_device(rank: float | str) -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    with pretended_cuda():
        assert ops.low_rank(x.cuda(), rank).rank == ops.low_rank(x, rank).rank


@pytest.mark.parametrize("run", list(RUNS))
def test_a_training_ends_as_on_the_cpu(graph, tmp_path, run: str) -> None:
    command = ["--dataset", str(graph), "--seeds", "0", "--quiet", *RUNS[run]]
    assert train.main([*command, "--device", "cpu", "--out", str(tmp_path / "cpu")]) == 0
    with pretended_cuda():
        assert train.main([*command, "--device", "cuda", "--out", str(tmp_path / "cuda")]) == 0
    cpu, cuda = (json.loads((tmp_path / d / "result.json").read_text()) for d in ("cpu", "cuda"))
    assert cuda["mean"]["acc"] == pytest.approx(cpu["mean"]["acc"], abs=0.02)


@pytest.mark.parametrize("model", [SampledHSAN, SampledECNMF])
def test_edges_do_not_travel_in_a_step(two_blocks, monkeypatch, model: type) -> None:
    adjacency, features, _ = two_blocks
    moved = []
    move = pretended.move
    monkeypatch.setattr(pretended, "move", lambda x: moved.append(x.numel()) or move(x))
    with pretended_cuda():
        graph, x = fc.Graph(adjacency).to("cuda"), torch.from_numpy(features).cuda()
        views = (x,) if model is SampledHSAN else (x, ops.low_rank(x, 3))
        options = {} if model is SampledHSAN else {"activation": "relu"}
        trained = model(*views, graph, n_clusters=2, width=4, batch_size=15, **options)
        trained.begin()
        moved.clear()
        trained.loss().backward()
    assert moved and graph.n_edges not in moved


@pytest.mark.parametrize("run", ["ecnmf", "hsan", "hsan-paper-code"])
def test_a_training_resumes(graph, tmp_path, monkeypatch, run: str) -> None:
    """What a checkpoint of the GPU holds comes back onto it."""
    model = ECNMFModel if run == "ecnmf" else HSANModel
    after_step = model.after_step

    def interrupted(self, epoch: int) -> None:
        after_step(self, epoch)
        if epoch == 2:
            signal.raise_signal(signal.SIGINT)

    command = ["--dataset", str(graph), "--seeds", "0", "--quiet", *RUNS[run], "--device", "cuda"]
    scores = []
    with pretended_cuda():
        assert train.main([*command, "--out", str(tmp_path / "whole")]) == 0
        monkeypatch.setattr(model, "after_step", interrupted)
        with pytest.raises(cli.Interrupted, match="checkpoint"):
            train.main([*command, "--out", str(tmp_path / "parts")])
        monkeypatch.undo()
        assert train.main([*command, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    for folder in ("whole", "parts"):
        scores.append(json.loads((tmp_path / folder / "result.json").read_text())["mean"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("model", [fc.HSAN, fc.ECNMF, fc.SSGC])
def test_an_estimator_is_saved_and_predicts(graph, tmp_path, model: type) -> None:
    data = fc.load_dataset(graph)
    epochs = {} if model is fc.SSGC else {"epochs": 3}
    with pretended_cuda():
        estimator = model(3, device="cuda", **epochs).fit(data.features, adjacency=data.adjacency)
        assert isinstance(estimator.labels_, np.ndarray)
        estimator.save(tmp_path)
        again = model.load(tmp_path)
        np.testing.assert_array_equal(
            again.predict(data.features, adjacency=data.adjacency),
            estimator.predict(data.features, adjacency=data.adjacency),
        )
        assert again.transform(data.features, adjacency=data.adjacency).shape[0] == 120
