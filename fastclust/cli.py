"""What the command-line modules share: arguments, errors as one line, exit codes, progress.

Exit codes: 0 done; 2 wrong usage or data, with one line on stderr that says what and how to mend
it; 130 interrupted (SIGINT or SIGTERM); 1 for a fault of fastclust itself. ``FASTCLUST_DEBUG=1``
shows the traceback of any of them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import errno
import os
import re
import signal
import sys
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from fastclust.memory import InsufficientMemoryError

__all__ = [
    "Interrupted",
    "Parser",
    "Progress",
    "UsageError",
    "cluster_count",
    "convert",
    "count",
    "did_you_mean",
    "duration",
    "explain",
    "guarded",
    "make_progress",
    "note",
    "parse_seeds",
    "path",
    "run",
    "show",
]

_MAX_SEED = 2**32 - 1
_MAX_SEEDS = 10_000
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGE = str(Path(__file__).parent)


class UsageError(Exception):
    """Wrong usage or data: shown as one line, exit code 2."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; its text says what was kept and how to go on."""


# --- running a main function -------------------------------------------------------------------


def run(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and leave the process with the exit code that its outcome stands for."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    _map_large_blocks()
    warnings.simplefilter("always")
    warnings.showwarning = _show_warning
    code = guarded(main)
    # The outcome stands: a signal while the interpreter takes itself down must not replace it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stderr.flush()
    sys.exit(code)


def _map_large_blocks() -> None:
    """Have glibc map every block of a megabyte or more on its own and return it when freed.

    Left to itself, glibc keeps blocks of up to 32 MB in its heap after the first of them is freed.
    An epoch on Amazon Computers allocates and frees dozens of 31 MB arrays; they split the heap,
    and the process peaked at 1.3 to 1.5 GB where 0.85 GB are in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def guarded(main: Callable[[], int]) -> int:
    """The exit code of ``main``, any exception told in one line on stderr."""
    _replace_closed_streams()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = 0  # the reader of our output (head, less) has left: nothing is wrong here
    except KeyboardInterrupt as interrupt:
        note(str(interrupt) or "interrupted")
        code = 130
    except Exception as error:
        if debugging():
            traceback.print_exc()
        code, message = explain(error)
        note(message if code == 2 else f"internal error: {message}", kind="error")
    try:
        sys.stdout.flush()
    except OSError:  # told already; Python's own attempt at its end would change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _replace_closed_streams() -> None:
    """Streams that the caller has closed (``>&-``) are None to Python: what goes there is lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def debugging() -> bool:
    """Whether ``FASTCLUST_DEBUG`` asks for tracebacks."""
    return os.environ.get("FASTCLUST_DEBUG", "") not in ("", "0")


def explain(error: Exception) -> tuple[int, str]:
    """The exit code that an exception stands for, and its one line."""
    text = _one_line(error)
    if isinstance(error, UsageError):
        return 2, text
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        advice = "check the path and its permissions"
        if error.errno in _OUT_OF_SPACE:
            advice = (
                "make room, then run the same command, with --resume if it has --out DIR; older "
                "files are intact"
            )
        return 2, f"{where}{error.strerror}; {advice}"
    if isinstance(error, (FileNotFoundError, InsufficientMemoryError)):
        return 2, text
    if isinstance(error, MemoryError) or "not enough memory" in text or "out of memory" in text:
        return 2, f"not enough memory ({text[:120]}); use a smaller graph, rank or width"
    # Checks of settings and data raise ValueError and TypeError inside the package, or in
    # scikit-learn's validation; the same from the depth of another library is a fault of ours.
    # An ArithmeticError is a diverged loss, whose message says what to lower.
    if isinstance(error, (ValueError, TypeError, ArithmeticError)) and _raised_here(error):
        return 2, text
    return 1, (
        f"{type(error).__name__}: {text[:300]} (FASTCLUST_DEBUG=1 shows the traceback; please "
        f"report it with the output of python -m fastclust.info)"
    )


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    path = Path(frames[-1].filename)
    return str(path).startswith(_PACKAGE) or path.parts[-3:-1] == ("sklearn", "utils")


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    return " ".join(text.split()) or type(error).__name__


def _raise_interrupt(signum: int, frame: types.FrameType | None) -> None:
    raise Interrupted("interrupted")


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    # Warnings of other libraries are no news to a user of this one.
    if category.__module__.startswith("fastclust") or debugging():
        note(" ".join(str(message).split()), kind="warning")


def note(text: str, *, kind: str = "") -> None:
    """Print one line on stderr; of several processes, those behind the first say who they are."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    who = f"rank {rank}: " if rank != "0" else ""
    print(who + (f"{kind}: {text}" if kind else text), file=sys.stderr, flush=True)


def show(text: str, advice: str) -> None:
    """Print a result on stdout.

    Raises
    ------
    UsageError
        It cannot be written there; the message ends with ``advice``. A reader that has left is
        still a ``BrokenPipeError``.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"cannot write to standard output: {error.strerror}; {advice}") from None


# --- arguments ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest valid spelling."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].partition("=")[0]
            options = [text for text in self._option_string_actions if text.startswith("--")]
            message = f"unrecognized argument {name}" + did_you_mean(name, options)
        choice = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            names = [part.strip(" '") for part in choice[3].split(",")]
            message = (
                f"argument {choice[1]} must be one of {', '.join(names)}, got {choice[2]!r}"
                + did_you_mean(choice[2], names)
            )
        note(f"{message}; --help lists all arguments", kind="error")
        raise SystemExit(2)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``" (did you mean ...?)"``, or nothing where no word is near."""
    near = difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def count(text: str) -> int:
    """A whole number of 1 or more, as an argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return value


