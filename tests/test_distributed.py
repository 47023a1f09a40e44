"""Several real processes over gloo against one process and the float64 twin."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

import fastclust as fc
from fastclust import Graph, distributed, ops, reference
from fastclust.distributed import launch, sharded
from fastclust.metrics import clustering_scores

SIZES = (1, 2, 3, 4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def views(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(2 * n, d, seed=seed), dim=1)


def own_views(ranks: distributed.ShardedRanks, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([ranks.rows(view) for view in x.chunk(2)])


def random_graph(n: int, norm: str, self_loops: bool) -> Graph:
    a = sp.random_array((n, n), density=min(1.0, 6 / n), rng=np.random.default_rng(n))
    a = a + a.T
    a.setdiag(0)
    a.eliminate_zeros()
    return Graph(a.tocsr(), norm=norm, self_loops=self_loops)


# --- what each process does; runs in all of them at once ------------------------------------------


def check_loss(size: int) -> None:
    """Both variants in float64 against one process, with and without weights of two refreshes."""
    for n in (7, 130, 801):
        z, e, alpha = views(n, 12), views(n, 5, seed=1), torch.tensor(0.7, dtype=torch.float64)
        old_z, old_e = views(n, 12, seed=2), views(n, 5, seed=3)
        labels = torch.arange(n) * 7 % 3
        first, second = torch.arange(n) % 5 != 0, torch.arange(n) % 3 != 1
        held = ops.hardness(old_z, old_e, 0.9, labels, first, 2.0)
        stale = ops.hardness(z, e, 0.6, labels, second, 2.0, previous=held)
        for ring in (False, True):
            ranks = distributed.ShardedRanks(n, ring=ring)
            parts = [own_views(ranks, x) for x in (old_z, old_e, z, e)]
            own = ranks.hardness(*parts[:2], 0.9, labels, first, 2.0)
            own_stale = ranks.hardness(*parts[2:], 0.6, labels, second, 2.0, previous=own)
            for w, want_w in ((None, None), (own, held), (own_stale, stale)):
                if w is not None:
                    whole = ranks.whole_weights(w)
                    torch.testing.assert_close(whole.state_dict(), want_w.state_dict())
                    again = ranks.own_weights(whole)
                    assert all(torch.equal(a, b) for a, b in zip(again.z, w.z, strict=True))
                leaves = [x.clone().requires_grad_() for x in (z, e, alpha)]
                want = ops.hard_infonce(*leaves, weights=want_w)
                want_grads = torch.autograd.grad(3 * want, leaves)
                mine = [x.clone().requires_grad_() for x in (*parts[2:], alpha)]
                ranks.sum_gradients(mine[2:])
                loss = ranks.hard_infonce(*mine, weights=w)
                grads = torch.autograd.grad(3 * loss, mine)
                torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
                for got, expected in zip(grads[:2], want_grads[:2], strict=True):
                    torch.testing.assert_close(
                        got, own_views(ranks, expected), rtol=1e-9, atol=1e-15
                    )
                torch.testing.assert_close(grads[2], want_grads[2], rtol=1e-9, atol=1e-15)
    # without structure, in float32, one gradient only
    n = 401
    z = views(n, 9).float()
    for ring in (False, True):
        ranks = distributed.ShardedRanks(n, ring=ring)
        part = own_views(ranks, z).requires_grad_()
        loss = ranks.hard_infonce(part, None, torch.tensor(1.0))
        twin = z.double().requires_grad_()
        want = reference.hard_infonce(twin, None, 1.0)
        want.backward()
        loss.backward()
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        expected = own_views(ranks, twin.grad).float()
        torch.testing.assert_close(part.grad, expected, rtol=1e-4, atol=1e-8)


def check_propagation(size: int) -> None:
    for n, norm, loops in ((7, "rw", True), (50, "sym", True), (201, "none", False)):
        whole = random_graph(n, norm, loops)
        ranks = distributed.ShardedRanks(n)
        graph = ranks.graph(whole)
        for activation in ("none", "relu"):
            h, residual = normal(n, 6, seed=1), normal(n, 6, seed=2)
            leaves = [x.clone().requires_grad_() for x in (h, residual)]
            want = ops.propagate(whole, leaves[0], residual=leaves[1], activation=activation)
            weight = normal(n, 6, seed=3)
            expected = torch.autograd.grad((want * weight).sum(), leaves)
            mine = [ranks.rows(x).requires_grad_() for x in (h, residual)]
            got = ranks.propagate(graph, mine[0], residual=mine[1], activation=activation)
            grads = torch.autograd.grad((got * ranks.rows(weight)).sum(), mine)
            torch.testing.assert_close(got, ranks.rows(want))
            for g, x in zip(grads, expected, strict=True):
                torch.testing.assert_close(g, ranks.rows(x))


def check_kmeans(size: int) -> None:
    n, k = 203, 5
    x = (
        normal(n, 7, seed=4, dtype=torch.float32)
        + 4 * normal(k, 7, seed=5).float()[torch.arange(n) % k]
    )
    ranks = distributed.ShardedRanks(n)
    for init in (None, "paper-code"):
        want = ops.kmeans(x, k, seed=3, init=init)
        got = ranks.kmeans(ranks.rows(x), k, seed=3, init=init)
        assert torch.equal(ranks.gather(got.labels), want.labels)
        torch.testing.assert_close(got.centers, want.centers)
        assert got.inertia == pytest.approx(want.inertia, rel=1e-6)
        # every rank has the same bits
        assert torch.equal(
            ranks.gather(got.centers[:1].expand(len(ranks.rows(x)), -1)).std(0), torch.zeros(7)
        )
    # empty clusters are mended, from whichever rank holds the farthest point
    for far in (0, n - 1):
        x = torch.zeros(n, 3)
        x[far], x[n // 2] = 9.0, 5.0
        got = ranks.kmeans(ranks.rows(x), 3, seed=0, n_init=2)
        assert got.inertia == 0.0
        assert ranks.gather(got.labels).unique().numel() == 3
    # fewer distinct points than clusters
    got = ranks.kmeans(ranks.rows(torch.ones(n, 3)), 4)
    assert got.inertia == 0.0


def check_exchange(size: int) -> None:
    n = 11
    ranks = distributed.ShardedRanks(n)
    x = normal(n, 3)
    assert torch.equal(ranks.gather(ranks.rows(x)), x)
    assert torch.equal(ranks.gather_views(own_views(ranks, views(n, 2))), views(n, 2))
    summed = ranks.scatter_views(torch.ones(2 * n, 2) * (ranks.rank + 1))
    assert torch.equal(summed, torch.full_like(summed, size * (size + 1) / 2))
    assert ranks.most(ranks.rank, -ranks.rank) == (size - 1, 0)
    assert ranks.from_first(lambda: ranks.rank) == 0
    with pytest.raises(KeyError, match="only here"):
        ranks.from_first(lambda: {}["only here"])
    # bands cover the triangle once
    for n in (7, 800, 20_000):
        shares = distributed.ShardedRanks(n)
        rows = 2 * n
        ends = []
        for r in range(size):
            shares.rank = r
            window = shares.window()
            if window is not None:
                assert window[0] == (ends[-1] if ends else 0) == window[2]
                ends.append(window[1])
        assert ends[-1] == rows


def small_problem() -> tuple[np.ndarray, sp.csr_array]:
    """Attributes [101, 12] and a graph of four noisy communities."""
    rng = np.random.default_rng(0)
    n, k = 101, 4
    group = np.arange(n) % k
    x = rng.normal(size=(k, 12))[group] + 0.7 * rng.normal(size=(n, 12))
    same = group[:, None] == group[None, :]
    a = np.triu(rng.random((n, n)) < np.where(same, 0.2, 0.02), 1)
    return x.astype(np.float32), sp.csr_array((a | a.T).astype(np.float32))


TRAINED = (
    lambda: fc.HSAN(n_clusters=4, epochs=6, width=16, weights="hard", refresh_every=2),
    lambda: fc.HSAN(n_clusters=4, epochs=6, width=16, weights="hard", protocol="paper-code"),
    lambda: fc.ECNMF(n_clusters=4, epochs=6, width=16, rank=3),
    lambda: fc.ECNMF(n_clusters=4, epochs=6, width=16, rank=3, n_layers=3, activation="relu",
                     head="random", kl="literal", bce="positive", selection="loss"),
)  # fmt: skip


def check_training(size: int) -> None:
    """The estimators on all ranks against one process; attributes dense, then sparse."""
    x, a = small_problem()
    for ring in (False, True):
        sharded.GATHER_UP_TO = 0 if ring else 4
        for make in TRAINED:
            for features in (x, sp.csr_array(np.where(np.abs(x) > 2.2, x, 0))):
                launch._active = False
                alone = make().fit(features, adjacency=a)
                launch._active = True
                shared = make().fit(features, adjacency=a)
                losses = [[h["loss"] for h in m.history_] for m in (alone, shared)]
                np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
                np.testing.assert_allclose(shared.embedding_, alone.embedding_, atol=1e-3)
                # clusters may be numbered otherwise: restarts of k-means tie
                assert clustering_scores(alone.labels_, shared.labels_)["ari"] > 0.97
                assert shared.parameters_.keys() == alone.parameters_.keys()
                for name, value in shared.parameters_.items():
                    assert value.shape == alone.parameters_[name].shape
    launch._active = False


CHECKS = (check_exchange, check_loss, check_propagation, check_kmeans, check_training)


def child(rank: int, size: int, port: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    distributed.join("gloo", timedelta(seconds=60))
    group = weakref.ref(dist.distributed_c10d.GroupMember.WORLD)
    try:
        for name in names:
            globals()[name](size)
    finally:
        dist.destroy_process_group()
    assert group() is None, "its threads live on, and may abort the process at its end"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree_with_one_process(size: int) -> None:
    """Loss, gradients, weights, propagation and k-means; processes are started once per size."""
    names = [check.__name__ for check in CHECKS]
    mp.spawn(child, (size, free_port(), names), nprocs=size)


# --- through torchrun -----------------------------------------------------------------------------

# fastclust.train, but rank 1 is killed after some epoch: as by a machine that fails.
DYING = """
import os, signal
from fastclust import cli, train
from fastclust.models.{module} import {model}
after_step = {model}.after_step
def dying(self, epoch):
    if os.environ["RANK"] == "1" and epoch == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    after_step(self, epoch)
{model}.after_step = dying
cli.run(train.main)
"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x, a = small_problem()
    path = tmp_path_factory.mktemp("data") / "small.npz"
    features = sp.csr_array(x)
    np.savez(
        path, adj_indptr=a.indptr, adj_indices=a.indices, x_indptr=features.indptr,
        x_indices=features.indices, x_data=features.data, shape_x=np.array(x.shape),
        labels=np.arange(len(x)) % 4,
    )  # fmt: skip
    return path


