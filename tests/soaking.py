"""What is run in a process of its own to see whether memory grows; prints what it found as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_quant import Quantizer, recipes
from torch_quant.backends.onednn.ops import PACKED

PAGE = 4
"""Kilobytes."""


class Small(nn.Module):
    """Two layers and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def resident() -> int:
    """Kilobytes of memory that the process has, but for what is free in it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def alive() -> Counter[str]:
    """Objects of this package and of PyTorch, by class."""
    gc.collect()
    len(PACKED)  # which looks for weights that nobody has any more now and then
    kinds = Counter(type(each) for each in gc.get_objects())
    return Counter(
        {
            f"{kind.__module__}.{kind.__qualname__}": count
            for kind, count in kinds.items()
            if str(getattr(kind, "__module__", "")).startswith(("torch", "__main__", "soaking"))
        }
    )


def cycle(backend: str, recipe: str, turn: int) -> None:
    """Quantize a new model, call it, and drop all of it."""
    model = Small().eval().requires_grad_(False)
    quantizer = Quantizer(backend, qconfig=getattr(recipes, recipe)())
    calib_model = quantizer.calib(model)
    for rows in (4, 1 + turn % 3):
        calib_model(torch.randn(rows, 16))
    quant_model = quantizer.quantize(model)
    for rows in (1, 5):
        quant_model(torch.randn(rows, 16))


def soak(backend: str, recipe: str, cycles: int, calls: int) -> dict[str, Any]:
    """Numbers before and after the last half of cycles, then of calls of mixed sizes."""
    found: dict[str, Any] = {}
    for turn in range(cycles):
        if turn == cycles // 2:
            before, memory = alive(), resident()
        cycle(backend, recipe, turn)
    found["cycles_kb"] = resident() - memory
    found["cycles_objects"] = dict(alive() - before)
    model = Small().eval().requires_grad_(False)
    quantizer = Quantizer(backend, qconfig=getattr(recipes, recipe)())
    quantizer.calib(model)(torch.randn(64, 16))
    quant_model = quantizer.quantize(model)
    for turn in range(calls):
        if turn == calls // 2:
            before, memory = alive(), resident()
        quant_model(torch.randn(1 + 7 * turn % 61, 16))
    found["calls_kb"] = resident() - memory
    found["calls_objects"] = dict(alive() - before)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(json.dumps(soak(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
