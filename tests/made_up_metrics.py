"""Metrics made up to steer the search of ``tune``, and a chain of layers to search in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows import calibrated
from models import normal, seeded
from torch import nn

from torch_quant import Quantizer
from torch_quant.amp.proxy import AmpModel

__all__ = ["LAYERS", "Metric", "needing", "ready"]

LAYERS = 6


def ready(backend: str = "reference") -> tuple[nn.Module, Quantizer]:
    """A chain of ``LAYERS`` linear layers, and a quantizer calibrated for it."""
    model = seeded(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS))))
    return model, calibrated(model, [((normal(16, 16),), {})], backend=backend)


class Metric:
    """Calls the model, then gives what ``value`` says of how many layers are in float.

    The float model is None to it.
    """

    def __init__(self, quantizer: Quantizer, value: Callable[[int | None], Any]) -> None:
        self.quantizer, self.value = quantizer, value
        self.asked: list[int | None] = []

    def __call__(self, model: nn.Module) -> Any:
        model(normal(4, 16))
        count = None if isinstance(model, AmpModel) else len(self.quantizer.fallen_back)
        self.asked.append(count)
        return self.value(count)


def needing(needed: int) -> Callable[[int | None], float]:
    """1 with so many layers in float, less with fewer."""
    return lambda count: 1.0 if count is None or count >= needed else 0.5 + 0.01 * count
