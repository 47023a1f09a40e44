"""The CPU kernels alone, without torch, under the sanitizers of the compiler.

``tests/native`` runs every kernel on small and odd shapes at every dispatch level and with 1, 2
and 4 threads, compares the bits of the thread counts and every level with plain loops. Here it is
built and run three times: with AddressSanitizer and UndefinedBehaviorSanitizer (fresh memory filled
with NaN, so that a read of it shows), the same with arrays that end at an unreadable page (masked
vector loads, which the sanitizer does not see), and with ThreadSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def kernel_sources() -> list[Path]:
    """Everything below csrc that knows no torch type."""
    torch_side = {"library.cpp", "python_module.cpp"}
    return [
        path
        for path in sorted((ROOT / "csrc").rglob("*.cpp"))
        if path.name not in torch_side and not path.stem.endswith("_ops")
    ]


def run(command: list[object]) -> str:
    """Run a command; its output, or a failed test with it."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        pytest.fail(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-8000:]}", False)
    return done.stdout


def build(folder: Path, sanitizers: str) -> Path:
    """The program with every kernel and every test, instrumented."""
    sys.path.insert(0, str(ROOT / "build_support"))
    import toolchain

    flags = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
    flags += ["-DFASTCLUST_STANDALONE", "-I", ROOT / "csrc", "-I", ROOT / "tests"]
    x86 = toolchain.is_x86_64()
    if x86:
        flags.append("-DFASTCLUST_X86_SIMD")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.relative_to(ROOT).as_posix().replace('/', '-')}.o"
        run([CXX, *flags, *toolchain.simd_flags(source), "-c", source, "-o", target])
        return target

    sources = [*kernel_sources(), *sorted((ROOT / "tests" / "native").glob("*.cpp"))]
    sources = [path for path in sources if x86 or not toolchain.simd_flags(path)]
    with ThreadPoolExecutor(toolchain.parallel_jobs()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernels"
    run([CXX, f"-fsanitize={sanitizers}", *objects, "-o", program, "-lpthread"])
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The instrumented programs by sanitizer, built on first use."""

    class Programs(dict[str, Path]):
        def __missing__(self, sanitizers: str) -> Path:
            self[sanitizers] = build(tmp_path_factory.mktemp("native"), sanitizers)
            return self[sanitizers]

    if CXX is None:
        pytest.skip("no C++ compiler (g++ or c++): the sanitizer builds need one")
    probe = [CXX, "-fsanitize=address,undefined", "-x", "c++", "-", "-o", os.devnull]
    answer = subprocess.run(probe, input=b"int main() {}", capture_output=True)
    if answer.returncode != 0:
        pytest.skip(f"{CXX} has no sanitizer libraries: {answer.stderr.decode()[:200]}")
    yield Programs()


@pytest.mark.parametrize(
    ("sanitizers", "options"),
    [
        ("address,undefined", []),
        ("address,undefined", ["--guard-pages"]),
        ("thread", []),
    ],
    ids=["address-undefined", "guard-pages", "thread"],
)
def test_kernels_are_clean(programs: dict[str, Path], sanitizers: str, options: list[str]) -> None:
    output = run([programs[sanitizers], *options])
    suites = {line.split(":")[0] for line in output.splitlines() if "checks passed" in line}
    assert suites == {"gemm", "infonce", "kmeans", "lowrank", "parallel", "propagate"}


# A fault of each kind, to be found: a sanitizer that is not at work would find nothing anywhere.
FAULTS = {
    "overrun": ("address,undefined", "heap-buffer-overflow", "int* x = new int[n]; return x[n];"),
    "overflow": ("address,undefined", "signed integer overflow", "return 2147483647 + n;"),
    "race": (
        "thread",
        "data race",
        "int x = 0; std::thread t([&] { ++x; }); ++x; t.join(); return x == n;",
    ),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_found(programs: dict[str, Path], tmp_path: Path, name: str) -> None:
    sanitizers, message, body = FAULTS[name]
    source = tmp_path / "fault.cpp"
    source.write_text(f"#include <thread>\nint main(int n, char**) {{ {body} }}\n")
    run([CXX, f"-fsanitize={sanitizers}", "-O0", source, "-o", tmp_path / "fault", "-lpthread"])
    done = subprocess.run(
        [tmp_path / "fault"], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr
