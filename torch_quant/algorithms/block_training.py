"""What methods that train a block share: rounding with a gradient, and the block's error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_quant.algorithms.blocks import Block, Layer, Part
from torch_quant.algorithms.clipping import longer_side
from torch_quant.algorithms.rtn import RoundToNearest
from torch_quant.core.granularity import split_blocks
from torch_quant.core.methods import Wanted, WeightMethod
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.core.telling import at_site, tell
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.sites import Site
from torch_quant.statistics import MEAN_SQUARE, MeanSquare, Statistic

__all__ = [
    "LearnedRounding", "Rounder",
    "block_error", "check_options", "error_and_gradients", "replaced_weights", "tell_unreached",
]  # fmt: skip

_UNREACHED = (
    "no calibration data reached it, or no gradient comes back to it, so that its weight is "
    "rounded to nearest; give quantizer.round_weights inputs that reach it, or take GPTQ(), which "
    "needs no gradient"
)


def check_options(method: Any, counts: Sequence[str], switches: Sequence[str] = ()) -> None:
    """Raise :class:`InvalidConfig` for options of the wrong type, and for counts below 1.

    Args:
        method: has the options as attributes, and a ``seed``.
        counts: names of integers, 1 or more.
        switches: names of booleans.
    """

    def refuse(name: str, wanted: str) -> None:
        given = f"{type(method).__name__}({name}={getattr(method, name)!r})"
        raise InvalidConfig(f"{given}: expected {wanted}")

    def is_integer(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for name in counts:
        value = getattr(method, name)
        if not is_integer(value) or value < 1:
            refuse(name, "an integer, 1 or more")
    for name in switches:
        if not isinstance(getattr(method, name), bool):
            refuse(name, "True or False")
    if not is_integer(method.seed):
        refuse("seed", "an integer")


class LearnedRounding(WeightMethod):
    """A method that trains the weights of a block, from where they are rounded to nearest."""

    clip_search: bool
    full_range: bool

    def refusal(self, site: Site) -> str:
        if site.op == "linear" or site.op.startswith("conv"):
            return ""
        return "it works on the linear layers and convolutions of a block"

    @property
    def wants_statistics(self) -> bool:
        return self.clip_search

    def statistics(self, site: Site) -> Wanted:
        """The mean squares of a linear layer's inputs, by which errors are weighted."""
        searched = self.clip_search and site.smoothable
        return {site.inputs[0]: {MEAN_SQUARE: MeanSquare}} if searched else {}

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        """Rounded to nearest, where training begins."""
        weighted = self.clip_search and weight.dim() == 2
        first = RoundToNearest(
            clip_search=self.clip_search, full_range=self.full_range, weighted=weighted
        )
        return first.quantize(weight, spec, statistics)


def tell_unreached(layer: Layer) -> None:
    """Warn of a layer that no sample has reached."""
    with at_site(layer.site):
        tell(_UNREACHED)


@contextmanager
def replaced_weights(weights: Mapping[Layer, Tensor]) -> Iterator[None]:
    """Have layers compute with these tensors, ``[out, in]``, and their gradients."""
    try:
        for layer, weight in weights.items():
            # What stands in the module's own dictionary goes before its parameters.
            layer.module.__dict__["weight"] = weight.T if layer.transposed else weight
        yield
    finally:
        for layer in weights:
            layer.module.__dict__.pop("weight", None)


def _error(block: Block, part: Part) -> Tensor:
    """The mean squared error of one call; raises :class:`QuantError` if it has other sizes."""
    result = block.run(part.sample)
    if result.shape != part.target.shape:
        where = block.path or "what lies outside of blocks"
        raise QuantError(
            f"{where} gives {tuple(result.shape)} with rounded weights and "
            f"{tuple(part.target.shape)} in float, as its sizes depend on values: these cannot be "
            "compared, take GPTQ(), which goes by what layers read"
        )
    return part.error(result)


def error_and_gradients(
    block: Block, weights: Mapping[Layer, Tensor], chosen: Sequence[int]
) -> tuple[float, dict[Layer, Tensor | None]]:
    """The mean squared error of a block on some samples, and its gradient at the weights.

    Args:
        block: has targets.
        weights: what layers compute with, ``[out, in]``; the others keep theirs.
        chosen: numbers of samples.

    Returns:
        The error, and for each layer its gradient; None where no sample reached it.
    """
    leaves = {layer: w.detach().requires_grad_() for layer, w in weights.items()}
    total, found = 0.0, dict.fromkeys(leaves, None)
    with torch.enable_grad(), replaced_weights(leaves):
        for part in block.gathered(chosen):
            error = _error(block, part) * len(part.numbers)
            total += float(error.detach()) / len(chosen)
            if not math.isfinite(total):
                where = block.path or "what lies outside of blocks"
                which = "sample" if len(part.numbers) == 1 else "samples"
                which += f" {', '.join(map(str, part.numbers))}"
                raise QuantError(f"the error of {where} on {which} is not finite: {total}")
            if (
                not error.requires_grad
            ):  # no layer that is trained was reached, or a no_grad forward
                continue
            made = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
            for layer, gradient in zip(leaves, made, strict=True):
                if gradient is not None:
                    before = found[layer]
                    found[layer] = gradient if before is None else before + gradient
    return total, found


