"""benchmarks/gpu.sh and gpu_table.py, as far as a machine without a GPU can tell."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not (BENCHMARKS / "gpu.py").is_file(), reason="no benchmarks here")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return module("gpu")


@pytest.fixture(scope="module")
def gpu_table() -> ModuleType:
    return module("gpu_table")


@pytest.fixture
def made_up_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCLUST_DATA", raising=False)


@pytest.mark.parametrize(
    "part",
    [
        *["ceilings", "infonce", "propagate", "propagate-large", "lowrank", "kmeans"],
        *["sanitizer", "profile"],
    ],
)
def test_every_part_runs_on_tiny_shapes(gpu, tmp_path, made_up_graphs, part) -> None:
    assert gpu.run_part(part, tmp_path, tiny=True) == 0
    content = json.loads((tmp_path / f"{gpu.SUBJECTS.get(part, part)}.json").read_text())
    assert set(content) == {
        "subject", "device", "tiny", "card", "versions", "commit", "seconds", "rows", "errors",
    }  # fmt: skip
    assert content["tiny"] and content["device"] == "cpu" and not content["errors"]
    assert content["rows"] and all(row["part"] == part for row in content["rows"])
    assert "torch" in content["versions"]
    if part not in ("sanitizer", "profile"):
        assert all(row["ms"] > 0 for row in content["rows"])


@pytest.mark.slow
def test_the_whole_script_dry(tmp_path, made_up_graphs) -> None:
    """All parts through the shell, at most eight small files, a summary line each."""
    script = [str(BENCHMARKS / "gpu.sh"), "--dry-run", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(script, capture_output=True, text=True, timeout=500, env=environment)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + log[-3000:]
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(files) <= 8 and "log.txt" in files and "train.json" in files
    assert all(p.stat().st_size < 2**20 for p in (tmp_path / "out").iterdir())
    training = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {row["what"] for row in training["rows"]} >= {"training", "agreement", "epoch"}
    assert training["cpu_rows"]


def test_a_failing_case_leaves_the_others(gpu, tmp_path) -> None:
    report = gpu.Report("subject", "part", tmp_path, "cpu", True)

    def broken() -> None:
        raise RuntimeError("no such kernel")

    report.case("first", broken, d=3)
    report.case("second", lambda: {"ms": 1.23456789})
    content = json.loads((tmp_path / "subject.json").read_text())
    assert content["rows"] == [{"part": "part", "case": "second", "ms": 1.2346}]
    assert content["errors"] == [
        {"part": "part", "case": "first", "d": "3", "error": "RuntimeError: no such kernel"}
    ]


def test_parts_are_cut_off_and_the_next_ones_run(gpu, tmp_path, monkeypatch, capsys) -> None:
    """Also: parts of one subject share a file, and a part that dies takes nothing with it."""
    child = tmp_path / "gpu.py"
    child.write_text(
        "import json, os, sys, time, pathlib\n"
        "part = sys.argv[sys.argv.index('--one') + 1]\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "if part == 'lowrank': time.sleep(60)\n"
        "if part == 'kmeans': os.abort()\n"
        "(out / f'{part}.json').write_text(json.dumps({'rows': [], 'errors': []}))\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(child))
    parts = dict(gpu.PARTS)
    parts["lowrank"] = (parts["lowrank"][0], 5.5)
    monkeypatch.setattr(gpu, "PARTS", parts)
    start = time.perf_counter()
    assert gpu.run_all(["lowrank", "kmeans", "ceilings"], tmp_path / "", True, 60) == 1
    assert time.perf_counter() - start < 30
    printed = capsys.readouterr().out
    assert "lowrank: cut off" in printed
    assert "kmeans: with errors" in printed
    assert "ceilings: ok" in printed
    assert gpu.run_all(["ceilings"], tmp_path, True, 3) == 1
    assert "ceilings: ok" not in capsys.readouterr().out  # no time left


def test_the_limits_fit_into_ten_minutes(gpu) -> None:
    """Every part's limit holds alone; the sum is cut by the deadline that run_all is given."""
    assert all(5 < limit <= 210 for _, limit in gpu.PARTS.values())
    subjects = {gpu.SUBJECTS.get(name, name) for name in gpu.PARTS}
    assert len(subjects) + 1 <= 8


