"""The run directory: which file lies where, written so that nothing computed is ever lost.

Layout::

    DIR/config.toml         every setting of the run; --config DIR/config.toml repeats it
    DIR/result.json         all finished seeds; rewritten as each one finishes
    DIR/report.html
    DIR/assignments.csv  DIR/embedding.npy  DIR/history.jsonl  DIR/checkpoint/
    DIR/model.safetensors  DIR/config.json
                            the first seed's; the last two are what the estimator's load() reads
    DIR/seed-<S>/...        the same files and checkpoint/ for every further seed S
    DIR/previous-<n>/...    what an earlier run, started without --resume, had left in DIR
    DIR/.lock               while a run lasts: the number of its process, see RunDirectory.held

Files are written beside their place and renamed into it, so each is either the old or the new one,
whole. A seed counts as finished once ``result.json`` lists it, which happens after its other files
are in place.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastclust.cli import UsageError
from fastclust.files import replacing, write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["RunDirectory", "read_history", "read_toml"]

_SEED_FILES = (
    "assignments.csv",
    "model.safetensors",
    "config.json",
    "embedding.npy",
    "history.jsonl",
    "checkpoint",
)
_SHARED_FILES = ("config.toml", "result.json", "report.html")


class RunDirectory:
    """A run directory, opened for a list of seeds.

    Parameters
    ----------
    root : path
        The directory; made if it does not exist.

    Raises
    ------
    UsageError
        It cannot be made or written to.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._first: int | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise UsageError(
                f"--out must be a directory that can be written to, got {str(self.root)!r}: "
                f"{error.strerror or error}"
            ) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the directory until the block ends.

        The system drops the lock of a process that ends, however it ends: the file that a killed
        run leaves keeps nobody out. Where the system or the file system has no such locks (Windows,
        some network drives), other runs are not kept out.

        Raises
        ------
        UsageError
            Another run holds the directory.
        """
        path = self.root / ".lock"
        handle = _lock(path)
        try:
            yield
        finally:
            if handle is not None:
                # Removed while it is locked: who has opened it meanwhile sees that it is gone.
                with suppress(OSError):
                    if _is_at(handle, path):
                        path.unlink()
                os.close(handle)

    def read_config(self) -> dict[str, Any] | None:
        """The settings of the run that lies here, or None."""
        path = self.root / "config.toml"
        return read_toml(path) if path.is_file() else None

    def read_result(self) -> dict[str, Any] | None:
        """``result.json``, or None where there is none yet."""
        path = self.root / "result.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            result = None
        runs = result.get("runs") if isinstance(result, dict) else None
        if not isinstance(runs, list) or not all(map(_is_run, runs)):
            raise UsageError(
                f"{path} is damaged; remove it, and --resume will train its seeds again from their "
                f"checkpoints"
            )
        assert isinstance(result, dict)
        return result

    def set_aside(self) -> Path | None:
        """Move an earlier run out of the way; returns where to, or None if there was none."""
        old = [self.root / name for name in (*_SHARED_FILES, *_SEED_FILES)]
        seeds = [path for path in self.root.glob("seed-*") if path.name[len("seed-") :].isdigit()]
        old = [path for path in old if path.exists()] + sorted(seeds)
        if not old:
            return None
        number = 1
        while (target := self.root / f"previous-{number}").exists():
            number += 1
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
        return target

    def begin(self, seeds: Sequence[int], config: Mapping[str, Any]) -> None:
        """Record the settings; the first seed's files will lie in the directory itself."""
        self._first = seeds[0]
        write_atomically(self.root / "config.toml", format_toml(config))

    def folder(self, seed: int) -> Path:
        """Where the files of one seed lie."""
        return self.root if seed == self._first else self.root / f"seed-{seed}"

    def missing(self, seed: int) -> list[str]:
        """Files of a finished seed that are gone; its checkpoint may be."""
        names = [name for name in _SEED_FILES if name != "checkpoint"]
        return [name for name in names if not (self.folder(seed) / name).is_file()]

    def write_seed(self, seed: int, estimator: Any, names: Iterable[str] | None = None) -> None:
        """Write the clusters, the embedding and the model of a fitted estimator.

        Nodes go by ``names`` where there are some, else by their numbers.
        """
        folder = self.folder(seed)
        clusters = estimator.labels_.tolist()
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["node", "cluster"])
        nodes = range(len(clusters)) if names is None else names
        writer.writerows(zip(nodes, clusters, strict=True))
        write_atomically(folder / "assignments.csv", table.getvalue())
        with replacing(folder / "embedding.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, estimator.embedding_, allow_pickle=False)
        estimator.save(folder)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``."""
        write_atomically(self.root / "result.json", json.dumps(result, indent=2) + "\n")


def _lock(path: Path) -> int | None:
    """Lock a file, made if need be; returns its descriptor, or None where it cannot be locked."""
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                with suppress(OSError):  # the disk is full: locked all the same
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
                return handle
            os.close(handle)  # its run has just ended and removed it: take the next one
        except BlockingIOError:
            holder = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            who = f" (process {holder})" if holder.isdigit() else ""
            raise UsageError(
                f"{path.parent} is in use by another run{who}; wait for it, stop it, or give "
                f"another --out"
            ) from None
        except OSError:
            os.close(handle)
            return None


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _is_run(entry: Any) -> bool:
    kinds = {"seed": int, "metrics": dict, "resolved": dict}
    return isinstance(entry, dict) and all(isinstance(entry.get(k), v) for k, v in kinds.items())


def read_history(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a ``history.jsonl``: a kill may have torn the last, or come before any."""
    rows = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            rows.append(json.loads(line))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("epoch"), int)]


# --- TOML --------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    UsageError
        There is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} must be a TOML file: {error}") from None


def format_toml(settings: Mapping[str, Any]) -> str:
    """Settings as TOML: text, numbers, booleans, None (as ``"none"``) and lists of them."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in settings.items())


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)