def block_error(block: Block, weights: Mapping[Layer, Tensor]) -> float:
    """The mean squared error over all samples."""
    count = len(block.samples)
    with torch.no_grad(), replaced_weights(weights):
        return sum(
            float(_error(block, part)) * len(part.numbers) / count
            for part in block.gathered(range(count))
        )


@dataclass
class Rounder:
    """Round to nearest with a gradient: rounding counts as the identity inside of the range.

    Args:
        spec: the format, its granularity bound to an axis.
        low: lower end of the range of each block of the weight, in the shape of the blocks' grid.
        high: upper end.
        sign: of the scales, 1 or -1, same shape; None for all positive.
    """

    spec: QuantSpec
    low: Tensor
    high: Tensor
    sign: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, spec: QuantSpec, full_range: bool = False) -> Rounder:
        """For the range of a weight; ``full_range`` as :class:`RoundToNearest` has it."""
        grid = spec.granularity.grid(weight.shape)
        split, shape = split_blocks(weight, grid)
        inside = [i for i in range(split.dim()) if not shape or shape[i] != split.shape[i]]
        low, high = (split.amin(inside), split.amax(inside)) if inside else (split, split)
        low, high = low.reshape(grid), high.reshape(grid)
        longer = longer_side(low.detach(), high.detach(), spec) if full_range else None
        if longer is None:
            return cls(spec, low, high)
        return cls(spec, low * longer.abs(), high * longer.abs(), longer.sign())

    @classmethod
    def around(cls, qparams: QParams) -> Rounder:
        """For the range that scales and zero points represent, with values on both sides of it."""
        spec, scale, zero = qparams.spec, qparams.scale, qparams.zero_point
        size, sign = scale.abs(), torch.where(scale < 0, -1.0, 1.0)
        below, above = zero - spec.quant_min, spec.quant_max - zero
        if spec.symmetric:
            below = above = torch.minimum(below, above)
        return cls(spec, -below * size, above * size, sign if bool((scale < 0).any()) else None)

    def grid(
        self, low: Tensor | float = 1.0, high: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor, QParams]:
        """Scales and zero points of ranges, with a gradient.

        Args:
            low: what the lower end is multiplied by, in the shape of the blocks' grid.
            high: the same for the upper end.

        Returns:
            Scale, zero point as floats, and both as they are stored.
        """
        bottom, top = self.low, self.high
        if not self.spec.float_zero_points:
            bottom, top = bottom.clamp(max=0.0), top.clamp(min=0.0)
        bottom, top = bottom * low, top * high
        if self.spec.float_zero_points:  # where 0 is outside, ends that move may cross
            bottom, top = torch.minimum(bottom, top), torch.maximum(bottom, top)
        exact = choose_qparams(bottom.detach(), top.detach(), self.spec)
        zero = exact.zero_point.to(torch.float32)
        if self.spec.symmetric:
            middle = 0 if self.spec.signed else float(zero.flatten()[0])
            steps = min(middle - self.spec.quant_min, self.spec.quant_max - middle)
            smooth = torch.maximum(-bottom, top) / steps
        else:
            smooth = (top - bottom) / (self.spec.quant_max - self.spec.quant_min)
        scale = smooth + (exact.scale - smooth).detach()
        if self.spec.float_zero_points:
            zero = self.spec.quant_min - bottom / scale
        if self.sign is not None:
            scale, exact = scale * self.sign, replace(exact, scale=exact.scale * self.sign)
        return scale, zero, exact

    def spread(self, grid: Tensor, weight: Tensor) -> Tensor:
        """A tensor in the shape of the blocks' grid, as one that multiplies ``weight``."""
        split, shape = split_blocks(weight, grid.shape)
        return grid.reshape(shape).expand_as(split).reshape(weight.shape)

    def steps(self, weight: Tensor) -> Tensor | None:
        """Distance to the next value around each weight, in units of the scale; None if all 1."""
        if self.spec.integer:
            return None
        scale = self.spread(self.grid()[0].detach(), weight)
        values = self.spec.values.to(scale.device)
        place = torch.bucketize(weight.detach() / scale, values).clamp(1, len(values) - 1)
        return values.diff()[place - 1]

    def rounded(self, weight: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
        """The values that weights are rounded to, with a gradient.

        Args:
            weight: any shape.
            scale: of :meth:`grid`.
            zero: likewise.
            offset: added before rounding, in units of the scale.
        """
        split, shape = split_blocks(weight, scale.shape)
        scale, zero = scale.reshape(shape), zero.reshape(shape)
        x = split / scale
        if offset is not None:
            x = x + offset.reshape(split.shape)
        x = x + zero if self.spec.integer else x
        inside = x.clamp(self.spec.quant_min, self.spec.quant_max)
        values = inside + (self.spec.round(x.detach()) - inside).detach()
        values = values - zero if self.spec.integer else values
        return (values * scale).reshape(weight.shape)

    def plain(self, weight: Tensor) -> Tensor:
        """Rounded to nearest in the whole range."""
        scale, zero, _ = self.grid()
        return self.rounded(weight, scale, zero, None)

    def codes(self, weight: Tensor, qparams: QParams, offset: Tensor | None) -> Tensor:
        """The codes of :meth:`rounded`."""
        split, shape = split_blocks(weight.detach(), qparams.scale.shape)
        x = split / qparams.scale.reshape(shape)
        if offset is not None:
            x = x + offset.detach().reshape(split.shape)
        if self.spec.integer:
            x = x + qparams.zero_point.reshape(shape)
        return self.spec.encode(x).reshape(weight.shape)
