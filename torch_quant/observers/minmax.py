"""The plainest statistics: the smallest and the largest value ever seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.observers.base import Observer, count_of, entry, register_observer

__all__ = ["MinMaxObserver"]


@register_observer
class MinMaxObserver(Observer):
    """Running minimum and maximum. Nothing is clipped: right for transformers and for weights.

    >>> observer = MinMaxObserver()
    >>> observer.observe(torch.tensor([-1.0, 3.0]))
    >>> [float(v) for v in observer.range(QuantSpec())]
    [-1.0, 3.0]
    """

    name = "minmax"

    def __init__(self, ch_axis: int | None = None) -> None:
        super().__init__(ch_axis)
        self.min_val = torch.tensor(float("inf"))
        self.max_val = torch.tensor(float("-inf"))

    def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.min_val = torch.minimum(self.min_val.to(low.device), low)
        self.max_val = torch.maximum(self.max_val.to(high.device), high)

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.min_val, self.max_val

    def state_dict(self) -> dict[str, Any]:
        state = {"batches": self.batches, "min_val": self.min_val, "max_val": self.max_val}
        return state if self.ch_axis is None else state | {"ch_axis": self.ch_axis}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        axis = entry(state, "ch_axis", int, type(None)) if "ch_axis" in state else None
        batches = count_of(state)
        low, high = entry(state, "min_val", Tensor), entry(state, "max_val", Tensor)
        for name, x in (("min_val", low), ("max_val", high)):
            if x.dtype != torch.float32 or x.dim() != (batches > 0 and axis is not None):
                raise InvalidConfig(
                    f"{name!r} is of shape {tuple(x.shape)} and {x.dtype}; expected a number"
                    f"{'' if axis is None else ' for each channel'} and torch.float32"
                )
        if low.shape != high.shape or low.numel() == 0:
            raise InvalidConfig(
                f"'min_val' is of shape {tuple(low.shape)}, 'max_val' of {tuple(high.shape)}"
            )
        # Where nothing was observed, the minimum is infinite and the maximum minus infinity.
        finite = torch.isfinite(low) & torch.isfinite(high)
        if batches and not bool((finite & (low <= high)).all()):
            raise InvalidConfig("the range is not finite, or 'min_val' lies above 'max_val'")
        self.batches, self.min_val, self.max_val, self.ch_axis = batches, low, high, axis
