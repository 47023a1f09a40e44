"""python -m fastclust.train: results, resuming, exit codes, messages."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import fastclust
from fastclust import cli, train
from fastclust.datasets import load_dataset, nearest_neighbor_graph
from fastclust.estimators import ECNMF
from fastclust.metrics import clustering_scores
from fastclust.report import LABEL_SCORES
from fastclust.rundir import RunDirectory

# A model that trains in milliseconds.
SMALL = ("--set", "width=8", "--set", "rank=4", "--set", "n_init=2")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Graphs this small gain nothing from threads, and results do not depend on their number."""
    before, environment = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)
    os.environ.pop("OMP_NUM_THREADS")
    if environment is not None:
        os.environ["OMP_NUM_THREADS"] = environment


@pytest.fixture(scope="module")
def parts() -> dict[str, np.ndarray]:
    """Three planted blocks in the uniform npz format."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    upper = np.triu(rng.random((60, 60)) < np.where(labels[:, None] == labels, 0.4, 0.02), 1)
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    x = sp.csr_array((rng.normal(size=(60, 8)) + 2 * np.eye(8)[labels]).astype(np.float32))
    return {
        "adj_indptr": adjacency.indptr.astype(np.int64),
        "adj_indices": adjacency.indices.astype(np.int32),
        "x_indptr": x.indptr.astype(np.int64),
        "x_indices": x.indices.astype(np.int32),
        "x_data": x.data,
        "shape_x": np.array(x.shape),
        "labels": labels,
    }


@pytest.fixture(scope="module")
def blocks(parts: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "blocks.npz"
    np.savez(path, **parts)
    return str(path)


@pytest.fixture
def unlabelled(parts: dict[str, np.ndarray], tmp_path: Path) -> str:
    path = tmp_path / "unlabelled.npz"
    np.savez(path, **{key: value for key, value in parts.items() if key != "labels"})
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.guarded(lambda: train.main(arguments))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    return code, *capsys.readouterr()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastclust.train", *arguments]


def spawn(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, **options
    )


def outcome(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """All that a run leaves which must repeat to the bit: everything but times and memory."""
    root = folder if root is None else root
    result = json.loads((root / "result.json").read_text())
    for run in result["runs"]:
        del run["seconds"], run["peak_memory_bytes"]
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    files = ("assignments.csv", "embedding.npy", "model.safetensors")
    return {
        "config": (root / "config.toml").read_bytes(),
        "result": result,
        "history": rows,
        **{name: (folder / name).read_bytes() for name in files},
    }


# --- results -------------------------------------------------------------------------------------


def test_digits_from_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = spawn("--epochs", "2", "--set", "width=32", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "result.json").read_text())
    assert result["dataset"] == "digits" and result["model"] == "ecnmf"
    assert (result["n_nodes"], result["n_features"], result["n_clusters"]) == (1797, 64, 10)
    assert result["config"]["width"] == 32 and result["config"]["epochs"] == 2
    assert result["config"]["lr"] == 1e-4 and result["config"]["rank"] == 50, "what fit chose"
    assert result["versions"]["fastclust"] == fastclust.__version__
    (run,) = result["runs"]
    assert set(run["metrics"]) == {"acc", "nmi", "ari", "f1"}
    assert all(0 <= value <= 1 for value in run["metrics"].values())
    assert run["epochs"] == 2 and run["seconds"] > 0 and run["peak_memory_bytes"] > 10**7
    assert result["mean"] == run["metrics"]
    assert "epoch 1/2" in done.stderr and "epoch 2/2" in done.stderr
    assert "left" in done.stderr and "Traceback" not in done.stderr

    lines = (out / "assignments.csv").read_text().splitlines()
    assert lines[0] == "node,cluster" and len(lines) == 1798
    nodes, clusters = np.array([line.split(",") for line in lines[1:]], dtype=int).T
    assert (nodes == np.arange(1797)).all() and clusters.min() >= 0 and clusters.max() < 10
    labels = load_dataset("digits").labels
    assert clustering_scores(labels, clusters) == run["metrics"]

    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all({"loss", "seconds"} <= set(row) for row in rows)
    assert rows[-1]["acc"] == run["metrics"]["acc"]

    assert np.load(out / "embedding.npy").shape == (1797, 32)
    loaded = ECNMF.load(out)
    assert (loaded.labels_ == clusters).all()
    assert "<svg" in (out / "report.html").read_text()
    assert any((out / "checkpoint").iterdir())
    assert not list(out.rglob(".*")), "temporary files were left"


def test_table_and_nothing_else_on_stdout(capsys: pytest.CaptureFixture[str], blocks: str) -> None:
    code, out, err = call(capsys, "--dataset", blocks, "--epochs", "3", "--seeds", "0-1", *SMALL)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["ACC", "NMI", "ARI", "F1"]
    assert [line.split()[0] for line in lines[1:]] == ["seed", "seed", "mean", "std"]
    assert "60 nodes" in err and "seed 1 (2 of 2)" in err
    code, _, err = call(capsys, "--dataset", blocks, "--epochs", "2", "--quiet", *SMALL)
    assert code == 0 and err == ""


def test_several_seeds(capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path) -> None:
    arguments = ("--dataset", blocks, "--epochs", "2", "--seeds", "3,0,5", "--json", *SMALL)
    code, out, _ = call(capsys, *arguments, "--out", str(tmp_path))
    assert code == 0
    result = json.loads(out)
    assert [run["seed"] for run in result["runs"]] == [3, 0, 5]
    assert result["complete"]
    for name in ("acc", "nmi", "ari", "f1"):
        values = [run["metrics"][name] for run in result["runs"]]
        assert result["mean"][name] == pytest.approx(np.mean(values))
        assert result["std"][name] == pytest.approx(np.std(values, ddof=1))
    for folder in (tmp_path, tmp_path / "seed-0", tmp_path / "seed-5"):
        for name in ("assignments.csv", "embedding.npy", "history.jsonl", "model.safetensors"):
            assert (folder / name).is_file()
    assert not (tmp_path / "seed-3").exists()


def test_unlabelled_data(
    capsys: pytest.CaptureFixture[str], unlabelled: str, tmp_path: Path
) -> None:
    arguments = ("--dataset", unlabelled, "--epochs", "2", *SMALL)
    code, _, err = call(capsys, *arguments)
    assert code == 2 and "give --n-clusters K" in err
    code, out, _ = call(
        capsys, *arguments, "--n-clusters", "3", "--json", "--out", str(tmp_path / "run")
    )
    assert code == 0
    scores = json.loads(out)["runs"][0]["metrics"]
    assert {"silhouette", "modularity", "conductance"} <= set(scores) and "acc" not in scores
    code, out, _ = call(capsys, *arguments, "--n-clusters", "3")
    assert code == 0 and "modularity" in out.splitlines()[0]


@pytest.mark.parametrize("model", ["ecnmf", "hsan", "ssgc"])
def test_one_cluster_is_allowed_with_a_warning(
    blocks: str, unlabelled: str, tmp_path: Path, model: str
) -> None:
    for data in (blocks, unlabelled):
        run = ["--dataset", data, "--model", model, "--n-clusters", "1", "--quiet"]
        run += [] if model == "ssgc" else ["--epochs", "2", "--set", "width=8"]
        done = spawn(*run, "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "n_clusters should be at least 2, got 1" in done.stderr
        assert "could not be written" not in done.stderr
        clusters = (tmp_path / "assignments.csv").read_text().splitlines()[1:]
        assert {line.split(",")[1] for line in clusters} == {"0"}


def test_gnn_benchmark_format(
    capsys: pytest.CaptureFixture[str], parts: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "blocks.npz"
    n = len(parts["labels"])
    np.savez(
        path,
        adj_data=np.ones(parts["adj_indices"].size, np.float32),
        adj_indices=parts["adj_indices"],
        adj_indptr=parts["adj_indptr"],
        adj_shape=np.array([n, n]),
        attr_data=parts["x_data"],
        attr_indices=parts["x_indices"],
        attr_indptr=parts["x_indptr"],
        attr_shape=parts["shape_x"],
        labels=parts["labels"],
    )
    code, out, _ = call(capsys, "--dataset", str(path), "--epochs", "2", "--json", *SMALL)
    assert code == 0 and json.loads(out)["n_clusters"] == 3


@pytest.mark.parametrize("model", ["hsan", "ssgc"])
def test_other_models(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path, model: str
) -> None:
    small = ("--epochs", "2", "--set", "width=8") if model == "hsan" else ()
    code, out, err = call(
        capsys, "--dataset", blocks, "--model", model, *small, "--json", "--out", str(tmp_path)
    )
    assert code == 0, err
    assert json.loads(out)["model"] == model
    assert (tmp_path / "report.html").is_file()


def test_selection_is_recorded(capsys: pytest.CaptureFixture[str], blocks: str) -> None:
    arguments = ("--dataset", blocks, "--epochs", "6", "--set", "eval_every=2", *SMALL)
    code, out, _ = call(capsys, *arguments, "--selection", "loss", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["selection"] == "loss"
    assert result["runs"][0]["selected_epoch"] in (1, 3, 5, 6)


def test_real_graph(
    capsys: pytest.CaptureFixture[str], data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTCLUST_DATA")
    arguments = ("--dataset", "cora", "--data-root", str(data_root), "--epochs", "2", "--json")
    code, out, err = call(capsys, *arguments, "--set", "width=32")
    assert code == 0, err
    result = json.loads(out)
    assert (result["n_nodes"], result["n_edges"], result["n_clusters"]) == (2708, 10556, 7)
    assert result["config"]["rank"] == 40, "the preset of the data set"


# --- settings ------------------------------------------------------------------------------------


def test_precedence_and_round_trip(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(
        f'dataset = "{blocks}"\nepochs = 2\nwidth = 8\nrank = 4\nalpha = 0.25\n'
        "n-init = 2\nseed = 4\n"
    )
    first = tmp_path / "first"
    code, out, err = call(
        capsys,
        *("--config", str(config), "--set", "alpha=0.5", "--set", "epochs=3", "--epochs", "4"),
        *("--json", "--out", str(first)),
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["config"]["alpha"] == 0.5 and result["config"]["epochs"] == 4
    assert result["runs"][0]["seed"] == 4 and result["config"]["n_init"] == 2

    again = tmp_path / "again"
    code, _, err = call(capsys, "--config", str(first / "config.toml"), "--out", str(again))
    assert code == 0, err
    assert outcome(first) == outcome(again)


def own_files(parts: dict[str, np.ndarray], folder: Path) -> tuple[str, ...]:
    """The blocks as tables with named nodes; returns the options that name them."""
    n = len(parts["labels"])
    adjacency = sp.csr_array(
        (np.ones(parts["adj_indices"].size), parts["adj_indices"], parts["adj_indptr"]), (n, n)
    )
    x = sp.csr_array((parts["x_data"], parts["x_indices"], parts["x_indptr"]), (n, 8)).toarray()
    edges = sp.triu(adjacency).tocoo()
    lines = [f"n{i},n{j}" for i, j in zip(edges.row, edges.col, strict=True)]
    (folder / "edges.csv").write_text("source,target\n" + "\n".join(lines) + "\n")
    rows = [
        f"n{i},{label}," + ",".join(f"{value:.9g}" for value in row)
        for i, (label, row) in enumerate(zip(parts["labels"], x, strict=True))
    ]
    header = "id,group," + ",".join(f"x{j}" for j in range(8))
    (folder / "nodes.csv").write_text(header + "\n" + "\n".join(rows) + "\n")
    return ("--edges", "edges.csv", "--features", "nodes.csv", "--labels", "group")


def test_own_tables_and_exact_repetition(
    capsys: pytest.CaptureFixture[str],
    blocks: str,
    parts: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = own_files(parts, tmp_path)
    arguments = ("--epochs", "3", *SMALL, "--out")
    code, _, err = call(capsys, *files, *arguments, "own")
    assert code == 0, err
    assert call(capsys, "--dataset", blocks, *arguments, "npz")[0] == 0
    own, npz = outcome(Path("own")), outcome(Path("npz"))
    assert own["result"]["runs"] == npz["result"]["runs"], "the same graph, the same result"
    names, clusters = zip(
        *(line.split(",") for line in Path("own/assignments.csv").read_text().splitlines()),
        strict=True,
    )
    assert names == ("node", *(f"n{i}" for i in range(60)))
    assert [*clusters[1:]] == [str(k) for k in ECNMF.load("own").labels_]

    # from elsewhere: the configuration holds absolute paths
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, _, err = call(capsys, "--config", "../own/config.toml", "--out", "again")
    assert code == 0, err
    assert outcome(Path("again")) == own
    code, _, err = call(capsys, "--out", str(tmp_path / "own"), "--resume")
    assert code == 0, err


def test_neighbors_of_a_graph_made_from_attributes(
    capsys: pytest.CaptureFixture[str], parts: dict[str, np.ndarray], tmp_path: Path
) -> None:
    x = parts["x_data"].reshape(60, 8)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="a,b,c,d,e,f,g,h", comments="")
    run = ("--features", str(tmp_path / "x.csv"), "--model", "ssgc", "--n-clusters", "3", "--json")
    for n_neighbors in (3, 10):
        out = call(capsys, *run, "--set", f"n_neighbors={n_neighbors}")[1]
        expected = nearest_neighbor_graph(x.astype(np.float32), n_neighbors).nnz
        assert json.loads(out)["n_edges"] == expected


def test_back_end_and_what_it_was_chosen_by_are_recorded(
    capsys: pytest.CaptureFixture[str], unlabelled: str, tmp_path: Path
) -> None:
    arguments = ("--dataset", unlabelled, "--model", "ssgc", "--n-clusters", "2")
    code, _, err = call(
        capsys, *arguments, "--set", "back_end=auto", "--out", str(tmp_path / "run")
    )
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (run,) = result["runs"]
    chosen = run["back_end_evidence"]["back_end"]
    assert chosen in ("kmeans", "cut")
    assert result["config"]["back_end"] == run["resolved"]["back_end"] == chosen
    assert 'back_end = "auto"' in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize("model", ["ecnmf", "hsan", "ssgc"])
def test_estimated_number_of_clusters_repeats(
    capsys: pytest.CaptureFixture[str], unlabelled: str, tmp_path: Path, model: str
) -> None:
    small = () if model == "ssgc" else ("--epochs", "2", "--set", "width=8")
    arguments = ("--dataset", unlabelled, "--model", model, *small, "--n-clusters", "auto")
    first, again = tmp_path / "first", tmp_path / "again"
    code, _, err = call(capsys, *arguments, "--out", str(first))
    assert code == 0 and "an estimated number of clusters" in err, err
    result = json.loads((first / "result.json").read_text())
    assert result["n_clusters"] == result["config"]["n_clusters"]
    assert 2 <= result["n_clusters"] <= 6
    assert len(result["runs"][0]["n_clusters_evidence"]["agreement"]) == 5
    assert 'n_clusters = "auto"' in (first / "config.toml").read_text()
    assert call(capsys, "--config", str(first / "config.toml"), "--out", str(again))[0] == 0
    for name in ("assignments.csv", "embedding.npy", "model.safetensors", "config.toml"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--edges", "edges.csv"], "--features FILE is required with --edges"),
        (["--edges", "edges.csv", "--features", "nodes.csv"], "give --n-clusters K"),
        (["--features", "nodes.csv", "--dataset", "cora"], "two sources of data"),
        (["--features", "nodes.csv", "--labels", "grup"], "did you mean group?"),
        (["--features", "nodes.csv", "--ids", "name"], "must have the column 'name'"),
        (["--edges", "absent.csv", "--features", "nodes.csv"], "absent.csv does not exist"),
        (["--set", "edges=x.csv"], "use --edges instead"),
        (["--n-clusters", "some"], "whole number of 1 or more, got 'some'"),
    ],
)
def test_mistakes_with_own_files(
    capsys: pytest.CaptureFixture[str],
    parts: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fragment: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    own_files(parts, tmp_path)
    code, out, err = call(capsys, *arguments, "--quiet")
    assert code == 2 and fragment in err
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err


def test_one_command_for_all_modules(blocks: str) -> None:
    def fastclust_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastclust", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    run = ("--dataset", blocks, "--epochs", "1", "--json", "--quiet", *SMALL)
    alone, whole = spawn(*run), fastclust_command("train", *run)
    assert whole.returncode == alone.returncode == 0, whole.stderr
    first, second = (json.loads(done.stdout)["runs"][0]["metrics"] for done in (alone, whole))
    assert first == second
    usage = fastclust_command()
    assert usage.returncode == 0 and "train" in usage.stdout and "compare" in usage.stdout
    wrong = fastclust_command("trian")
    assert wrong.returncode == 2 and "did you mean train?" in wrong.stderr
    version = fastclust_command("--version")
    assert version.stdout.strip() == f"fastclust {fastclust.__version__}"


def test_help_teaches() -> None:
    done = spawn("--help")
    assert done.returncode == 0 and done.stderr == ""
    for text in (
        "examples:",
        "--resume",
        "--set",
        "exit codes",
        "amac",
        "my_graph.npz",
        "--edges edges.csv",
    ):
        assert text in done.stdout


def test_set_help_lists_hyper_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--set", "help")
    assert code == 0 and "rank" in out and "recombine" in out and "callbacks" not in out
    code, out, _ = call(capsys, "--set", "help", "--model", "hsan")
    assert code == 0 and "tau" in out
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "from labels" in lines["n_clusters"]
    assert "calinski-harabasz" in lines["selection"]


# --- resuming ------------------------------------------------------------------------------------

# Evaluated in every epoch, to be slow enough to be interrupted.
LONG = ("--epochs", "80", "--set", "checkpoint_every=3", "--set", "eval_every=1", *SMALL)


def interrupt(arguments: tuple[str, ...], log: Path, rows: int, number: int) -> tuple[int, str]:
    """Start the command, and send a signal once its history has so many lines."""
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= rows:
            break
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize("model", ["ecnmf", "hsan"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_resume_ends_with_the_same_bits(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path, number: int, model: str
) -> None:
    run = ("--dataset", blocks, "--model", model, "--seed", "1")
    run += LONG if model == "ecnmf" else (*LONG[:6], "--set", "width=8")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(capsys, *run, "--out", str(whole), "--quiet")[0] == 0
    code, err = interrupt((*run, "--out", str(parts)), parts / "history.jsonl", 10, number)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130, err
        assert "--resume" in err and "Traceback" not in err
    assert not (parts / "result.json").exists()
    # The settings need not be given again.
    code, _, err = call(capsys, "--out", str(parts), "--resume")
    assert code == 0, err
    assert "epoch 1/80" not in err
    assert outcome(parts) == outcome(whole)


@pytest.mark.slow
def test_kill_at_random_moments(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, "--seeds", "0-2", *LONG)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(capsys, *run, "--out", str(whole), "--quiet")[0] == 0
    rng = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen(
            command(*run, "--out", str(parts), "--resume"), stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(1.5, 6.0))
        process.kill()
        process.wait()
    assert call(capsys, *run, "--out", str(parts), "--resume", "--quiet")[0] == 0
    for folder in ("seed-1", "seed-2"):
        for name in ("assignments.csv", "embedding.npy", "model.safetensors"):
            assert (parts / folder / name).read_bytes() == (whole / folder / name).read_bytes()
    assert outcome(parts) == outcome(whole)


def test_a_signal_in_the_last_epoch_is_not_lost(
    capsys: pytest.CaptureFixture[str],
    blocks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next seed of several would begin."""
    run = ("--dataset", blocks, "--epochs", "3", "--seeds", "0-1", *SMALL, "--out", str(tmp_path))
    record = train.History.__call__

    def interrupt(self: train.History, event: Any) -> None:
        record(self, event)
        if event.epoch == event.n_epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.History, "__call__", interrupt)
        code, _, err = call(capsys, *run)
    assert code == 130 and "seed 0: SIGTERM after epoch 3" in err
    code, _, err = call(capsys, *run, "--resume")
    assert code == 0 and "epoch 1/3" in err and "seed 1 (2 of 2)" in err
    assert "seed 0 (1 of 2)  epoch" not in err


