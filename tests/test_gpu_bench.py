"""benchmarks/gpu.sh, gpu/ and gpu_table.py, as far as a machine without a GPU can tell."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not (BENCHMARKS / "gpu").is_dir(), reason="no benchmarks here")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    """Benchmarks can be imported."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpu(benchmarks: None) -> ModuleType:
    importlib.import_module("gpu.command")  # and with it all others
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def gpu_table(benchmarks: None) -> ModuleType:
    return importlib.import_module("gpu_table")


@pytest.fixture
def made_up_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCLUST_DATA", raising=False)


@pytest.mark.parametrize(
    "part",
    [
        *["ceilings", "infonce", "infonce-hopper", "propagate", "propagate-large", "lowrank"],
        *["kmeans", "epochs", "sanitizer", "determinism", "profile"],
    ],
)
def test_every_part_runs_on_tiny_shapes(gpu, tmp_path, made_up_graphs, part) -> None:
    assert gpu.parts.run_part(part, tmp_path, tiny=True) == 0
    content = json.loads((tmp_path / f"{gpu.parts.SUBJECTS.get(part, part)}.json").read_text())
    assert set(content) == {
        "subject", "device", "tiny", "card", "versions", "commit", "seconds", "rows", "errors",
    }  # fmt: skip
    assert content["tiny"] and content["device"] == "cpu" and not content["errors"]
    assert content["rows"] and all(row["part"] == part for row in content["rows"])
    assert "torch" in content["versions"]
    if part not in ("sanitizer", "determinism", "profile"):
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
    report = gpu.report.Report("subject", "part", tmp_path, "cpu", True)

    def broken() -> None:
        raise RuntimeError("no such kernel")

    report.case("first", broken, d=3)
    report.case("second", lambda: {"ms": 1.23456789})
    content = json.loads((tmp_path / "subject.json").read_text())
    assert content["rows"] == [{"part": "part", "case": "second", "ms": 1.2346}]
    assert content["errors"] == [
        {"part": "part", "case": "first", "d": "3", "error": "RuntimeError: no such kernel"}
    ]


def test_a_lost_context_ends_the_part(gpu, tmp_path, monkeypatch) -> None:
    """After a kernel has failed every CUDA call does; later cases would tell nothing."""
    report = gpu.report.Report("subject", "part", tmp_path, "cuda", True)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(gpu.report.ContextLost, match="after first"):
        report.case("first", lost)
    content = json.loads((tmp_path / "subject.json").read_text())
    assert [error["case"] for error in content["errors"]] == ["first"]


def test_a_slow_driver_holds_nothing_up(gpu, tmp_path, monkeypatch) -> None:
    """nvidia-smi may hang; and it is not asked after every case."""
    asked = []

    def hangs(*command: str) -> str:
        asked.append(command)
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(gpu.report, "_output", hangs)
    monkeypatch.delenv("FASTCLUST_COMMIT", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card 9000")
    for name in ("commit", "_card"):
        getattr(gpu.report, name).cache_clear()
    report = gpu.report.Report("subject", "part", tmp_path, "cpu", True)
    for case in range(20):
        report.case(str(case), lambda: {"ms": 1.0})
    for name in ("commit", "_card"):
        getattr(gpu.report, name).cache_clear()
    assert len(asked) <= 4
    content = json.loads((tmp_path / "subject.json").read_text())
    assert content["card"] == {"name": "Card 9000"} and content["commit"] == "unknown"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")
def test_a_time_limit_holds_for_what_a_command_starts(gpu, tmp_path) -> None:
    """A profiler's program, a worker of pytest: it has the output open and runs on."""
    note = tmp_path / "pid"
    child = f"sleep 50 & echo $! >{note}; echo said; wait"
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match="not done in 1 s: said"):
        gpu.processes.call(["sh", "-c", child], 1.0)
    assert time.perf_counter() - start < 20
    pid = int(note.read_text())
    for _ in range(100):  # whoever adopts it has to collect it
        path = Path(f"/proc/{pid}/stat")
        if not path.is_file() or path.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it lives on")


