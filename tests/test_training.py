"""The loop: what it reports, which epoch it keeps, and that a run survives being cut off."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastclust import ECNMF, HSAN, checkpoints, training
from fastclust.checkpoints import parse_interval
from fastclust.training import (
    SELECTIONS,
    CheckpointError,
    CheckpointWarning,
    Event,
    TrainingDivergedError,
    TrainingInterrupted,
    train,
)

CHECKPOINT, PREVIOUS = checkpoints.CHECKPOINT_NAME, checkpoints.PREVIOUS_NAME

# One estimator per kind of state that a checkpoint has to carry.
RUNS: dict[str, Any] = {
    "hsan": lambda **kw: HSAN(2, epochs=13, width=8, n_init=2, refresh_every=3, **kw),
    "hsan-paper-code": lambda **kw: HSAN(
        2, epochs=13, width=8, refresh_every=3, tau=0.5, protocol="paper-code", lr=1e-2, **kw
    ),
    "hsan-snapshots": lambda **kw: RUNS["hsan-paper-code"](weight_storage="snapshots", **kw),
    "hsan-inertia": lambda **kw: HSAN(
        2, epochs=13, width=8, n_init=2, selection="inertia", eval_every=2, **kw
    ),
    "ecnmf": lambda **kw: ECNMF(
        2, epochs=13, width=8, n_init=2, update_every=4, target_every=3, lr=1e-2, **kw
    ),
    "hsan-batches": lambda **kw: RUNS["hsan"](batch_size=8, **kw),
    "ecnmf-batches": lambda **kw: RUNS["ecnmf"](train_batch_size=8, **kw),
    "ecnmf-loss": lambda **kw: ECNMF(
        2, epochs=13, width=8, n_init=2, selection="loss", eval_every=3, lr=1e-2, **kw
    ),
}


def assert_same_bits(a: Any, b: Any) -> None:
    assert np.array_equal(a.labels_, b.labels_)
    assert a.embedding_.tobytes() == b.embedding_.tobytes()
    assert a.selected_epoch_ == b.selected_epoch_
    assert a.parameters_.keys() == b.parameters_.keys()
    for name, value in a.parameters_.items():
        assert value.numpy().tobytes() == b.parameters_[name].numpy().tobytes(), name
    drop = {"seconds"}
    for x, y in zip(a.history_, b.history_, strict=True):
        assert {k: v for k, v in x.items() if k not in drop} == {
            k: v for k, v in y.items() if k not in drop
        }


class Cut(Exception):
    """Stands for whatever ends a process between two epochs."""


def cut_after(epoch: int) -> Any:
    def callback(event: Event) -> None:
        if event.epoch == epoch:
            raise Cut

    return callback


class Walk(nn.Module):
    """A model whose loss and clusters follow a script; one parameter that moves by lr an epoch."""

    def __init__(self, losses: list[float], labels: list[list[int]]) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(()))
        self.losses, self.labels, self.epoch = losses, labels, 0

    def begin(self) -> None:
        pass

    def loss(self) -> Tensor:
        return self.position - self.position.detach() + self.losses[self.epoch]

    def after_step(self, epoch: int) -> None:
        assert not torch.is_inference_mode_enabled()
        self.epoch = epoch + 1

    def assign(self, epoch: int) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        points = torch.tensor([[0.0, 0.1], [0.1, 0.0], [5.0, 5.1], [5.1, 5.0]])
        return torch.tensor(self.labels[epoch]), points + epoch

    def diagnostics(self) -> dict[str, float]:
        return {"position": float(self.position.detach())}

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        pass


TWO_PAIRS = sp.csr_array(np.kron(np.eye(2), [[0, 1], [1, 0]]).astype(np.float32))
GOOD, MIXED, POOR = [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 0, 1]


def test_events_and_history():
    events: list[Event] = []
    model = Walk([3.0, 2.0, 1.0, 0.5, 0.25, 0.2], [GOOD] * 6)
    result = train(
        model, epochs=6, lr=0.1, adjacency=TWO_PAIRS, eval_every=3, callbacks=[events.append]
    )
    assert [e.epoch for e in events] == [1, 2, 3, 4, 5, 6]
    assert all(e.n_epochs == 6 and e.seconds > 0 for e in events)
    assert [e.loss for e in events] == pytest.approx(model.losses)
    assert [e.epoch for e in events if e.evaluation is not None] == [1, 4, 6]
    evaluation = events[0].evaluation
    assert evaluation is not None
    assert evaluation["labels"].dtype == np.int64
    assert {"inertia", "calinski-harabasz", "davies-bouldin", "modularity"} <= set(evaluation)
    assert [h["epoch"] for h in result.history] == [1, 2, 3, 4, 5, 6]
    assert "inertia" in result.history[3] and "inertia" not in result.history[4]
    assert "labels" not in result.history[0]


@pytest.mark.parametrize("selection", sorted(SELECTIONS))
def test_selection_keeps_the_epoch_that_its_rule_prefers(selection):
    labels = [POOR, MIXED, GOOD, POOR, MIXED]
    model = Walk([3.0, 0.1, 1.0, 2.0, 1.5], labels)
    result = train(model, epochs=5, lr=0.1, adjacency=TWO_PAIRS, eval_every=1, selection=selection)
    expected = {"last": 5, "loss": 2}.get(selection, 3)
    assert result.epoch == expected
    assert result.labels.tolist() == labels[expected - 1]
    assert result.embedding[0, 0] == expected - 1
    # The parameters are of the same epoch: one step of Adam on a constant gradient moves by lr.
    assert float(result.parameters["position"]) == pytest.approx(-0.1 * expected, rel=1e-4)


def test_of_equal_scores_the_first_is_kept():
    model = Walk([1.0] * 3, [GOOD] * 3)
    result = train(
        model, epochs=3, lr=0.1, adjacency=TWO_PAIRS, eval_every=1, selection="modularity"
    )
    assert result.epoch == 1


def test_a_loss_that_is_not_finite_stops_the_run():
    model = Walk([1.0, float("nan")], [GOOD] * 2)
    with pytest.raises(TrainingDivergedError, match=r"nan in epoch 2; lower lr \(now 0.1\)"):
        train(model, epochs=2, lr=0.1, adjacency=TWO_PAIRS)


@pytest.mark.parametrize("scale", [1e20, float("inf"), float("nan")])
def test_an_embedding_that_cannot_be_scored_stops_the_run(monkeypatch, scale):
    """Squares of 1e20 are infinite: told as what it is, not as a wrong x of the scores."""
    embedding = torch.full((4, 2), scale)
    monkeypatch.setattr(Walk, "assign", lambda self, epoch: (torch.tensor(GOOD), embedding))
    with pytest.raises(TrainingDivergedError, match="after epoch 1; lower lr"):
        train(Walk([1.0], [GOOD]), epochs=1, lr=0.1, adjacency=TWO_PAIRS)


def test_intervals():
    assert parse_interval(25) == (25, 0.0)
    assert parse_interval("90s") == (0, 90.0)
    for bad in (0, -1, True, "25", "xs", "-3s", None, 2.5):
        with pytest.raises(ValueError, match="checkpoint_every must be a number of epochs"):
            parse_interval(bad)  # type: ignore[arg-type]


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(RUNS))
def test_a_resumed_run_ends_in_the_same_bits(kind, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    whole = RUNS[kind]().fit(x, adjacency=adjacency)
    cuts = np.random.default_rng(sorted(RUNS).index(kind)).permutation(np.arange(1, 13))[:3]
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Cut):
        RUNS[kind](callbacks=cut_after(1), **keep).fit(x, adjacency=adjacency)
    assert (tmp_path / CHECKPOINT).exists()  # though the callback came before the first was due
    for epoch in sorted(int(c) for c in cuts):
        if epoch > 1:
            with pytest.raises(Cut):
                RUNS[kind](callbacks=cut_after(epoch), resume=True, **keep).fit(
                    x, adjacency=adjacency
                )
    resumed = RUNS[kind](resume=True, **keep).fit(x, adjacency=adjacency)
    assert_same_bits(whole, resumed)
    # and once more from the checkpoint of the finished run
    assert_same_bits(whole, RUNS[kind](resume=True, **keep).fit(x, adjacency=adjacency))


def test_weights_of_a_checkpoint_may_become_stored_but_not_snapshots(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    runs = RUNS["hsan-snapshots"], RUNS["hsan-paper-code"]
    with pytest.raises(Cut):
        runs[0](callbacks=cut_after(6), **keep).fit(x, adjacency=adjacency)
    whole = runs[0]().fit(x, adjacency=adjacency)
    with pytest.raises(Cut):
        runs[1](callbacks=cut_after(10), resume=True, **keep).fit(x, adjacency=adjacency)
    assert "extra/tiles" in names_in(tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="stored, which only one process on the CPU"):
        runs[0](resume=True, **keep).fit(x, adjacency=adjacency)
    resumed = runs[1](resume=True, **keep).fit(x, adjacency=adjacency)
    assert resumed.resolved_["weight_storage"] == "stored"
    assert whole.resolved_["weight_storage"] == "snapshots"
    np.testing.assert_allclose(resumed.embedding_, whole.embedding_, atol=1e-4)


def test_checkpoints_do_not_change_the_run(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    plain = RUNS["hsan"]().fit(x, adjacency=adjacency)
    kept = RUNS["hsan"](checkpoint_dir=tmp_path, checkpoint_every="0s").fit(x, adjacency=adjacency)
    assert_same_bits(plain, kept)


def test_evaluating_more_often_does_not_change_the_run(two_blocks):
    adjacency, x, _ = two_blocks
    a = RUNS["hsan"]().fit(x, adjacency=adjacency)
    b = RUNS["hsan"](eval_every=1).fit(x, adjacency=adjacency)
    assert np.array_equal(a.labels_, b.labels_)
    assert a.embedding_.tobytes() == b.embedding_.tobytes()


KILLED = textwrap.dedent(
    """
    import sys, time
    import numpy as np
    import scipy.sparse as sp
    import fastclust as fc

    folder, out = sys.argv[1:]
    data = np.load(folder + "/data.npz")
    adjacency, x = sp.csr_array(data["a"]), data["x"]
    def report(event):
        print(event.epoch, flush=True)
        time.sleep(0.02)
    model = fc.HSAN(2, epochs=60, width=8, n_init=2, tau=0.5, lr=1e-2, protocol="paper-code",
                    callbacks=report, checkpoint_dir=folder, checkpoint_every=1, resume=True)
    model.fit(x, adjacency=adjacency).save(out)
    """
)


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    np.savez(tmp_path / "data.npz", a=adjacency.toarray(), x=x)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    rng = np.random.default_rng()
    for _ in range(3):
        resumable = (tmp_path / CHECKPOINT).exists()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first > 1 or not resumable, "the run started anew: its checkpoint was lost"
        time.sleep(float(rng.uniform(0, 0.4)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / CHECKPOINT).exists():
            with safe_open(tmp_path / CHECKPOINT, "pt") as file:  # loads, whatever moment it was
                assert file.metadata()["fastclust"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    whole = HSAN(2, epochs=60, width=8, n_init=2, tau=0.5, lr=1e-2, protocol="paper-code")
    assert_same_bits(whole.fit(x, adjacency=adjacency), HSAN.load(tmp_path / "out"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_epoch_and_leaves_a_checkpoint(number, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks

    def interrupt(event: Event) -> None:
        if event.epoch == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": "1000s"}
    with pytest.raises(TrainingInterrupted, match=f"{number.name} after epoch 4; checkpoint"):
        RUNS["ecnmf"](callbacks=interrupt, **keep).fit(x, adjacency=adjacency)
    assert signal.getsignal(number) is before
    resumed = RUNS["ecnmf"](resume=True, **keep).fit(x, adjacency=adjacency)
    assert_same_bits(RUNS["ecnmf"]().fit(x, adjacency=adjacency), resumed)


def epochs_kept(folder: Path) -> dict[str, int]:
    """Epochs done of every checkpoint file."""
    kept = {}
    for path in folder.iterdir():
        with safe_open(path, "pt") as file:
            kept[path.name] = json.loads(file.metadata()["record"])["epochs_done"]
    return kept


def names_in(path: Path) -> set[str]:
    """Names of the tensors of a checkpoint file."""
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("error", [Cut, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("kind", ["hsan-paper-code", "ecnmf"])
def test_an_exception_leaves_a_checkpoint_of_the_last_step(kind, error, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 5}

    def fail(event: Event) -> None:
        if event.epoch == 7:
            raise error

    with pytest.raises(error):
        RUNS[kind](callbacks=fail, **keep).fit(x, adjacency=adjacency)
    assert epochs_kept(tmp_path) == {CHECKPOINT: 7, PREVIOUS: 5}
    epochs: list[int] = []
    resumed = RUNS[kind](resume=True, callbacks=lambda e: epochs.append(e.epoch), **keep)
    resumed.fit(x, adjacency=adjacency)
    assert epochs[0] == 8
    assert_same_bits(RUNS[kind]().fit(x, adjacency=adjacency), resumed)


@pytest.mark.parametrize("kind", sorted(RUNS))
@pytest.mark.parametrize("half", ["loss", "backward", "after_step"])
def test_an_exception_within_a_step(kind, half, two_blocks, tmp_path, monkeypatch):
    """Where the memory is too small it is so for loss and gradient: parameters are as before."""
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 5}
    step = training._step

    def failing_step(state: Any, epoch: int) -> float:
        if epoch == 7:
            owner = Tensor if half == "backward" else type(state.model)
            whole = getattr(owner, half)

            def fail(*args: Any, **kwargs: Any) -> None:
                whole(*args, **kwargs)
                raise MemoryError

            monkeypatch.setattr(owner, half, fail)
        return step(state, epoch)

    monkeypatch.setattr(training, "_step", failing_step)
    with pytest.raises(MemoryError):
        RUNS[kind](**keep).fit(x, adjacency=adjacency)
    monkeypatch.undo()
    # Of "accumulated" the gradient is part of what a checkpoint holds.
    if half == "loss" or (half == "backward" and "grad/0" not in names_in(tmp_path / CHECKPOINT)):
        assert epochs_kept(tmp_path) == {CHECKPOINT: 7, PREVIOUS: 5}
    else:
        assert epochs_kept(tmp_path) == {CHECKPOINT: 5}
    resumed = RUNS[kind](resume=True, **keep).fit(x, adjacency=adjacency)
    assert_same_bits(RUNS[kind]().fit(x, adjacency=adjacency), resumed)


@pytest.mark.parametrize("kind", sorted(RUNS))
@pytest.mark.parametrize("part", ["assign", "internal_scores", "diagnostics"])
def test_an_exception_while_an_epoch_is_scored(kind, part, two_blocks, tmp_path, monkeypatch):
    """The step before it stands; whoever resumes scores first."""
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 50}
    steps = 0
    evaluate, step = training._evaluate, training._step

    def failing_evaluate(state: Any, epoch: int, *args: Any) -> Any:
        if epoch > 0:
            owner = training if part == "internal_scores" else type(state.model)
            whole = getattr(owner, part)

            def fail(*args: Any) -> None:
                whole(*args)
                raise MemoryError

            monkeypatch.setattr(owner, part, fail)
        return evaluate(state, epoch, *args)

    def counted_step(*args: Any) -> float:
        nonlocal steps
        steps += 1
        return step(*args)

    monkeypatch.setattr(training, "_evaluate", failing_evaluate)
    for resume in (False, True):  # twice: what is on disk is not written again
        with pytest.raises(MemoryError):
            RUNS[kind](resume=resume, **keep).fit(x, adjacency=adjacency)
        assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    monkeypatch.undo()
    monkeypatch.setattr(training, "_step", counted_step)
    epochs: list[int] = []
    resumed = RUNS[kind](resume=True, callbacks=lambda e: epochs.append(e.epoch), **keep)
    resumed.fit(x, adjacency=adjacency)
    assert epochs[0] > 1 and steps == len(epochs) - 1  # the first of them was made already
    assert_same_bits(RUNS[kind]().fit(x, adjacency=adjacency), resumed)


@pytest.mark.parametrize("scored", [False, True])
def test_divergence_leaves_no_checkpoint_of_it(scored, tmp_path, monkeypatch):
    model = Walk([1.0, 1.0, 1.0 if scored else float("nan")], [GOOD] * 3)
    if scored:
        endless = torch.full((4, 2), float("inf"))
        assign = Walk.assign
        monkeypatch.setattr(
            Walk,
            "assign",
            lambda self, e: (assign(self, e)[0], endless if e == 2 else torch.ones(4, 2)),
        )
    with pytest.raises(TrainingDivergedError):
        train(model, epochs=3, lr=0.1, adjacency=TWO_PAIRS, checkpoint_dir=tmp_path,
              checkpoint_every=2)  # fmt: skip
    assert epochs_kept(tmp_path) == {CHECKPOINT: 2}


@pytest.mark.parametrize("second", [OSError(errno.EIO, "no disk"), RuntimeError("no device")])
def test_a_checkpoint_that_cannot_be_written_masks_no_exception(
    second, two_blocks, tmp_path, monkeypatch
):
    adjacency, x, _ = two_blocks

    def fail(*args: Any) -> None:
        raise second

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(Cut) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        RUNS["ecnmf"](callbacks=cut_after(3), checkpoint_dir=tmp_path).fit(x, adjacency=adjacency)
    assert caught.value.__context__ is None
    assert not any(tmp_path.iterdir())


def test_a_second_signal_waits_for_no_checkpoint(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks

    def interrupt(event: Event) -> None:
        if event.epoch == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        RUNS["ecnmf"](callbacks=interrupt, checkpoint_dir=tmp_path).fit(x, adjacency=adjacency)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not any(tmp_path.iterdir())


def test_resuming_from_nowhere_is_refused(two_blocks, monkeypatch):
    adjacency, x, _ = two_blocks
    model = Walk([1.0], [GOOD])
    with pytest.raises(ValueError, match=r"checkpoint_dir must be .* resume=True, got None"):
        train(model, epochs=1, lr=0.1, adjacency=TWO_PAIRS, resume=True)
    monkeypatch.setattr(ECNMF, "_prepare", lambda *args: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"checkpoint_dir must be .* resume=True, got None"):
        RUNS["ecnmf"](resume=True).fit(x, adjacency=adjacency)


def test_without_checkpoints_a_signal_acts_at_once(two_blocks):
    adjacency, x, _ = two_blocks
    # A shell that starts the tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(event: Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            RUNS["ecnmf"](callbacks=interrupt).fit(x, adjacency=adjacency)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, TrainingInterrupted)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(
    two_blocks, tmp_path, monkeypatch
):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Cut):
        RUNS["hsan"](callbacks=cut_after(5), **keep).fit(x, adjacency=adjacency)
    old = (tmp_path / CHECKPOINT).read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.warns(CheckpointWarning, match="No space left.*the previous checkpoint stays"):
        resumed = RUNS["hsan"](resume=True, **keep).fit(x, adjacency=adjacency)
    assert (tmp_path / CHECKPOINT).read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, PREVIOUS]
    assert_same_bits(RUNS["hsan"]().fit(x, adjacency=adjacency), resumed)


def test_checkpoints_hold_plain_tensors_only(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    RUNS["hsan-paper-code"](checkpoint_dir=tmp_path).fit(x, adjacency=adjacency)
    names = names_in(tmp_path / CHECKPOINT)
    for prefix in ("model/", "adam/", "grad/", "extra/", "best/"):
        assert any(name.startswith(prefix) for name in names), prefix


@pytest.mark.parametrize(
    ("change", "named"),
    [({"tau": 0.8}, "tau"), ({"random_state": 3}, "random_state"), ({"epochs": 20}, "epochs")],
)
def test_a_checkpoint_of_other_settings_is_refused(change, named, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "resume": True}
    RUNS["hsan"](**keep).fit(x, adjacency=adjacency)
    with pytest.raises(CheckpointError, match=rf"belongs to another run \({named} was"):
        RUNS["hsan"](**keep).set_params(**change).fit(x, adjacency=adjacency)


def test_a_checkpoint_of_other_data_is_refused(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "resume": True}
    RUNS["ecnmf"](**keep).fit(x, adjacency=adjacency)
    other = x.copy()
    other[0, 0] += 1
    with pytest.raises(CheckpointError, match="data was"):
        RUNS["ecnmf"](**keep).fit(other, adjacency=adjacency)


def damaged(content: bytes, damage: str) -> bytes:
    if damage == "bit":  # one, in the middle of the numbers: the file still reads
        at = len(content) - 200
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    return {"truncated": content[:-100], "text": b"no checkpoint", "empty": b""}[damage]


DAMAGES = pytest.mark.parametrize("damage", ["truncated", "bit", "text", "empty"])


@DAMAGES
@pytest.mark.parametrize("kind", ["ecnmf", "hsan-inertia"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(kind, damage, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Cut):
        RUNS[kind](callbacks=cut_after(9), **keep).fit(x, adjacency=adjacency)
    path = tmp_path / CHECKPOINT
    path.write_bytes(damaged(path.read_bytes(), damage))
    epochs: list[int] = []
    told = rf"{CHECKPOINT} is damaged.*going on from the one before it, {PREVIOUS}, after epoch 8"
    with pytest.warns(CheckpointWarning, match=told):
        resumed = RUNS[kind](
            resume=True, callbacks=lambda event: epochs.append(event.epoch), **keep
        ).fit(x, adjacency=adjacency)
    assert epochs[0] == 9
    assert_same_bits(RUNS[kind]().fit(x, adjacency=adjacency), resumed)


@DAMAGES
def test_two_damaged_checkpoints_are_refused(damage, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 5, "resume": True}
    RUNS["ecnmf"](**keep).fit(x, adjacency=adjacency)
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes(), damage))
    with pytest.raises(
        CheckpointError,
        match=rf"{CHECKPOINT} is damaged .* and .*{PREVIOUS} is damaged .*remove both",
    ):
        RUNS["ecnmf"](**keep).fit(x, adjacency=adjacency)
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT} is damaged .*; remove it to start"):
        RUNS["ecnmf"](**keep).fit(x, adjacency=adjacency)


def test_a_kill_between_the_two_renames_loses_nothing(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": 5}
    with pytest.raises(Cut):
        RUNS["hsan"](callbacks=cut_after(6), **keep).fit(x, adjacency=adjacency)
    (tmp_path / CHECKPOINT).rename(tmp_path / PREVIOUS)
    epochs: list[int] = []
    RUNS["hsan"](resume=True, callbacks=lambda e: epochs.append(e.epoch), **keep).fit(
        x, adjacency=adjacency
    )
    assert epochs[0] == 7


def test_on_a_nearly_full_disk_the_newer_checkpoint_is_worth_more(
    two_blocks, tmp_path, monkeypatch
):
    adjacency, x, _ = two_blocks
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    RUNS["ecnmf"](checkpoint_dir=tmp_path, checkpoint_every=6).fit(x, adjacency=adjacency)
    assert (tmp_path / CHECKPOINT).exists()


def test_the_clock_may_jump(two_blocks, tmp_path, monkeypatch):
    """Intervals and durations are measured by a clock that nobody sets."""
    adjacency, x, _ = two_blocks
    year = 365 * 86400.0
    now = itertools.cycle([0.0, 60 * year, 30 * year, -year])
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(now) * 1e9))
    keep = {"checkpoint_dir": tmp_path, "checkpoint_every": "0s"}
    with pytest.raises(Cut):
        RUNS["hsan"](callbacks=cut_after(6), **keep).fit(x, adjacency=adjacency)
    resumed = RUNS["hsan"](resume=True, **keep).fit(x, adjacency=adjacency)
    assert [entry["epoch"] for entry in resumed.history_] == list(range(1, 14))
    assert all(0 < entry["seconds"] < 60 for entry in resumed.history_)


def test_a_checkpoint_folder_that_cannot_be_made(two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint_dir must be a folder that can be created"):
        RUNS["ecnmf"](checkpoint_dir=tmp_path / "file" / "run").fit(x, adjacency=adjacency)


def test_every_selection_has_a_direction() -> None:
    assert list(get_args(training.Selection)) == list(training.SELECTIONS)


def test_embedding_that_overflows_is_divergence(two_blocks) -> None:
    """The loss of that epoch, from before the step, is finite; X is not to blame."""
    adjacency, x, _ = two_blocks
    with pytest.raises(training.TrainingDivergedError, match="lower lr"):
        ECNMF(4, lr=1e30, epochs=3, width=32).fit(x, adjacency=adjacency)