def test_resume_keeps_finished_seeds_and_adds_new_ones(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, "--epochs", "3", *SMALL, "--out", str(tmp_path), "--json")
    first = json.loads(call(capsys, *run, "--seeds", "0-1")[1])
    code, out, err = call(capsys, *run, "--seeds", "0-2", "--resume")
    assert code == 0
    second = json.loads(out)
    assert second["runs"][:2] == first["runs"] and len(second["runs"]) == 3
    assert "seed 0 (" not in err and "seed 2 (3 of 3)" in err


@pytest.mark.parametrize("model", ["ecnmf", "hsan", "ssgc"])
@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (("assignments.csv", "embedding.npy", "checkpoint"), "made again from its model"),
        (("history.jsonl",), "history.jsonl is gone from .*; made again from its model"),
        (("model.safetensors",), "model.safetensors is gone from .*; training goes on"),
        (("config.json", "checkpoint", "history.jsonl"), "begins anew without one"),
        (("checkpoint",), ""),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_resume_makes_files_of_a_finished_seed_again(
    model: str,
    lost: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
    blocks: str,
    tmp_path: Path,
) -> None:
    run = ["--dataset", blocks, "--model", model, "--out", str(tmp_path), "--seeds", "0-1"]
    if model != "ssgc":
        run += ["--epochs", "3", "--set", "width=8", "--set", "n_init=2"]
    assert call(capsys, *run)[0] == 0
    before = outcome(tmp_path), outcome(tmp_path / "seed-1", tmp_path)
    for folder in (tmp_path, tmp_path / "seed-1"):
        for name in lost:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=name == "checkpoint")
    code, _, err = call(capsys, *run, "--resume")
    assert code == 0
    notes = [line for line in err.splitlines() if "gone from" in line]
    assert len(notes) == (2 if told else 0)
    for line, seed in zip(notes, (0, 1), strict=False):
        assert line.startswith(f"seed {seed}: ") and re.search(told, line)
    after = outcome(tmp_path), outcome(tmp_path / "seed-1", tmp_path)
    if "history.jsonl" in lost and "checkpoint" not in lost:
        # what the labels said of each epoch cannot be known again without training anew
        for part in (*before, *after):
            part["history"] = [
                {k: v for k, v in row.items() if k not in LABEL_SCORES} for row in part["history"]
            ]
    assert after == before


