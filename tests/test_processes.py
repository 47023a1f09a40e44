"""Threads and processes: the same bits everywhere, and no child that waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from joblib import Parallel, delayed

from fastclust import ECNMF, HSAN, SSGC, load_dataset

ESTIMATORS = {
    "hsan": lambda: HSAN(4, epochs=3, width=48, device="cpu"),
    "ecnmf": lambda: ECNMF(4, epochs=3, width=48, rank=8, device="cpu"),
    "ssgc": lambda: SSGC(4, device="cpu"),
    "ssgc, auto": lambda: SSGC(4, device="cpu", back_end="auto"),
}
names = pytest.mark.parametrize("name", list(ESTIMATORS))


def data() -> tuple[np.ndarray, sp.csr_array]:
    """400 nodes in four blocks: enough for several tasks of every kernel."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    p = np.where(labels[:, None] == labels, 0.08, 0.005)
    upper = np.triu(rng.random((400, 400)) < p, 1)
    features = rng.normal(size=(400, 60)) + 2 * np.eye(60)[labels]
    return features.astype(np.float32), sp.csr_array((upper | upper.T).astype(np.float32))


def bits(name: str) -> bytes:
    """All that a fit gives."""
    x, adjacency = data()
    fitted = ESTIMATORS[name]().fit(x, adjacency=adjacency)
    return fitted.labels_.tobytes() + fitted.embedding_.tobytes()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@names
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    results = set()
    for n_threads in (1, 2, 4):
        torch.set_num_threads(n_threads)
        results.add(bits(name))
    assert len(results) == 1


@pytest.mark.slow
@names
def test_any_number_of_threads_gives_the_same_bits_on_cora(name: str, data_root: Path) -> None:
    """2708 nodes, 1433 attributes: several blocks of every kernel, as users run them."""
    ds = load_dataset("cora", root=data_root)
    results = set()
    for n_threads in (1, 2, 4):
        torch.set_num_threads(n_threads)
        fitted = (
            ESTIMATORS[name]().set_params(n_clusters=7).fit(ds.features, adjacency=ds.adjacency)
        )
        results.add(fitted.labels_.tobytes() + fitted.embedding_.tobytes())
    assert len(results) == 1


@names
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_fork_after_use(name: str) -> None:
    """The pool of threads does not live on in a child, which must not wait for it."""
    expected = bits(name)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if bits(name) == expected else 3
        finally:
            os._exit(code)  # none of pytest's business in the child
    deadline = time.monotonic() + 60
    done, status = 0, 0
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


@names
def test_joblib_with_threads(name: str) -> None:
    expected = bits(name)
    results = Parallel(n_jobs=2, backend="threading")(delayed(bits)(name) for _ in range(4))
    assert all(result == expected for result in results)


@pytest.mark.slow
def test_joblib_with_processes() -> None:
    """Loky's workers start afresh; in a process of its own, which takes them along at its end."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from joblib import Parallel, delayed; import test_processes as t;"
        "r = Parallel(n_jobs=2, backend='loky')(delayed(t.bits)(n) for n in t.ESTIMATORS);"
        "assert r == [t.bits(n) for n in t.ESTIMATORS]"
    )
    here = os.path.dirname(__file__)
    import fastclust

    paths = os.pathsep.join([os.path.dirname(os.path.dirname(fastclust.__file__)), here])
    command = [sys.executable, "-c", code, here]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
