"""What the build finds on this machine, and the one table of what is compiled with which flags."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 10)
MIN_NVCC = (12, 1)  # sm_90a, and sums of pairs by its memory (mma.cuh)

# Suffix of a source file -> flags of its instruction set. Files with a suffix are compiled on
# x86-64 only; everything else uses the compiler's baseline.
SIMD_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "_avx512bf16": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx2", "-mfma",
    ],
}  # fmt: skip

CXX_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-unused-parameter",
]  # fmt: skip

NVCC_FLAGS = [
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-DUSE_CUDA",
    # torch's stable headers trip this one warning about unused static helpers
    "-diag-suppress=177",
]  # fmt: skip

# LibTorch stable ABI of torch 2.10: the result loads in that release and in every later one.
TORCH_DEFINES = ["-DTORCH_TARGET_VERSION=0x020A000000000000ULL"]

# The one source that includes pybind11, and nothing of torch.
PYTHON_MODULE = "python_module.cpp"

DEFAULT_CUDA_ARCHS = "8.0;9.0a;8.0+PTX"


@dataclass(frozen=True)
class Torch:
    """An installed torch, seen from outside: never imported, so any build environment will do."""

    root: Path
    version: str

    @property
    def include(self) -> str:
        return str(self.root / "include")

    @property
    def lib_dir(self) -> str:
        return str(self.root / "lib")


def find_torch() -> Torch | None:
    """Find torch on ``sys.path``, else beside the interpreter (an isolated build hides it)."""
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates.append(Path(next(iter(spec.submodule_search_locations))))
    paths = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    paths += site.getsitepackages()
    candidates += [Path(p) / "torch" for p in paths]
    for root in candidates:
        version_file = root / "version.py"
        header = root / "include" / "torch" / "csrc" / "stable" / "library.h"
        if not version_file.is_file() or not header.is_file():
            continue
        match = re.search(r"__version__ = '([^']+)'", version_file.read_text())
        if match and tuple(int(p) for p in match[1].split(".")[:2]) >= MIN_TORCH:
            return Torch(root, match[1])
    return None


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++ or c++.

    Raises:
        SystemExit: There is none.
    """
    wish = os.environ.get("CXX")
    found = shutil.which(wish) if wish else shutil.which("g++") or shutil.which("c++")
    if found is None:
        missing = f"CXX names {wish!r}, which is not there" if wish else "no g++ or c++ was found"
        raise SystemExit(
            f"Building fastclust needs a C++20 compiler: {missing}. Install GCC 11 or later "
            "(Debian and Ubuntu: apt-get install g++), or point CXX at one."
        )
    return wish or found


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler."""

    path: str
    version: str


def find_nvcc() -> Nvcc | None:
    """Find nvcc through CUDA_HOME, CUDA_PATH, PATH, then the customary folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if not path or not Path(path).is_file():
            continue
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+\.\d+)", text)
        if match:
            return Nvcc(path, match[1])
    return None


def cuda_wanted(nvcc: Nvcc | None) -> bool:
    """Decide whether to build for CUDA: FASTCLUST_CUDA=0 never, 1 always, unset if possible.

    Raises:
        SystemExit: FASTCLUST_CUDA is 1 and there is no usable nvcc, or it has another value.
    """
    wish = os.environ.get("FASTCLUST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FASTCLUST_CUDA must be 0, 1 or unset, was {wish!r}")
    if wish == "0":
        return False
    problem = ""
    if nvcc is None:
        problem = "no nvcc was found (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    elif tuple(int(p) for p in nvcc.version.split(".")) < MIN_NVCC:
        problem = f"nvcc {nvcc.version} is older than {'.'.join(map(str, MIN_NVCC))}"
    if not problem:
        return True
    if wish == "1":
        raise SystemExit(
            f"FASTCLUST_CUDA=1 asks for the CUDA library, but {problem}. "
            "Install the CUDA toolkit or point CUDA_HOME at it; unset FASTCLUST_CUDA to build "
            "for the CPU alone."
        )
    print(f"fastclust: building for the CPU alone: {problem}", file=sys.stderr)
    return False


def cuda_archs() -> list[str]:
    """Architectures as in TORCH_CUDA_ARCH_LIST: ``8.0``, ``9.0a``, ``8.0+PTX``."""
    names = {
        "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0a",
        "Blackwell": "10.0;12.0",
    }  # fmt: skip
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    for name, archs in names.items():
        text = text.replace(name, archs)
    items = [item for item in re.split(r"[;\s]+", text) if item]
    for item in items:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", item):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST holds {item!r}; expected entries like 8.0, 9.0a or 8.0+PTX"
            )
    if all(float(re.match(r"\d+\.\d", item)[0]) < 8.0 for item in items):  # type: ignore[index]
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={text}: the kernels need 8.0 (Ampere) or later")
    return [i for i in items if float(re.match(r"\d+\.\d", i)[0]) >= 8.0]  # type: ignore[index]


def with_hopper(archs: list[str]) -> bool:
    """Whether kernels of their own for Hopper are built, ``*_sm90.cu``."""
    return any(arch.startswith("9.0a") for arch in archs)


def gencode_flags(archs: list[str], *, hopper_only: bool) -> list[str]:
    """Flags of nvcc; files named ``*_sm90.cu`` hold Hopper instructions and get sm_90a alone."""
    if hopper_only:
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flag = f"-gencode=arch=compute_{number},code=sm_{number}"
        if flag not in flags:
            flags.append(flag)
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def torch_flags(source: Path, torch: Torch) -> list[str]:
    """Headers and defines of torch; none for the Python module.

    torch carries headers of pybind11, and up to 2.12 they refuse to be included by whoever asks
    for the stable ABI.
    """
    if source.name == PYTHON_MODULE:
        return []
    return ["-isystem", torch.include, *TORCH_DEFINES]


def simd_flags(source: Path) -> list[str]:
    """Flags of a source's instruction set, by the suffix of its name."""
    for suffix, flags in SIMD_FLAGS.items():
        if source.stem.endswith(suffix):
            return flags
    return []


def is_x86_64() -> bool:
    """Whether the build targets x86-64."""
    return platform.machine().lower() in ("x86_64", "amd64")


def parallel_jobs() -> int:
    """Compile jobs: MAX_JOBS, else one per core and per 2.5 GB of memory that is free now."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = cores or 1
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free_kib = int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1])  # type: ignore[index]
        jobs = min(jobs, int(free_kib / (2.5 * 2**20)))
    except (OSError, TypeError):
        pass
    return max(1, jobs)
