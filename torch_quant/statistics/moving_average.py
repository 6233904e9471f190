"""Extremes that forget: one wild batch moves them a little instead of for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_quant.core.granularity import Granularity
from torch_quant.errors import InvalidConfig
from torch_quant.statistics.base import entry, register_statistic
from torch_quant.statistics.minmax import MinMaxObserver

__all__ = ["MovingAverageObserver"]


@register_statistic
class MovingAverageObserver(MinMaxObserver):
    """Exponential moving average of each batch's minimum and maximum.

    ``value += momentum * (batch's value - value)``; the first batch sets the value. (Jacob et al.
    2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.1.) By its definition the result depends on how data is batched.

    Args:
        granularity: which elements have their statistics together.
        momentum: weight of the newest batch, ``0 < momentum <= 1``; 1 keeps only the last batch.

    Raises:
        InvalidConfig: ``momentum`` is out of its range.
    """

    name = "moving_average"
    in_place = False

    def __init__(self, granularity: Granularity | None = None, *, momentum: float = 0.01) -> None:
        super().__init__(granularity)
        if not 0.0 < momentum <= 1.0:
            raise InvalidConfig(
                f"MovingAverageObserver(momentum={momentum}): expected 0 < momentum <= 1"
            )
        self.momentum = momentum

    def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        if self.batches == 0:
            self.min_val, self.max_val = low, high
            return
        self.min_val = self.min_val.to(low.device).lerp(low, self.momentum)
        self.max_val = self.max_val.to(high.device).lerp(high, self.momentum)

    def _merge(self, other: MinMaxObserver) -> None:
        """The mean of both averages, weighted by their batches: neither came after the other."""
        assert isinstance(other, MovingAverageObserver)
        if self.momentum != other.momentum:
            raise InvalidConfig(
                f"averages of momentum {self.momentum} and {other.momentum} cannot be merged"
            )
        share = other.batches / (self.batches + other.batches)
        self.min_val = self.min_val.lerp(other.min_val, share)
        self.max_val = self.max_val.lerp(other.max_val, share)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        momentum = float(entry(state, "momentum", float, int))
        if not 0.0 < momentum <= 1.0:
            raise InvalidConfig(f"'momentum' is {momentum}; expected 0 < momentum <= 1")
        super().load_state_dict(state)
        self.momentum = momentum