def test_an_interrupt_while_files_are_made_again_keeps_the_other_results(
    capsys: pytest.CaptureFixture[str],
    blocks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ("--dataset", blocks, "--epochs", "3", *SMALL, "--out", str(tmp_path), "--seeds", "0-2")
    assert call(capsys, *run)[0] == 0
    before = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "seed-1" / "model.safetensors").unlink()
    whole = train.keep_seed

    def interrupt(directory: Any, seed: int, *rest: Any) -> Any:
        if seed == 1:
            raise KeyboardInterrupt
        return whole(directory, seed, *rest)

    monkeypatch.setattr(train, "keep_seed", interrupt)
    assert call(capsys, *run, "--resume")[0] == 130
    kept = json.loads((tmp_path / "result.json").read_text())
    assert [entry["seed"] for entry in kept["runs"]] == [0, 1, 2]
    assert [entry["metrics"] for entry in kept["runs"]] == [r["metrics"] for r in before["runs"]]


def test_resume_of_another_run_is_refused(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, "--epochs", "2", *SMALL, "--out", str(tmp_path))
    assert call(capsys, *run)[0] == 0
    code, _, err = call(capsys, *run, "--resume", "--set", "alpha=0.5")
    assert code == 2 and "alpha was 1.0" in err and "got 0.5" in err
    code, _, err = call(capsys, *run, "--resume", "--seed", "7")
    assert code == 2 and "seeds was [0]" in err
    for model in ("hsan", "ssgc"):
        code, _, err = call(capsys, *run[:4], "--out", str(tmp_path), "--resume", "--model", model)
        assert code == 2 and f"model was 'ecnmf' in {tmp_path}, got {model!r}" in err


