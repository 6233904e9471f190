"""A program that ends its process, or fails, is found again, and does it once more."""

from __future__ import annotations

import faulthandler
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from last_program import keep, remember, same_each_time
from programs import Program
from promises import PROMISES

QUITS = Program(
    inputs=("torch.randn(n, 8)",),
    layers=("nn.Linear(8, 4)",),
    lines=("v0 = self.m0(x0)", "__import__('os').kill(__import__('os').getpid(), 11)"),
    result="v0",
)


def test_a_crash_is_written_down_before_it_happens(tmp_path: Path) -> None:
    path = remember(QUITS, "everything", tmp_path)
    assert path.parent == tmp_path
    assert path.name.startswith("last")
    again = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert again.returncode == -signal.SIGSEGV, again.stderr
    assert "Fatal Python error: Segmentation fault" in again.stderr
    assert '"<program 0>", line 12 in forward' in again.stderr.replace("File ", "")
    assert QUITS.source in again.stdout


FAILS = Program(
    inputs=("torch.randn(n, 8)",),
    layers=("nn.Linear(8, 4)",),
    lines=("v0 = self.m0(x0)", "v1 = v0.reshape(3, 1)"),
    result="v1",
)


def failure() -> Exception:
    with pytest.raises(Exception, match="invalid for input of size") as found:
        PROMISES["everything"](FAILS)
    return found.value


def test_each_failing_program_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script is run here; the one above starts another such in a process of its own."""
    error = failure()
    path = keep(FAILS, "everything", error, tmp_path)
    assert keep(FAILS, "fallback", error, tmp_path) != path
    assert "invalid for input of size" in path.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(faulthandler, "enable", lambda: None)  # pytest has its own
    with pytest.raises(Exception, match="invalid for input of size"):
        runpy.run_path(str(path))
    assert FAILS.source in capsys.readouterr().out


def test_a_failure_in_generated_code_has_one_place() -> None:
    places = set()
    for _ in range(2):
        error = same_each_time(failure())
        assert error.__context__ is None
        places.add(str(traceback.extract_tb(error.__traceback__)[-1]))
    assert len(places) == 1
    assert "<program" not in places.pop()
