"""The range that holds a given share of the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.granularity import Granularity
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics._bins import BinnedObserver, Bins
from torch_quant.statistics.base import entry, register_statistic
from torch_quant.statistics.minmax import MinMaxObserver

__all__ = ["PercentileObserver"]


def _quantile(bins: Bins, share: float) -> Tensor:
    """The value with ``share`` of the counts below it, float64, ``[channels]``; right to a bin."""
    sums = bins.counts.cumsum(dim=1)
    target = share * sums[:, -1:].double()
    index = torch.searchsorted(sums.double(), target).clamp(max=sums.shape[1] - 1)
    count = bins.counts.gather(1, index)
    inside = (target - (sums.gather(1, index) - count)) / count.clamp(min=1)
    return (bins.first + (index + inside)[:, 0]) * bins.width


@register_statistic
class PercentileObserver(BinnedObserver):
    """Keeps ``percentile`` percent of the values; the rest is clipped, half of it at each end.

    Bound: batches of at most ``SAMPLES`` elements (in a channel) give the same range bit for bit
    however the data was split, each end within one bin of the exact quantile (the smallest value
    with at least that share of the data at or below it). Of larger batches the tails are counted
    exactly, about ``TAIL`` in ``SAMPLES`` of the data or more at each end, so that the default's
    ends still are; further in, the shares of two splits differ like those of two such samples.

    Args:
        granularity: which elements have their statistics together.
        percentile: the share kept, ``50 < percentile <= 100``; 100 keeps the exact extremes.
        bins: number of bins, as for every :class:`BinnedObserver`.

    Raises:
        InvalidConfig: ``percentile`` or ``bins`` is out of its range.
    """

    name = "percentile"

    def __init__(
        self,
        granularity: Granularity | None = None,
        *,
        percentile: float = 99.99,
        bins: int | None = None,
    ) -> None:
        super().__init__(granularity, bins=bins)
        if not 50.0 < percentile <= 100.0:
            raise InvalidConfig(
                f"PercentileObserver(percentile={percentile}): expected 50 < percentile <= 100"
            )
        self.percentile = percentile

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if self.percentile == 100.0:
            return self.min_val, self.max_val
        tail = (1.0 - self.percentile / 100.0) / 2.0
        low, high = (
            _quantile(self.bins, share)
            .to(self.min_val)
            .view_as(self.min_val)
            .clamp(self.min_val, self.max_val)
            for share in (tail, 1.0 - tail)
        )
        return low, high

    def _merge(self, other: MinMaxObserver) -> None:
        assert isinstance(other, PercentileObserver)
        if self.percentile != other.percentile:
            raise InvalidConfig(
                f"percentiles of {self.percentile} and {other.percentile} cannot be merged"
            )
        super()._merge(other)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"percentile": self.percentile}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        percentile = float(entry(state, "percentile", float, int))
        if not 50.0 < percentile <= 100.0:
            raise InvalidConfig(f"'percentile' is {percentile}; expected 50 < percentile <= 100")
        super().load_state_dict(state)
        self.percentile = percentile