def test_data_that_disappeared_or_changed(
    capsys: pytest.CaptureFixture[str], parts: dict[str, np.ndarray], tmp_path: Path
) -> None:
    data, out = tmp_path / "data.npz", str(tmp_path / "out")
    np.savez(data, **parts)
    short = ("--epochs", "2", *SMALL, "--out", out)
    assert call(capsys, "--dataset", str(data), *short)[0] == 0
    (Path(out) / "result.json").unlink()  # as if it had been cut off before the end
    x = parts["x_data"].copy()
    x[0] += 1
    np.savez(data, **(parts | {"x_data": x}))
    code, _, err = call(capsys, "--out", out, "--resume")
    assert code == 2 and "belongs to another run (data was" in err and err.count("\n") <= 2
    data.unlink()
    code, _, err = call(capsys, "--out", out, "--resume")
    assert code == 2 and f"{data} does not exist" in err and err.count("\n") == 1

    edges, features = tmp_path / "edges.csv", tmp_path / "x.csv"
    links = sp.csr_array((np.ones(len(parts["adj_indices"])), parts["adj_indices"],
                          parts["adj_indptr"])).tocoo()  # fmt: skip
    np.savetxt(edges, np.stack([links.row, links.col], 1), "%d")
    np.savetxt(features, parts["x_data"].reshape(60, 8), header="a b c d e f g h", comments="")
    tables = ("--edges", str(edges), "--features", str(features), "--n-clusters", "3")
    assert call(capsys, *tables, *short)[0] == 0
    edges.unlink()
    code, _, err = call(capsys, "--out", out, "--resume")
    assert code == 2 and f"{edges} does not exist" in err and err.count("\n") == 1


