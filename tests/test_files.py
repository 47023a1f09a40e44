"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastclust import files
from fastclust.files import replacing, write_atomically


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", "")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_safetensors_errors_are_those_of_files(tmp_path: Path) -> None:
    """Disk full and the like, by number; and what it leaves is as readable as other files."""
    old = os.umask(0o022)
    try:
        with replacing(tmp_path / "model") as temporary:
            save_file({"x": torch.ones(2)}, temporary)
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o644
    with pytest.raises(OSError) as caught, replacing(tmp_path / "model"):
        save_file({"x": torch.ones(2)}, tmp_path / "nowhere" / "model")
    assert caught.value.errno == errno.ENOENT
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_json_of_what_json_has_no_word_for() -> None:
    value = {1: [np.float32(0.5), np.int64(3), float("nan")], "a": (float("inf"), None, True)}
    assert json.dumps(files.as_json(value)) == '{"1": [0.5, 3, null], "a": [null, null, true]}'
