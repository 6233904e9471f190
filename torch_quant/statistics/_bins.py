"""Histograms that grow without error; the statistics behind the clipping observers.

A bin is ``2**level`` wide and its edges are integer multiples of that width. When the range grows,
whole bins merge: no count is ever split, moved by interpolation or lost. Level and first bin are
functions of the exact extremes alone, so any order and any split of the same data gives the same
counts, bit for bit.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.granularity import Granularity, PerTensor, block_rows
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics._blocks import Blocks
from torch_quant.statistics.base import check_observable, entry, require_finite
from torch_quant.statistics.minmax import MinMaxObserver

__all__ = ["SAMPLES", "TAIL", "BinnedObserver", "Bins"]

SAMPLES = 2**15
"""Batches of up to so many elements (in a channel) are counted whole; of larger ones, a sample."""

TAIL = 8
"""At most so many elements of a sample, at each end, lie in the tails, which are counted whole."""

_MIN_LEVEL = -100  # bins of 2**-100: their inverse is still a normal float32
_INDEX_BITS = 20  # |bin index| <= 2**20, so that float32 arithmetic on indices is exact


def _width(level: Tensor) -> Tensor:
    return torch.tensor([math.ldexp(1.0, e) for e in level.tolist()], dtype=torch.float64)


def _exponent(x: Tensor) -> Tensor:
    """The ``e`` of ``2**(e - 1) <= x < 2**e``; very small for 0."""
    return torch.where(x > 0, torch.frexp(x).exponent.to(torch.int64), _MIN_LEVEL)


def _level(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The smallest level at which ``bins`` bins cover ``[low, high]``, float64, ``[channels]``.

    It never falls as the range grows.
    """
    largest = torch.maximum(low.abs(), high.abs())
    level = torch.maximum(_exponent((high - low) / bins), _exponent(largest) - _INDEX_BITS)
    level = level.clamp(min=_MIN_LEVEL)
    width = _width(level)
    # The guess lets high - low pass, but not always with the edges where they have to be.
    return level + ((high / width).floor() - (low / width).floor() >= bins)


@dataclass(frozen=True)
class Bins:
    """A histogram for each channel (one channel: per tensor). Always on the CPU.

    Args:
        counts: int64, ``[channels, bins]``; how many elements each bin stands for.
        level: int64, ``[channels]``; a bin is ``2**level`` wide, in the tensor's units.
        first: int64, ``[channels]``; bin 0 begins at ``first * 2**level``.
    """

    counts: Tensor
    level: Tensor
    first: Tensor

    @classmethod
    def empty(cls, bins: int) -> Bins:
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(torch.zeros(1, bins, dtype=torch.int64), zero + _MIN_LEVEL, zero)

    def __deepcopy__(self, memo: object) -> Bins:
        return self  # nothing ever writes into one

    @property
    def width(self) -> Tensor:
        """The width of a bin, float64, ``[channels]``."""
        return _width(self.level)

    @functools.cached_property
    def _units(self) -> tuple[Tensor, Tensor]:
        """How many bins make 1, float32, and what to subtract, int32; both ``[channels, 1]``."""
        channels, bins = self.counts.shape
        origin = self.first - torch.arange(channels) * bins
        return (1.0 / self.width[:, None]).to(torch.float32), origin[:, None].to(torch.int32)

    @property
    def centres(self) -> Tensor:
        """The middle of every bin, float64, ``[channels, bins]``."""
        index = self.first[:, None] + torch.arange(self.counts.shape[1])
        return (index + 0.5) * self.width[:, None]

    def __getitem__(self, channels: slice) -> Bins:
        return Bins(self.counts[channels], self.level[channels], self.first[channels])

    def index(self, values: Tensor) -> Tensor:
        """The bin that holds each of ``values``, float, ``[channels, n]``."""
        index = (values.cpu().double() / self.width[:, None]).floor().to(torch.int64)
        return index - self.first[:, None]

    def covering(self, low: Tensor, high: Tensor) -> Bins:
        """The same counts in the finest bins that cover ``[low, high]``, shape ``[channels]``.

        The range must hold every one covered before: bins only merge.
        """
        low, high = low.cpu().double(), high.cpu().double()
        bins = self.counts.shape[1]
        level = _level(low, high, bins)
        first = (low / _width(level)).floor().to(torch.int64)
        if torch.equal(level, self.level) and torch.equal(first, self.first):
            return self
        # More than 62 levels up, all indices are 0 or -1: as far as an int64 can be shifted.
        shift = (level - self.level).clamp(0, 62)
        moved = ((self.first[:, None] + torch.arange(bins)) >> shift[:, None]) - first[:, None]
        counts = torch.zeros(len(level), bins, dtype=torch.int64)
        # Bins beyond the range hold nothing: where they go does not matter.
        counts.scatter_add_(1, moved.clamp(0, bins - 1), self.counts.expand(len(level), -1))
        return Bins(counts, level, first)

    def tally(self, rows: Tensor, channel: Tensor | None = None) -> Tensor:
        """How many elements each bin holds, int64, ``[channels, bins]``.

        Args:
            rows: inside the range, ``[rows, n]``, on any device.
            channel: int64, ``[rows]``, which channel each row belongs to; None: each to its own.
        """
        channels, bins = self.counts.shape
        scale, origin = (each.to(rows.device) for each in self._units)
        if channel is not None and channels > 1:
            scale, origin = scale[channel], origin[channel]
        # Both steps are exact: a product with a power of two, and integers below 2**24.
        index = (rows.to(torch.float32) * scale).floor_().to(torch.int32).sub_(origin)
        counts = torch.bincount(index.flatten(), minlength=channels * bins)
        return counts.cpu().view(channels, bins)

    def adding(self, counts: Tensor) -> Bins:
        """With these counts more, int64, ``[channels, bins]``."""
        return Bins(self.counts + counts, self.level, self.first)

    def edges(self, index: Tensor) -> Tensor:
        """Where the bins ``index`` begin, exact in float32, ``[channels, n]``."""
        return ((self.first[:, None] + index) * self.width[:, None]).to(torch.float32)