@pytest.mark.parametrize("arguments", [["--out"], ["--out", "x", "nonsense"], []])
def test_wrong_usage(gpu, arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_script_wants_a_folder() -> None:
    done = subprocess.run([str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


def test_made_up_graph_has_the_shape_of_its_model(gpu, tmp_path, made_up_graphs) -> None:
    dataset = gpu.load("cora", tmp_path)
    n, entries, width, density, k, _ = gpu.SHAPES["cora"]
    assert dataset.adjacency.shape == (n, n) and abs(dataset.adjacency.nnz - entries) <= 2
    assert dataset.features.shape == (n, width) and dataset.n_clusters == k
    assert 0.5 * density < dataset.features.nnz / (n * width) < 2 * density


def test_profiles_are_read_by_kernel(gpu) -> None:
    """Nsight Compute's CSV: a line per launch and metric, after lines of its own."""
    header = (
        '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    )
    lines = ["==PROF== Connected to process 7", header]
    for launch, (kernel, duration, unit) in enumerate(
        [("tile_kernel(Args)", "1,500", "nsecond"), ("tile_kernel(Args)", "2.5", "usecond"),
         ("sum_kernel(Args)", "1", "usecond")]
    ):  # fmt: skip
        start = f'"{launch}","7","{kernel}","GPU Speed Of Light Throughput"'
        lines += [
            f'{start},"Duration","{unit}","{duration}"',
            f'{start},"Elapsed Cycles","cycle","9"',
        ]
        lines += [f'{start},"L2 Cache Throughput","%","{40 + launch}"']
        lines += [f'{start},"DRAM Throughput","%","n/a"']
    assert gpu.kernel_rows("\n".join(lines)) == [
        {"kernel": "tile_kernel", "launches": 2, "us": 2.0, "l2_percent": 40.5},
        {"kernel": "sum_kernel", "launches": 1, "us": 1.0, "l2_percent": 42.0},
    ]
    assert gpu.kernel_rows("==ERROR== no permission") == []


# ---- the table ----------------------------------------------------------------------------------


def result(subject: str, rows: list[dict], **changes) -> str:
    content = {
        "subject": subject, "device": "cuda", "tiny": False, "seconds": 1.0, "commit": "abc",
        "card": {"name": "Card 9000", "driver_version": "1.2"}, "versions": {"torch": "2.11"},
        "rows": rows, "errors": [],
    }  # fmt: skip
    return json.dumps(content | changes)


def test_table_from_results(gpu_table, tmp_path) -> None:
    readme, kept, out = tmp_path / "README.md", tmp_path / "kept", tmp_path / "out"
    readme.write_text(f"a\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nb\n")
    out.mkdir()
    row = {
        "part": "infonce", "case": "amac", "peer": "fastclust", "what": "forward", "ms": 4.321,
        "rate": 700.0, "unit": "TFLOP/s", "share": 0.61, "peak_bytes": 2**20, "weights": "snapshot",
    }  # fmt: skip
    trained = {
        "part": "train",
        "case": "cora",
        "model": "hsan",
        "seconds": 9.0,
        "acc": 0.7,
        "nmi": 0.5,
    }
    (out / "infonce.json").write_text(result("infonce", [row, {"part": "x", "case": "no timing"}]))
    (out / "train.json").write_text(result("train", [trained], errors=[{"case": "x"}]))
    assert gpu_table.main([str(out)], kept, readme) == 0
    text = readme.read_text()
    assert "Card 9000" in text and "abc" in text and "old" not in text
    assert (
        "| infonce: amac, forward, weighted | fastclust | 4.32 ms | 700 TFLOP/s = 61 % | 1 MiB |"
        in text
    )
    assert "| hsan: cora | fastclust | 9 s | ACC 70.0, NMI 50.0 |  |" in text
    assert "1 cases failed" in text and text.startswith("a\n") and text.endswith("b\n")
    assert gpu_table.main(["--check"], kept, readme) == 0
    readme.write_text(text.replace("4.32", "0.01"))
    assert gpu_table.main(["--check"], kept, readme) == 1


@pytest.mark.parametrize("changes", [{"tiny": True}, {"device": "cpu"}])
def test_dry_runs_never_reach_the_table(gpu_table, tmp_path, changes) -> None:
    (tmp_path / "x.json").write_text(result("x", [], **changes))
    with pytest.raises(SystemExit, match="no measurement of a GPU"):
        gpu_table.read(tmp_path)


def test_readme_is_what_the_results_say(gpu_table) -> None:
    assert gpu_table.main(["--check"]) == 0
