"""The parts of ``benchmarks/gpu.sh``: tests, sanitizer, ceilings, kernels, trainings, profiles.

Every part runs in a process of its own with a time limit, since a faulty kernel takes the CUDA
context of its process with it, and writes its JSON after every case, so that a part cut short keeps
what it measured. Parts that time nothing run side by side, the others one after another::

    python benchmarks/gpu.py --out DIR                # all parts
    python benchmarks/gpu.py --out DIR infonce train  # some
    python benchmarks/gpu.py --out DIR --tiny         # on CPU tensors of tiny shapes: a dry run

A JSON holds ``subject``, ``card`` (name, clocks, driver), ``versions``, ``commit``, ``tiny``,
``rows`` (one measurement each) and ``errors`` (case and message). Times are medians in
milliseconds; rates count useful work, and ``share`` is the rate (for bf16x3 that of its three
products) over the card's own measured ceiling in the same arithmetic. Where there is a
``host_ms``, the time is that of the kernels alone and ``host_ms`` what the host takes to launch
them; other times are what a caller waits for. Nothing here changes a setting of the card.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if importlib.util.find_spec("fastclust") is None:  # not installed: a dry run in a built checkout
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# Graphs by name: nodes, stored entries, features, share of ones, clusters, and rank of the low-rank
# view; made up in these shapes where FASTCLUST_DATA does not name the real ones.
SHAPES = {
    "cora": (2708, 10556, 1433, 0.013, 7, 40),
    "amap": (7650, 238162, 745, 0.35, 8, 20),
    "amac": (13752, 491722, 767, 0.35, 10, 70),
    "100k": (100_000, 1_000_000, 500, 0.05, 10, 40),
    "tiny": (120, 600, 90, 0.2, 3, 5),
}


# ---- one part's report --------------------------------------------------------------------------


class ContextLost(Exception):
    """A kernel failed and took the CUDA context with it: nothing more runs in this process."""


@dataclass
class Report:
    """What one part measured; ``case`` adds rows and survives a failing one."""

    subject: str
    part: str
    out: Path
    device: str
    tiny: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def write(self) -> None:
        """Put the state into ``<subject>.json``."""
        content = {
            "subject": self.subject,
            "device": self.device,
            "tiny": self.tiny,
            "card": card(),
            "versions": versions(),
            "commit": commit(),
            "seconds": round(time.perf_counter() - self.started, 1),
            "rows": self.rows,
            "errors": self.errors,
        }
        path = self.out / f"{self.subject}.json"
        path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def case(self, name: str, run: Callable[[], dict[str, Any] | None], **labels: Any) -> None:
        """Run one measurement; its dictionary becomes a row, an exception an error."""
        try:
            found = run()
        except Exception as error:
            message = f"{type(error).__name__}: {error}".strip()[:500]
            named = {k: str(v) for k, v in labels.items()}
            self.errors.append({"part": self.part, "case": name, **named, "error": message})
            print(f"  {name} {labels}: {message}", flush=True)
        else:
            if found is not None:
                self.rows.append({"part": self.part, "case": name, **labels, **rounded(found)})
                print(f"  {self.rows[-1]}", flush=True)
        self.write()
        if self.device == "cuda" and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise ContextLost(f"no CUDA call works after {name} {labels}: {error}") from None

    def ceiling(self, name: str) -> float | None:
        """A rate measured by the part ``ceilings``, if it ran."""
        with contextlib.suppress(OSError, ValueError):
            for row in json.loads((self.out / "ceilings.json").read_text())["rows"]:
                if row["case"] == name:
                    return float(row["rate"])
        return None

    def share(self, rate: float, ceiling: str) -> dict[str, Any]:
        """``share`` of a measured ceiling, where there is one."""
        limit = self.ceiling(ceiling)
        return {} if limit is None else {"share": rate / limit, "ceiling": ceiling}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than a timing holds."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


@functools.cache
def commit() -> str:
    """Commit of the tree, with ``+`` where tracked files differ from it."""
    if os.environ.get("FASTCLUST_COMMIT"):
        return os.environ["FASTCLUST_COMMIT"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno").strip()
        return head + ("+" if changed else "")
    return "unknown"


def card() -> dict[str, str]:
    """Name, driver and clocks of the GPU as nvidia-smi read them in the last ten seconds.

    Without nvidia-smi the name alone, empty without a GPU.
    """
    return _card(int(time.monotonic() / 10))


@functools.lru_cache(maxsize=1)
def _card(_when: int) -> dict[str, str]:
    fields = (
        "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu",
    )  # fmt: skip
    try:
        text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        with contextlib.suppress(RuntimeError, AssertionError):
            return {"name": torch.cuda.get_device_name()}
        return {}
    values = text.splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=False))


@functools.cache
def versions() -> dict[str, str]:
    """Versions that timings depend on."""
    from fastclust.info import versions as package_versions

    return package_versions() | {"cuda": str(torch.version.cuda)}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


# ---- processes ----------------------------------------------------------------------------------


def call(command: list[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, with a time limit for all that it starts.

    ``subprocess.run`` ends the command alone: the program below a profiler, or a worker of pytest,
    would keep the device busy beside all that is timed later.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        out, err = process.communicate()
        raise TimeoutError(f"not done in {seconds:.0f} s: {(out + err)[-400:]}") from None
    except BaseException:
        kill_tree(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End a process and everything below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    tree = [process.pid]
    for pid in tree:
        tree += children.get(pid, [])
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def scratch(out: Path) -> Path:
    """Where what is not a result goes: not to OUT, from which few files come back."""
    return Path(os.environ.get("FASTCLUST_BENCH_SCRATCH") or out)


# ---- timing -------------------------------------------------------------------------------------


def measure(
    run: Callable[[], Any], device: str, seconds: float = 1.0, *, kernels: bool = False
) -> dict[str, float]:
    """Median and least time in ms, and peak device bytes beyond what stood before.

    On CUDA with ``kernels`` it is the time of the kernels alone: the device is kept waiting until
    the host has launched them, so that no gap between launches counts. Without, gaps do count.
    """
    cuda = device == "cuda"
    run()  # builds, allocations, handles
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = run()
    launched = time.perf_counter() - start
    del result
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    once = time.perf_counter() - start
    times, host = [], [launched]
    for _ in range(int(min(50, max(3, seconds / max(once, 1e-6)))) if seconds else 1):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if kernels:  # cycles at some 2 GHz; a slower clock waits longer, which does no harm
                torch.cuda._sleep(int(2e9 * min(2 * max(host) + 1e-4, 5e-3)))
            begin.record()
            start = time.perf_counter()
            run()
            host.append(time.perf_counter() - start)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    row = {"ms": statistics.median(times), "ms_min": min(times), "repeats": len(times)}
    if cuda and kernels:
        row["host_ms"] = 1e3 * statistics.median(host)
    return row | ({"peak_bytes": peak} if cuda else {})


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a replay of a CUDA graph: one launch for all of its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let torch's float32 products run in tf32, as an eager user may."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def sibling(name: str) -> ModuleType:
    """Another benchmark file as a module, for its peers and generators."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- data ---------------------------------------------------------------------------------------


