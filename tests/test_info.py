"""python -m fastclust.info."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastclust
from fastclust import info


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastclust.info", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def test_text_names_versions_cpu_and_gpu() -> None:
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["fastclust"] == fastclust.__version__
    for word in ("torch", "numpy", "cpu dispatch", "cpu features", "cuda library", "gpu"):
        assert any(line.startswith(word) for line in done.stdout.splitlines()), word


def test_json_is_one_object_and_level_can_be_lowered() -> None:
    done = run("--json", FASTCLUST_CPU_LEVEL="portable")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["cpu"]["dispatch_level"] == "portable"
    assert found["cpu"]["dispatch_level_forced"] == "portable"
    assert found["cuda"]["usable"] == bool(found["cuda"]["usable"] and found["cuda"]["gpus"])
    assert set(found) == {"versions", "platform", "build", "cpu", "cuda"}


def test_level_that_does_not_exist_is_told() -> None:
    done = run("--json", FASTCLUST_CPU_LEVEL="foo")
    assert done.returncode == 0
    assert "FASTCLUST_CPU_LEVEL must be one of portable, avx2, avx512, got 'foo'" in done.stderr


def test_collect_is_what_json_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(
        name="GeForce", major=7, minor=5, total_memory=2**33, multi_processor_count=40
    )
    answers = {"is_available": True, "device_count": 1, "get_device_properties": old,
               "get_device_capability": (7, 5), "get_device_name": "GeForce"}  # fmt: skip
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr("fastclust.validation.cuda_loaded", True)
    found = info.collect()
    assert not found["cuda"]["usable"] and not found["cuda"]["gpus"][0]["usable"]
    rows = dict(info._rows(found))
    assert rows["gpu"].endswith("40 multiprocessors, not used")
    assert rows["cuda needs"] == "compute 8.0 or later"


def test_unknown_argument_is_one_line() -> None:
    done = run("--jsn")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--jsn" in done.stderr and "did you mean --json" in done.stderr
