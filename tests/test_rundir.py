"""The run directory: layout, atomic files, earlier runs set aside."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from fastclust.cli import UsageError
from fastclust.files import write_atomically
from fastclust.rundir import RunDirectory, format_toml, read_toml


def test_settings_survive_toml(tmp_path: Path) -> None:
    settings = {
        "dataset": 'a "quoted" \\ näme\n',
        "seeds": [0, 3],
        "lr": 1e-05,
        "beta": float("inf"),
        "width": 600,
        "norm": True,
    }
    path = tmp_path / "config.toml"
    write_atomically(path, format_toml(settings))
    assert read_toml(path) == settings
    assert format_toml({"rank": None}) == 'rank = "none"\n'


@pytest.mark.parametrize("content", [b"lr = ", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_bad_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="must be a TOML file"):
        read_toml(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_toml(tmp_path / "absent.toml")


def test_first_seed_lies_on_top(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "b")
    directory.begin([4, 0], {"seeds": [4, 0]})
    assert directory.folder(4) == directory.root
    assert directory.folder(0) == directory.root / "seed-0"

    class Fitted:
        labels_ = np.array([1, 0])
        embedding_ = np.ones((2, 3), np.float32)

        def save(self, folder: Path) -> None:
            (folder / "model.safetensors").touch(mode=0o600)

    directory.write_seed(4, Fitted())
    assert (directory.root / "assignments.csv").read_text() == "node,cluster\n0,1\n1,0\n"
    assert np.load(directory.root / "embedding.npy").shape == (2, 3)


def test_earlier_runs_are_set_aside(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for name in ("notes.txt", "seed-nodes.csv"):
        (tmp_path / name).write_text("mine")
    assert directory.set_aside() is None
    for number in (1, 2):
        directory.write_result({"n": number})
        (tmp_path / "seed-1").mkdir()
        assert directory.set_aside() == tmp_path / f"previous-{number}"
        assert (tmp_path / f"previous-{number}" / "seed-1").is_dir()
        assert directory.read_result() is None
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "seed-nodes.csv").exists()


def test_directory_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out must be a directory"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(UsageError, match="--out must be a directory"):
        RunDirectory("/proc/fastclust")


needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="the system has no flock")


@needs_locks
def test_one_run_at_a_time(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).held():
        with (
            pytest.raises(UsageError, match=rf"in use by another run \(process {os.getpid()}\)"),
            RunDirectory(tmp_path).held(),
        ):
            pass
        assert (tmp_path / ".lock").exists(), "who was refused leaves the lock alone"
    assert list(tmp_path.iterdir()) == []


def _hold_until_killed(root: Path) -> None:
    with RunDirectory(root).held():
        os.kill(os.getpid(), signal.SIGKILL)


@needs_locks
def test_a_killed_run_keeps_nobody_out(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_hold_until_killed, args=(tmp_path,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and (tmp_path / ".lock").exists()
    with RunDirectory(tmp_path).held():
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_a_lock_that_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that opens the file just before its holder removes it must lock the next one."""
    import fcntl

    flock, held = fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        if not held:
            (tmp_path / ".lock").unlink()
        held.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunDirectory(tmp_path).held():
        assert len(held) == 2 and (tmp_path / ".lock").exists()


@needs_locks
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunDirectory(tmp_path).held(), RunDirectory(tmp_path).held():
        pass


def test_damaged_result(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    run = b'"seed": 0, "metrics": {}'
    for content in (b'{"runs": [', b"[]", b'{"runs": [{%s}]}' % run, b"\xff", b"[" * 100_000):
        (tmp_path / "result.json").write_bytes(content)
        with pytest.raises(UsageError, match="damaged"):
            directory.read_result()
