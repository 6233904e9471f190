"""A program that ends its process is found again, and does it once more."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from last_program import remember
from programs import Program

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
