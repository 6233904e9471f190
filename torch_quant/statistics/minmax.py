"""The plainest statistics: the smallest and the largest value ever seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.granularity import Granularity, PerTensor
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics.base import Observer, count_of, entry, register_statistic

__all__ = ["MinMaxObserver"]


@register_statistic
class MinMaxObserver(Observer):
    """Running minimum and maximum. Nothing is clipped: right for transformers and for weights.

    >>> observer = MinMaxObserver()
    >>> observer.observe(torch.tensor([-1.0, 3.0]))
    >>> [float(v) for v in observer.range(QuantSpec())]
    [-1.0, 3.0]
    """

    name = "minmax"
    in_place = False

    def __init__(self, granularity: Granularity | None = None) -> None:
        super().__init__(granularity)
        self.min_val = torch.tensor(float("inf"))
        self.max_val = torch.tensor(float("-inf"))

    def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        if self.min_val.device != low.device:
            self.min_val, self.max_val = self.min_val.to(low.device), self.max_val.to(low.device)
        self.min_val = torch.minimum(self.min_val, low)
        self.max_val = torch.maximum(self.max_val, high)

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.min_val, self.max_val

    def _merge(self, other: MinMaxObserver) -> None:
        ours, theirs = self.min_val.shape, other.min_val.shape
        if ours != theirs:
            raise InvalidConfig(f"ranges of shapes {tuple(ours)} and {tuple(theirs)} do not merge")
        self.min_val = torch.minimum(self.min_val, other.min_val)
        self.max_val = torch.maximum(self.max_val, other.max_val)

    def state_dict(self) -> dict[str, Any]:
        state = {"batches": self.batches, "min_val": self.min_val, "max_val": self.max_val}
        per_tensor = isinstance(self.granularity, PerTensor)
        return state if per_tensor else state | {"granularity": str(self.granularity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        granularity: Granularity = PerTensor()
        if "granularity" in state:
            granularity = _granularity(entry(state, "granularity", str))
        whole = isinstance(granularity, PerTensor)
        batches = count_of(state)
        low, high = entry(state, "min_val", Tensor), entry(state, "max_val", Tensor)
        for name, x in (("min_val", low), ("max_val", high)):
            if x.dtype != torch.float32 or (x.dim() == 0) != (whole or batches == 0):
                raise InvalidConfig(
                    f"{name!r} is of shape {tuple(x.shape)} and {x.dtype}; expected a number"
                    f"{'' if whole else f' {granularity}'} and torch.float32"
                )
        if low.shape != high.shape or low.numel() == 0:
            raise InvalidConfig(
                f"'min_val' is of shape {tuple(low.shape)}, 'max_val' of {tuple(high.shape)}"
            )
        # Where nothing was observed, the minimum is infinite and the maximum minus infinity.
        finite = torch.isfinite(low) & torch.isfinite(high)
        if batches and not bool((finite & (low <= high)).all()):
            raise InvalidConfig("the range is not finite, or 'min_val' lies above 'max_val'")
        self.batches, self.min_val, self.max_val = batches, low, high
        self.granularity = granularity


def _granularity(text: str) -> Granularity:
    try:
        return Granularity.parse(text)
    except InvalidConfig as error:
        raise InvalidConfig(f"'granularity': {error}") from error
