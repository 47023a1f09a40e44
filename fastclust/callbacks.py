"""Callbacks: what is called with a :class:`fastclust.training.Event` after every epoch.

Any callable will do; pass one or a list as ``callbacks=`` of an estimator that trains.
"""

from __future__ import annotations

import os
import sys
from functools import cached_property
from numbers import Real
from typing import Any

from fastclust.training import Event

__all__ = ["Event", "TensorBoard", "print_progress"]


class TensorBoard:
    """Writes loss, time and the label-free scores of every evaluation for TensorBoard.

    Parameters
    ----------
    log_dir : path
        Folder of the event files; ``tensorboard --logdir`` shows it.

    Raises
    ------
    ImportError
        tensorboard is not installed.

    Examples
    --------
    >>> import fastclust as fc
    >>> fc.HSAN(7, callbacks=TensorBoard("runs/cora"))  # doctest: +SKIP
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "the TensorBoard callback needs the package tensorboard: "
                "pip install 'fastclust[tensorboard]'"
            ) from None
        self.log_dir = os.fspath(log_dir)
        self._new_writer = SummaryWriter

    @cached_property
    def writer(self) -> Any:
        """The ``SummaryWriter``, from the first epoch on."""
        return self._new_writer(self.log_dir)

    def __getstate__(self) -> dict[str, Any]:
        """All but the writer, whose threads cannot be copied: a copy opens a file of its own."""
        return {key: value for key, value in self.__dict__.items() if key != "writer"}

    def __call__(self, event: Event) -> None:
        """Write one epoch; what is written is on disk after the last one."""
        values = {"loss": event.loss, "seconds": event.seconds, **(event.evaluation or {})}
        for name, value in values.items():
            if isinstance(value, Real):
                self.writer.add_scalar(name, value, event.epoch)
        if event.epoch == event.n_epochs:
            self.writer.flush()


def print_progress(event: Event) -> None:
    """A callback that prints one line per evaluated epoch to stderr."""
    if event.evaluation is not None:
        print(
            f"epoch {event.epoch}/{event.n_epochs}  loss {event.loss:.6g}  {event.seconds:.2f} s",
            file=sys.stderr,
        )