def torchrun(size: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTCLUST_TIMEOUT": "60"}
    root = str(Path(fc.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=180,
        env=environment, check=False,
    )  # fmt: skip


def test_joining_leaves_stdout_to_the_results(monkeypatch, capfd) -> None:
    def talkative(*args: object, **kwargs: object) -> None:
        os.write(1, b"[Gloo] Rank 0 is connected\n")

    monkeypatch.setattr("torch.distributed.init_process_group", talkative)
    distributed.join("gloo", timedelta(seconds=1))
    print("result")
    out, err = capfd.readouterr()
    assert out == "result\n" and "[Gloo]" in err


@pytest.mark.parametrize(
    ("model", "module", "name"), [("hsan", "hsan", "HSANModel"), ("ecnmf", "ecnmf", "ECNMFModel")]
)
def test_a_lost_rank_and_going_on_with_another_number(
    tmp_path: Path, data_file: Path, model: str, module: str, name: str
) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(module=module, model=name))
    settings = ["--dataset", data_file, "--model", model, "--epochs", "12", "--n-clusters", "4"]
    settings += ["--set", "width=16", "--set", "checkpoint_every=3", "--set", "n_init=2"]
    out = tmp_path / "run"
    lost = torchrun(2, script, *settings, "--out", out)
    assert lost.returncode != 0
    assert "rank 0 of 2: another process of this run has died" in lost.stderr, lost.stderr
    assert "--resume goes on" in lost.stderr
    assert (out / "checkpoint" / "checkpoint.safetensors").exists()

    resumed = torchrun(3, "-m", "fastclust.train", *settings, "--out", out, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout)  # printed once
    assert [run["epochs"] for run in result["runs"]] == [12]
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == list(range(1, 13))

    whole = tmp_path / "alone"
    alone = subprocess.run(
        [sys.executable, "-m", "fastclust.train", *map(str, settings), "--out", str(whole)],
        capture_output=True, text=True, check=False, cwd=Path(fc.__file__).parent.parent,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_allclose(
        np.load(out / "embedding.npy"), np.load(whole / "embedding.npy"), atol=5e-3
    )
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir()} == names


# fastclust.train, but one rank raises: in the scores, which only the first takes, or in a callback.
FAILING = """
import os
from fastclust import cli, train, training
internal_scores, calls = training.internal_scores, []
def failing_scores(*args):
    calls.append(args)
    if len(calls) == 2:
        raise MemoryError("no room for scores")
    return internal_scores(*args)
told = train.History.__call__
def failing_callback(self, event):
    told(self, event)
    if os.environ["RANK"] == "1" and event.epoch == 7:
        raise MemoryError("no room for a line")
if {scores}:
    training.internal_scores = failing_scores
else:
    train.History.__call__ = failing_callback
cli.run(train.main)
"""


@pytest.mark.parametrize(("model", "scores"), [("ecnmf", True), ("hsan", False)])
def test_a_rank_that_raises_between_steps_leaves_a_checkpoint(
    tmp_path: Path, data_file: Path, model: str, scores: bool
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(scores=scores))
    settings = ["--dataset", data_file, "--model", model, "--epochs", "12", "--n-clusters", "4"]
    settings += ["--set", "width=16", "--set", "checkpoint_every=50", "--set", "n_init=2"]
    out, whole = tmp_path / "run", tmp_path / "whole"
    failed = torchrun(2, script, *settings, "--out", out)
    assert failed.returncode != 0
    assert "no room for" in failed.stderr, failed.stderr
    if not scores:
        assert "rank 0 of 2: rank 1 failed after an epoch" in failed.stderr, failed.stderr
    with safe_open(out / "checkpoint" / "checkpoint.safetensors", "pt") as file:
        record = json.loads(file.metadata()["record"])
    assert (record["epochs_done"], record["stepped"] is not None) == ((10 if scores else 7), scores)

    for arguments in ([*settings, "--out", whole], ["--out", out, "--resume"]):
        done = torchrun(2, "-m", "fastclust.train", *arguments)
        assert done.returncode == 0, done.stderr
    assert (out / "embedding.npy").read_bytes() == (whole / "embedding.npy").read_bytes()
    rows = [
        [json.loads(line) | {"seconds": 0} for line in (folder / "history.jsonl").open()]
        for folder in (out, whole)
    ]
    assert rows[0] == rows[1]


TERMINATED = """
import torch.distributed as dist
from fastclust import cli, train
def terminated(*args):
    raise KeyboardInterrupt
def training(*args):
    try:
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4321")
    finally:
        {when}
train.train_all = training
cli.run(train.main)
"""


@pytest.mark.parametrize("when", ["terminated()", "dist.destroy_process_group = terminated"])
def test_a_lost_rank_is_told_though_the_launcher_ends_the_others(tmp_path: Path, when: str) -> None:
    """Its SIGTERM may come while the loss is being made of, and said no more than interrupted."""
    script = tmp_path / "script.py"
    script.write_text(TERMINATED.format(when=when))
    done = torchrun(2, script, "--out", tmp_path / "run")
    assert "of 2: another process of this run has died" in done.stderr, done.stderr
    assert "--resume goes on" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"checkpoint_dir": folder} if rank == 0 else {}', "checkpoint_dir is True on rank 0"),
        ('{"checkpoint_dir": folder, "resume": rank == 1}', "resume is False on rank 0"),
    ],
)
def test_ranks_that_keep_checkpoints_otherwise_are_told(
    tmp_path: Path, settings: str, message: str
) -> None:
    """They waited for each other until the time was out, and called the other one lost."""
    script = tmp_path / "fit.py"
    script.write_text(
        f"""
import os
import fastclust as fc
from fastclust import distributed
rank, folder = int(os.environ["RANK"]), {str(tmp_path / "checkpoint")!r}
data = fc.make_attributed_sbm(60, 200, 6, 2)
with distributed.session():
    model = fc.HSAN(2, epochs=2, width=8, n_init=2, **({settings}))
    model.fit(data.features, adjacency=data.adjacency)
"""
    )
    run = torchrun(2, script)
    assert run.returncode != 0
    assert f"must be started with the same data and settings, but {message}" in run.stderr


