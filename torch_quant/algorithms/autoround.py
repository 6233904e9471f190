"""AutoRound: learn which way each weight of a block is rounded, and how far its range reaches.

    W' = s (clip(round(W / s + V) + z) - z),   range [beta low, alpha high] of each block of W

``V``, ``alpha`` and ``beta`` follow the signs of the gradient of the block's squared error against
the float block. ``V`` lies in ``[-1/2, 1/2]``, all of which steps that shrink from
``1 / iterations`` to 0 can reach; ``alpha`` and ``beta`` start from 1. Cheng et al., "Optimize
Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023, equations 2 to 6
and algorithm 1. ``V`` is in steps of the format: with floats, in the distance of the two values
that a weight lies between. In the paper
a range begins with the extremes of the block and can shrink. Here it begins, unless that is turned
off, where the search of :mod:`torch_quant.algorithms.clipping` ends, and can go both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_quant.algorithms.block_training import (
    LearnedRounding,
    Rounder,
    block_error,
    check_options,
    error_and_gradients,
    tell_unreached,
)
from torch_quant.algorithms.blocks import Block, Layer
from torch_quant.core.methods import register_weight_method
from torch_quant.core.qparams import QParams
from torch_quant.errors import InvalidConfig

__all__ = ["AutoRound"]


@register_weight_method
@dataclass(frozen=True)
class AutoRound(LearnedRounding):
    """Signed gradient descent on roundings and ranges, a block at a time.

    :meth:`Quantizer.round_weights` runs it. Of the state with the least error on its batch, the
    last one, and that of round to nearest, the one with the least error on all samples is taken:
    on them, no block comes out worse than rounded to nearest. A layer that no sample reaches is
    rounded to nearest, with a warning.

    Args:
        iterations: steps.
        batch_size: samples of each step: rows of a graph, or batches where rows read each other;
            batches of models whose modules are blocks.
        learning_rate: of the first step; None for ``1 / iterations``.
        range_learning_rate: the same for the ends of ranges; None for ``learning_rate``.
        ranges: learn ranges too.
        clip_search: begin with the ranges of least squared error, weighted by the inputs.
        full_range: let symmetric scales be negative, as :class:`RoundToNearest` does; it goes with
            ``clip_search``.
        seed: of the choice of samples.

    Raises:
        InvalidConfig: an option is of another type or range.

    >>> from torch import nn, randn
    >>> from torch_quant import Quantizer, recipes
    >>> config = recipes.int4_weight_only(group_size=16, method=AutoRound(iterations=10))
    >>> model, quantizer = nn.Sequential(nn.Linear(32, 8)), Quantizer("reference", qconfig=config)
    >>> quantizer.round_weights(model, [randn(8, 32)]).sites
    ('0',)
    """

    name = "autoround"
    wants_blocks: ClassVar[bool] = True
    wants_targets: ClassVar[bool] = True
    wants_importance: ClassVar[bool] = True

    iterations: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    range_learning_rate: float | None = None
    ranges: bool = True
    clip_search: bool = True
    full_range: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, ("iterations", "batch_size"), ("ranges", "clip_search", "full_range"))
        for name in ("learning_rate", "range_learning_rate"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= 1):
                raise InvalidConfig(
                    f"AutoRound({name}={value!r}): expected a number above 0, at most 1, or None"
                )
        if self.full_range and not self.clip_search:
            raise InvalidConfig("AutoRound(full_range=True): give clip_search=True with it")

    def round_block(self, block: Block, layers: Sequence[Layer]) -> None:
        """Learn, and round ``layers``; those of the block that others round stay as they are."""
        known = block.observe(layers, self) if self.clip_search else {}
        learned = []
        for layer in layers:
            weight = layer.weight.contiguous().clone()
            first = self.quantize(weight, layer.spec, known.get(layer.site, {}))[1]
            searched = Rounder.around(first)
            rounder = searched if self.clip_search else Rounder.of(weight, layer.spec)
            learned.append(_Learned.of(layer, weight, rounder, self.ranges, self.clip_search))
        generator = torch.Generator().manual_seed(self.seed)
        count, size = len(block.samples), min(self.batch_size, len(block.samples))
        rate = self.learning_rate or 1.0 / self.iterations
        range_rate = self.range_learning_rate or rate
        reached: set[Layer] = set()
        states, least = [[each.state() for each in learned]], float("inf")
        for turn in range(self.iterations):
            chosen = torch.randperm(count, generator=generator)[:size].tolist()
            with torch.enable_grad():
                weights = {each.layer: each.rounded() for each in learned}
            error, gradients = error_and_gradients(block, weights, chosen)
            if error < least:
                least, best = error, [each.state() for each in learned]
            left = 1.0 - turn / self.iterations
            for each in learned:
                gradient = gradients[each.layer]
                if gradient is not None and bool(gradient.any()):
                    reached.add(each.layer)
                    each.step(weights[each.layer], gradient, rate * left, range_rate * left)
        states += [best, [each.state() for each in learned]]
        errors = []
        for state in states:
            _restore(learned, state)
            errors.append(block_error(block, {x.layer: x.rounded().detach() for x in learned}))
        _restore(learned, states[errors.index(min(errors))])
        for each in learned:
            if each.layer not in reached:
                tell_unreached(each.layer)
            each.layer.round_to(*each.result())


State = tuple[Tensor, ...]


def _restore(learned: Sequence[_Learned], states: Sequence[State]) -> None:
    for each, state in zip(learned, states, strict=True):
        each.load(state)


@dataclass
class _Learned:
    """One weight and what is learned of it.

    Args:
        layer: the layer.
        weight: as it was, ``[out, in]``.
        rounder: of its format.
        offset: ``V`` of each weight, in steps of the format.
        ends: ``beta`` and ``alpha`` of each block; None if they stay 1.
        widest: what these are at most.
        steps: of the format around each weight; None for 1.
    """

    layer: Layer
    weight: Tensor
    rounder: Rounder
    offset: Tensor
    ends: tuple[Tensor, Tensor] | None
    widest: float
    steps: Tensor | None

    @classmethod
    def of(
        cls, layer: Layer, weight: Tensor, rounder: Rounder, ranges: bool, wider: bool
    ) -> _Learned:
        ends = None
        if ranges:
            ends = torch.ones_like(rounder.low), torch.ones_like(rounder.low)
            for end in ends:
                end.requires_grad_()
        offset = torch.zeros_like(weight).requires_grad_()
        widest = 2.0 if wider else 1.0
        return cls(layer, weight, rounder, offset, ends, widest, rounder.steps(weight))

    def _offset(self) -> Tensor:
        return self.offset if self.steps is None else self.offset * self.steps

    def rounded(self) -> Tensor:
        """The weight that the layer would have now."""
        scale, zero, _ = self.rounder.grid(*(self.ends or ()))
        return self.rounder.rounded(self.weight, scale, zero, self._offset())

    def result(self) -> tuple[Tensor, QParams]:
        """Codes and what they stand for."""
        qparams = self.rounder.grid(*(self.ends or ()))[2]
        return self.rounder.codes(self.weight, qparams, self._offset()), qparams

    @property
    def learnable(self) -> list[Tensor]:
        return [self.offset, *(self.ends or ())]

    def step(self, rounded: Tensor, gradient: Tensor, rate: float, range_rate: float) -> None:
        """Go one step against the signs of the gradient."""
        parts = torch.autograd.grad(rounded, self.learnable, gradient)
        with torch.no_grad():
            self.offset.sub_(parts[0].sign_(), alpha=rate).clamp_(-0.5, 0.5)
            for end, part in zip(self.ends or (), parts[1:], strict=True):
                end.sub_(part.sign_(), alpha=range_rate).clamp_(0.0, self.widest)

    def state(self) -> State:
        return tuple(x.detach().clone() for x in self.learnable)

    def load(self, state: State) -> None:
        with torch.no_grad():
            for x, value in zip(self.learnable, state, strict=True):
                x.copy_(value)
