"""What one part measured: a JSON file that is whole after every case."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class ContextLost(Exception):
    """A kernel failed and took the CUDA context with it: nothing more runs in this process."""


@dataclass
class Report:
    """What one part measured; ``case`` adds rows and survives a failing one."""

    subject: str
    part: str
    out: Path
    device: str
    tiny: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def write(self) -> None:
        """Put the state into ``<subject>.json``."""
        content = {
            "subject": self.subject,
            "device": self.device,
            "tiny": self.tiny,
            "card": card(),
            "versions": versions(),
            "commit": commit(),
            "seconds": round(time.perf_counter() - self.started, 1),
            "rows": self.rows,
            "errors": self.errors,
        }
        path = self.out / f"{self.subject}.json"
        path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def case(self, name: str, run: Callable[[], dict[str, Any] | None], **labels: Any) -> None:
        """Run one measurement; its dictionary becomes a row, an exception an error."""
        try:
            found = run()
        except Exception as error:
            message = f"{type(error).__name__}: {error}".strip()[:500]
            named = {k: str(v) for k, v in labels.items()}
            self.errors.append({"part": self.part, "case": name, **named, "error": message})
            print(f"  {name} {labels}: {message}", flush=True)
        else:
            if found is not None:
                self.rows.append({"part": self.part, "case": name, **labels, **rounded(found)})
                print(f"  {self.rows[-1]}", flush=True)
        self.write()
        if self.device == "cuda" and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise ContextLost(f"no CUDA call works after {name} {labels}: {error}") from None

    def ceiling(self, name: str) -> float | None:
        """A rate measured by the part ``ceilings``, if it ran."""
        with contextlib.suppress(OSError, ValueError):
            for row in json.loads((self.out / "ceilings.json").read_text())["rows"]:
                if row["case"] == name:
                    return float(row["rate"])
        return None

    def share(self, rate: float, ceiling: str) -> dict[str, Any]:
        """``share`` of a measured ceiling, where there is one."""
        limit = self.ceiling(ceiling)
        return {} if limit is None else {"share": rate / limit, "ceiling": ceiling}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than a timing holds."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


@functools.cache
def commit() -> str:
    """Commit of the tree, with ``+`` where tracked files differ from it."""
    if os.environ.get("FASTCLUST_COMMIT"):
        return os.environ["FASTCLUST_COMMIT"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno").strip()
        return head + ("+" if changed else "")
    return "unknown"


def card() -> dict[str, str]:
    """Name, driver and clocks of the GPU as nvidia-smi read them in the last ten seconds.

    Without nvidia-smi the name alone, empty without a GPU.
    """
    return _card(int(time.monotonic() / 10))


@functools.lru_cache(maxsize=1)
def _card(_when: int) -> dict[str, str]:
    fields = (
        "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu",
    )  # fmt: skip
    try:
        text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        with contextlib.suppress(RuntimeError, AssertionError):
            return {"name": torch.cuda.get_device_name()}
        return {}
    values = text.splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=False))


@functools.cache
def versions() -> dict[str, str]:
    """Versions that timings depend on."""
    from fastclust.info import versions as package_versions

    return package_versions() | {"cuda": str(torch.version.cuda)}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
