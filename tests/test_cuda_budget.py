"""Registers, spills and matrix instructions of the CUDA kernels against a table.

Read from the assembler's report that the build leaves beside each object, and from the object's
disassembly where ``cuobjdump`` and ``nvdisasm`` are at hand (on PATH, beside nvcc, or from the
packages ``nvidia-cuda-cuobjdump`` and ``nvidia-cuda-nvdisasm``). No GPU is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Blocks have 256 threads: 128 registers let two of them share a multiprocessor, 255 one.
TWO_BLOCKS, ONE_BLOCK = 128, 255
TILE_WORDS = 96  # bytes of local memory for the epilogue of T, in the few tiles at an edge
LOOP_GAP = 64  # instructions; matrix instructions of one loop follow each other more closely


@dataclass(frozen=True)
class Budget:
    """Upper bounds per kernel; ``hmma`` is exact, per precision of the operands.

    Some epilogues keep a few words in local memory, once per tile; the k loops must not, which the
    disassembly shows.
    """

    registers: int
    hmma: dict[str, int]
    spill_bytes: int = 24


# One k step of a tile is 2 x 4 x 4 matrix instructions per warp and product, and nothing unrolls
# further; of several products the loop holds half a step. A kernel with weights holds the loop
# twice, the snapshot's in bf16 with three products.
BUDGETS = {
    r"forward_kernel<MmaPath<bf16, 1>, MmaPath<bf16, 3>, false>": Budget(TWO_BLOCKS, {"BF16": 32}),
    r"forward_kernel<MmaPath<bf16, 1>, MmaPath<bf16, 3>, true>": Budget(ONE_BLOCK, {"BF16": 80}),
    r"forward_kernel<MmaPath<bf16, 3>, MmaPath<bf16, 3>, false>": Budget(ONE_BLOCK, {"BF16": 48}),
    r"forward_kernel<MmaPath<bf16, 3>, MmaPath<bf16, 3>, true>": Budget(ONE_BLOCK, {"BF16": 96}),
    r"forward_kernel<MmaPath<float, 1>, MmaPath<bf16, 3>, false>": Budget(TWO_BLOCKS, {"TF32": 32}),
    r"forward_kernel<MmaPath<float, 1>, MmaPath<bf16, 3>, true>": Budget(
        ONE_BLOCK, {"TF32": 32, "BF16": 48}
    ),
    r"tile_kernel<MmaPath<bf16, 1>, MmaPath<bf16, 3>, false>": Budget(
        TWO_BLOCKS, {"BF16": 32}, TILE_WORDS
    ),
    r"tile_kernel<MmaPath<bf16, 1>, MmaPath<bf16, 3>, true>": Budget(
        ONE_BLOCK, {"BF16": 80}, TILE_WORDS
    ),
    r"tile_kernel<MmaPath<bf16, 3>, MmaPath<bf16, 3>, false>": Budget(
        ONE_BLOCK, {"BF16": 48}, TILE_WORDS
    ),
    r"tile_kernel<MmaPath<bf16, 3>, MmaPath<bf16, 3>, true>": Budget(
        ONE_BLOCK, {"BF16": 96}, TILE_WORDS
    ),
    r"tile_kernel<MmaPath<float, 1>, MmaPath<bf16, 3>, false>": Budget(
        TWO_BLOCKS, {"TF32": 32}, TILE_WORDS
    ),
    r"tile_kernel<MmaPath<float, 1>, MmaPath<bf16, 3>, true>": Budget(
        ONE_BLOCK, {"TF32": 32, "BF16": 48}, TILE_WORDS
    ),
    # T X and T^T X
    r"product_kernel<MmaPath<bf16, 1>>": Budget(TWO_BLOCKS, {"BF16": 64}),
    r"product_kernel<MmaPath<bf16, 3>>": Budget(ONE_BLOCK, {"BF16": 96}),
    r"product_kernel<MmaPath<float, 1>>": Budget(TWO_BLOCKS, {"TF32": 48}),  # T^T X half unrolled
    r"range_kernel<MmaPath<bf16, 4>>": Budget(ONE_BLOCK, {"BF16": 64}),
    # float64 and the small kernels around: bounded by memory or by plain arithmetic.
    r"(forward|tile|product|range)_kernel<PlainPath<double>.*>": Budget(ONE_BLOCK, {}),
    r"(pack|sum|loss|inverse|finish|alpha|range_finish|rank|tile_mask|needed)_kernel(<.*>)?": (
        Budget(64, {})
    ),
    # Hopper: one step of the ring is 4 wgmma per product and warpgroup. Blocks alone on a
    # multiprocessor start with 168 registers a thread and move them to the consumers; of blocks of
    # 288 threads two share one with 96.
    r"sm90::(forward|tile)_kernel<1, false>": Budget(96, {"HGMMA": 4}),
    r"sm90::(forward|tile)_kernel<3, false>": Budget(168, {"HGMMA": 48}),  # two steps in flight
    r"sm90::(forward|tile)_kernel<1, true>": Budget(168, {"HGMMA": 16}),
    r"sm90::(forward|tile)_kernel<3, true>": Budget(168, {"HGMMA": 24}),
    r"sm90::product_kernel<1>": Budget(96, {"HGMMA": 24}),  # the ring of three unrolled
    r"sm90::product_kernel<3>": Budget(168, {"HGMMA": 96}),
    # Bounded by memory: no matrix instructions, registers for at least half of the threads.
    r"propagate/.*": Budget(128, {}, 0),
    # The batched SVD: the small factorisations are one block per batch, bound by latency.
    r"lowrank/(column_means|center|normal|gram|apply|shift|shifted)_kernel(<(float|double)>)?": (
        Budget(64, {}, 40)
    ),
    r"lowrank/gram_schmidt_kernel": Budget(TWO_BLOCKS, {}, 64),
    r"lowrank/(cholesky|jacobi)_kernel<true>": Budget(64, {}, 0),  # 1024 threads
    r"lowrank/(cholesky|jacobi)_kernel<false>": Budget(128, {}, 0),  # 512
    r"kmeans/(assign|measure|repair|sums)_kernel<(float|double)>": Budget(TWO_BLOCKS, {}),
    r"kmeans/(column_sums|square_norms|sample|draw|choose|count|means|inertia)_kernel<.*>": (
        Budget(64, {}, 40)
    ),
    r"kmeans/(column_means|mean|converge|total)_kernel": Budget(64, {}, 40),
}

# Loads that go out with no branch and no store between them, before a sum or before the stores of
# a copy: waiting for one at a time would take these kernels most of their time. The assembler
# leaves it at that where a store might change what is read next, where it cannot count the turns
# of a loop, where branches or shuffles part them, and where a value is converted at once.
LOADS_AHEAD = {
    r"kmeans/choose_kernel<.*>": {"copy": 8},
    r"kmeans/column_sums_kernel<.*>": {"sum": 8, "copy": 2},
    r"kmeans/sums_kernel<.*>": {"sum": 8},
    r"kmeans/count_kernel<.*>": {"sum": 8},
    r"lowrank/column_means_kernel<.*>": {"sum": 16},
    r"lowrank/shift_kernel<.*>": {"sum": 8},
    r"propagate/propagate_rows<.*, false>": {"sum": 8},
    r"propagate/propagate_rows<.*, true>": {"sum": 16},  # and the bits that go with each
}


def objects() -> list[Path]:
    """CUDA objects of the last build in this checkout."""
    return sorted(ROOT.glob("build/**/*.cu.o"))


needs_build = pytest.mark.skipif(
    not objects(), reason="no CUDA build here: FASTCLUST_CUDA=1 python setup.py build_ext --inplace"
)


def demangle(names: list[str]) -> dict[str, str]:
    """Short readable names of kernels, by mangled name."""
    tool = shutil.which("c++filt")
    if tool is None:
        pytest.skip("needs c++filt (binutils)")
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    short = {}
    for name, full in zip(names, text.splitlines(), strict=True):
        full = full.replace("fastclust::infonce::", "").replace("unsigned short", "bf16")
        full = full.replace("fastclust::", "").replace("(anonymous namespace)::", "")
        full = full.removeprefix("void ").partition("(")[0].replace(" >", ">")
        short[name] = full
    return short


def in_folder(folder: str, kernel: str) -> str:
    """Kernels of other operators go by their folder; those of the loss by name alone."""
    return kernel if folder == "infonce" else f"{folder}/{kernel.removeprefix(folder + '::')}"


def budget_of(kernel: str) -> Budget:
    found = [budget for pattern, budget in BUDGETS.items() if re.fullmatch(pattern, kernel)]
    assert len(found) == 1, f"{kernel} needs exactly one row of the budget table, has {len(found)}"
    return found[0]


@needs_build
def test_registers_and_spills() -> None:
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    rows = []
    for obj in objects():
        report = Path(f"{obj}.ptxas").read_text()
        # Of Hopper's kernels: products one after the other, registers that do not change hands.
        assert "Potential Performance Loss" not in report, obj.name
        found = entry.findall(report)
        rows += [(obj.parent.name, *row) for row in found]
    assert rows, "the assembler's reports are empty: build anew"
    names = demangle([row[1] for row in rows])
    seen = set()
    for folder, mangled, arch, stack, stores, loads, registers in rows:
        kernel = in_folder(folder, names[mangled])
        budget = budget_of(kernel)
        seen.add(kernel)
        assert int(registers) <= budget.registers, f"{kernel} on {arch}: {registers} registers"
        spilled = max(int(stack), int(stores), int(loads))
        assert spilled <= budget.spill_bytes, f"{kernel} on {arch}: {spilled} bytes spilled"
    assert {name for name in BUDGETS if "MmaPath" in name} <= seen, "a main kernel is missing"


def tool(name: str) -> str | None:
    nvcc = shutil.which("nvcc")
    places = [
        Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin",
        *([Path(nvcc).resolve().parent] if nvcc else []),
        Path("/usr/local/cuda/bin"),
    ]
    found = shutil.which(name) or next(
        (str(p / name) for p in places if os.access(p / name, os.X_OK)), None
    )
    return found


def disassembly(obj: Path) -> list[str]:
    """Lines of an object's machine code."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [cuobjdump, "-sass", str(obj)],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    ).stdout.splitlines()  # fmt: skip


