"""Every example that a reader may copy runs: README, docs, examples/, docstrings.

Blocks of ``python`` and ``sh`` of a page run in order, Python blocks in one namespace, all of them
in one empty folder. Trainings are cut short. A block that installs or builds is marked
``no-run: reason``, one that wants a benchmark graph ``needs: name``.
"""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from markdown_it import MarkdownIt

import fastclust
from fastclust.datasets import DatasetNotFoundError, load_dataset
from fastclust.estimators import trained

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EPOCHS = 3


def blocks(path: Path) -> list[tuple[str, str, str, int]]:
    """Language, remark, text and line of every fenced block."""
    found = []
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            language, _, remark = token.info.strip().partition(" ")
            found.append((language, remark.strip(), token.content, token.map[0] + 2))
    return found


# Each command of the shell is a process that imports torch: pages with several take a while.
RUNNABLE = [
    pytest.param(page, marks=[pytest.mark.slow] if languages.count("sh") > 1 else [], id=page.name)
    for page in PAGES
    if {"python", "sh"} & set(languages := [language for language, *_ in blocks(page)])
]


def need(name: str) -> None:
    """Skip unless a benchmark graph lies here: tests download nothing."""
    if not any(Path(os.environ.get("FASTCLUST_DATA", "/nowhere")).glob(f"{name}.npz")):
        pytest.skip(f"needs the data set {name} in $FASTCLUST_DATA")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own, trainings of a few epochs, no window."""
    whole = trained.train

    def cut(model: Any, *, epochs: int, **rest: Any) -> Any:
        return whole(model, epochs=min(epochs, EPOCHS), **rest)

    monkeypatch.setattr(trained, "train", cut)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")


def run_shell(text: str, where: str) -> None:
    """Run the lines of a shell block; of fastclust only the first epochs."""
    text = re.sub(r"\s+#.*$", "", text, flags=re.M).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"] and words[2].startswith("fastclust."), (
            f"{where}: {line!r} is no command of fastclust; mark the block no-run with a reason"
        )
        words[0] = sys.executable
        trains = words[2] == "fastclust.train" and not {"--help", "help", "ssgc"} & set(words)
        if trains and "--config" not in words and "--resume" not in words:
            if "--epochs" in words:
                at = words.index("--epochs")
                del words[at : at + 2]
            words += ["--epochs", str(EPOCHS)]
        elif "--resume" in words:
            words[words.index("--epochs") + 1] = str(EPOCHS)
        for name in set(words) & {"cora", "amac"}:
            need(name)
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", RUNNABLE)
def test_examples_of_a_page(path: Path, short: None) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    np.random.seed(0)
    skipped = []
    for language, remark, text, line in blocks(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        if language not in ("python", "sh"):
            continue
        if remark.startswith("no-run:"):
            assert language == "sh" and remark.removeprefix("no-run:").strip(), where
            continue
        if remark.startswith("needs:"):
            try:
                need(remark.removeprefix("needs:").strip())
            except pytest.skip.Exception as reason:
                skipped.append(str(reason))
                continue
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(path), "exec"), namespace)
        else:
            run_shell(text, where)
    if skipped:
        pytest.skip(f"the rest runs; {skipped[0]}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_file(
    path: Path, short: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text(encoding="utf-8")
    if "torch_geometric" in text:
        pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
    monkeypatch.setattr(sys, "argv", [str(path)])
    assert text.startswith('"""') and f"python examples/{path.name}" in text
    exec(compile(text, str(path), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


MODULES = [
    module.name
    for module in pkgutil.walk_packages(fastclust.__path__, "fastclust.")
    if not module.name.endswith(("_C", "libfastclust_cuda"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, short: None) -> None:
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=options, verbose=False)
    for case in finder.find(module, name):
        case.globs = dict(vars(module))
        messages: list[str] = []
        runner.run(case, out=messages.append)
        assert not messages, "".join(messages)


def test_pages_are_linked_and_links_lead_somewhere() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        named = page.stem in ("index", "results", "scale", "reliability")
        assert named or re.search(rf"^{page.stem}$", index, re.M), f"{page.name} is in no toctree"
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", readme):
        assert (ROOT / target).exists(), f"README.md links to {target}"


def test_benchmark_graphs_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``need`` looks for is what a run would find."""
    need("cora")
    try:
        assert load_dataset("cora").n_nodes == 2708
    except DatasetNotFoundError:
        pytest.fail("need() and load_dataset disagree")
