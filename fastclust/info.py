"""``python -m fastclust.info``: what is installed, what was built, and what this machine offers.

The output is what a bug report needs: versions, CPU features with the dispatch level in force,
the state of the CUDA library with the architectures it was compiled for, and the GPUs seen.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from fastclust import cli

__all__ = ["collect", "cpu_name", "main", "versions"]

_DISTRIBUTIONS = ("torch", "numpy", "scipy", "scikit-learn", "safetensors")


def versions() -> dict[str, str]:
    """Versions of fastclust, Python and the packages that results depend on.

    Examples
    --------
    >>> versions()["python"].startswith("3.")
    True
    """
    from fastclust._version import __version__

    found = {"fastclust": __version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def collect() -> dict[str, Any]:
    """Everything that ``python -m fastclust.info`` shows, as a dictionary that JSON can hold.

    Returns
    -------
    dict
        ``versions``, ``platform``, ``build`` (torch, compiler, cuda, cuda_archs), ``cpu`` (name,
        logical_cores, features, dispatch_level, dispatch_level_forced, torch_threads) and ``cuda``
        (library, architectures, least_capability, torch_cuda, gpus, usable).
    """
    import torch

    from fastclust._library import _C, cuda_status
    from fastclust.validation import LEAST_CAPABILITY, why_not_cuda

    build = dict(_C.build_info())
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": int(properties.total_memory),
                    "multiprocessors": int(properties.multi_processor_count),
                    "usable": why_not_cuda(index) is None,
                }
            )
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "build": {key: build[key] for key in sorted(build)},
        "cpu": {
            "name": cpu_name(),
            "logical_cores": os.cpu_count() or 1,
            "features": {key: bool(on) for key, on in sorted(_C.cpu_features().items())},
            "dispatch_level": str(_C.cpu_level()),
            "dispatch_level_forced": os.environ.get("FASTCLUST_CPU_LEVEL"),
            "torch_threads": int(torch.get_num_threads()),
        },
        "cuda": {
            "library": cuda_status,
            "architectures": build.get("cuda_archs", "").split(),
            "least_capability": ".".join(map(str, LEAST_CAPABILITY)),
            "torch_cuda": torch.version.cuda,
            "gpus": gpus,
            "usable": any(gpu["usable"] for gpu in gpus),
        },
    }


def cpu_name() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, cuda = found["cpu"], found["cuda"]
    level = cpu["dispatch_level"]
    if cpu["dispatch_level_forced"]:
        level += f" (FASTCLUST_CPU_LEVEL={cpu['dispatch_level_forced']})"
    features = [name for name, on in cpu["features"].items() if on]
    gpus = [
        f"{gpu['name']}, compute {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
        f"{gpu['multiprocessors']} multiprocessors{'' if gpu['usable'] else ', not used'}"
        for gpu in cuda["gpus"]
    ]
    return [
        *found["versions"].items(),
        ("platform", found["platform"]),
        ("cpu", f"{cpu['name']}, {cpu['logical_cores']} logical cores"),
        ("cpu features", " ".join(features) or "baseline only"),
        ("cpu dispatch", level),
        ("torch threads", str(cpu["torch_threads"])),
        ("built with", f"torch {found['build']['torch']}, {found['build']['compiler']}"),
        ("cuda library", cuda["library"]),
        ("cuda needs", f"compute {cuda['least_capability']} or later"),
        ("cuda compiled for", " ".join(cuda["architectures"]) or "nothing"),
        ("torch cuda", cuda["torch_cuda"] or "none: the installed torch is a CPU build"),
        ("gpu", "; ".join(gpus) or "none seen: everything runs on the CPU"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what :func:`collect` finds; the exit code is 0."""
    parser = cli.Parser(
        prog="python -m fastclust.info",
        description="Show versions, CPU features and dispatch, the CUDA library and the GPUs seen.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments: argparse.Namespace = parser.parse_args(argv)
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        rows = _rows(found)
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:<{width}}  {text}")
    return 0


if __name__ == "__main__":
    cli.run(main)