def dataset_path(name: str, folder: Path) -> str:
    """What ``--dataset`` takes: the name where the real graph is at hand, else a made-up file."""
    root = os.environ.get("FASTCLUST_DATA")
    if root and (Path(root) / f"{name}.npz").is_file():
        return name
    path = scratch(folder).resolve() / f"{name}-like.npz"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}.npz")  # another process may want it, too
        made_up(name, part)
        part.replace(path)
    return str(path)


def graph_name(name: str, folder: Path) -> str:
    """The name of a graph in a row: ``cora``, or ``cora-like`` where it is made up."""
    return Path(dataset_path(name, folder)).stem


def made_up(name: str, path: Path) -> None:
    """A graph in the shape of a named one: communities, power law of degrees, binary features."""
    n, entries, width, density, k, _ = SHAPES[name]
    adjacency = sibling("test_propagate").community_graph.__wrapped__(n, entries, k)
    rng = np.random.default_rng(1)
    labels = np.random.default_rng(0).integers(0, k, n)  # as community_graph draws them
    topics = rng.random((k, width)) ** 2
    topics *= density / topics.mean()
    features = rng.random((n, width)) < (0.5 * density + 0.5 * topics[labels])
    rows = np.concatenate([[0], np.cumsum(features.sum(1))])
    np.savez_compressed(
        path,
        adj_indptr=adjacency.indptr.astype(np.int64),
        adj_indices=adjacency.indices.astype(np.int32),
        x_indptr=rows.astype(np.int64),
        x_indices=np.nonzero(features)[1].astype(np.int32),
        x_data=np.ones(int(rows[-1]), np.float32),
        shape_x=np.array([n, width]),
        labels=labels.astype(np.int64),
    )


def load(name: str, folder: Path) -> Any:
    """The graph as a :class:`fastclust.datasets.Dataset`."""
    from fastclust import load_dataset

    where = dataset_path(name, folder)
    return load_dataset(Path(where) if where.endswith(".npz") else where)


def randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Normal numbers, drawn on the device."""
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(seed))


# ---- parts --------------------------------------------------------------------------------------


def ceilings(report: Report) -> None:
    """Copy bandwidth and matrix rates of this card."""
    device = report.device
    size = 2**16 if report.tiny else 2**28  # floats: 1 GiB read, 1 GiB written
    source, target = randn(size, device=device), torch.empty(size, device=device)

    def copy() -> dict[str, Any]:
        found = measure(lambda: target.copy_(source), device, kernels=True)
        return found | {"rate": 8 * size / found["ms"] / 1e6, "unit": "GB/s"}

    report.case("copy", copy, peer="torch")
    n = 128 if report.tiny else 8192

    def product(dtype: torch.dtype, allow: bool) -> dict[str, Any]:
        a, b = (randn(n, n, device=device, seed=s).to(dtype) for s in range(2))
        with tf32(allow):
            found = measure(lambda: a @ b, device, kernels=True)
        return found | {"rate": 2 * n**3 / found["ms"] / 1e9, "unit": "TFLOP/s"}

    report.case("gemm-bf16", lambda: product(torch.bfloat16, False), peer="torch")
    report.case("gemm-tf32", lambda: product(torch.float32, True), peer="torch")
    report.case("gemm-fp32", lambda: product(torch.float32, False), peer="torch")


def infonce_hopper(report: Report) -> None:
    """The loss on its path of its own for Hopper, on request until a card has confirmed it."""
    if report.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        return
    with environment(FASTCLUST_SM90="1"):
        infonce(report, path="sm90")


def infonce(report: Report, path: str = "") -> None:
    """The loss, forward and backward, at every size, in every precision, beside eager torch."""
    from fastclust import ops

    device, tiny = report.device, report.tiny
    dense_loss = sibling("test_infonce").dense_loss
    sizes = {"tiny": 60} if tiny else {name: SHAPES[name][0] for name in ("cora", "amap", "amac")}
    sizes |= {} if tiny else {"50k": 50_000, "100k": 100_000}
    d = 12 if tiny else 500
    for case, n in sizes.items():
        z, e = (normalize(randn(2 * n, d, device=device, seed=s)).requires_grad_() for s in (0, 1))
        alpha = torch.tensor(0.7, device=device, requires_grad=True)
        labels = torch.randint(0, 7, (n,), generator=torch.Generator().manual_seed(2)).to(device)
        confident = (torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.7).to(device)
        weights = ops.hardness(z, e, alpha, labels, confident, 1.0)
        leaves = (z, e, alpha)

        def row(
            step: Callable[[], Tensor], arithmetic: str, both: bool, n: int = n
        ) -> dict[str, Any]:
            found = measure(step, device, 0.3 if n > 20_000 else 1.0, kernels=True)
            work = (4 if both else 1) * (2 * n) ** 2 * 2 * d
            rate = work / found["ms"] / 1e9
            products, ceiling = (3, "bf16") if arithmetic == "bf16x3" else (1, arithmetic)
            found |= {"rate": rate, "unit": "TFLOP/s"}
            found |= report.share(rate * products, f"gemm-{ceiling}")
            if "peak_bytes" in found:  # the step's own results are not extra
                found["extra_bytes"] = found["peak_bytes"] - (2 * 2 * n * d * 4 if both else 0)
            return found

        def ours(precision: str, w: Any, both: bool, leaves: Any = leaves) -> Callable[[], Any]:
            def step() -> Any:
                loss = ops.hard_infonce(*leaves, weights=w, precision=precision)
                return torch.autograd.grad(loss, leaves) if both else loss.detach()

            return step

        precisions = ("bf16", "bf16x3") if path else ("bf16", "bf16x3", "tf32")
        for precision, weighted in [(p, w) for p in precisions for w in (False, True)]:
            if n > 20_000 and (precision == "tf32" or (n > 50_000 and weighted)):
                continue
            for both in (False, True):
                w = weights if weighted else None
                report.case(
                    case,
                    lambda p=precision, w=w, b=both: row(ours(p, w, b), p, b),
                    peer=f"fastclust {path}".strip(), precision=precision,
                    weights="snapshot" if weighted else "none",
                    what="forward+backward" if both else "forward",
                )  # fmt: skip
        if path or n > 14_000:
            continue
        dense = ops.dense_weights(weights)
        for allow in (False, True):

            def eager(leaves: Any = leaves, dense: Any = dense) -> Any:
                return torch.autograd.grad(dense_loss(*leaves, dense), leaves)

            with tf32(allow):
                arithmetic = "tf32" if allow else "fp32"
                report.case(
                    case, lambda step=eager, a=arithmetic: row(step, a, True), peer="eager torch",
                    precision=arithmetic, weights="given dense",
                    what="forward+backward",
                )  # fmt: skip
        del dense


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def propagate(report: Report) -> None:
    """One residual propagation at AMAC's shape against cuSPARSE."""
    dataset = load("tiny" if report.tiny else "amac", report.out)
    for d in (8,) if report.tiny else (64, 500):
        propagate_case(report, dataset.name, dataset.adjacency, d)