@needs_build
def test_loads_go_out_together() -> None:
    ahead: dict[tuple[str, str, str], dict[str, int]] = {}
    for obj in (o for o in objects() if o.parent.name != "infonce"):
        arch, current, loads = "", {"sum": 0, "copy": 0}, 0
        for line in disassembly(obj):
            if match := re.search(r"arch = (\w+)", line):
                arch = match[1]
            elif match := re.search(r"Function : (\w+)", line):
                current = ahead.setdefault((obj.parent.name, match[1], arch), {"sum": 0, "copy": 0})
                loads = 0
            elif re.search(r"\bLDG\b", line):
                loads += 1
                current["sum"] = max(current["sum"], loads)
            elif re.search(r"\bSTG\b", line):
                current["copy"], loads = max(current["copy"], loads), 0
            elif re.search(r"\b(BRA|BAR|EXIT|RET)\b", line):
                loads = 0
    if not ahead:
        pytest.skip("the objects could not be disassembled")
    names = demangle([name for _, name, _ in ahead])
    kernels = {(in_folder(folder, names[m]), arch): n for (folder, m, arch), n in ahead.items()}
    for pattern, least in LOADS_AHEAD.items():
        found = {key: n for key, n in kernels.items() if re.fullmatch(pattern, key[0])}
        assert found, f"no kernel {pattern}"
        for key, n in found.items():
            assert all(n[kind] >= count for kind, count in least.items()), f"{key}: {n}"


