"""Arguments, messages and progress that the command-line modules share."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastclust import cli


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0,3,5", [0, 3, 5]), ("5,0-2,1", [5, 0, 1, 2])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert cli.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "0-", "1.5", "0-99999999", "9999999999"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers"):
        cli.parse_seeds(text)


@given(st.text(max_size=30))
def test_seeds_of_any_text_are_a_list_or_a_clear_error(text: str) -> None:
    try:
        seeds = cli.parse_seeds(text)
    except argparse.ArgumentTypeError:
        return
    assert seeds and len(seeds) == len(set(seeds))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("40", int, 40),
        ("40", int | None, 40),
        ("none", int | None, None),
        (3.0, int, 3),
        ("1e-3", float, 1e-3),
        (1, float, 1.0),
        ("true", bool, True),
        ("off", bool, False),
        (True, bool, True),
        ("merge", Literal["merge", "block"], "merge"),
        ("auto", int | Literal["auto"], "auto"),
        ("7", int | Literal["auto"], 7),
        ("60s", int | str, "60s"),
        ("25", int | str, 25),
        ("text", str, "text"),
    ],
)
def test_convert(value: Any, hint: Any, expected: Any) -> None:
    result = cli.convert("key", value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "fragment"),
    [
        ("x", int, "key must be a whole number, got 'x'"),
        ("1.5", int, "a whole number"),
        (1.5, int, "a whole number"),
        (True, int, "a whole number"),
        ("x", float | None, "a number or none"),
        ("maybe", bool, "true or false"),
        ("mrege", Literal["merge", "block"], "did you mean merge?"),
        ([1], float, "a number"),
    ],
)
def test_convert_refuses(value: Any, hint: Any, fragment: str) -> None:
    with pytest.raises(cli.UsageError) as caught:
        cli.convert("key", value, hint)
    assert fragment in str(caught.value)


def test_explain_tells_wrong_input_from_our_own_faults() -> None:
    assert cli.explain(cli.UsageError("two\nlines")) == (2, "two lines")
    full = OSError(errno.ENOSPC, "No space left on device", "/x/result.json")
    code, text = cli.explain(full)
    assert code == 2 and "/x/result.json" in text and "--resume" in text
    # Not raised by the package itself: a fault to be reported.
    code, text = cli.explain(ValueError("shapes do not fit"))
    assert code == 1 and "FASTCLUST_DEBUG" in text
    with pytest.raises(ValueError) as ours:
        from fastclust.validation import check_n_clusters

        check_n_clusters(1)
    assert cli.explain(ours.value)[0] == 2
    assert cli.explain(MemoryError())[0] == 2


def test_progress_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = cli.make_progress(quiet=False)
    progress.start("seed 3")
    for epoch in (1, 2, 3):
        progress(SimpleNamespace(epoch=epoch, n_epochs=3, loss=0.5, seconds=0.25))
    progress.stop()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "seed 3  epoch 1/3  loss 0.5  0.25 s/epoch  0.5 s left",
        "seed 3  epoch 3/3  loss 0.5  0.25 s/epoch  0.0 s left",
    ]


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = cli.make_progress(quiet=True)
    progress.start("seed 3")
    progress(SimpleNamespace(epoch=1, n_epochs=1, loss=0.5, seconds=0.25))
    progress.stop()
    assert capsys.readouterr() == ("", "")


def test_duration() -> None:
    assert [cli.duration(s) for s in (0, 3.21, 59.99, 125, 7300)] == [
        "0.0 s", "3.2 s", "1 min 0 s", "2 min 5 s", "2 h 1 min",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["-m", "fastclust.train"], True),
        (["-m", "fastclust", "train"], True),
        (["{folder}/fastclust", "train"], True),
        (["-c", "import fastclust"], False),
        (["-m", "using"], False),
    ],
)
def test_an_interrupt_while_torch_is_imported(
    command: list[str], told: bool, tmp_path: Path
) -> None:
    """Of commands alone: a program that uses the package has its own way to end."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    (tmp_path / "using.py").write_text("import fastclust")
    (tmp_path / "fastclust").write_text("from fastclust.__main__ import main\nmain()\n")
    root = Path(cli.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *(part.format(folder=tmp_path) for part in command)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if told:
        assert (done.returncode, done.stderr) == (130, "interrupted\n")
    else:
        assert done.returncode == -signal.SIGINT and "Traceback" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [0, 2])
def test_a_signal_after_the_end_does_not_change_the_outcome(number: int, code: int) -> None:
    text = (
        f"import atexit, os; from fastclust import cli; "
        f"atexit.register(os.kill, os.getpid(), {int(number)}); cli.run(lambda: {code})"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")
