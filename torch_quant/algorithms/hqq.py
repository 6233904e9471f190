"""HQQ: grids that a heavy tail of the weight does not pull away.

The few large errors of a weight, those of its outliers, count little under ``|e|^p``, ``p < 1``.
The minimum of ``|W - s (Q - z)|^p`` is found by splitting off the outliers' part ``E`` of the
error, and by solving two problems in turn:

    E = shrink(W - s (Q - z)),  shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    z = mean(Q - (W - E) / s)                                     float zero points
    s = argmin |W - E - s (Q - z)|^2                              others

with errors in steps of the range's scale.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023, equations 1
to 6, where the scale stays what the range gives and the zero point, a float, is solved for: a
format with ``float_zero_points``. Integer zero points of ranges are within half of the best already
(in 15 distributions tried, none moved), so the scale is solved for there. That serves formats
without a zero point too. It looks at no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.algorithms.clipping import rounded_steps
from torch_quant.core.functional import quantize
from torch_quant.core.granularity import PerChannel, block_rows
from torch_quant.core.methods import WeightMethod, register_weight_method
from torch_quant.core.qparams import QParams, choose_qparams, storable_scale
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import Statistic

__all__ = ["HQQ"]

_ELEMENTS = 2**16  # that are looked at together: temporaries stay in the cache
_SMALLEST = 1e-12  # in steps: |e|^(p - 1) stays finite


@register_weight_method
@dataclass(frozen=True)
class HQQ(WeightMethod):
    """Half-quadratic quantization; it needs no data.

    Its own format is affine with float zero points, ``recipes.int4_weight_only(method="hqq",
    symmetric=False, float_zero_points=True)``. In formats without them it solves for the scale,
    and what counts little then can count much for the output: the large weights of language models
    often belong to loud channels. There, ``RoundToNearest(full_range=True)`` is the better choice
    without data, and a search that is weighted with data. Scales that are powers of two hardly
    leave anything to solve.

    Of all rounds, each block keeps the grid with the least ``|error|^p``, so none comes out worse
    by that measure than round to nearest does.

    Args:
        p: the norm, above 0 and at most 1.
        beta: what counts as an outlier's error: in steps, those above ``beta ** (1 / (p - 2))``, a
            sixth for 10; it grows by ``kappa`` each round.
        kappa: above 1.
        iterations: rounds, 1 or more.

    Raises:
        InvalidConfig: an option is outside of that.

    >>> import torch
    >>> from torch_quant import PerGroup
    >>> spec = QuantSpec.of("uint4", granularity=PerGroup(64, 1))
    >>> codes, qparams = HQQ().quantize(torch.linspace(-1, 1, 128).reshape(1, 128), spec, {})
    >>> qparams.zero_point.dtype, tuple(qparams.scale.shape)
    (torch.int32, (1, 2))
    """

    name = "hqq"
    serves_unreached = True

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        for name, expected, holds in (
            ("p", "a number above 0, at most 1", lambda v: 0 < v <= 1),
            ("beta", "a number above 0", lambda v: 0 < v < float("inf")),
            ("kappa", "a number above 1", lambda v: 1 < v < float("inf")),
            ("iterations", "an integer, 1 or more", lambda v: isinstance(v, int) and v >= 1),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not holds(value):
                raise InvalidConfig(f"HQQ({name}={value!r}): expected {expected}")

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        grid = spec.granularity.grid(weight.shape)
        rows = block_rows(weight, spec.granularity)
        flat = dataclasses.replace(spec, granularity=PerChannel(0))
        size = max(1, _ELEMENTS // max(1, rows.shape[1]))
        found = [self._solved(part, flat) for part in rows.split(size)]
        scale, zero_point = (torch.cat([each[k] for each in found]) for k in (0, 1))
        zero_point = zero_point.reshape(grid).to(spec.zero_point_dtype)
        qparams = QParams(spec, scale.reshape(grid), zero_point)
        return quantize(weight, qparams), qparams

    def _solved(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The best scale and zero point of each row, ``[blocks, 1]``."""
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        first = choose_qparams(low, high, spec)
        scale, zero_point = first.scale, first.zero_point.to(torch.float32)
        unit = first.scale
        best = scale, zero_point
        least = torch.full_like(scale, float("inf"))
        beta = self.beta
        for turn in range(self.iterations + 1):
            values = rounded_steps(rows / scale, spec, zero_point)
            error = torch.addcmul(rows, values, scale, value=-1).div_(unit)
            size = error.abs().clamp_(min=_SMALLEST)
            slope = size.pow(self.p - 1)
            cost = (size * slope).sum(1, keepdim=True)
            wins = cost < least
            least = torch.where(wins, cost, least)
            best = torch.where(wins, scale, best[0]), torch.where(wins, zero_point, best[1])
            if turn == self.iterations:
                break
            outliers = size.sub_(slope.div_(beta)).clamp_(min=0).copysign_(error).mul_(unit)
            beta *= self.kappa
            if spec.float_zero_points:
                moved = values - (rows - outliers) / scale
                zero_point = zero_point + moved.mean(1, keepdim=True)
                continue
            found = ((rows - outliers) * values).sum(1, keepdim=True)
            found = found / values.square().sum(1, keepdim=True)
            usable = torch.isfinite(found) & (found > 0)
            scale = storable_scale(torch.where(usable, found, scale), spec)
        return best
