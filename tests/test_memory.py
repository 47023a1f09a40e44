"""The estimate before the allocation: what is available, and who asks."""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from fastclust import ECNMF, HSAN, SSGC, Graph, cli, memory, ops
from fastclust.memory import InsufficientMemoryError, available_memory, require_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much memory is left")


@linux
def test_what_is_available() -> None:
    available = available_memory()
    assert available is not None and 1 << 24 < available < 1 << 50


@linux
def test_the_limit_of_the_process_counts() -> None:
    code = (
        "import resource; from fastclust.memory import *;"
        "from fastclust.memory import _fields, Path;"
        "used = _fields(Path('/proc/self/status'))['VmSize'] * 1024;"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), {resource.RLIM_INFINITY}));"
        "print(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 64 << 20


def test_where_nothing_is_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": None)
    require_memory(1 << 60, "it", "change it")


def test_the_message_names_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": 3 * 10**9)
    require_memory(3 * 10**9, "it", "change it")
    with pytest.raises(InsufficientMemoryError) as caught:
        require_memory(4 * 10**9, "it", "change it")
    text = "it needs at least 4.00 GB of memory, 3.00 GB are available; change it"
    assert str(caught.value) == text
    assert cli.explain(caught.value) == (2, text)


@linux
@pytest.mark.parametrize("model", [HSAN, ECNMF])
def test_a_fit_that_cannot_fit_is_refused_at_once(model: type) -> None:
    x = sp.csr_array(np.eye(40, dtype=np.float32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InsufficientMemoryError, match=r"40 nodes .* lower width \(now 10+\)"):
        model(3, width=10**9, device="cpu").fit(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_the_estimate_of_ssgc(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sp.random_array((20_000, 1000), density=0.01, format="csr", dtype=np.float32)
    needed = 2 * 4 * 20_000 * 256
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": needed - 1)
    near = np.arange(20_000)
    ring = np.stack([np.r_[near, np.roll(near, 1)], np.r_[np.roll(near, 1), near]])
    for n_clusters in (3, "auto"):
        with pytest.raises(
            InsufficientMemoryError, match=r"SSGC on 20000 .*; reduce the features or take a sub"
        ):
            SSGC(n_clusters, device="cpu").fit(x, adjacency=ring)


@linux
def test_operators_that_write_a_large_matrix() -> None:
    n = 2_000_000
    one = torch.zeros(1)
    w = ops.Hardness(
        z=(one,),
        e=(one,),
        alpha=one,
        range=one,
        labels=one,
        membership=torch.zeros(n, dtype=torch.int64),
        order=one,
        beta=1.0,
    )
    with pytest.raises(InsufficientMemoryError, match=r"dense_weights \[4000000, 4000000\]"):
        ops.dense_weights(w)


@linux
def test_an_edge_with_an_absurd_node_number() -> None:
    with pytest.raises(InsufficientMemoryError, match="number the nodes from 0 on"):
        Graph(np.array([[0, 1], [1, 2**60], [5, 6]]).T)