def propagate_large(report: Report) -> None:
    """The same at five million nodes and a hundred million entries."""
    import scipy.sparse as sp

    n, per_node, d = (300, 4, 8) if report.tiny else (5_000_000, 10, 256)
    g = torch.Generator(report.device).manual_seed(0)
    ends = torch.randint(0, n, (2, n * per_node), device=report.device, generator=g)
    keys = torch.cat([ends[0] * n + ends[1], ends[1] * n + ends[0]])[
        torch.cat([ends[0] != ends[1]] * 2)
    ]
    keys = torch.unique(keys)
    indptr = torch.searchsorted(keys, torch.arange(n + 1, device=report.device) * n)
    columns = (keys % n).int().cpu().numpy()
    data = np.ones(len(columns), np.float32)
    adjacency = sp.csr_array((data, columns, indptr.int().cpu().numpy()), shape=(n, n))
    del ends, keys, indptr
    propagate_case(report, "100M" if not report.tiny else "tiny", adjacency, d)


def propagate_case(report: Report, case: str, adjacency: Any, d: int) -> None:
    """ours, torch's CSR product and cuSPARSE's two algorithms on one graph."""
    from fastclust import Graph, ops

    device, n, entries = report.device, adjacency.shape[0], adjacency.nnz
    # In turn, 256 MiB together: five times what the second-level cache of an H100 holds.
    copies = 2 if report.tiny else -(-(2**28) // (4 * n * d))
    inputs = [randn(n, d, device=device, seed=s) for s in range(copies)]
    turn = iter(range(10**9))

    def next_input() -> Tensor:
        return inputs[next(turn) % copies]

    # Each operand once, indices once: what no cache can save. Gathers that miss come on top.
    least_bytes = 4 * entries + 8 * n + 4 * 2 * n * d
    gathered = 4 * (entries * (d + 1) + 2 * n * d)

    def row(step: Callable[[], Any], passes: int = 1) -> dict[str, Any]:
        found = measure(step, device, kernels=True)
        rate = passes * least_bytes / found["ms"] / 1e6
        found |= {"rate": rate, "unit": "GB/s"} | report.share(rate, "copy")
        return found | {"gathered_gb_s": passes * gathered / found["ms"] / 1e6, "d": d}

    graph = Graph(adjacency).to(device)

    def fused() -> Tensor:
        h = next_input()
        return ops.propagate(graph, h, residual=h, activation="relu")

    report.case(case, lambda: row(fused), peer="fastclust", what="relu(Abar H + H)")
    plain = Graph(adjacency, norm="none", self_loops=False).to(device)
    report.case(
        case, lambda: row(lambda: ops.propagate(plain, next_input())), peer="fastclust", what="A H"
    )
    ones = torch.ones_like(inputs[0])

    def both() -> Any:
        leaf = next_input().detach().requires_grad_()
        out = ops.propagate(graph, leaf, residual=leaf, activation="relu")
        return torch.autograd.grad(out, leaf, ones)

    report.case(case, lambda: row(both, 2), peer="fastclust", what="forward+backward")

    index = torch.int32 if entries < 2**31 else torch.int64
    matrix = torch.sparse_csr_tensor(
        torch.from_numpy(adjacency.indptr).to(index), torch.from_numpy(adjacency.indices).to(index),
        torch.from_numpy(adjacency.data).float(), adjacency.shape, check_invariants=False,
    ).to(device)  # fmt: skip
    report.case(case, lambda: row(lambda: matrix @ next_input()), peer="torch CSR", what="A H")
    if device != "cuda":
        return
    for algorithm in ("CSR_ALG2", "CSR_ALG3"):

        def peer(algorithm: str = algorithm) -> dict[str, Any]:
            product = cusparse(adjacency, algorithm)
            got = torch.from_dlpack(product(inputs[0]))[:1000]
            torch.testing.assert_close(got, (matrix @ inputs[0])[:1000], rtol=1e-3, atol=1e-3)
            return row(lambda: product(next_input()))

        report.case(case, peer, peer=f"cuSPARSE {algorithm}", what="A H")


def cusparse(adjacency: Any, algorithm: str) -> Callable[[Tensor], Any]:
    """A H by one named algorithm of cusparseSpMM, through CuPy; CSR_ALG3 is deterministic."""
    import cupy
    import cupyx.scipy.sparse
    from cupy_backends.cuda.libs import cusparse as library
    from cupyx.cusparse import SpMatDescriptor

    code = {"CSR_ALG2": 6, "CSR_ALG3": 12}[algorithm]  # as in cusparse.h; CuPy does not name them
    a = cupyx.scipy.sparse.csr_matrix(adjacency.astype(np.float32))
    sparse = SpMatDescriptor.create(a)
    one, zero = np.array(1.0, np.float32), np.array(0.0, np.float32)
    handle = cupy.cuda.device.get_cusparse_handle()
    kept: dict[str, Any] = {}

    def product(h: Tensor) -> Any:
        if "out" not in kept:
            kept["out"] = cupy.empty(tuple(h.shape), cupy.float32)
            kept["result"] = row_major(kept["out"])
        dense = row_major(cupy.from_dlpack(h.detach()))
        arguments = (
            handle, 0, 0, one.ctypes.data, sparse.desc, dense.desc, zero.ctypes.data,
            kept["result"].desc, 0, code,
        )  # fmt: skip
        if "buffer" not in kept:
            size = max(1, library.spMM_bufferSize(*arguments))
            kept["buffer"] = cupy.empty(size, cupy.int8)
        library.spMM(*arguments, kept["buffer"].data.ptr)
        return kept["out"]

    return product


def row_major(array: Any) -> Any:
    """A descriptor of a row-major CuPy array; CuPy's own wrapper takes column-major ones only."""
    from cupy_backends.cuda.libs import cusparse as library
    from cupyx.cusparse import DnMatDescriptor

    rows, columns = array.shape
    real32, order_row = 0, 2  # CUDA_R_32F, CUSPARSE_ORDER_ROW
    desc = library.createDnMat(rows, columns, columns, array.data.ptr, real32, order_row)
    return DnMatDescriptor(desc, None, library.destroyDnMat)


def lowrank(report: Report) -> None:
    """All row batches of AMAC at its rank, eager and as a CUDA graph, against svd_lowrank."""
    from fastclust import ops

    device = report.device
    name = "tiny" if report.tiny else "amac"
    dataset = load(name, report.out)
    rank = SHAPES[name][5]
    x = torch.from_numpy(np.asarray(dataset.features.todense(), dtype=np.float32)).to(device)
    for batch in (None,) if report.tiny else (1024, 2048, None):
        labels: dict[str, Any] = {"rank": rank, "batch_size": batch or len(x)}

        def ours(batch: int | None = batch) -> Any:
            return ops.batched_svd(x, rank, batch_size=batch)

        def peer(batch: int | None = batch) -> Any:
            return [
                torch.svd_lowrank(b - b.mean(0), min(rank + 10, *b.shape), niter=2)
                for b in x.split(batch or len(x))
            ]

        report.case(dataset.name, lambda f=ours: measure(f, device), peer="fastclust", **labels)
        if device == "cuda":
            report.case(
                dataset.name,
                lambda f=ours: measure(captured(f), device),
                peer="fastclust, CUDA graph",
                **labels,
            )
        report.case(
            dataset.name, lambda f=peer: measure(f, device), peer="torch.svd_lowrank", **labels
        )


def kmeans(report: Report) -> None:
    """Ten restarts at AMAC's shape, against Lloyd's iterations in plain torch of as many steps."""
    from fastclust import ops

    device = report.device
    n, k = (200, 3) if report.tiny else (SHAPES["amac"][0], SHAPES["amac"][4])
    for d in (6,) if report.tiny else (500, 1500):
        means = 0.15 * randn(k, d, device=device)
        x = means[torch.arange(n, device=device) % k] + randn(n, d, device=device, seed=1)

        def ours(x: Tensor = x) -> dict[str, Any]:
            found = measure(lambda: ops.kmeans(x, k, n_init=10), device)
            best = ops.kmeans(x, k, n_init=10)
            return found | {"inertia": float(best.inertia), "iterations": best.n_iter}

        def peer(x: Tensor = x) -> dict[str, Any]:
            steps = ops.kmeans(x, k, n_init=10).n_iter

            def lloyd() -> Tensor:
                best = torch.full((), torch.inf, device=x.device)
                for restart in range(10):
                    g = torch.Generator(device).manual_seed(restart)
                    centers = x[torch.randperm(len(x), device=device, generator=g)[:k]]
                    for _ in range(steps):
                        distance, labels = torch.cdist(x, centers).min(1)
                        sums = torch.zeros_like(centers).index_add_(0, labels, x)
                        count = torch.bincount(labels, minlength=k).clamp_min(1)
                        centers = sums / count[:, None]
                    best = torch.minimum(best, distance.square().sum())
                return best

            return measure(lloyd, device) | {"inertia": float(lloyd()), "iterations": steps}

        report.case("amac" if not report.tiny else "tiny", ours, peer="fastclust", d=d)
        report.case("amac" if not report.tiny else "tiny", peer, peer="torch Lloyd", d=d)


# ---- whole trainings ----------------------------------------------------------------------------

# model, graph, epochs, seeds, further options
RUNS = [
    ("ecnmf", "cora", 1000, "0-2", []),
    ("hsan", "cora", 400, "0-2", []),
    ("ecnmf", "amac", 1000, "0", []),
    ("hsan", "amac", 400, "0", ["--set", "width=500"]),
    ("hsan", "100k", 5, "0", ["--set", "width=200"]),  # for its memory: S alone would take 160 GB
]
TINY_RUNS = [("ecnmf", "tiny", 3, "0-1", []), ("hsan", "tiny", 3, "0-1", ["--set", "width=16"])]


def train_once(run: tuple[Any, ...], device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """``python -m fastclust.train`` in a process of its own; the JSON it prints."""
    model, name, epochs, seeds, options = run
    command = [
        sys.executable, "-m", "fastclust.train", "--dataset", dataset_path(name, folder),
        "--model", model, "--epochs", str(epochs), "--seeds", seeds, "--device", device, "--json",
        "--quiet", *options,
    ]  # fmt: skip
    done = call(command, seconds, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout)


def train_row(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics, seconds and memory of one result, per seed and on average."""
    runs = result["runs"]
    gpu = [run["peak_gpu_memory_bytes"] for run in runs if "peak_gpu_memory_bytes" in run]
    return {
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "epochs": runs[0]["epochs"],
        "seeds": len(runs),
        "acc": result["mean"]["acc"],
        "acc_std": result["std"]["acc"],
        "nmi": result["mean"]["nmi"],
        "nmi_std": result["std"]["nmi"],
        **({"peak_bytes": max(gpu)} if gpu else {}),
    }


def train_cpu(report: Report) -> None:
    """The small trainings on the CPU: what the GPU's metrics must agree with."""
    for run in TINY_RUNS if report.tiny else RUNS[:2]:
        row = lambda r=run: train_row(train_once(r, "cpu", report.out, 400))  # noqa: E731
        report.case(graph_name(run[1], report.out), row, model=run[0])


def train(report: Report) -> None:
    """Trainings on the device."""
    for run in TINY_RUNS if report.tiny else RUNS:
        row = lambda r=run: train_row(train_once(r, report.device, report.out, 120))  # noqa: E731
        report.case(graph_name(run[1], report.out), row, model=run[0], what="training")


def epochs(report: Report) -> None:
    """One epoch of the models against an eager one, and as a CUDA graph."""
    bench = sibling("test_train")
    device, tiny = report.device, report.tiny
    for model, names, width in (
        ("ecnmf", ("amac", "cora"), 16 if tiny else 600),
        ("hsan", ("cora",), 16 if tiny else 1500),
        ("hsan", ("amac",), 16 if tiny else 500),
    ):
        for name in ("tiny",) if tiny else names:
            labels: dict[str, Any] = {"model": model, "what": "epoch", "width": width}

            def epoch(
                side: str, model: str = model, name: str = name, width: int = width
            ) -> dict[str, Any]:
                make = getattr(bench, f"{model}_{side}")
                return measure(make(load(name, report.out), device=device, width=width), device)

            def graph(model: str = model, name: str = name, width: int = width) -> dict[str, Any]:
                return captured_epoch(model, load(name, report.out), device, width)

            case = graph_name(name, report.out)
            report.case(case, lambda f=epoch: f("ours"), peer="fastclust", **labels)
            report.case(case, graph, peer="fastclust, CUDA graph", **labels)
            if (model, name) != ("hsan", "amac"):  # a dozen dense matrices of 3 GB
                report.case(case, lambda f=epoch: f("eager"), peer="eager torch", **labels)


def captured_epoch(model_name: str, dataset: Any, device: str, width: int) -> dict[str, Any]:
    """One epoch between refreshes (loss, gradients, Adam) as a CUDA graph, beside the eager one."""
    model = getattr(sibling("test_train"), f"{model_name}_inputs")(dataset, width, device)[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True, capturable=device == "cuda")

    def epoch() -> Tensor:
        adam.zero_grad(set_to_none=True)
        loss = model.loss()
        loss.backward()
        adam.step()
        return loss.detach()

    epoch()
    if model_name == "ecnmf":
        model.after_step(0)  # the pseudo labels stay: finding them waits for the device
    eager = measure(epoch, device)
    replayed = measure(captured(epoch), device) if device == "cuda" else eager
    return replayed | {"eager_ms": eager["ms"]}


def agreement(trained: list[dict[str, Any]], cpu: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether mean metrics on device and CPU differ by no more than the spread over seeds."""
    rows = []
    for row in [r for r in trained if r.get("what") == "training"]:
        same = [c for c in cpu if (c["case"], c["model"]) == (row["case"], row["model"])]
        for other in same:
            allowed = max(0.02, 2 * max(row["acc_std"] or 0, other["acc_std"] or 0))
            rows.append(
                {
                    "part": "train-cpu",
                    "case": row["case"],
                    "model": row["model"],
                    "what": "agreement",
                    "acc": row["acc"],
                    "acc_cpu": other["acc"],
                    "allowed": round(allowed, 4),
                    "agrees": abs(row["acc"] - other["acc"]) <= allowed,
                }
            )
    return rows


# ---- correctness --------------------------------------------------------------------------------

# Those of the GPU first; what runs over emulated blocks (test_infonce_device_math.py) needs none.
TEST_FILES = [
    "test_infonce_cuda.py", "test_ops_on_device.py", "test_propagate.py", "test_kmeans.py",
    "test_lowrank.py", "test_infonce.py",
]  # fmt: skip


def tests(report: Report) -> None:
    """The op tests, on CUDA tensors where there are any."""
    files = [str(ROOT / "tests" / f) for f in TEST_FILES if (ROOT / "tests" / f).is_file()]
    select = (
        ["-k", "test_range_and_permutation or test_loss_on"]
        if report.tiny
        else ["-m", "not slow or gpu"]
    )
    workers, cores = 6, os.cpu_count() or 1
    parallel, threads = [], cores
    if importlib.util.find_spec("xdist") and not report.tiny:
        parallel, threads = ["-n", str(workers)], max(1, cores // 2 // workers)
        if importlib.util.find_spec("pytest_timeout"):
            # A kernel that hangs ends its worker, which says so and is replaced.
            parallel += ["--timeout", "90", "--timeout-method", "thread"]

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-x" if report.tiny else "--maxfail=40"]
        command += ["-p", "no:cacheprovider", *parallel, *select, *files]
        done = call(command, 140, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode not in (0, 5):  # 5: nothing selected, in a dry run
            raise RuntimeError(f"{lines[-1] if lines else 'no output'}: {'; '.join(failed[:10])}")
        return {"summary": lines[-1]}

    report.case("pytest", run)


def determinism(report: Report) -> None:
    """1000 runs of every kernel with the same bits, or what fits into its share of the time."""
    runs, seconds = (3, 60.0) if report.tiny else (1000, 120.0)
    hopper = report.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    calls = [(name, "0", step) for name, step in small_calls(report.device)]
    if hopper:
        calls += [
            (f"sm90 {name}", "1", step)
            for name, _, step in calls
            if name.startswith("infonce bf16")
        ]
    start = time.perf_counter()

    def repeat(step: Callable[[], list[Tensor]], until: float) -> dict[str, Any]:
        first = [t.clone() for t in step()]
        done = 0
        while done < runs and time.perf_counter() - start < until:
            done += 1
            if not all(torch.equal(a, b) for a, b in zip(first, step(), strict=True)):
                raise AssertionError(f"other bits in run {done}")
        return {"runs": done}

    for i, (name, path, step) in enumerate(calls):
        until = seconds * (i + 1) / len(calls)
        with environment(FASTCLUST_SM90=path):
            report.case("determinism", lambda s=step, u=until: repeat(s, u), kernel=name)


def small_calls(device: str) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Every kernel on shapes with ragged edges."""
    import scipy.sparse as sp

    from fastclust import Graph, ops

    n, dz, de = 150, 70, 37
    views = [normalize(randn(2 * n, d, device="cpu", seed=d)) for d in (dz, de)]
    labels = torch.arange(n) % 3
    for dtype in (torch.float32, torch.float64):
        z, e = (v.to(device, dtype).requires_grad_() for v in views)
        alpha = torch.tensor(0.7, device=device, dtype=dtype, requires_grad=True)
        w = ops.hardness(z, e, alpha, labels.to(device), (labels > 0).to(device), 1.5)
        kinds = ("fp32",) if dtype == torch.float64 else ("bf16", "tf32", "bf16x3")
        for precision in kinds:
            for weights in (None, w):

                def loss(
                    p: str = precision, w: Any = weights, v: Any = (z, e, alpha)
                ) -> list[Tensor]:
                    out = ops.hard_infonce(*v, weights=w, precision=p)
                    return [out.detach(), *torch.autograd.grad(out, v)]

                kind = "weighted" if weights is not None else "plain"
                yield f"infonce {precision} {kind} {str(dtype)[6:]}", loss
        rng = np.random.default_rng(0)
        upper = np.triu(rng.random((n, n)) < 0.1, 1)
        upper[0] = True
        upper[0, 0] = False
        graph = Graph(sp.csr_array((upper | upper.T).astype(np.float32))).to(device)
        for d in (1, 33, 128):
            h = randn(n, d, device="cpu", seed=d).to(device, dtype).requires_grad_()

            def spread(graph: Any = graph, h: Tensor = h) -> list[Tensor]:
                out = ops.propagate(graph, h, residual=h, activation="relu")
                return [out.detach(), *torch.autograd.grad(out, h, torch.ones_like(out))]

            yield f"propagate {d} {str(dtype)[6:]}", spread
        x = randn(n, 21, device="cpu").to(device, dtype)
        for init in (None, "random", "paper-code"):

            def cluster(x: Tensor = x, init: Any = init) -> list[Tensor]:
                result = ops.kmeans(x, 5, n_init=3, init=init)
                return [result.labels, result.centers]

            yield f"kmeans {init} {str(dtype)[6:]}", cluster

        def factors(x: Tensor = x) -> list[Tensor]:
            svd = ops.batched_svd(x, 6, batch_size=64)
            return [svd.u, svd.s, svd.vh]

        yield f"lowrank {str(dtype)[6:]}", factors


SANITIZER_SECONDS = 135.0


def sanitizer(report: Report) -> None:
    """compute-sanitizer's four tools over every kernel on small shapes, side by side.

    Errors of initcheck and racecheck want a second look: up to the one of CUDA 13.0, initcheck does
    not see what bulk copies write, and racecheck reports some uses of mbarriers that are no race.
    """
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    child = [sys.executable, str(Path(__file__)), "--small-calls", "--out", str(report.out)]
    if report.tiny:
        report.case("dry run", lambda: {"ok": not subprocess.run([*child, "--tiny"]).returncode})
        return
    running = {}
    for path_name, value in (("", "0"), ("sm90 ", "1")):
        for tool in tools:
            command = [path, *sanitizer_options(tool), "--port", str(49152 + 20 * len(running))]
            # Every tensor in an allocation of its own, so that overruns are seen.
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
            # not a pipe: nobody would read those of seven while the eighth is waited for
            written = scratch(report.out) / f"sanitizer-{len(running)}.txt"
            with contextlib.suppress(OSError), written.open("w") as output:
                process = subprocess.Popen(
                    [*command, *child],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | env | {"FASTCLUST_SM90": value},
                )
                running[path_name + tool] = process, written
    deadline = time.perf_counter() + SANITIZER_SECONDS

    def finish(process: subprocess.Popen[Any], written: Path) -> dict[str, Any]:
        late = False
        try:
            process.wait(timeout=max(1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            kill_tree(process)
            process.wait()
            late = True
        text = written.read_text(errors="replace")
        written.unlink()
        said = sanitizer_said(text)
        print("\n".join(said)[:8000], flush=True)
        if late:
            raise TimeoutError(f"not done in time, after {text.splitlines()[-1:]}")
        if process.returncode:  # the first error is the one to look at
            tail = said or text.splitlines()[-5:]
            raise RuntimeError(f"exit code {process.returncode}: {' | '.join(tail)}")
        return {"summary": sanitizer_summary(text)}

    for tool, parts in running.items():
        report.case(tool, lambda parts=parts: finish(*parts))
    if not running:
        report.errors.append(
            {"part": "sanitizer", "case": "all", "error": "compute-sanitizer is not here"}
        )
        report.write()


def sanitizer_options(tool: str) -> list[str]:
    """Options of compute-sanitizer 2023.3 or later."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    # By default it waits a minute for the first CUDA call, which may take longer to come beside
    # seven others, and then lets the program run unchecked.
    options += ["--launch-timeout", "0"]
    if tool != "initcheck":  # which has to see what torch's kernels write
        options += ["--kernel-name", "kns=fastclust"]
    if tool == "memcheck":  # torch asks for things that may fail; our own calls are all checked
        options += ["--report-api-errors", "no"]
    return options


def sanitizer_said(text: str) -> list[str]:
    """What compute-sanitizer told, without its headline and without what the program told."""
    lines = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
    return [line for line in lines if line and line != "COMPUTE-SANITIZER"]


def sanitizer_summary(text: str) -> str:
    """The line of compute-sanitizer that counts the errors; without one nothing was checked."""
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    if not summary:
        raise RuntimeError(f"no summary, so nothing was checked: {text[-500:]}")
    return summary[-1].strip("= ")


# ---- where the time of a kernel goes ------------------------------------------------------------

# What Nsight Compute says of a kernel, by the names of its report, and as rows hold it.
PROFILE = {
    "Duration": "us",
    "Compute (SM) Throughput": "sm_percent",
    "Memory Throughput": "memory_percent",
    "L1/TEX Cache Throughput": "l1_percent",
    "L2 Cache Throughput": "l2_percent",
    "DRAM Throughput": "dram_percent",
    "Issue Slots Busy": "issue_percent",
    "Achieved Occupancy": "occupancy_percent",
    "Registers Per Thread": "registers",
}
MICROSECONDS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}


def profiled_calls(name: str, device: str, tiny: bool) -> None:
    """The call behind one profile: the loss, a propagation or a low-rank factorisation at AMAC."""
    from fastclust import Graph, ops

    n, entries, width, _, k, rank = SHAPES["tiny" if tiny else "amac"]
    if name.startswith("bf16"):
        z, e = (
            normalize(randn(2 * n, 500, device=device, seed=s)).requires_grad_() for s in (0, 1)
        )
        alpha = torch.tensor(0.7, device=device, requires_grad=True)
        loss = ops.hard_infonce(z, e, alpha, precision=name)
        torch.autograd.grad(loss, (z, e, alpha))
    elif name == "propagate":
        graph = Graph(sibling("test_propagate").community_graph.__wrapped__(n, entries, k))
        h = randn(n, 500, device=device)
        ops.propagate(graph.to(device), h, residual=h, activation="relu")
    else:
        ops.batched_svd(randn(n, width, device=device), rank, batch_size=min(n, 1024))


def profile(report: Report) -> None:
    """The main kernels under Nsight Compute: which unit of the card each keeps busy."""
    found = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    path = shutil.which("ncu") or (str(found[-1]) if found else "/usr/local/cuda/bin/ncu")
    sections = ["SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats"]
    command = [path, "--clock-control", "none", "--csv", "--page", "details"]
    command += [word for section in sections for word in ("--section", section)]
    # Not torch's own; and the first patches of a loss are as good as all of them.
    ours = "(forward|tile|product|pack|sum|finish|gram|apply|cholesky|jacobi|center|shifted)_kernel"
    # cuBLAS calls its own products nvjet on Hopper.
    command += ["--kernel-name", f"regex:^{ours}|^propagate_|gemm|nvjet", "--launch-count", "96"]
    for name, hopper in (
        ("bf16", "1"), ("bf16x3", "1"), ("bf16", "0"), ("bf16x3", "0"),
        ("propagate", "0"), ("lowrank", "0"),
    ):  # fmt: skip
        child = [sys.executable, str(Path(__file__)), "--profile-calls", name]
        child += ["--out", str(report.out), *(["--tiny"] if report.tiny else [])]
        rows: list[dict[str, Any]] = [{"ok": True}] if report.tiny else []

        def run(child: list[str] = child, hopper: str = hopper, rows: Any = rows) -> None:
            done = call(
                [*([] if report.tiny else command), *child], 60,
                env=os.environ | {"FASTCLUST_SM90": hopper},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(
                    f"exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"
                )
            rows.extend(kernel_rows(done.stdout))

        labels = {"call": name, "sm90": hopper == "1"}
        report.case("profile", run, **labels)
        for row in rows:
            report.case("profile", lambda row=row: row, **labels)


def kernel_rows(text: str) -> list[dict[str, Any]]:
    """Means over the launches of each kernel, the longest first, from Nsight Compute's CSV."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, list[float]]] = {}
    for line in csv.DictReader(lines[start:]):
        key = PROFILE.get(line.get("Metric Name") or "")
        if key is None:
            continue
        try:
            value = float(line["Metric Value"].replace(",", ""))
        except ValueError:  # not available on this card
            continue
        value *= MICROSECONDS.get(line["Metric Unit"], 1.0) if key == "us" else 1.0
        name = kernel_name(line["Kernel Name"])
        launches.setdefault(name, {}).setdefault(key, []).append(value)
    rows: list[dict[str, Any]] = [
        {"kernel": name, "launches": len(next(iter(values.values())))}
        | {key: statistics.mean(numbers) for key, numbers in values.items()}
        for name, values in launches.items()
    ]
    return sorted(rows, key=lambda row: -row["launches"] * row.get("us", 0.0))[:12]


def kernel_name(text: str) -> str:
    """A kernel without result, namespaces and parameters: ``tile_kernel<(bool)1>``."""
    depth = end = 0
    if text.endswith(")"):  # template arguments have parentheses, too
        for end in range(len(text) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(text[end], 0)
            if depth == 0:
                text = text[:end]
                break
    text = re.sub(r"(\w+|<unnamed>|\(anonymous namespace\))::", "", text.removeprefix("void "))
    return text if len(text) <= 100 else text[:97] + "..."


# ---- all parts ----------------------------------------------------------------------------------

# part: function, time limit in seconds. The order is that of importance, short parts first: what is
# at the end may find no time left.
PARTS: dict[str, tuple[Callable[[Report], None], float]] = {
    "ceilings": (ceilings, 30),
    "tests": (tests, 150),
    "determinism": (determinism, 130),
    "sanitizer": (sanitizer, 150),
    "infonce": (infonce, 90),
    "propagate": (propagate, 40),
    "lowrank": (lowrank, 40),
    "kmeans": (kmeans, 30),
    "infonce-hopper": (infonce_hopper, 60),
    "epochs": (epochs, 60),
    "train": (train, 190),
    "propagate-large": (propagate_large, 70),
    "profile": (profile, 120),
}
# They time nothing, and most of their time is the host's: side by side.
CHECKS = ("tests", "determinism", "sanitizer")
# One file per subject: parts of one subject share it, one after another ...
SUBJECTS = {
    "tests": "checks", "infonce-hopper": "infonce", "propagate-large": "propagate",
    "profile": "ceilings", "epochs": "train",
}  # fmt: skip
# ... or have their own until they are done, where another part of the subject runs beside them.
FOLDED = {"determinism": "checks", "sanitizer": "checks", "train-cpu": "train"}


def subject_of(name: str) -> str:
    """The name of the file where the rows of a part are in the end."""
    return FOLDED.get(name, SUBJECTS.get(name, name))


def report_of(name: str, out: Path, tiny: bool) -> Report:
    """The report of a part with the rows that its file holds."""
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    report = Report(SUBJECTS.get(name, name), name, out, device, tiny)
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((out / f"{report.subject}.json").read_text())
        report.rows, report.errors = before["rows"], before["errors"]
    return report


def run_part(name: str, out: Path, tiny: bool) -> int:
    """One part in this process; rows of another part of the same subject stay."""
    report = report_of(name, out, tiny)
    report.rows = [r for r in report.rows if r["part"] != name]
    report.errors = [e for e in report.errors if e["part"] != name]
    others = len(report.errors)
    function = train_cpu if name == "train-cpu" else PARTS[name][0]
    report.write()
    try:
        function(report)
    except Exception as error:  # outside of a case: the preparation of one
        message = f"{type(error).__name__}: {error}"[:500]
        report.errors.append({"part": name, "case": "preparation", "error": message})
    report.write()
    return 1 if report.errors[others:] else 0


def run_all(names: list[str], out: Path, tiny: bool, seconds: float) -> int:
    """Every part in a process of its own, within the time left; a summary at the end."""
    end = time.perf_counter() + seconds
    size = ["--tiny"] if tiny else []
    for old in set(map(subject_of, PARTS)) - {subject_of(n) for n in PARTS if n not in names}:
        (out / f"{old}.json").unlink(missing_ok=True)  # other files keep what other parts wrote
    stages: list[list[str]] = []
    for name in names:
        if name in CHECKS and stages and stages[-1][-1] in CHECKS:
            stages[-1].append(name)
        else:
            stages.append([name])
    started: list[subprocess.Popen[bytes]] = []
    summary = []
    with (
        tempfile.TemporaryDirectory(prefix="fastclust-bench-") as folder,
        (out / "log.txt").open("a") as log,
    ):
        threads = str(max(1, (os.cpu_count() or 2) // 2))  # trainings on the CPU have the others
        variables = {"OMP_NUM_THREADS": threads} | os.environ | {"FASTCLUST_BENCH_SCRATCH": folder}

        def start(name: str, where: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "--one", name, "--out", str(where), *size]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, preexec_fn=os.setpgrp
            )
            started.append(process)
            return process

        try:
            # beside everything else
            background = start("train-cpu", Path(folder)) if "train" in names else None
            for stage in stages:
                running = []
                for name in stage:
                    begun = time.perf_counter()
                    limit = min(PARTS[name][1], end - begun - 5)
                    if limit < 5:
                        summary.append((name, "not started: no time left", 0.0))
                        continue
                    print(f"== {name} (at most {limit:.0f} s)", file=log, flush=True)
                    running.append((name, start(name, out), begun, limit))
                for name, process, begun, limit in running:
                    word, wrong = wait_for(process, begun, limit)
                    if wrong:
                        report = report_of(name, out, tiny)
                        report.errors.append({"part": name, "case": "all", "error": wrong})
                        report.write()
                    summary.append((name, word, time.perf_counter() - begun))
                    print(f"{name}: {word}, {summary[-1][2]:.0f} s", flush=True)
                for name in stage:
                    fold_in(name, out, out)
            if background is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    background.wait(timeout=max(0.1, end - 5 - time.perf_counter()))
                stop(background)
                fold_in("train-cpu", Path(folder), out)
        finally:
            for process in started:
                stop(process)
    print_summary(out, names)
    return 0 if all(word == "ok" for _, word, _ in summary) else 1


def wait_for(process: subprocess.Popen[Any], begun: float, limit: float) -> tuple[str, str]:
    """How a part ended, within its seconds, and what went wrong that it has not written itself."""
    try:
        code = process.wait(timeout=max(0.1, begun + limit - time.perf_counter()))
    except subprocess.TimeoutExpired:
        stop(process)
        return "cut off", f"cut off after {limit:.0f} s"
    word = "ok" if code == 0 else "with errors"
    return word, "" if code in (0, 1) else f"ended with exit code {code}"


def stop(process: subprocess.Popen[Any]) -> None:
    """End a part with all that it started, what has lost its parent included."""
    if process.poll() is None:
        kill_tree(process)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def fold_in(name: str, source: Path, out: Path) -> None:
    """Move what a part beside others has written into the file of its subject."""
    path = source / f"{name}.json"
    if name not in FOLDED or not path.is_file():
        return
    target = out / f"{FOLDED[name]}.json"
    with contextlib.suppress(OSError, ValueError):
        part = json.loads(path.read_text())
        content = part | {"subject": FOLDED[name], "rows": [], "errors": []}
        if target.is_file():
            content = json.loads(target.read_text())
        for kept in ("rows", "errors"):  # but those of an earlier call
            content[kept] = [x for x in content[kept] if x["part"] != name]
        if name == "train-cpu":
            content["cpu_rows"] = part["rows"]
            content["rows"] += agreement(content["rows"], part["rows"])
        else:
            content["rows"] += part["rows"]
        content["errors"] += part["errors"]
        target.write_text(json.dumps(content, indent=1) + "\n")
    path.unlink()


def print_summary(out: Path, names: list[str]) -> None:
    """Rows and errors of every subject, a line each."""
    for subject in dict.fromkeys(map(subject_of, names)):
        try:
            content = json.loads((out / f"{subject}.json").read_text())
        except (OSError, ValueError):
            print(f"{subject}: no result")
            continue
        print(f"{subject}: {len(content['rows'])} rows, {len(content['errors'])} errors")
        for row in content["rows"]:
            print("   ", *(f"{k}={v}" for k, v in row.items() if k != "part" and v is not None))
        for error in content["errors"]:
            print("    ERROR", json.dumps(error)[:400])


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; 0 when every part went through without an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="CPU tensors of tiny shapes")
    parser.add_argument("--seconds", type=float, default=560, help="for all parts together")
    parser.add_argument("--one", metavar="PART", help="run this part in this process")
    parser.add_argument("--small-calls", action="store_true", help="call every kernel once")
    parser.add_argument("--profile-calls", metavar="CALL", help="what a profile looks at, once")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    arguments = parser.parse_args(argv)
    unknown = sorted(
        {*arguments.parts, *([arguments.one] if arguments.one else [])} - {*PARTS, "train-cpu"}
    )
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    arguments.out = arguments.out.resolve()  # trainings run in another folder
    if os.environ.get("FASTCLUST_DATA"):
        os.environ["FASTCLUST_DATA"] = str(Path(os.environ["FASTCLUST_DATA"]).resolve())
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.small_calls:
        for name, step in small_calls("cpu" if arguments.tiny else "cuda"):
            step()
            print(name, flush=True)
        return 0
    if arguments.profile_calls:
        device = "cpu" if arguments.tiny else "cuda"
        profiled_calls(arguments.profile_calls, device, arguments.tiny)
        return 0
    if arguments.one:
        return run_part(arguments.one, arguments.out, arguments.tiny)
    return run_all(arguments.parts or list(PARTS), arguments.out, arguments.tiny, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
