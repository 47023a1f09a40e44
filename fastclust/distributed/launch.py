"""Joining the processes that a launcher has started, and telling when one of them is lost."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from fastclust.distributed.ranks import ONE, LaunchError, RankLostError, Ranks
from fastclust.distributed.sharded import ShardedRanks

TIMEOUT_VARIABLE = "FASTCLUST_TIMEOUT"
DEFAULT_TIMEOUT = 600.0  # seconds

_active = False


def launched() -> bool:
    """Whether a launcher such as ``torchrun`` has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def session() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; one process alone joins nothing.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. CPU tensors go by gloo, CUDA
    tensors by NCCL, each process on the GPU of its LOCAL_RANK. A collective that waits longer than
    ``$FASTCLUST_TIMEOUT`` seconds (default 600) fails.

    Raises
    ------
    LaunchError
        Variables are missing or wrong, there are fewer GPUs than processes on this machine, or the
        others do not appear.
    RankLostError
        Out of the body: another process has gone.
    """
    global _active
    if not launched():
        yield ONE
        return
    size, rank, local = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LaunchError(
                f"WORLD_SIZE is {size}, but {name} is not set: start with torchrun "
                f"--nproc-per-node={size} -m fastclust.train ..., or unset WORLD_SIZE"
            )
    if not 0 <= rank < size:
        raise LaunchError(f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}")
    backend = "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise LaunchError(
                f"each process needs a GPU of its own: LOCAL_RANK is {local}, but this machine has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node, or hide the GPUs with "
                f"CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=_timeout())
    try:
        join(backend, timeout)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({_first_line(error)})"
        ) from None
    _active = True
    try:
        yield ShardedRanks(size)
    except (RuntimeError, KeyboardInterrupt) as error:
        lost = next(filter(_is_of_connection, with_contexts(error)), None)
        if lost is None:
            raise
        raise RankLostError(
            f"rank {rank} of {size}: another process of this run has died or not answered for "
            f"{timeout.total_seconds():g} s ({_first_line(lost)})"
        ) from None
    finally:
        _active = False
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def with_contexts(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those in the handling of which it came, the latest first.

    A launcher that finds a process gone ends the others: its signal interrupts what they make of
    the loss.
    """
    while error is not None:
        yield error
        error = error.__context__


def join(backend: str, timeout: timedelta) -> None:
    """Join the other processes, such that ``destroy_process_group`` ends the threads of the group.

    Modules that torch's optimizers import have the group of that moment as default arguments. One
    that exists by then lives as long as they do: its threads, still freeing what they have sent,
    meet the end of the interpreter, which aborts the process after all its work. So these modules
    come first.
    """
    importlib.import_module("torch._dynamo")
    with _stdout_for_results():
        dist.init_process_group(backend, timeout=timeout)


@contextlib.contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Send what native code prints to stderr: gloo of torch 2.10 tells of its connections."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def current(n_nodes: int) -> Ranks:
    """The ranks that share a graph of N nodes: those of the :func:`session`, if there is one.

    Raises
    ------
    LaunchError
        There are more ranks than nodes.
    """
    if not _active:
        return ONE
    size = dist.get_world_size()
    if n_nodes < size:
        raise LaunchError(f"there must be at most one rank per node: {size} ranks, {n_nodes} nodes")
    return ShardedRanks(n_nodes)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{name} must be a whole number, as torchrun sets it, got {text!r}: start with "
            f"torchrun --nproc-per-node=R -m fastclust.train ..."
        ) from None


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise LaunchError(f"{TIMEOUT_VARIABLE} must be a number of seconds, got {text!r}")
    return seconds


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _is_of_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "connection" in text)
    )
