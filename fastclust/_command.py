"""Imported before torch: a command interrupted meanwhile ends as :mod:`fastclust.cli` ends it."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def _is_command() -> bool:
    """Whether this process is ``python -m fastclust...`` or ``fastclust``, not a user of it."""
    if sys.argv[:1] == ["-m"]:  # until the module is found, whose name comes next
        arguments = [*sys.orig_argv, "-m", ""]
        return arguments[arguments.index("-m") + 1].partition(".")[0] == "fastclust"
    return os.path.basename("".join(sys.argv[:1])) == "fastclust"


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


if _is_command():
    sys.excepthook = _tell
