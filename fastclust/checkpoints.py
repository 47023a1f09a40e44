"""Checkpoints of a training run: the newest and the one before it, each known to be whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastclust.distributed import Ranks

if TYPE_CHECKING:
    from fastclust.training import State

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "parse_interval",
    "require_checkpoint_dir",
]

CHECKPOINT_NAME = "checkpoint.safetensors"
PREVIOUS_NAME = "previous.safetensors"  # the one before, should the newest turn out damaged
_FORMAT = "2"


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another configuration or other data."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or was damaged and the one before it is used."""


class _Damaged(Exception):
    """A checkpoint file that cannot be what was written."""


class Checkpoints:
    """The newest checkpoint and the one before it, each in a file replaced as a whole.

    A temporary file is flushed to disk and renamed, so that a crash leaves whole files; a digest of
    what it holds tells a file that changed later, as on a failing disk.

    Of several ranks the first reads and writes it, and no other touches the disk.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int | str, ranks: Ranks) -> None:
        self.path = Path(directory) / CHECKPOINT_NAME
        self.previous = self.path.with_name(PREVIOUS_NAME)
        self.ranks = ranks
        try:
            ranks.from_first(lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise ValueError(
                f"checkpoint_dir must be a folder that can be created and written, got "
                f"{os.fspath(directory)!r}: {error.strerror}"
            ) from None
        self.epochs, self.seconds = parse_interval(every)
        self.last_written = time.monotonic()
        self.tried = 0  # steps done at the last attempt to write one

    def due(self, epochs_done: int) -> bool:
        """Whether it is time for one."""
        if self.epochs:
            return epochs_done % self.epochs == 0
        return time.monotonic() - self.last_written >= self.seconds

    def save(self, state: State) -> bool:
        """Write one; a failure leaves the newest and is only warned of."""
        self.tried = state.steps_done
        tensors = {name: value.cpu() for name, value in state.tensors().items()}
        self.last_written = time.monotonic()
        return self.ranks.from_first(lambda: self._write(state, tensors))

    def _write(self, state: State, tensors: dict[str, Tensor]) -> bool:
        metadata = {
            "fastclust": _FORMAT,
            "identity": json.dumps(state.identity, sort_keys=True),
            "record": json.dumps(state.record()),
        }
        temporary = self.path.with_suffix(".tmp")
        try:
            if shutil.disk_usage(self.path.parent).free < sum(t.nbytes for t in tensors.values()):
                self.previous.unlink(missing_ok=True)  # rather one that is new than two old ones
            save_file(tensors, temporary, {**metadata, "digest": _digest(tensors, metadata)})
            _flush_to_disk(temporary)
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(temporary, self.path)
            if os.name == "posix":
                _flush_to_disk(self.path.parent)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            warnings.warn(
                f"the checkpoint after epoch {state.steps_done} could not be written to "
                f"{self.path} ({error}); training goes on"
                + (", the previous checkpoint stays" if self.path.exists() else ""),
                CheckpointWarning,
                stacklevel=4,
            )
            return False
        return True

    def load(self, state: State) -> bool:
        """Restore the run from the newest checkpoint that is whole; whether there was one."""
        tensors: dict[str, Tensor] = {}
        record = self.ranks.from_first(lambda: self._newest(state.identity, tensors))
        if record is None:
            return False
        try:
            state.restore(self.ranks.tensors_from_first(tensors), record)
        except (KeyError, RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} does not fit this run or version ({error}); remove it to start anew"
            ) from None
        self.tried = state.steps_done
        return True

    def _newest(
        self, wanted: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> dict[str, Any] | None:
        """Record of the newest checkpoint that is whole, or None; its tensors go to ``tensors``."""
        damaged: list[str] = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                found, identity, record = _read(path)
            except _Damaged as error:
                damaged.append(str(error))
                continue
            _require_same_run(path, identity, wanted)
            if damaged:
                warnings.warn(
                    f"{damaged[0]}; going on from the one before it, {path.name}, after epoch "
                    f"{record.get('epochs_done')}",
                    CheckpointWarning,
                    stacklevel=4,
                )
            tensors |= found
            return record
        if damaged:
            raise CheckpointError(
                f"{' and '.join(damaged)}; remove {'both' if damaged[1:] else 'it'} to start afresh"
            )
        return None


def _require_same_run(path: Path, identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    changed = sorted(k for k in {*identity, *wanted} if identity.get(k) != wanted.get(k))
    if changed:
        details = ", ".join(
            f"{key} was {identity.get(key)!r} and is {wanted.get(key)!r}"[:160]
            for key in changed[:4]
        )
        raise CheckpointError(
            f"{path} belongs to another run ({details}); resume with the same data and "
            f"settings, or remove it to start afresh"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, identity and record of a checkpoint, provided that they are as written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.pop("digest") != _digest(tensors, metadata):
            raise ValueError("its content is not what its digest says")
        return tensors, dict(json.loads(metadata["identity"])), dict(json.loads(metadata["record"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _Damaged(f"{path} is damaged or no checkpoint of fastclust ({error})") from None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of a checkpoint's content, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_checkpoint_dir(resume: bool, directory: str | os.PathLike[str] | None) -> None:
    """Refuse to resume from nowhere: that would start anew without a word."""
    if resume and directory is None:
        raise ValueError(
            "checkpoint_dir must be the folder of the checkpoint to go on from where resume=True, "
            "got None"
        )


def parse_interval(every: int | str) -> tuple[int, float]:
    """``checkpoint_every`` as (epochs, 0) or (0, seconds)."""
    if isinstance(every, Integral) and not isinstance(every, bool) and every > 0:
        return int(every), 0.0
    if isinstance(every, str):
        with contextlib.suppress(ValueError):
            if every.endswith("s") and float(every[:-1]) >= 0:
                return 0, float(every[:-1])
    raise ValueError(
        f"checkpoint_every must be a number of epochs (25) or of seconds ('60s'), got {every!r}"
    )


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
