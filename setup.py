"""Builds the two native libraries with ninja: fastclust._C (CPU) and libfastclust_cuda (CUDA).

What is compiled with which flags, and which toolchain is taken, is decided in
build_support/toolchain.py; this file only writes the build graph and runs it.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_support"))

import toolchain  # noqa: E402

CUDA_LIBRARY = "fastclust.libfastclust_cuda"


def sources(*suffixes: str) -> list[Path]:
    """All sources below csrc with one of the suffixes, in a fixed order."""
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)


class NinjaBuild(build_ext):
    """Compile through one ninja graph: parallel, and incremental by header dependencies."""

    def get_ext_filename(self, fullname: str) -> str:
        # The CUDA library is loaded by torch.ops.load_library, not imported: a plain name serves
        # every Python version.
        if fullname == CUDA_LIBRARY or fullname == CUDA_LIBRARY.rpartition(".")[2]:
            return str(Path(*fullname.split("."))) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        torch = toolchain.find_torch()
        if torch is None:
            raise SystemExit(
                "Building fastclust needs torch 2.10 or later in this environment "
                f"({sys.prefix}): pip install torch, or build without --no-build-isolation."
            )
        import pybind11

        build_dir = ROOT / self.build_temp
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx = toolchain.find_compiler()
        nvcc = toolchain.find_nvcc()
        with_cuda = any(ext.name == CUDA_LIBRARY for ext in self.extensions)
        archs = toolchain.cuda_archs() if with_cuda else []
        if not with_cuda and not self.inplace:
            # An earlier build's would go into this one's wheel.
            stale = Path(self.build_lib) / self.get_ext_filename(CUDA_LIBRARY)
            stale.unlink(missing_ok=True)

        common = ["-I", str(ROOT / "csrc")]
        if toolchain.is_x86_64():
            common.append("-DFASTCLUST_X86_SIMD")
        compiler = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
        build_facts = {
            "FASTCLUST_BUILD_TORCH": torch.version,
            "FASTCLUST_BUILD_COMPILER": compiler.splitlines()[0] if compiler else cxx,
            "FASTCLUST_BUILD_CUDA": nvcc.version if with_cuda and nvcc else "",
            "FASTCLUST_BUILD_CUDA_ARCHS": " ".join(archs) if with_cuda else "",
        }
        python_flags = [
            *("-isystem", sysconfig.get_path("include")),
            *("-isystem", pybind11.get_include()),
            *(f'-D{key}="{value}"' for key, value in build_facts.items()),
        ]

        graph = Graph(build_dir / "build.ninja")
        graph.rule("cxx", f"{q(cxx)} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d")
        graph.rule("link", f"{q(cxx)} -shared $in -o $out $flags")
        if with_cuda and nvcc is not None:
            # ptxas reports registers and spills on stderr; kept beside the object for the budget
            # check, and shown only when the compile fails.
            graph.rule(
                "nvcc",
                f"{q(nvcc.path)} -MD -MF $out.d $flags -c $in -o $out 2> $out.ptxas "
                "|| (cat $out.ptxas; exit 1)",
                depfile="$out.d",
            )
            graph.rule("nvlink", f"{q(nvcc.path)} -shared $in -o $out $flags")

        # Kernels of their own for Hopper are built where the architectures hold 9.0a.
        hopper = [Path(s) for ext in self.extensions for s in ext.sources if s.endswith("_sm90.cu")]
        nvcc_defines = ["-DFASTCLUST_SM90"] if hopper else []

        outputs = []
        for ext in self.extensions:
            objects = []
            for source in map(Path, ext.sources):
                source = (ROOT / source).resolve()
                headers = toolchain.torch_flags(source, torch)
                name = source.relative_to(ROOT / "csrc").with_suffix("")
                obj = build_dir / f"{name}{source.suffix}.o"
                if source.suffix == ".cu":
                    hopper_only = source.stem.endswith("_sm90")
                    gencode = toolchain.gencode_flags(archs, hopper_only=hopper_only)
                    flags = [*toolchain.NVCC_FLAGS, *gencode, *common, *headers, *nvcc_defines]
                    flags.append(f"-ccbin={cxx}")
                    graph.build("nvcc", obj, [source], flags)
                else:
                    flags = [*toolchain.CXX_FLAGS, *toolchain.simd_flags(source), *common, *headers]
                    if source.name == toolchain.PYTHON_MODULE:
                        flags += python_flags
                    graph.build("cxx", obj, [source], flags)
                objects.append(obj)
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            if ext.name == CUDA_LIBRARY:
                # libtorch.so is empty but pulls in libtorch_cuda.so where torch has CUDA.
                link = [
                    f"-L{torch.lib_dir}", "--cudart=static",
                    "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu",
                ]  # fmt: skip
                graph.build("nvlink", output, objects, link)
            else:
                graph.build("link", output, objects, [f"-L{torch.lib_dir}", "-ltorch_cpu"])
            outputs.append(output)
        graph.write()

        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        command += ["-f", str(graph.path), "-j", str(toolchain.parallel_jobs())]
        if self.verbose:
            command.append("-v")
        try:
            subprocess.run(command, check=True, cwd=ROOT)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "Compiling fastclust failed; the compiler's message stands above. "
                "FASTCLUST_CUDA=0 leaves the CUDA library out, MAX_JOBS=1 saves memory."
            ) from error

        # Also beside the sources: `python -m fastclust.train` in a checkout imports the folder it
        # stands in, and after `pip install .` that should work as well as anywhere else.
        for output in outputs:
            with contextlib.suppress(OSError, shutil.SameFileError):
                shutil.copy2(output, ROOT / "fastclust" / output.name)


class Graph:
    """A ninja file in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = ["ninja_required_version = 1.8", f"builddir = {path.parent}"]

    def rule(self, name: str, command: str, depfile: str | None = None) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += [f"  depfile = {depfile}", "  deps = gcc"]

    def build(self, rule: str, output: Path, inputs: list[Path], flags: list[str]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        paths = " ".join(escape(str(p)) for p in inputs)
        self.lines.append(f"build {escape(str(output))}: {rule} {paths}")
        self.lines.append("  flags = " + " ".join(q(flag).replace("$", "$$") for flag in flags))

    def write(self) -> None:
        text = "\n".join(self.lines) + "\n"
        # Left alone when nothing changed, so that the next build starts at once.
        if not self.path.is_file() or self.path.read_text() != text:
            self.path.write_text(text)


def q(text: str) -> str:
    """Quote for the shell."""
    return shlex.quote(text)


def escape(path: str) -> str:
    """Escape a path for ninja."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    """The CPU library always; the CUDA library where it can or must be built."""
    cpu = [s for s in sources(".cpp") if toolchain.is_x86_64() or not toolchain.simd_flags(s)]
    result = [Extension("fastclust._C", [str(s.relative_to(ROOT)) for s in cpu])]
    building = any(c in sys.argv for c in ("build_ext", "bdist_wheel", "editable_wheel", "build"))
    if building and toolchain.cuda_wanted(toolchain.find_nvcc()):
        hopper = any(a.startswith("9.0a") for a in toolchain.cuda_archs())
        cuda = [s for s in sources(".cu") if hopper or not s.stem.endswith("_sm90")]
        result.append(Extension(CUDA_LIBRARY, [str(s.relative_to(ROOT)) for s in cuda]))
    return result


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
