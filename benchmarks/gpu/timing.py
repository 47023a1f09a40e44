"""How long a call takes, on the device and on the host."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


def measure(
    run: Callable[[], Any], device: str, seconds: float = 1.0, *, kernels: bool = False
) -> dict[str, float]:
    """Median and least time in ms, and peak device bytes beyond what stood before.

    On CUDA with ``kernels`` it is the time of the kernels alone: the device is kept waiting until
    the host has launched them, so that no gap between launches counts. Without, gaps do count.
    """
    cuda = device == "cuda"
    run()  # builds, allocations, handles
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = run()
    launched = time.perf_counter() - start
    del result
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    once = time.perf_counter() - start
    times, host = [], [launched]
    for _ in range(int(min(50, max(3, seconds / max(once, 1e-6)))) if seconds else 1):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if kernels:  # cycles at some 2 GHz; a slower clock waits longer, which does no harm
                torch.cuda._sleep(int(2e9 * min(2 * max(host) + 1e-4, 5e-3)))
            begin.record()
            start = time.perf_counter()
            run()
            host.append(time.perf_counter() - start)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    row = {"ms": statistics.median(times), "ms_min": min(times), "repeats": len(times)}
    if cuda and kernels:
        row["host_ms"] = 1e3 * statistics.median(host)
    return row | ({"peak_bytes": peak} if cuda else {})


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a replay of a CUDA graph: one launch for all of its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let torch's float32 products run in tf32, as an eager user may."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
