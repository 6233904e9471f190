"""The range with the least squared error: what is clipped against what is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.statistics._bins import BinnedObserver, Bins
from torch_quant.statistics._search import Cost, Range, best_range, grids, shrink
from torch_quant.statistics.base import register_statistic

__all__ = ["Density", "HistogramObserver", "squared_error"]

_EXACT_LEVELS = 16  # of evenly spaced ones: up to here the search looks at every level


class Density:
    """A histogram as a probability density, uniform inside each bin.

    Lengths are counted in bins, and 0 is the real 0.
    """

    def __init__(self, bins: Bins) -> None:
        counts = bins.counts.double()
        self.width = bins.width[:, None]
        self.mass = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        self.first = bins.first.double()[:, None]
        self.size = counts.shape[1]
        left = self.first + torch.arange(self.size)
        means = torch.stack([torch.ones_like(left), left + 0.5, left * (left + 1.0) + 1.0 / 3.0])
        self._sums = torch.nn.functional.pad((self.mass * means).cumsum(dim=-1), (1, 0))

    def moments_below(self, x: Tensor) -> Tensor:
        """Integrals of 1, t and t^2 up to ``x``, ``[channels, ...]``; ``[3, channels, ...]``."""
        shape, x = x.shape, x.flatten(1)
        x = torch.minimum(torch.maximum(x, self.first), self.first + self.size)
        index = (x - self.first).floor().clamp(max=self.size - 1)
        left = self.first + index
        where = index.to(torch.int64)
        inside = torch.stack([x - left, (x**2 - left**2) / 2.0, (x**3 - left**3) / 3.0])
        sums = self._sums.gather(2, where.expand(3, -1, -1)) + inside * self.mass.gather(1, where)
        return sums.view(3, *shape)


def squared_error(density: Density, spec: QuantSpec, *, exact: bool) -> Cost:
    """The mean squared error of quantizing ``density``, by range; in squared bins.

    Every cell (the values that share a code) contributes the integral of ``(x - value)^2`` over
    the density. Without ``exact``, for integers, only three cells are integrated: those of the
    first and the last code, which hold what is clipped, and one at 0, where activations pile up.
    The others count as uniform rounding noise, ``scale^2 / 12`` (Bennett 1948, "Spectra of
    Quantized Signals").
    """
    values = spec.values
    lowest, highest = float(values[0]), float(values[-1])

    def cost(low: Tensor, high: Tensor) -> Tensor:
        qparams = grids(low, high, spec)
        scale = (qparams.scale.view_as(low).double() / density.width)[..., None]
        zero = qparams.zero_point.view_as(low)[..., None]
        if exact:
            starts = values[1:].expand(*low.shape, -1)
            borders = spec.borders[1:-1]
        else:
            middle = zero.to(torch.float32).clamp(lowest + 1, highest - 1)
            second = torch.full_like(middle, lowest + 1)
            last = torch.full_like(middle, highest)
            starts = torch.cat([second, middle, middle + 1, last], dim=-1)
            borders = starts - 0.5
        below = density.moments_below((borders - zero) * scale)
        everything = density.moments_below(torch.full_like(scale, torch.inf))
        below = torch.cat([torch.zeros_like(everything), below, everything], dim=-1)
        mass, mean, square = below.diff(dim=-1)
        value = (torch.nn.functional.pad(starts, (1, 0), value=lowest) - zero) * scale
        error: Tensor = square - 2.0 * value * mean + value.square() * mass
        if not exact:  # the two groups of cells beside the middle one
            error[..., 1::2] = mass[..., 1::2] * scale.square() / 12.0
        return error.sum(dim=-1)

    return cost


@register_statistic
class HistogramObserver(BinnedObserver):
    """The range of least expected squared error, clipping and rounding, in the spec asked for.

    On the recorded histogram it is never worse than the exact extremes. The search takes about a
    millisecond a tensor.

    Bound: batches of at most ``SAMPLES`` elements (in a channel) give the same histogram, and so
    the same range bit for bit, however the data was split. Of larger batches the tails are counted
    exactly and the body is sampled, so that what clipping costs is known however rare the outliers
    are; the shares of two splits then differ like those of two samples of that size.

    >>> observer = HistogramObserver()
    >>> observer.observe(torch.cat([torch.linspace(-1.0, 1.0, 10000), torch.tensor([9.0])]))
    >>> low, high = observer.range(QuantSpec.of(bits=4))
    >>> bool(high < 2.0)
    True
    """

    name = "histogram"

    def _range(self, spec: QuantSpec) -> Range:
        exact = not spec.integer or spec.levels <= _EXACT_LEVELS
        cells = spec.levels if exact else _EXACT_LEVELS

        def pick(bins: Bins, whole: Range) -> Range:
            density = Density(bins)
            found = shrink(*whole, spec.symmetric, squared_error(density, spec, exact=exact))
            low, high = (torch.stack(ends, dim=1) for ends in zip(whole, found, strict=True))
            # The model of the search may err by a little; the whole range is the one to beat.
            best = squared_error(density, spec, exact=True)(low, high).argmin(dim=1, keepdim=True)
            return low.gather(1, best)[:, 0], high.gather(1, best)[:, 0]

        return best_range(self.bins, self.min_val, self.max_val, spec, pick, cells=cells)