@pytest.mark.parametrize("changed", ["x_data", "labels"])
@pytest.mark.parametrize("model", ["ecnmf", "ssgc"])
def test_finished_seeds_of_other_data_are_not_mixed_in(
    model: str,
    changed: str,
    capsys: pytest.CaptureFixture[str],
    parts: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, **parts)
    run = ["--dataset", str(data), "--model", model, "--out", str(out)]
    run += ["--epochs", "2", *SMALL] if model == "ecnmf" else []
    assert call(capsys, *run)[0] == 0
    np.savez(data, **(parts | {changed: parts[changed][::-1]}))
    before = (out / "result.json").read_bytes(), (out / "config.toml").read_bytes()
    for seeds in ("0", "0-1"):
        code, _, err = call(capsys, *run, "--resume", "--seeds", seeds)
        assert code == 2 and f"the data of {out} have changed since" in err
    assert before == ((out / "result.json").read_bytes(), (out / "config.toml").read_bytes())
    np.savez(data, **parts)
    assert call(capsys, *run, "--resume", "--seeds", "0-1")[0] == 0


def test_a_damaged_checkpoint_is_told_and_survived(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, *LONG, "--out")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(capsys, *run, str(whole), "--quiet")[0] == 0
    interrupt((*run, str(parts)), parts / "history.jsonl", 10, signal.SIGKILL)
    newest = parts / "checkpoint" / "checkpoint.safetensors"
    newest.write_bytes(newest.read_bytes()[:-50])
    done = spawn("--out", str(parts), "--resume")
    assert done.returncode == 0, done.stderr
    assert "checkpoint.safetensors is damaged" in done.stderr
    assert "going on from the one before it, previous.safetensors, after epoch" in done.stderr
    assert outcome(parts) == outcome(whole)


