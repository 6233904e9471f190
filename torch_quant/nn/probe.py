"""Modules that calibration inserts into a graph: they look at a tensor and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ObserverProbe"]


class ObserverProbe(nn.Module):
    """Hands a tensor to whoever keeps the statistics.

    Args:
        key: the tensor's key.
        observe: takes the key and the tensor.
        compute: makes the tensor from the probe's arguments; None if it is the only argument.
    """

    def __init__(
        self,
        key: str,
        observe: Callable[[str, Tensor], Any],
        compute: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.key, self._observe, self._compute = key, observe, compute

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> None:
        x = args[0] if self._compute is None else self._compute(*args, **kwargs)
        self._observe(self.key, x)