def test_kernels_are_timed_without_gaps_between_launches(gpu, monkeypatch) -> None:
    """The device waits for the host before the first event, and the host's time is told."""
    seen = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("record")

        def synchronize(self) -> None:
            seen.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 0.5

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: seen.append(f"sleep {cycles >= 2e5}"))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(cuda, name, lambda: 0)
    row = gpu.timing.measure(lambda: seen.append("run"), "cuda", 0, kernels=True)
    assert seen == ["run", "run", "sleep True", "record", "run", "record", "wait"]
    assert row["ms"] == 0.5 and 0 < row["host_ms"] < 1000
    seen.clear()
    assert "host_ms" not in gpu.timing.measure(lambda: None, "cuda", 0)
    assert seen == ["record", "record", "wait"]


def test_a_share_is_of_the_ceiling_of_the_same_arithmetic(gpu, tmp_path) -> None:
    rates = {"gemm-bf16": 8.0, "gemm-tf32": 4.0, "gemm-fp32": 1.0}
    rows = [{"part": "ceilings", "case": name, "rate": rate} for name, rate in rates.items()]
    (tmp_path / "ceilings.json").write_text(json.dumps({"rows": rows, "errors": []}))
    gpu.parts.run_part("infonce", tmp_path, tiny=True)
    found = json.loads((tmp_path / "infonce.json").read_text())["rows"]
    assert {row["peer"] for row in found} == {"fastclust", "eager torch"}
    for row in found:
        kind = {"bf16x3": "bf16"}.get(row["precision"], row["precision"])
        times = 3 if row["precision"] == "bf16x3" else 1
        assert row["ceiling"] == f"gemm-{kind}"
        assert row["share"] == pytest.approx(times * row["rate"] / rates[f"gemm-{kind}"], rel=1e-3)


