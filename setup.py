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


def is_hopper(source: Path) -> bool:
    """Whether a source holds kernels of Hopper's own instructions."""
    return source.stem.endswith("_sm90")


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
        with_cuda = any(ext.name == CUDA_LIBRARY for ext in self.extensions)
        if not with_cuda and not self.inplace:
            # An earlier build's would go into this one's wheel.
            stale = Path(self.build_lib) / self.get_ext_filename(CUDA_LIBRARY)
            stale.unlink(missing_ok=True)
        self.torch, self.cxx = torch, toolchain.find_compiler()
        self.nvcc = toolchain.find_nvcc() if with_cuda else None
        self.archs = toolchain.cuda_archs() if with_cuda else []
        self.build_dir = ROOT / self.build_temp
        self.build_dir.mkdir(parents=True, exist_ok=True)

        graph = Graph(self.build_dir / "build.ninja")
        self.add_rules(graph)
        outputs = [self.add_library(graph, ext) for ext in self.extensions]
        graph.write()
        self.run_ninja(graph.path)
        # Also beside the sources: `python -m fastclust.train` in a checkout imports the folder it
        # stands in, and after `pip install .` that should work as well as anywhere else.
        for output in outputs:
            with contextlib.suppress(OSError, shutil.SameFileError):
                shutil.copy2(output, ROOT / "fastclust" / output.name)

    def add_rules(self, graph: Graph) -> None:
        cxx = q(self.cxx)
        graph.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d")
        graph.rule("link", f"{cxx} -shared $in -o $out $flags")
        if self.nvcc is not None:
            nvcc = q(self.nvcc.path)
            # ptxas reports registers and spills on stderr; kept beside the object for the budget
            # check, and shown only when the compile fails.
            graph.rule(
                "nvcc",
                f"{nvcc} -MD -MF $out.d $flags -c $in -o $out 2> $out.ptxas "
                "|| (cat $out.ptxas; exit 1)",
                depfile="$out.d",
            )
            graph.rule("nvlink", f"{nvcc} -shared $in -o $out $flags")

    def add_library(self, graph: Graph, ext: Extension) -> Path:
        """Add the compiles and the link of one library; returns where it will be."""
        objects = []
        for source in ((ROOT / s).resolve() for s in ext.sources):
            objects.append(self.build_dir / f"{source.relative_to(ROOT / 'csrc')}.o")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            graph.build(rule, objects[-1], [source], self.flags(source))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CUDA_LIBRARY:
            # libtorch.so is empty but pulls in libtorch_cuda.so where torch has CUDA.
            link = [
                f"-L{self.torch.lib_dir}", "--cudart=static",
                "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu",
            ]  # fmt: skip
            graph.build("nvlink", output, objects, link)
        else:
            graph.build("link", output, objects, [f"-L{self.torch.lib_dir}", "-ltorch_cpu"])
        return output

    def flags(self, source: Path) -> list[str]:
        """The flags that a source is compiled with."""
        common = ["-I", str(ROOT / "csrc")]
        if toolchain.is_x86_64():
            common.append("-DFASTCLUST_X86_SIMD")
        common += toolchain.torch_flags(source, self.torch)
        if source.suffix == ".cu":
            gencode = toolchain.gencode_flags(self.archs, hopper_only=is_hopper(source))
            hopper = ["-DFASTCLUST_SM90"] if toolchain.with_hopper(self.archs) else []
            return [*toolchain.NVCC_FLAGS, *gencode, *common, *hopper, f"-ccbin={self.cxx}"]
        flags = [*toolchain.CXX_FLAGS, *toolchain.simd_flags(source), *common]
        return flags + self.module_flags() if source.name == toolchain.PYTHON_MODULE else flags

    def module_flags(self) -> list[str]:
        """Headers of the Python module, and what it can tell of this build."""
        import pybind11

        compiler = subprocess.run([self.cxx, "--version"], capture_output=True, text=True).stdout
        facts = {
            "FASTCLUST_BUILD_TORCH": self.torch.version,
            "FASTCLUST_BUILD_COMPILER": compiler.splitlines()[0] if compiler else self.cxx,
            "FASTCLUST_BUILD_CUDA": self.nvcc.version if self.nvcc else "",
            "FASTCLUST_BUILD_CUDA_ARCHS": " ".join(self.archs),
        }
        return [
            *("-isystem", sysconfig.get_path("include")),
            *("-isystem", pybind11.get_include()),
            *(f'-D{key}="{value}"' for key, value in facts.items()),
        ]

    def run_ninja(self, path: Path) -> None:
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        command += ["-f", str(path), "-j", str(toolchain.parallel_jobs())]
        if self.verbose:
            command.append("-v")
        try:
            subprocess.run(command, check=True, cwd=ROOT)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "Compiling fastclust failed; the compiler's message stands above. "
                "FASTCLUST_CUDA=0 leaves the CUDA library out, MAX_JOBS=1 saves memory."
            ) from error


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
        hopper = toolchain.with_hopper(toolchain.cuda_archs())
        cuda = [s for s in sources(".cu") if hopper or not is_hopper(s)]
        result.append(Extension(CUDA_LIBRARY, [str(s.relative_to(ROOT)) for s in cuda]))
    return result


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
