"""Fixtures shared by the test modules."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-data",
        action="store_true",
        help="fail, instead of skipping, the tests that need the graphs named by FASTCLUST_DATA",
    )


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End this process after a kernel has failed: no CUDA call works in it any more.

    The tests to come would fail for that alone. A worker of pytest-xdist is replaced.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"no CUDA call works after {nodeid}: {error}", returncode=3)


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    """The folder of benchmark graphs named by FASTCLUST_DATA; skips where there is none."""
    absent = pytest.fail if pytestconfig.getoption("--require-data") else pytest.skip
    root = os.environ.get("FASTCLUST_DATA")
    if not root:
        absent("FASTCLUST_DATA is not set: it must name the folder of benchmark graphs")
    if not (Path(root) / "cora.npz").is_file():
        absent(f"FASTCLUST_DATA={root} holds no cora.npz")
    return Path(root)


ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compiles tests/device/NAME_emulated.cpp, CUDA kernels over an emulated block; skips without
    a C++ compiler."""

    def compiled(name: str) -> ctypes.CDLL:
        if CXX is None:
            pytest.skip("needs a C++ compiler: none was found on PATH")
        library = tmp_path_factory.mktemp("device") / f"{name}_emulated.so"
        source = ROOT / "tests" / "device" / f"{name}_emulated.cpp"
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
        flags += ["-Wno-unknown-pragmas", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests")]
        subprocess.run([CXX, *flags, "-x", "c++", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    return compiled


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the GPU where there is one: the test runs on each."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return str(request.param)


@pytest.fixture
def path_graph() -> sp.csr_array:
    """The path 0 - 1 - 2 - 3 - 4, unweighted."""
    return sp.csr_array(sp.diags_array([np.ones(4), np.ones(4)], offsets=[-1, 1]), dtype=np.float32)


@pytest.fixture
def two_blocks() -> tuple[sp.csr_array, np.ndarray, np.ndarray]:
    """A planted partition of 60 nodes into two blocks: adjacency, features [60, 8], labels."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    p = np.where(labels[:, None] == labels[None, :], 0.4, 0.02)
    upper = np.triu(rng.random((60, 60)) < p, 1)
    features = rng.normal(size=(60, 8)).astype(np.float32) + 2.0 * labels[:, None]
    adjacency = sp.csr_array((upper | upper.T).astype(np.float32))
    return adjacency, features.astype(np.float32), labels


@pytest.fixture
def degrees_only() -> tuple[sp.csr_array, np.ndarray]:
    """150 nodes whose degrees differ much, and nothing else: adjacency and one-hot degrees."""
    n = 150
    expected = np.linspace(1, 8, n)  # Chung and Lu's model: degrees in proportion to these
    chance = np.clip(np.outer(expected, expected) / expected.sum() * 20 / expected.mean(), 0, 1)
    upper = np.triu(np.random.default_rng(0).random((n, n)) < chance, 1).astype(np.float32)
    degree = (upper + upper.T).sum(axis=1).astype(int)
    return sp.csr_array(upper + upper.T), np.eye(degree.max() + 1, dtype=np.float32)[degree]