def test_checks_run_side_by_side_into_one_file(
    gpu, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    """And what was cut off or crashed says so in its file."""
    child = tmp_path / "gpu.py"
    started = tmp_path_factory.mktemp("started")
    child.write_text(
        "import json, os, sys, time, pathlib\n"
        "part = sys.argv[sys.argv.index('--one') + 1]\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "name = {'tests': 'checks'}.get(part, part)\n"
        "rows = [{'part': part, 'case': 'x'}]\n"
        "(out / f'{name}.json').write_text(json.dumps({'rows': rows, 'errors': []}))\n"
        f"started = pathlib.Path({str(started)!r})\n"
        "(started / part).touch()\n"
        "while len(list(started.iterdir())) < 3: time.sleep(0.05)\n"  # in turn: for ever
        "if part == 'sanitizer': time.sleep(60)\n"
        "if part == 'determinism': os.abort()\n"
    )
    monkeypatch.setattr(gpu.parts, "PROGRAM", str(child))
    parts = dict(gpu.parts.PARTS)
    parts["sanitizer"] = (parts["sanitizer"][0], 6.0)
    monkeypatch.setattr(gpu.parts, "PARTS", parts)
    assert gpu.parts.run_all(["tests", "determinism", "sanitizer"], tmp_path, True, 60) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checks.json", "gpu.py", "log.txt"]
    content = json.loads((tmp_path / "checks.json").read_text())
    assert [row["part"] for row in content["rows"]] == ["tests", "determinism", "sanitizer"]
    assert [(error["part"], error["error"]) for error in content["errors"]] == [
        ("determinism", "ended with exit code -6"),
        ("sanitizer", "cut off after 6 s"),
    ]


def test_a_second_call_keeps_what_it_does_not_repeat(gpu, tmp_path, monkeypatch) -> None:
    child = tmp_path / "gpu.py"
    child.write_text("")
    monkeypatch.setattr(gpu.parts, "PROGRAM", str(child))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("ceilings", "lowrank"):
        (out / f"{name}.json").write_text(json.dumps({"rows": [{"part": name}], "errors": []}))
    assert gpu.parts.run_all(["profile", "lowrank"], out, True, 60) == 0
    assert (out / "ceilings.json").is_file() and not (out / "lowrank.json").is_file()


def test_trainings_on_the_cpu_are_compared_at_the_end(gpu, tmp_path) -> None:
    """They may end after those on the GPU did."""
    row = {"case": "cora", "model": "ecnmf", "acc": 0.7, "acc_std": None}
    here = row | {"part": "train", "what": "training"}
    there = row | {"part": "train-cpu", "acc": 0.6}
    (tmp_path / "train.json").write_text(json.dumps({"rows": [here], "errors": []}))
    aside = tmp_path / "aside"
    aside.mkdir()
    (aside / "train-cpu.json").write_text(json.dumps({"rows": [there], "errors": []}))
    gpu.parts.fold_in("train-cpu", aside, tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["cpu_rows"] == [there] and not list(aside.iterdir())
    (compared,) = (r for r in content["rows"] if r["what"] == "agreement")
    assert compared["acc_cpu"] == 0.6 and not compared["agrees"]


def test_made_up_graphs_are_found_from_anywhere(gpu, tmp_path, monkeypatch, made_up_graphs) -> None:
    """Trainings run in another folder; and only results are in OUT, where there is a scratch."""
    monkeypatch.chdir(tmp_path)
    assert Path(gpu.graphs.dataset_path("tiny", Path())).is_absolute()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("FASTCLUST_BENCH_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "out").mkdir()
    gpu.graphs.dataset_path("tiny", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert [p.name for p in (tmp_path / "scratch").iterdir()] == ["tiny-like.npz"]


def test_a_sanitizer_that_checked_nothing_is_an_error(gpu) -> None:
    done = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
    assert gpu.checks.sanitizer_summary(done) == "ERROR SUMMARY: 0 errors"
    with pytest.raises(RuntimeError, match="nothing was checked"):
        gpu.checks.sanitizer_summary("========= Error: No attachable process found. timed-out.")
    text = f"{done.splitlines()[0]}\ninfonce bf16\n========= Invalid read of size 4\n{done}"
    assert gpu.checks.sanitizer_said(text)[0] == "Invalid read of size 4"
    assert "--kernel-name" not in gpu.checks.sanitizer_options(
        "initcheck"
    )  # torch's kernels write, too


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "infonce bf16 plain float32"
case "$*" in
*memcheck*) echo "========= Invalid __global__ read of size 4 bytes"; code=9;;
*racecheck*) sleep 60 & wait;;
*initcheck*) exit 0;;
esac
echo "========= ERROR SUMMARY: 0 errors"
exit $code
"""


def test_what_the_sanitizer_says(gpu, tmp_path, monkeypatch) -> None:
    """Its errors, where it was when time was over, and nothing that it did not say."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu.checks, "SANITIZER_SECONDS", 2.0)
    (tmp_path / "out").mkdir()
    report = gpu.report.Report("sanitizer", "sanitizer", tmp_path / "out", "cuda", False)
    start = time.perf_counter()
    gpu.checks.sanitizer(report)
    assert time.perf_counter() - start < 30
    assert [row["case"] for row in report.rows] == ["synccheck", "sm90 synccheck"]
    assert report.rows[0]["summary"] == "ERROR SUMMARY: 0 errors"
    memcheck, racecheck, initcheck, *of_hopper = report.errors
    assert "exit code 9: Invalid __global__ read" in memcheck["error"] and len(of_hopper) == 3
    assert "not done in time, after ['infonce bf16 plain float32']" in racecheck["error"]
    assert "nothing was checked" in initcheck["error"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sanitizer.json"]


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
    monkeypatch.setattr(gpu.parts, "PROGRAM", str(child))
    parts = dict(gpu.parts.PARTS)
    parts["lowrank"] = (parts["lowrank"][0], 5.5)
    monkeypatch.setattr(gpu.parts, "PARTS", parts)
    start = time.perf_counter()
    assert gpu.parts.run_all(["lowrank", "kmeans", "ceilings"], tmp_path / "", True, 60) == 1
    assert time.perf_counter() - start < 30
    printed = capsys.readouterr().out
    assert "lowrank: cut off" in printed
    assert "kmeans: with errors" in printed
    assert "ceilings: ok" in printed
    assert gpu.parts.run_all(["ceilings"], tmp_path, True, 3) == 1
    assert "ceilings: ok" not in capsys.readouterr().out  # no time left


def test_the_limits_fit_into_ten_minutes(gpu) -> None:
    """Every part's limit holds alone; the sum is cut by the deadline that run_all is given."""
    assert all(5 < limit <= 210 for _, limit in gpu.parts.PARTS.values())
    subjects = {
        gpu.parts.FOLDED.get(name, gpu.parts.SUBJECTS.get(name, name)) for name in gpu.parts.PARTS
    }
    assert len(subjects) + 1 <= 8


@pytest.mark.parametrize("arguments", [["--out"], ["--out", "x", "nonsense"], []])
def test_wrong_usage(gpu, arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        gpu.command.main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_relative_folders(gpu, tmp_path, monkeypatch) -> None:
    """Trainings, which look for the same data, run in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCLUST_DATA", "data")
    monkeypatch.setitem(gpu.parts.PARTS, "kmeans", (lambda report: None, 30))
    assert gpu.command.main(["--out", "out", "--one", "kmeans", "--tiny"]) == 0
    assert os.environ["FASTCLUST_DATA"] == str(tmp_path / "data")
    assert (tmp_path / "out" / "kmeans.json").is_file()


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*get_device_capability*) echo 9.0a;;
*"pip install"*) sleep 1.1; [ -n "$BUILDS" ] && touch fastclust/libfastclust_cuda.so; exit 1;;
*) echo "ran $* with $PYTHONPATH";;
esac
"""


@pytest.mark.parametrize("builds", ["", "1"])
def test_what_was_built_is_used_where_it_cannot_be_installed(tmp_path, builds: str) -> None:
    for folder in ("benchmarks", "fastclust"):
        (tmp_path / folder).mkdir()
    (tmp_path / "fastclust" / "libfastclust_cuda.so").touch()  # an old one does not count
    script, python = tmp_path / "benchmarks" / "gpu.sh", tmp_path / "python"
    for path, text in ((script, (BENCHMARKS / "gpu.sh").read_text()), (python, FAKE_PYTHON)):
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": "", "BUILDS": builds}
    command = [str(script), str(tmp_path / "out"), "kmeans"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == (0 if builds else 1), done.stdout
    assert ("build: FAILED" in done.stdout) != bool(builds)
    assert (
        "benchmarks/gpu --out" in done.stdout and f"kmeans with {tmp_path}" in done.stdout
    ) == bool(builds)


def test_script_wants_a_folder() -> None:
    done = subprocess.run([str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


def test_a_made_up_graph_is_not_called_by_a_real_name(
    gpu, tmp_path, monkeypatch, made_up_graphs
) -> None:
    """An accuracy on it would stand in the README as one on Cora."""
    assert gpu.graphs.graph_name("tiny", tmp_path) == "tiny-like"
    monkeypatch.setattr(gpu.trainings, "train_once", lambda *args: {})
    monkeypatch.setattr(gpu.trainings, "train_row", lambda result: {"acc": 0.9})
    report = gpu.report.Report("train", "train", tmp_path, "cpu", True)
    gpu.trainings.train(report)
    gpu.trainings.train_cpu(report)
    assert {row["case"] for row in report.rows} == {"tiny-like"}
    (tmp_path / "tiny.npz").touch()
    monkeypatch.setenv("FASTCLUST_DATA", str(tmp_path))
    assert gpu.graphs.graph_name("tiny", tmp_path) == "tiny"


def test_made_up_graph_has_the_shape_of_its_model(gpu, tmp_path, made_up_graphs) -> None:
    dataset = gpu.graphs.load("cora", tmp_path)
    n, entries, width, density, k, _ = gpu.graphs.SHAPES["cora"]
    assert dataset.adjacency.shape == (n, n) and abs(dataset.adjacency.nnz - entries) <= 2
    assert dataset.features.shape == (n, width) and dataset.n_clusters == k
    assert 0.5 * density < dataset.features.nnz / (n * width) < 2 * density


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tile_kernel(Args)", "tile_kernel"),
        ("tile_kernel", "tile_kernel"),
        ("void a::<unnamed>::sum_kernel<(int)4, float>(T1 *, T2)", "sum_kernel<(int)4, float>"),
        ("void a::(anonymous namespace)::rows<(bool)1>(a::P<T1>)", "rows<(bool)1>"),
    ],
)
def test_names_of_kernels(gpu, text: str, name: str) -> None:
    """Nsight Compute writes template arguments with parentheses of their own."""
    assert gpu.profiles.kernel_name(text) == name


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
    assert gpu.profiles.kernel_rows("\n".join(lines)) == [
        {"kernel": "tile_kernel", "launches": 2, "us": 2.0, "l2_percent": 40.5},
        {"kernel": "sum_kernel", "launches": 1, "us": 1.0, "l2_percent": 42.0},
    ]
    assert gpu.profiles.kernel_rows("==ERROR== no permission") == []


def test_a_profile_of_no_kernel_is_an_error(gpu, tmp_path, monkeypatch) -> None:
    program = tmp_path / "ncu"
    program.write_text('#!/bin/sh\necho "==ERROR== ERR_NVGPUCTRPERM" >&2\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    report = gpu.report.Report("ceilings", "profile", tmp_path, "cpu", False)
    gpu.profiles.profile(report)
    assert report.rows == []
    assert len(report.errors) == 6
    assert all("no kernel was profiled: ==ERROR== ERR_NVG" in e["error"] for e in report.errors)


# ---- its tests ----------------------------------------------------------------------------------

POISONED = """
import torch


def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_first(monkeypatch):
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = lost
    lost()


def test_second():
    assert torch.cuda.synchronize is not lost
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_kernel_fails_one_test(tmp_path, workers: int) -> None:
    """With pytest-xdist the others run in a new process, without it they are not blamed."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_poisoned.py").write_text(POISONED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."]
    parallel = ["-n", str(workers)] if workers else []
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*command, "-W", "ignore", *parallel], **options)
    assert done.returncode == (1 if workers else 3), done.stdout
    assert "no CUDA call works after" in done.stdout or workers
    assert ("1 passed" in done.stdout) == bool(workers), done.stdout
    assert "test_second" not in done.stdout


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
        "part": "infonce", "case": "amac", "peer": "fastclust", "what": "forward+backward",
        "ms": 4.321, "rate": 700.0, "unit": "TFLOP/s", "share": 0.61, "peak_bytes": 2**20,
        "weights": "none", "host_ms": 0.5,
    }  # fmt: skip
    trained = {
        "part": "train",
        "case": "cora",
        "model": "hsan",
        "what": "training",
        "seconds": 9.0,
        "acc": 0.7,
        "nmi": 0.5,
    }
    small = row | {"case": "cora", "ms": 0.2}
    weighted = row | {"weights": "snapshot"}
    found = [row, small, weighted, {"part": "x", "case": "no timing"}]
    (out / "infonce.json").write_text(result("infonce", found))
    (out / "train.json").write_text(result("train", [trained], errors=[{"case": "x"}]))
    assert gpu_table.main([str(out)], kept, readme) == 0
    text = readme.read_text()
    assert "Card 9000" in text and "abc" in text and "old" not in text
    lines = {
        "| infonce: amac, forward+backward | fastclust | 4.32 ms | 700 TFLOP/s = 61 % | 1 MiB |": 1,
        "| hsan: cora, training | fastclust | 9 s | ACC 70.0, NMI 50.0 |  |": 1,
        "| infonce: cora, forward+backward | fastclust | 0.2 ms (0.5 ms to launch) |": 0,
        "| infonce: amac, forward+backward, weighted |": 0,
    }
    assert {line: text.count(line) for line in lines} == lines
    assert "1 cases failed" in text and text.startswith("a\n") and text.endswith("b\n")
    page = kept.with_suffix(".md")
    assert {line: page.read_text().count(line) for line in lines} == dict.fromkeys(lines, 1)
    assert gpu_table.main(["--check"], kept, readme) == 0
    readme.write_text(text.replace("4.32", "0.01"))
    assert gpu_table.main(["--check"], kept, readme) == 1
    readme.write_text(text)
    page.unlink()
    assert gpu_table.main(["--check"], kept, readme) == 1


def test_table_from_two_calls(gpu_table, tmp_path) -> None:
    """What the second one repeats counts, and of the first what it does not."""

    def rows(**times: float) -> str:
        found = [{"part": part, "case": part, "ms": ms} for part, ms in times.items()]
        return result("ceilings", found)

    for name, text in (("a", rows(ceilings=1.0, profile=2.0)), ("b", rows(profile=3.0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ceilings.json").write_text(text)
    readme = tmp_path / "README.md"
    readme.write_text(f"{gpu_table.BEGIN}\n{gpu_table.END}\n")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert gpu_table.main(folders, tmp_path / "kept", readme) == 0
    text = (tmp_path / "kept.md").read_text()
    assert "1 ms" in text and "3 ms" in text and "2 ms" not in text
    other = json.loads(rows(profile=3.0)) | {"card": {"name": "Card 9001"}}
    (tmp_path / "b" / "ceilings.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="of another card"):
        gpu_table.main(folders, tmp_path / "kept", readme)


@pytest.mark.parametrize("changes", [{"tiny": True}, {"device": "cpu"}])
def test_dry_runs_never_reach_the_table(gpu_table, tmp_path, changes) -> None:
    (tmp_path / "x.json").write_text(result("x", [], **changes))
    with pytest.raises(SystemExit, match="no measurement of a GPU"):
        gpu_table.read(tmp_path)


def test_readme_is_what_the_results_say(gpu_table) -> None:
    assert gpu_table.main(["--check"]) == 0
