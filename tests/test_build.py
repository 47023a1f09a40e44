"""The decisions of the build: toolchain search, flags, architectures."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastclust import _C

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_support"))
    import toolchain

    return toolchain


def test_torch_is_found_without_importing_it(toolchain):
    import torch

    found = toolchain.find_torch()
    assert found is not None
    assert found.version == torch.__version__
    assert Path(found.lib_dir, "libtorch_cpu.so").exists()


def test_an_isolated_environment_finds_the_torch_beside_the_interpreter():
    # pip takes site-packages off sys.path for the build.
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p];"
        f"sys.path.insert(0, {str(ROOT / 'build_support')!r}); import toolchain;"
        "print(toolchain.find_torch().version)"
    )
    output = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    import torch

    assert output.stdout.strip() == torch.__version__


@pytest.mark.parametrize(
    "wish, told", [("", r"no g\+\+ or c\+\+ was found"), ("g++-99", "CXX names 'g\\+\\+-99'")]
)
def test_a_missing_compiler_is_told(toolchain, monkeypatch, tmp_path, wish, told):
    monkeypatch.setenv("CXX", wish)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=f"needs a C\\+\\+20 compiler: {told}"):
        toolchain.find_compiler()


@pytest.mark.parametrize(
    "version, told",
    [
        ("2.9.1+cpu", "torch must be 2.10 or later, got 2.9.1+cpu: pip install"),
        ("2.13.0", "build it: pip install . (or, in a checkout, python setup.py build_ext"),
    ],
)
def test_an_import_that_cannot_work_says_what_to_do(version, told, tmp_path):
    """Kernels built against the stable ABI of a torch that is not there: undefined symbols."""
    broken = Path(tmp_path, "_C.py")
    broken.write_text("raise ImportError('_C.so: undefined symbol: aoti_torch_library_init')")
    code = (
        "import sys, types, torch;"
        f"torch.__version__ = {version!r};"
        "package = types.ModuleType('fastclust'); package.__path__ = sys.argv[1:];"
        "sys.modules['fastclust'] = package; import fastclust._library"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT / "fastclust")],
        capture_output=True,
        text=True,
    )
    assert "the kernels of fastclust do not load (_C.so: undefined symbol" in done.stderr
    assert told in done.stderr


def test_libraries_of_an_earlier_build_are_no_package_data(tmp_path):
    """A CPU wheel made in a used checkout would carry its CUDA library."""
    pytest.importorskip("setuptools", minversion="77", reason="as [build-system] asks for")
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py"]
    subprocess.run([sys.executable, *command, "--build-lib", str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "fastclust" / "report.html.j2").is_file()
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_is_forbidden_by_0(toolchain, monkeypatch):
    monkeypatch.setenv("FASTCLUST_CUDA", "0")
    assert not toolchain.cuda_wanted(toolchain.Nvcc("nvcc", "13.0"))


@pytest.mark.parametrize("nvcc, reason", [(None, "no nvcc"), ("12.0", "older than 12.1")])
def test_cuda_asked_for_but_impossible_is_an_error(toolchain, monkeypatch, nvcc, reason):
    monkeypatch.setenv("FASTCLUST_CUDA", "1")
    found = toolchain.Nvcc("nvcc", nvcc) if nvcc else None
    with pytest.raises(SystemExit, match=reason):
        toolchain.cuda_wanted(found)


def test_cuda_unset_means_where_possible(toolchain, monkeypatch, capsys):
    monkeypatch.delenv("FASTCLUST_CUDA", raising=False)
    assert toolchain.cuda_wanted(toolchain.Nvcc("nvcc", "13.0"))
    assert not toolchain.cuda_wanted(None)
    assert "CPU alone" in capsys.readouterr().err


def test_cuda_other_values_are_refused(toolchain, monkeypatch):
    monkeypatch.setenv("FASTCLUST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset"):
        toolchain.cuda_wanted(None)


def test_default_architectures(toolchain, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    flags = toolchain.gencode_flags(toolchain.cuda_archs(), hopper_only=False)
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_architecture_list_is_honoured(toolchain, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;12.0+PTX")
    assert toolchain.cuda_archs() == ["8.6", "12.0+PTX"]  # 7.5 has no bf16 matrix unit
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volta;Turing;Ada")
    assert toolchain.cuda_archs() == ["8.9"]


def test_architectures_are_nothing_to_a_cpu_build():
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "7.5", "FASTCLUST_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["eight", "8", "7.0;7.5"])
def test_unusable_architecture_lists_are_errors(toolchain, monkeypatch, text):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        toolchain.cuda_archs()


def test_hopper_files_are_compiled_for_hopper_alone(toolchain):
    assert toolchain.gencode_flags(["8.0"], hopper_only=True) == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]


def test_simd_flags_follow_the_suffix(toolchain):
    assert toolchain.simd_flags(Path("csrc/x/x_cpu.cpp")) == []
    assert "-mavx512f" in toolchain.simd_flags(Path("csrc/x/x_avx512.cpp"))
    assert "-mavx512f" not in toolchain.simd_flags(Path("csrc/x/x_avx2.cpp"))
    assert "-mavx512bf16" in toolchain.simd_flags(Path("csrc/x/x_avx512bf16.cpp"))


def test_pybind11_and_torch_never_meet_in_a_source(toolchain):
    """torch up to 2.12 carries headers of pybind11 that refuse the defines of the stable ABI."""
    torch = toolchain.find_torch()
    mixed = []
    for source in (ROOT / "csrc").rglob("*.c*"):
        takes_torch = bool(toolchain.torch_flags(source, torch))
        takes_pybind11 = "<pybind11/" in source.read_text()
        assert takes_pybind11 == (source.name == toolchain.PYTHON_MODULE)
        mixed += [source.name] * (takes_torch and takes_pybind11)
    assert not mixed


def test_no_source_is_compiled_for_the_build_machine():
    for path in [ROOT / "setup.py", *(ROOT / "build_support").glob("*.py")]:
        assert "march=native" not in path.read_text()


def test_jobs_respect_max_jobs(toolchain, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain.parallel_jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert toolchain.parallel_jobs() >= 1


def assert_compiles(source: Path, command: list[str]) -> None:
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, f"{source.name}:\n{result.stderr}"


@pytest.mark.skipif(
    not os.environ.get("FASTCLUST_OLDEST_TORCH"),
    reason="FASTCLUST_OLDEST_TORCH is not set: the folder of the oldest torch, its headers suffice",
)
def test_sources_compile_beside_the_oldest_torch(toolchain, tmp_path):
    root = Path(os.environ["FASTCLUST_OLDEST_TORCH"])
    version = ".".join(map(str, toolchain.MIN_TORCH))
    assert f"__version__ = '{version}." in (root / "version.py").read_text()
    headers = toolchain.torch_flags(Path("x.cpp"), toolchain.Torch(root, version))
    common = ["-I", str(ROOT / "csrc"), *headers]
    nvcc = toolchain.find_nvcc()
    everything = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
    checked = 0
    for source in everything:
        if "_ops" not in source.stem and "#include <torch/" not in source.read_text():
            continue
        if source.suffix == ".cpp":
            compiler = [toolchain.find_compiler(), *toolchain.CXX_FLAGS, "-O0", "-fsyntax-only"]
        elif nvcc is not None:
            arch = toolchain.gencode_flags(["9.0a"], hopper_only=False)
            compiler = [nvcc.path, *toolchain.NVCC_FLAGS, "-O0", *arch, "-c"]
            compiler += ["-o", str(tmp_path / "object.o")]
        else:
            continue
        assert_compiles(source, [*compiler, *common])
        checked += 1
    assert checked >= 6


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no cross compiler for arm64"
)
def test_the_portable_sources_compile_where_x86_does_not_exist(toolchain, tmp_path):
    torch = toolchain.find_torch()
    sources = [
        path
        for path in sorted((ROOT / "csrc").rglob("*.cpp"))
        if not toolchain.simd_flags(path) and path.name != toolchain.PYTHON_MODULE
    ]
    flags = [*toolchain.CXX_FLAGS, "-O0", "-fsyntax-only", "-I", str(ROOT / "csrc")]
    for source in sources:
        headers = toolchain.torch_flags(source, torch)
        assert_compiles(source, ["aarch64-linux-gnu-g++", *flags, *headers])


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (binutils)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
def test_nothing_is_stored_by_lanes_with_avx2():
    # A vmaskmov to memory is microcode on AMD's processors: k-means took three times as long, and
    # propagation of seven columns twice.
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "vfmadd" in code
    assert not re.findall(r"vp?maskmov\w+ +%[xy]mm\d+,%[xy]mm\d+,.*", code)
