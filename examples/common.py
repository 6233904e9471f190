"""What the examples share: timing, file sizes, the table, and the check in a fresh process."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

__all__ = ["check_in_fresh_process", "file_size", "interleaved_latency", "print_table"]


def interleaved_latency(
    calls: dict[str, Callable[[], Any]], *, warm_up: int = 3, rounds: int = 11
) -> dict[str, float]:
    """Median time of each call in milliseconds, measured in turns in one run.

    Each turn takes the calls in another order, and each call once before it is timed: what ran
    before leaves the caches full of its own.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    sample = random.Random(0).sample
    with torch.no_grad():
        for turn in range(warm_up + rounds):
            for name, call in sample(list(calls.items()), len(calls)):
                call()
                start = time.perf_counter()
                call()
                if turn >= warm_up:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def file_size(model: nn.Module) -> int:
    """Bytes of the model's saved ``state_dict``."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        return Path(file.name).stat().st_size


def print_table(rows: list[tuple[Any, ...]], *columns: str) -> None:
    """Rows of (what, a value for each column)."""
    print(tabulate(rows, headers=("", *columns), disable_numparse=True))


_LOADER = """
import importlib, sys, torch
importlib.import_module(sys.argv[4])
model = torch.jit.load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
with torch.no_grad():
    for _ in range(3):  # compiled ones are fused from their second call on
        outputs = model(*inputs)
    if isinstance(outputs, dict):
        outputs = outputs[sys.argv[3]]
assert torch.equal(outputs, expected), (outputs - expected).abs().max()
"""


def check_in_fresh_process(
    path: Path,
    inputs: tuple[Tensor, ...],
    expected: Tensor,
    output: str = "",
    needs: str = "torch_quant",
) -> None:
    """Load a saved TorchScript file in a new Python process and compare its output bit for bit.

    Raises:
        SystemExit: the process fails, or gives another output.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.pt"
        torch.save((inputs, expected), case)
        command = [sys.executable, "-W", "ignore", "-c", _LOADER, str(path), str(case), output]
        command.append(needs)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{path} does not give the same outputs when loaded:\n{result.stderr}")