@needs_build
def test_matrix_instructions_in_the_disassembly() -> None:
    matrix = r"\bHMMA\.\d+\.F32\.(\w+)|\b(HGMMA)\.64x128x16\.F32\.BF16"
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    spills_in_loop = []
    for obj in objects():
        arch, current = "", {}
        since_matrix, spill = LOOP_GAP, ""  # instructions since the last HMMA; spill seen in them
        for line in disassembly(obj):
            if match := re.search(r"arch = (\w+)", line):
                arch = match[1]
            elif match := re.search(r"Function : (\w+)", line):
                current = counts.setdefault((obj.parent.name, match[1], arch), {})
                since_matrix, spill = LOOP_GAP, ""
            elif match := re.search(matrix, line):
                kind = match[1] or match[2]
                current[kind] = current.get(kind, 0) + 1
                if spill and since_matrix < LOOP_GAP:
                    spills_in_loop.append(spill)
                since_matrix, spill = 0, ""
            elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
                since_matrix += 1
                if re.search(r"\b(LDL|STL)\b", line):
                    spill = f"{next(reversed(counts))}: {line.strip()}"
    if not counts:
        pytest.skip("the object could not be disassembled")
    assert not spills_in_loop
    names = demangle([name for _, name, _ in counts])
    for (folder, mangled, arch), found in counts.items():
        kernel = in_folder(folder, names[mangled])
        assert found == budget_of(kernel).hmma, f"{kernel} on {arch}: {found}"
