"""The search for the scale of each block of a weight that leaves the least squared error.

Rounding errors shrink with the scale, and what lies beyond the range is clipped; the best range is
smaller than that of the values for formats of few bits. A grid of ranges comes first (Nagel et al.
2021, "A White Paper on Neural Network Quantization", section 3.1). The codes of the best one give a
line through the values, whose slope is a better scale and whose root is a better zero point: least
squares and rounding in turn, as Lloyd's algorithm has it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.core.granularity import PerChannel, block_rows
from torch_quant.core.qparams import QParams, choose_qparams, storable_scale
from torch_quant.core.spec import QuantSpec, ScaleType

__all__ = ["full_range_qparams", "longer_side", "rounded_steps", "searched_qparams"]

_FACTORS = (1.0, *(1.0 - 0.05 * i for i in range(1, 11)), 0.4, 0.3, 0.2, 0.1)
"""Of the range of a block."""
_POWERS = (
    1.0,
    2.0,
    0.5,
    0.25,
    0.125,
    0.0625,
)  # of ranges whose scales are powers of two; the standard's may saturate
_ROUNDS = 2  # of least squares
_ELEMENTS = 2**16  # that are looked at together: temporaries stay in the cache


def searched_qparams(
    weight: Tensor,
    spec: QuantSpec,
    *,
    importance: Tensor | None = None,
    full_range: bool = False,
) -> QParams:
    """The scales, and zero points, whose rounding leaves the least squared error in each block.

    The range of the values is a candidate, so the error is never larger than without a search.

    Args:
        weight: float32, any shape.
        spec: the format, its granularity bound to an axis.
        importance: what an error counts, shape ``[in]``, the last dimension of the weight; 1 each
            by default.
        full_range: whether scales may be negative, see :func:`full_range_qparams`.

    Raises:
        InvalidConfig: the blocks do not divide the weight, or it is not finite.

    >>> spec = QuantSpec.of("int4", granularity=PerChannel(0))
    >>> searched_qparams(torch.tensor([[1.0, 2.0, 3.1, -4.0, 14.0]]), spec).scale
    tensor([[1.9525]])
    """
    grid = spec.granularity.grid(weight.shape)
    rows = block_rows(weight, spec.granularity)
    counts = None
    if importance is not None:
        # Other data may excite a channel that these do not: it counts as much as the mean.
        importance = torch.where(importance > 0, importance, importance.mean())
        counts = block_rows(importance.to(weight).expand_as(weight), spec.granularity)
    flat = dataclasses.replace(spec, granularity=PerChannel(0))
    size = max(1, _ELEMENTS // max(1, rows.shape[1]))
    found = [
        _Search(part, flat, None if counts is None else counts[i : i + size]).run(full_range)
        for i, part in zip(range(0, len(rows), size), rows.split(size), strict=True)
    ]
    scale, zero_point = (torch.cat([each[k] for each in found]) for k in (0, 1))
    return QParams(spec, scale.reshape(grid), zero_point.reshape(grid).to(spec.zero_point_dtype))


def rounded_steps(values: Tensor, spec: QuantSpec, zero_point: Tensor) -> Tensor:
    """Values in steps of their scale, written over by the nearest that the format has.

    >>> rounded_steps(torch.tensor([1.4, 9.0]), QuantSpec.of("int4"), torch.tensor(0.0))
    tensor([1., 7.])
    """
    if not spec.integer:
        return spec.round(values)
    values = values if spec.float_zero_points else values.round_()
    return spec.round(values.add_(zero_point)).sub_(zero_point)


def full_range_qparams(weight: Tensor, spec: QuantSpec) -> QParams:
    """Symmetric scales, of such a sign that the largest value of each block gets the longer side.

    Signed integers have one negative value more: -8 to 7. With ``scale = w / -8``, ``w`` the value
    of largest magnitude, all 16 are used, where ``max|w| / 7`` leaves out -8. Elements whose values
    are symmetric, affine formats and scales that have no sign get what ranges give.

    >>> spec = QuantSpec.of("int4", granularity=PerChannel(0))
    >>> full_range_qparams(torch.tensor([[1.0, 8.0], [-8.0, 1.0]]), spec).scale.flatten().tolist()
    [-1.0, 1.0]
    """
    rows = block_rows(weight, spec.granularity)
    flat = dataclasses.replace(spec, granularity=PerChannel(0))
    scale, zero_point = _Search(rows, flat, None).start()
    longer = longer_side(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), flat)
    scale = storable_scale(scale * longer, spec) if longer is not None else scale
    grid = spec.granularity.grid(weight.shape)
    return QParams(spec, scale.reshape(grid), zero_point.reshape(grid).to(spec.zero_point_dtype))


def longer_side(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor | None:
    """By what a symmetric scale is multiplied for full range; None where there is none.

    Args:
        low: the smallest value of each block, any shape.
        high: the largest, same shape.
        spec: the format.
    """
    if not spec.symmetric or not spec.integer or spec.scale_type is ScaleType.E8M0:
        return None
    middle = 0 if spec.signed else (spec.quant_min + spec.quant_max + 1) // 2
    below, above = middle - spec.quant_min, spec.quant_max - middle
    if below <= above:
        return None
    sign = torch.where(high > -low, -1.0, 1.0)
    return torch.where((low == 0) & (high == 0), 1.0, sign * above / below)


@dataclass
class _Search:
    """Some blocks: the best scale and zero point so far, ``[blocks, 1]``.

    Args:
        rows: ``[blocks, elements]``.
        spec: the format, one scale for each row.
        counts: what an error counts, same shape.
    """

    rows: Tensor
    spec: QuantSpec
    counts: Tensor | None

    def start(self, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """What the range times ``factor`` gives; with float zero points, around its middle."""
        low, high = self.rows.amin(1, keepdim=True), self.rows.amax(1, keepdim=True)
        if self.spec.float_zero_points:
            middle = low / 2 + high / 2
            low, high = middle + (low - middle) * factor, middle + (high - middle) * factor
            found = choose_qparams(low, high, self.spec)
            return found.scale, found.zero_point
        found = choose_qparams(low.clamp(max=0) * factor, high.clamp(min=0) * factor, self.spec)
        return found.scale, found.zero_point.to(torch.float32)

    def values(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The rounded values in units of the scale."""
        return rounded_steps(self.rows / scale, self.spec, zero_point)

    def run(self, full_range: bool) -> tuple[Tensor, Tensor]:
        powers = self.spec.scale_type is ScaleType.E8M0
        candidates = [self.start(factor) for factor in (_POWERS if powers else _FACTORS)]
        ends = self.rows.amin(1, keepdim=True), self.rows.amax(1, keepdim=True)
        side = longer_side(*ends, self.spec) if full_range else None
        if side is not None:
            plain, zero_point = candidates[0]
            signed = plain * side
            candidates += [
                (storable_scale(signed * factor, self.spec), zero_point) for factor in _FACTORS
            ]
        best, values, error = candidates[0], *self._tried(*candidates[0])
        for candidate in candidates[1:]:
            best, values, error = self._better(candidate, best, values, error)
        for _ in range(0 if powers else _ROUNDS):
            candidate = self._fitted(*best, values)
            best, values, error = self._better(candidate, best, values, error)
        return best

    def _tried(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded values, and their squared error in each block, ``[blocks, 1]``."""
        values = self.values(scale, zero_point)
        errors = (values * scale).sub_(self.rows).square_()
        return values, self._sum(errors)

    def _better(
        self, candidate: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor], values: Tensor,
        error: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:  # fmt: skip
        new, new_error = self._tried(*candidate)
        wins = new_error < error
        scale, zero_point = (torch.where(wins, *pair) for pair in zip(candidate, best, strict=True))
        return (scale, zero_point), torch.where(wins, new, values), torch.minimum(new_error, error)

    def _fitted(self, scale: Tensor, zero_point: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale and zero point for the codes that ``values`` stand for."""
        if not self.spec.symmetric:
            total = self._sum(torch.ones_like(values))
            x, q = self._sum(self.rows.clone()) / total, self._sum(values.clone()) / total
            slope = self._sum((self.rows - x) * (values - q)) / self._sum((values - q).square())
            root = zero_point + q - x / slope
            if not self.spec.float_zero_points:
                root = root.round().clamp(self.spec.quant_min, self.spec.quant_max)
            usable = torch.isfinite(root) & (slope > 0)
            moved = torch.where(usable, root, zero_point)
            values, zero_point = values + (zero_point - moved), moved
        fitted = self._sum(self.rows * values) / self._sum(values.square())
        usable = torch.isfinite(fitted) & (fitted * scale > 0)
        return storable_scale(torch.where(usable, fitted, scale), self.spec), zero_point

    def _sum(self, x: Tensor) -> Tensor:
        """The weighted sum of a tensor of this method's own, ``[blocks, 1]``."""
        return (x if self.counts is None else x.mul_(self.counts)).sum(1, keepdim=True)