def test_resume_without_a_run_begins(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, "--epochs", "2", *SMALL, "--out", str(tmp_path / "new"))
    code, _, err = call(capsys, *run, "--resume")
    assert code == 0 and "holds no run yet" in err


def test_an_earlier_run_is_not_lost(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, "--epochs", "2", *SMALL, "--out", str(tmp_path))
    assert call(capsys, *run)[0] == 0
    before = (tmp_path / "result.json").read_bytes()
    code, _, err = call(capsys, *run)
    assert code == 0 and "previous-1" in err
    assert (tmp_path / "previous-1" / "result.json").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no flock")
def test_a_directory_in_use_is_left_alone(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path
) -> None:
    run = ("--dataset", blocks, "--epochs", "2", *SMALL, "--out", str(tmp_path))
    assert call(capsys, *run)[0] == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    assert ".lock" not in before
    with RunDirectory(tmp_path).held():
        for again in ((), ("--resume",)):
            code, out, err = call(capsys, *run, *again)
            assert code == 2 and out == "" and err.count("\n") == 1
            assert f"{tmp_path} is in use by another run (process {os.getpid()})" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- bad input -----------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    (["--datset", "cora"], "did you mean --dataset?"),
    (["--dataset", "corra"], "must be one of cora"),
    (["--dataset", "absent.npz"], "absent.npz does not exist"),
    (["--dataset", ""], "dataset must be a name or path"),
    (["--model", "ecnfm"], "did you mean ecnmf?"),
    (["--epochs", "0"], "whole number of 1 or more, got '0'"),
    (["--epochs", "many"], "whole number of 1 or more, got 'many'"),
    (["--n-clusters", "0"], "whole number of 1 or more"),
    (["--set", "n_clusters=0"], "n_clusters must be at least 1, got 0"),
    (["--n-clusters", "1798"], "n_clusters must be at most the number of nodes"),
    (["--n-clusters", "-3"], "whole number of 1 or more"),
    (["--seeds", "9-0"], "rising ranges"),
    (["--seed", "x"], "rising ranges"),
    (["--seed", "1", "--seeds", "0-3"], "not allowed with"),
    (["--selection", "oracle"], "argument --selection must be one of last"),
    (["--protocol", "paper"], "did you mean paper-code?"),
    (["--precision", "fp16"], "must be one of fp32"),
    (["--set", "rnak=3"], "did you mean rank?"),
    (["--set", "rank"], "--set must be KEY=VALUE, got 'rank'"),
    (
        ["--set", "rank=many"],
        "rank must be gavish-donoho or a whole number or a number or none, got 'many'",
    ),
    (["--set", "rank=0"], "'rank' parameter"),
    (["--set", "rank=65"], "rank must be at most 64"),
    (["--set", "lr=fast"], "lr must be a number or none"),
    (["--set", "lr=-1"], "'lr' parameter"),
    (["--set", "recombine=mrege"], "did you mean merge?"),
    (["--set", "selection=first"], "selection must be last or inertia"),
    (["--set", "dataset=cora"], "use --dataset instead"),
    (["--set", "callbacks=x"], "no hyper-parameter 'callbacks'"),
    (["--set", "checkpoint_every=often", "--out", "{tmp}/run"], "checkpoint_every must be"),
    (["--model", "ssgc", "--epochs", "5"], "ssgc has no hyper-parameter 'epochs'"),
    (["--config", "absent.toml"], "cannot read 'absent.toml'"),
    (["--config", "{tmp}/bad.toml"], "must be a TOML file"),
    (["--config", "{tmp}/table.toml"], "got a table [model]"),
    (["--resume"], "--resume needs --out DIR"),
    (["--out", "{tmp}/bad.toml"], "--out must be a directory that can be written to"),
    (["--out", "/proc/fastclust"], "--out must be a directory that can be written to"),
    (["--data-root", "", "--dataset", "cora"], "data_root must be a name or path"),
    (["--out", ""], "--out: must be a path, got ''"),
    (["--out", " ", "--resume"], "--out: must be a path, got ' '"),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD_ARGUMENTS, ids=lambda v: " ".join(v)[:40])
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fragment: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("epochs = ")
    (tmp_path / "table.toml").write_text("[model]\nrank = 3\n")
    code, out, err = call(capsys, *(a.format(tmp=tmp_path) for a in arguments), "--quiet")
    assert code == 2, err
    assert fragment in err
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("ecnmf", "rank=0"),
        ("ecnmf", "lr=-1"),
        ("ecnmf", "n_init=0"),
        ("ecnmf", "device=cuda:99"),
        ("ecnmf", "checkpoint_every=often"),
        ("ecnmf", "rank=1000"),
        ("hsan", "n_input=1000"),
        ("hsan", "width=1000000000"),
        ("ssgc", "n_components=1000"),
    ],
)
def test_a_bad_setting_is_told_before_anything_else(
    capsys: pytest.CaptureFixture[str], blocks: str, tmp_path: Path, model: str, setting: str
) -> None:
    run = ("--dataset", blocks, "--model", model, "--out", str(tmp_path))
    run += () if model == "ssgc" else ("--epochs", "1")
    assert call(capsys, *run, "--quiet")[0] == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = call(capsys, *run, "--set", setting)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, "no line before the error"
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "no run set aside"


