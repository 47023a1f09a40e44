"""The run directory: layout, atomic files, earlier runs set aside."""

from __future__ import annotations

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
    (tmp_path / "notes.txt").write_text("mine")
    assert directory.set_aside() is None
    for number in (1, 2):
        directory.write_result({"n": number})
        (tmp_path / "seed-1").mkdir()
        assert directory.set_aside() == tmp_path / f"previous-{number}"
        assert (tmp_path / f"previous-{number}" / "seed-1").is_dir()
        assert directory.read_result() is None
    assert (tmp_path / "notes.txt").exists()


def test_directory_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out must be a directory"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(UsageError, match="--out must be a directory"):
        RunDirectory("/proc/fastclust")


def test_damaged_result(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    run = b'"seed": 0, "metrics": {}'
    for content in (b'{"runs": [', b"[]", b'{"runs": [{%s}]}' % run, b"\xff", b"[" * 100_000):
        (tmp_path / "result.json").write_bytes(content)
        with pytest.raises(UsageError, match="damaged"):
            directory.read_result()