def test_stored_weights_stay_with_one_process(tmp_path: Path, data_file: Path) -> None:
    """A run whose stale weights are stored says how it can be resumed, and with snapshots can."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(module="hsan", model="HSANModel"))
    settings = ["--dataset", data_file, "--model", "hsan", "--epochs", "12", "--n-clusters", "4"]
    settings += ["--protocol", "paper-code", "--set", "width=16", "--set", "checkpoint_every=3"]
    for storage, message in (
        ("auto", "only one process on the CPU can go on with"),
        ("snapshots", ""),
    ):
        run = [*settings, "--set", f"weight_storage={storage}", "--out", tmp_path / storage]
        died = subprocess.run(
            [sys.executable, str(script), *map(str, run)], check=False, capture_output=True,
            env=os.environ | {"RANK": "1"}, cwd=Path(fc.__file__).parent.parent,
        )  # fmt: skip
        assert died.returncode == -signal.SIGKILL, died.stderr
        resumed = torchrun(2, "-m", "fastclust.train", *run, "--resume")
        assert (resumed.returncode != 0) == bool(message), resumed.stderr
        assert message in resumed.stderr


def test_what_several_processes_cannot_do(data_file: Path) -> None:
    run = torchrun(2, "-m", "fastclust.train", "--dataset", data_file, "--model", "ssgc")
    assert run.returncode != 0
    assert "ssgc has no training that several processes could share" in run.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number, as torchrun sets it, got ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
             "MASTER_PORT": "1"},
            "RANK must be from 0 to WORLD_SIZE - 1 = 1, got 2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
             "MASTER_PORT": "1", "FASTCLUST_TIMEOUT": "soon"},
            "FASTCLUST_TIMEOUT must be a number of seconds, got 'soon'",
        ),
    ],
)  # fmt: skip
def test_wrong_launches(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.LaunchError, match=message), distributed.session():
        pass


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.session() as ranks:
        assert ranks is distributed.ONE
        assert distributed.current(5) is distributed.ONE
    assert not dist.is_initialized()
