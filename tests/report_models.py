"""A model with something of all that a report shows, and a long one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_quant import Quantizer

__all__ = ["EVIL", "Known", "long_model"]

EVIL = "</script><img src=x onerror=alert(1)>"
"""A name that a module may have."""


class Net(nn.Module):
    """A layer that stays in float, one with a name that is HTML, and a product without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.add_module(EVIL, nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = torch.tanh(getattr(self, EVIL)(x))
        return self.head(x @ (x.transpose(-1, -2) @ x))


class Known:
    """A calibrated quantizer with its model, batches, and all that it reports."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net().eval()
        self.batches = [torch.randn(2, 6, 16) for _ in range(3)]
        self.quantizer = Quantizer("onednn", overrides={"body.2": None})
        calib_model = self.quantizer.calib(self.model)
        for x in self.batches:
            calib_model(x)
        self.amp_model = self.quantizer.amp(self.model)
        self.amp_model(self.batches[0])
        self.quantizer.fallback(self.amp_model, 1)
        self.report = self.quantizer.report(
            None,
            self.model,
            self.batches[:2],
            sensitivity=self.amp_model,
            metrics={"accuracy": (0.75, 0.5)},
        )
        self.layers: list[dict[str, Any]] = self.report.data["layers"]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def long_model(layers: int) -> nn.Module:
    """A chain of so many linear layers, two in a block."""
    return nn.Sequential(*(_Block() for _ in range(layers // 2)))