def path(text: str) -> str:
    """A path, as an argparse type: an unset variable of the shell is not the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return text


def cluster_count(text: str) -> int | str:
    """A number of clusters, or "auto", as an argparse type."""
    return "auto" if text == "auto" else count(text)


def parse_seeds(text: str) -> list[int]:
    """Seeds from ``"3"``, ``"0-9"`` or ``"0,3,7-9"``, in the order given, each once.

    Raises
    ------
    argparse.ArgumentTypeError
        Not such a list, a seed outside 0..2**32 - 1, or more than 10,000 seeds.

    Examples
    --------
    >>> parse_seeds("0-2,7")
    [0, 1, 2, 7]
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if not match or not first <= last <= _MAX_SEED or last - first >= _MAX_SEEDS:
            raise argparse.ArgumentTypeError(
                f"must be whole numbers and rising ranges such as 0-9 or 0,3,5 (at most "
                f"{_MAX_SEEDS} seeds up to {_MAX_SEED}), got {text!r}"
            )
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Turn the text of a setting, or a value of a TOML file, into the type that ``hint`` names.

    ``hint`` is a type annotation made of bool, int, float, str, None and Literal, joined by ``|``.
    The text ``none`` stands for None.

    Raises
    ------
    UsageError
        The value is of no such type.

    Examples
    --------
    >>> convert("rank", "40", int | None), convert("lr", "1e-3", float)
    (40, 0.001)
    """
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    literals = [
        v for kind in kinds if typing.get_origin(kind) is Literal for v in typing.get_args(kind)
    ]
    text = value.strip() if isinstance(value, str) else value
    if type(None) in kinds and (text is None or str(text).lower() == "none"):
        return None
    if text in literals and not isinstance(text, bool):
        return text
    if bool in kinds:
        if isinstance(text, bool):
            return text
        if str(text).lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return str(text).lower() in ("true", "yes", "on", "1")
    for kind in (int, float):
        if kind in kinds and not isinstance(text, bool):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = kind(text)
                if kind is float or number == text or isinstance(text, str):
                    return number
    if str in kinds and isinstance(value, str):
        return value
    raise UsageError(
        f"{name} must be {type_text(hint)}, got {value!r}"
        + (did_you_mean(value, map(str, literals)) if isinstance(value, str) else "")
    )


def type_text(hint: Any) -> str:
    """A type annotation in words.

    Examples
    --------
    >>> type_text(int | None)
    'a whole number or none'
    """
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    words = [v for kind in kinds for v in typing.get_args(kind)]
    words += [names[kind] for kind in kinds if kind in names]
    words += ["none"] * (type(None) in kinds)
    return " or ".join(map(str, words))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


# --- progress ----------------------------------------------------------------------------------


class Progress:
    """Shows the epochs of one training run; used as an estimator callback. This one is silent."""

    def start(self, title: str) -> None:
        """Begin a run."""

    def __call__(self, event: Any) -> None:
        """One epoch is done."""

    def stop(self) -> None:
        """The run is over, well or not."""


def make_progress(quiet: bool) -> Progress:
    """A bar on a terminal, lines otherwise, nothing with ``quiet``."""
    if quiet:
        return Progress()
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Pace:
    """Seconds per epoch: a mean in which the last epochs count most."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def update(self, seconds: float) -> None:
        self.seconds = seconds if not self.seconds else 0.8 * self.seconds + 0.2 * seconds

    def text(self) -> str:
        return (
            f"{self.seconds:.2f} s/epoch"
            if self.seconds >= 0.1
            else f"{1e3 * self.seconds:.1f} ms/epoch"
        )


class _Lines(Progress):
    """Plain lines, ever fewer as the run gets longer: at most one a second, at least one in 30."""

    def start(self, title: str) -> None:
        self.title, self.pace = title, _Pace()
        self.began = self.shown = time.monotonic()
        self.first = True

    def __call__(self, event: Any) -> None:
        self.pace.update(event.seconds)
        now = time.monotonic()
        interval = min(max((now - self.began) / 10, 1.0), 30.0)
        if self.first or event.epoch >= event.n_epochs or now - self.shown >= interval:
            self.first, self.shown = False, now
            left = duration((event.n_epochs - event.epoch) * self.pace.seconds)
            note(
                f"{self.title}  epoch {event.epoch}/{event.n_epochs}  loss {event.loss:.6g}  "
                f"{self.pace.text()}  {left} left"
            )


class _Bar(Progress):
    """A bar that is drawn over itself."""

    def start(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.pace = _Pace()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self.bar.start()
        self.task = self.bar.add_task(title, total=1, facts="preparing")

    def __call__(self, event: Any) -> None:
        self.pace.update(event.seconds)
        left = duration((event.n_epochs - event.epoch) * self.pace.seconds)
        self.bar.update(
            self.task,
            total=event.n_epochs,
            completed=event.epoch,
            facts=f"loss {event.loss:.6g}  {self.pace.text()}  {left} left",
        )

    def stop(self) -> None:
        self.bar.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Examples
    --------
    >>> duration(3.21), duration(125), duration(7300)
    ('3.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
