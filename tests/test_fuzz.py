"""A short campaign over every fuzz target; docs/reliability.md tells of the long ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastclust

FUZZ = Path(__file__).resolve().parent / "fuzz"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


def test_no_target_has_findings() -> None:
    """In a process of its own, whose memory is limited and measured."""
    command = [sys.executable, str(FUZZ / "campaign.py"), "--cases", "10000", "--seed", "5"]
    here = os.environ | {"PYTHONPATH": str(Path(fastclust.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=here)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong exceptions, hangs and jumps in memory are all told."""
    monkeypatch.syspath_prepend(str(FUZZ))
    import campaign
    from targets import Target

    def faulty(data: bytes) -> None:
        if data == b"0123":
            return
        if data[:1] > b"0":
            raise KeyError(data)
        if len(data) < 4:
            while True:
                pass
        if len(data) > 40:
            bytearray(400 << 20)

    monkeypatch.setitem(campaign.TARGETS, "faulty", Target(faulty, lambda: [b"0123"]))
    monkeypatch.setattr(campaign, "SECONDS", 0.05)
    findings = "".join(campaign.fuzz("faulty", 300).findings)
    assert "KeyError" in findings and "Hang" in findings and "memory grew by" in findings


def test_telling_a_fault_is_nobodys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FUZZ))
    import campaign
    from targets import Target

    class SlowToTell(Exception):
        def __str__(self) -> str:
            time.sleep(0.1)
            return "told"

    def faulty(data: bytes) -> None:
        if data != b"0123":
            raise SlowToTell

    monkeypatch.setitem(campaign.TARGETS, "faulty", Target(faulty, lambda: [b"0123"]))
    monkeypatch.setattr(campaign, "SECONDS", 0.05)
    findings = campaign.fuzz("faulty", 6).findings
    assert findings and all("SlowToTell: told" in finding for finding in findings)