def test_a_single_node_is_told_before_anything_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    none = np.zeros(0, np.int64)
    np.savez(
        tmp_path / "one.npz", adj_indptr=np.zeros(2, np.int64), adj_indices=none, labels=[0],
        x_indptr=[0, 1], x_indices=[2], x_data=[1.0], shape_x=[1, 3],
    )  # fmt: skip
    code, out, err = call(capsys, "--dataset", str(tmp_path / "one.npz"))
    assert code == 2 and out == ""
    assert err == "error: X must have at least 2 rows, one per node, got n_samples=1\n"


def bad_file(kind: str, parts: dict[str, np.ndarray], path: Path) -> None:
    """Write a data file that has something wrong."""
    arrays: dict[str, Any] = dict(parts)
    n = len(parts["labels"])
    if kind == "no array":
        del arrays["x_data"]
    elif kind == "pickled":
        arrays["labels"] = np.array([{}] * n, dtype=object)
    elif kind == "negative index":
        arrays["adj_indices"] = arrays["adj_indices"].copy()
        arrays["adj_indices"][0] = -1
    elif kind == "index out of range":
        arrays["adj_indices"] = arrays["adj_indices"].copy()
        arrays["adj_indices"][-1] = n
    elif kind == "NaN in features":
        arrays["x_data"] = arrays["x_data"].copy()
        arrays["x_data"][3] = np.nan
    elif kind == "infinity in features":
        arrays["x_data"] = arrays["x_data"].copy()
        arrays["x_data"][3] = np.inf
    elif kind == "NaN weight":
        arrays["adj_data"] = np.ones(arrays["adj_indices"].size, np.float32)
        arrays["adj_data"][0] = np.nan
    elif kind == "too few rows":
        arrays["x_indptr"] = arrays["x_indptr"][:-1]
        arrays["shape_x"] = arrays["shape_x"] - [1, 0]
        arrays["x_indices"] = arrays["x_indices"][: arrays["x_indptr"][-1]]
        arrays["x_data"] = arrays["x_data"][: arrays["x_indptr"][-1]]
    elif kind == "no columns":
        arrays |= {
            "x_indptr": np.zeros(n + 1, np.int64),
            "x_indices": np.zeros(0, np.int32),
            "x_data": np.zeros(0, np.float32),
            "shape_x": np.array([n, 0]),
        }
    elif kind == "labels too short":
        arrays["labels"] = arrays["labels"][:-1]
    np.savez(path, **arrays)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "corrupt":
        content = bytearray(path.read_bytes())
        content[600:640] = bytes(40)
        path.write_bytes(content)
    elif kind == "no npz":
        path.write_bytes(b"hello")
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("no array", "lacks the arrays x_data"),
        ("pickled", "pickled"),
        ("negative index", "-1"),
        ("index out of range", "adj must hold indices below 60, got 60"),
        ("NaN in features", "NaN"),
        ("infinity in features", "inf"),
        ("NaN weight", "NaN"),
        ("too few rows", "one row per node (60)"),
        ("no columns", "at least one column"),
        ("labels too short", "labels must hold one class per node (60)"),
        ("truncated", "truncated, corrupt"),
        ("corrupt", "corrupt"),
        ("no npz", "npz"),
        ("empty", "npz"),
    ],
)
def test_bad_files(
    capsys: pytest.CaptureFixture[str],
    parts: dict[str, np.ndarray],
    tmp_path: Path,
    kind: str,
    fragment: str,
) -> None:
    path = tmp_path / "bad.npz"
    bad_file(kind, parts, path)
    code, out, err = call(capsys, "--dataset", str(path), "--epochs", "1", "--quiet")
    assert code == 2, err
    assert fragment in err and str(path) in err
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err