def _stride(count: int) -> int:
    """The step in which ``count`` elements are sampled: at most ``SAMPLES`` of them.

    It shares no factor with ``count``, hence none with any dimension: the sample walks through all
    positions of each axis alike.
    """
    stride = -(-count // SAMPLES)
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _count(bins: Bins, rows: Tensor, blocks: Blocks) -> Tensor:
    """The counts of ``rows``, ``[channels, n]``, as the observer below describes them."""
    stride = _stride(rows.shape[1])
    counts = bins.tally(rows[:, ::stride])
    if stride == 1:
        return counts
    total = -(-rows.shape[1] // stride)
    # The body is ends[0] <= bin < ends[1], as narrow as TAIL lets it be.
    ends = torch.tensor([TAIL + 1, total - TAIL]).repeat(len(rows), 1)
    ends = torch.searchsorted(counts.cumsum(dim=1), ends) + torch.tensor([0, 1])
    edges = bins.edges(ends).to(rows.device)
    near = blocks.beyond(edges[:, :1], edges[:, 1:])
    result = torch.stack([bins.tally(*found) for found in near]).sum(dim=0)
    for channel, (first, end) in enumerate(ends.tolist()):
        result[channel, first:end] = stride * counts[channel, first:end]
    return result


class BinnedObserver(MinMaxObserver):
    """Exact extremes and a histogram of fixed size; subclasses say which range to keep.

    Of a batch with more than ``SAMPLES`` elements (in a channel) an even sample is counted, each
    element as often as it stands for others. That is right for the body of the distribution, but a
    sample may miss or multiply the few massive outliers of a transformer, which decide on the
    squared error of clipping. So the tails are counted whole: the bins at either end that hold
    ``TAIL`` elements of the sample at most, one in some thousand of the batch. What they add to
    the counts is exact.

    Args:
        granularity: which elements have their statistics together: one histogram for each block.
        bins: number of bins, 16 to 65536; between half and all of them cover the data. None: 2048
            per tensor, and 512 for each block. A histogram takes 8 bytes a bin.

    Raises:
        InvalidConfig: ``bins`` is out of its range.
    """

    def __init__(self, granularity: Granularity | None = None, *, bins: int | None = None) -> None:
        super().__init__(granularity)
        if bins is None:
            bins = 2048 if isinstance(self.granularity, PerTensor) else 512
        if not 16 <= bins <= 65536:
            raise InvalidConfig(f"{type(self).__name__}(bins={bins}): expected 16 to 65536 bins")
        self.bins = Bins.empty(bins)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        check_observable(x)
        x = x.detach()
        grid = self.granularity.grid(x.shape)
        rows = block_rows(x, self.granularity)
        blocks = Blocks(rows)
        low, high = blocks.extremes()
        require_finite(x, low, high)
        self._record(x, low.view(grid), high.view(grid))
        self._cover()
        self.bins = self.bins.adding(_count(self.bins, rows, blocks))
        self.batches += 1

    def _cover(self) -> None:
        """Let the bins cover the present range."""
        self.bins = self.bins.covering(self.min_val.reshape(-1), self.max_val.reshape(-1))

    def _merge(self, other: MinMaxObserver) -> None:
        assert isinstance(other, BinnedObserver)
        mine, theirs = (each.bins.counts.shape[1] for each in (self, other))
        if mine != theirs:
            raise InvalidConfig(f"histograms of {mine} and {theirs} bins cannot be merged")
        super()._merge(other)
        self._cover()
        ends = self.min_val.reshape(-1), self.max_val.reshape(-1)
        self.bins = self.bins.adding(other.bins.covering(*ends).counts)

    @abstractmethod
    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]:
        bins = self.bins
        return super().state_dict() | {
            "counts": bins.counts,
            "level": bins.level,
            "first": bins.first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        bins = Bins(*(entry(state, name, Tensor) for name in ("counts", "level", "first")))
        super().load_state_dict(state)
        channels = max(self.min_val.numel(), 1)
        shapes = [tuple(x.shape) for x in (bins.counts, bins.level, bins.first)]
        size = bins.counts.shape[-1] if bins.counts.dim() else 0
        if shapes != [(channels, size), (channels,), (channels,)] or not 16 <= size <= 65536:
            raise InvalidConfig(
                f"'counts', 'level' and 'first' are of shapes {shapes}; expected "
                f"({channels}, 16 to 65536), ({channels},) and ({channels},)"
            )
        if any(x.dtype != torch.int64 for x in (bins.counts, bins.level, bins.first)):
            raise InvalidConfig("'counts', 'level' and 'first' must be of torch.int64")
        if bool((bins.counts < 0).any()) or not _covers(bins, self):
            raise InvalidConfig("the bins hold negative counts, or do not cover the range")
        self.bins = bins


def _covers(bins: Bins, observer: MinMaxObserver) -> bool:
    """Whether the bins are those of the observed range."""
    if observer.batches == 0:
        return torch.equal(bins.level, Bins.empty(16).level) and not bool(bins.counts.any())
    again = bins.covering(observer.min_val.reshape(-1), observer.max_val.reshape(-1))
    return again is bins and bool((bins.counts.sum(dim=1) > 0).all())
