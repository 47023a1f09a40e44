"""How much memory is left, a clear error before more than that is asked for, and what was taken.

Linux grants more memory than there is and kills the process later, without a word; so the estimate
comes first.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

__all__ = [
    "InsufficientMemoryError",
    "available_memory",
    "begin_peak_memory",
    "peak_memory",
    "require_memory",
]


class InsufficientMemoryError(MemoryError):
    """What was asked for cannot fit; the message says how much is needed and what to change."""


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated, or None where the system does not tell.

    On the CPU the least of what is free or can be freed on the machine (swap included), what the
    control group still allows (containers), and the process's own limit (``ulimit -v``).

    Parameters
    ----------
    device : torch.device or str, default "cpu"
        The CPU or a CUDA device.

    Returns
    -------
    int or None
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    limits = [_machine_memory(), _group_memory(), _process_memory()]
    return min((limit for limit in limits if limit is not None), default=None)


def require_memory(needed: int, what: str, advice: str, device: torch.device | str = "cpu") -> None:
    """Raise unless ``needed`` bytes are available.

    Parameters
    ----------
    needed : int
        Bytes.
    what : str
        What needs them: the subject of the message.
    advice : str
        What to change.
    device : torch.device or str, default "cpu"
        Where they are needed.

    Raises
    ------
    InsufficientMemoryError
        They are not available.

    Examples
    --------
    >>> require_memory(1 << 60, "a matrix [2N, 2N]", "take fewer nodes")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fastclust.memory.InsufficientMemoryError: a matrix [2N, 2N] needs at least 1152921505 GB of ...
    """
    if needed < 1 << 24:
        return  # not worth the look
    available = available_memory(device)
    if available is not None and needed > available:
        raise InsufficientMemoryError(
            f"{what} needs at least {_size(needed)} of memory, {_size(available)} are available; "
            f"{advice}"
        )


def begin_peak_memory() -> None:
    """Set the high-water mark of memory back to what is in use now, where Linux lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Most memory in use, in bytes, since :func:`begin_peak_memory`: resident, and on the GPU."""
    peak, unit = _fields(Path("/proc/self/status")).get("VmHWM"), 1024
    if peak is None:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_memory_bytes": peak * unit}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_bytes"] = int(torch.cuda.max_memory_allocated())
    return peaks


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.0f} GB" if n_bytes >= 1e11 else f"{n_bytes / 1e9:.2f} GB"


def _machine_memory() -> int | None:
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" not in fields:
        return None
    return (fields["MemAvailable"] + fields.get("SwapFree", 0)) * 1024


def _group_memory() -> int | None:
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            root = Path(folder)
            allowed = int((root / limit).read_text())
            # cached file contents count as used, but give way
            cached = _fields(root / "memory.stat").get("inactive_file", 0)
            return allowed - int((root / used).read_text()) + cached
    return None


def _process_memory() -> int | None:
    with contextlib.suppress(ImportError, OSError):
        import resource

        allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = _fields(Path("/proc/self/status")).get("VmSize")
        if allowed != resource.RLIM_INFINITY and used is not None:
            return allowed - used * 1024
    return None


def _fields(path: Path) -> dict[str, int]:
    """The whole numbers of a file of lines ``name: number`` or ``name number``."""
    fields = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if len(words) >= 2 and words[1].isdigit():
                fields[words[0]] = int(words[1])
    return fields