def test_odd_but_usable_data(
    capsys: pytest.CaptureFixture[str], parts: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Isolated nodes, several components, all-zero rows: no error."""
    n = len(parts["labels"])
    x = sp.csr_array(
        (parts["x_data"], parts["x_indices"], parts["x_indptr"]), shape=tuple(parts["shape_x"])
    ).tolil()
    x[:5] = 0
    x = x.tocsr()
    adjacency = sp.csr_array(
        (np.ones(parts["adj_indices"].size), parts["adj_indices"], parts["adj_indptr"]), (n, n)
    ).tolil()
    adjacency[:3] = 0
    adjacency[:, :3] = 0
    adjacency = adjacency.tocsr()
    path = tmp_path / "odd.npz"
    np.savez(
        path,
        adj_indptr=adjacency.indptr,
        adj_indices=adjacency.indices,
        x_indptr=x.indptr,
        x_indices=x.indices,
        x_data=x.data,
        shape_x=parts["shape_x"],
        labels=parts["labels"],
    )
    for model in ("ecnmf", "hsan", "ssgc"):
        epochs = () if model == "ssgc" else ("--epochs", "2", "--set", "width=8")
        code, _, err = call(capsys, "--dataset", str(path), "--model", model, *epochs)
        assert code == 0, err


def test_mended_data_is_told_in_one_line_each(parts: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "directed.npz"
    n = len(parts["labels"])
    adjacency = sp.csr_array(
        (np.ones(parts["adj_indices"].size), parts["adj_indices"], parts["adj_indptr"]), (n, n)
    )
    directed = sp.csr_array(sp.triu(adjacency) + sp.eye_array(n))
    np.savez(path, **{**parts, "adj_indptr": directed.indptr, "adj_indices": directed.indices})
    done = spawn("--dataset", str(path), "--epochs", "1", "--quiet", *SMALL)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: ") for line in lines)
    assert "self loops" in done.stderr and "not symmetric" in done.stderr


@pytest.mark.parametrize("limit", [200, 3000])
def test_a_full_disk_loses_no_score(blocks: str, tmp_path: Path, limit: int) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = spawn(
        *("--dataset", blocks, "--epochs", "3", *SMALL, "--out", str(tmp_path / "run")),
        preexec_fn=small_disk,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr and "--resume" in done.stderr
    if limit > 1000:
        assert "ACC" in done.stdout, "the scores are shown all the same"


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    done = spawn("--dataset", "corra", env=os.environ | {"FASTCLUST_DEBUG": "1"})
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_closed_pipe_is_no_error(blocks: str) -> None:
    process = subprocess.Popen(
        command("--dataset", blocks, "--epochs", "1", "--quiet", *SMALL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="the shell closes the streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(blocks: str, tmp_path: Path, closed: str) -> None:
    words = command("--dataset", blocks, "--epochs", "1", *SMALL, "--out", str(tmp_path / "run"))
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert ("ACC" in done.stdout) == (not closed.startswith(">"))
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
@pytest.mark.parametrize("keep", [False, True])
def test_output_that_cannot_be_written(blocks: str, tmp_path: Path, keep: bool) -> None:
    run = ["--dataset", blocks, "--epochs", "1", "--quiet", *SMALL]
    run += ["--out", str(tmp_path)] if keep else []
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(*run), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=buffered
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to standard output: No space left")
    assert done.stderr.count("\n") == 1
    if keep:
        assert f"{tmp_path} has the results" in done.stderr
        again = spawn(*run, "--resume")
        assert again.returncode == 0 and "ACC" in again.stdout
    else:
        assert "give it, or another place" in done.stderr and "--resume" not in done.stderr


def test_interrupt_without_out_says_so(blocks: str) -> None:
    process = subprocess.Popen(
        command("--dataset", blocks, "--epochs", "1000000", *SMALL),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 1/" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(timeout=120) == 130
    assert "nothing is kept" in rest and "Traceback" not in rest


def test_published_rates_go_with_the_protocol(
    data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HSAN's published learning rate of eat, 1e-4, is for accumulated gradients and plain Adam."""
    base = ("--dataset", "eat", "--model", "hsan", "--epochs", "1", *SMALL[:2])
    base += ("--data-root", str(data_root))
    rates = {}
    for name, more in {
        "standard": (),
        "paper-code": ("--protocol", "paper-code"),
        "adam": ("--set", "optimizer=adam"),
        "own": ("--protocol", "paper-code", "--set", "lr=0.01"),
    }.items():
        code, out, err = call(capsys, *base, *more, "--quiet", "--json")
        assert code == 0, err
        rates[name] = json.loads(out)["config"]["lr"]
    assert rates == {"standard": 3e-3, "paper-code": 1e-4, "adam": 1e-4, "own": 0.01}


def test_labels_change_nothing_but_the_scores(parts: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Training with permuted labels gives the same clusters, embedding, model and curves."""
    results = []
    for name, model in (
        ("true", "hsan"),
        ("permuted", "hsan"),
        ("true", "ecnmf"),
        ("permuted", "ecnmf"),
    ):
        labels = parts["labels"]
        if name == "permuted":
            labels = np.random.default_rng(1).permutation(labels)
        folder = tmp_path / model / name
        folder.mkdir(parents=True)
        np.savez(folder / "blocks.npz", **(parts | {"labels": labels}))
        out = folder / "run"
        arguments = ("--dataset", str(folder / "blocks.npz"), "--model", model, "--quiet")
        arguments += ("--epochs", "12", "--selection", "inertia", *SMALL[:2], "--out", str(out))
        assert cli.guarded(lambda given=arguments: train.main(given)) == 0
        found = {
            f: (out / f).read_bytes()
            for f in ("assignments.csv", "embedding.npy", "model.safetensors")
        }
        rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        scores = [
            [row.pop(key) for key in ("acc", "nmi", "ari", "f1")] for row in rows if "acc" in row
        ]
        for row in rows:
            del row["seconds"]
        results.append((found, rows, scores))
    for true, permuted in (results[:2], results[2:]):
        assert true[:2] == permuted[:2]
        assert true[2] != permuted[2], "the scores do see the labels"
