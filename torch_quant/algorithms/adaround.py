"""AdaRound: learn for each weight of a block whether it is rounded up or down.

    W' = s (clip(floor(W / s) + h(V) + z) - z),   h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

``V`` begins where ``W' = W`` and follows the gradient of

    error / error of nearest rounding + r mean(1 - |2 h(V) - 1|^b)

by Adam. The second term leaves ``h`` alone at first, as ``b`` is 20, and drives it to 0 or 1 at the
end, where ``b`` is 2; it is off for the first fifth of the steps. The error is that of a block's
result against the float block. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
Quantization", 2020, equations 21 to 25, for a layer; Li et al., "BRECQ", 2021, for blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_quant.algorithms.block_training import (
    LearnedRounding,
    block_error,
    check_options,
    error_and_gradients,
    tell_unreached,
)
from torch_quant.algorithms.blocks import Block, Layer
from torch_quant.core.functional import dequantize
from torch_quant.core.granularity import split_blocks
from torch_quant.core.methods import register_weight_method
from torch_quant.core.qparams import QParams
from torch_quant.errors import InvalidConfig

__all__ = ["AdaRound"]

_ZETA, _GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid."""
_WARM_UP = 0.2
"""Share of the steps in which nothing drives ``h`` to 0 or 1."""
_BETAS = 20.0, 2.0


@register_weight_method
@dataclass(frozen=True)
class AdaRound(LearnedRounding):
    """Rounding up or down, learned a block at a time; the scales stay as they are.

    :meth:`Quantizer.round_weights` runs it, on linear layers and convolutions: in the graph of a
    model whose activations are quantized, after calibration, else in blocks of modules. What comes
    out is taken where it has a smaller error on all samples than rounding to nearest. A layer that
    no sample reaches is rounded to nearest, with a warning.

    Args:
        iterations: steps.
        batch_size: samples of each step: rows of a graph, or batches where rows read each other;
            batches of models whose modules are blocks.
        learning_rate: of Adam, for ``V``.
        regularization: ``r``.
        clip_search: scales of least squared error, in place of the whole range.
        full_range: let symmetric scales be negative, as :class:`RoundToNearest` does.
        weighted: in a graph, let an error count as the square of the gradient that the model's
            outputs have there.
        seed: of the choice of samples.

    Raises:
        InvalidConfig: an option is of another type or range.

    >>> from torch import nn, randn
    >>> from torch_quant import QConfig, Quantizer, QuantSpec
    >>> config = QConfig(weight=QuantSpec.of("int4", per_channel=True), method=AdaRound(20))
    >>> model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), randn(4, 3, 8, 8)
    >>> quantizer = Quantizer("reference", qconfig=config)
    >>> _ = quantizer.calib(model)(x)
    >>> quantizer.round_weights(model, [x]).sites
    ('0',)
    """

    name = "adaround"
    wants_blocks: ClassVar[bool] = True
    wants_targets: ClassVar[bool] = True

    iterations: int = 400
    batch_size: int = 16
    learning_rate: float = 0.1
    regularization: float = 1.0
    clip_search: bool = True
    full_range: bool = False
    weighted: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, ("iterations", "batch_size"), ("clip_search", "full_range", "weighted"))
        for name in ("learning_rate", "regularization"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise InvalidConfig(f"AdaRound({name}={value!r}): expected a number above 0")

    @property
    def wants_importance(self) -> bool:  # type: ignore[override]
        return self.weighted

    def round_block(self, block: Block, layers: Sequence[Layer]) -> None:
        """Learn, and round ``layers``; those of the block that others round stay as they are."""
        known = block.observe(layers, self) if self.clip_search else {}
        nearest, learned = {}, []
        for layer in layers:
            weight = layer.weight.contiguous()
            nearest[layer] = self.quantize(weight, layer.spec, known.get(layer.site, {}))
            learned.append(_Rounding(layer, weight, nearest[layer][1]))
        start = block_error(block, {layer: dequantize(*made) for layer, made in nearest.items()})
        reached = self._learn(block, learned, start) if start else set()
        made = {each.layer: each.result() for each in learned}
        end = block_error(block, {layer: dequantize(*each) for layer, each in made.items()})
        for layer in layers:
            if start and layer not in reached:
                tell_unreached(layer)
            layer.round_to(*(made if end < start else nearest)[layer])

    def _learn(self, block: Block, learned: Sequence[_Rounding], start: float) -> set[Layer]:
        """All steps; returns the layers that samples have reached."""
        generator = torch.Generator().manual_seed(self.seed)
        count, reached = len(block.samples), set[Layer]()
        size = min(self.batch_size, count)
        adam = torch.optim.Adam([each.v for each in learned], lr=self.learning_rate)
        warm_up = int(_WARM_UP * self.iterations)
        for turn in range(self.iterations):
            chosen = torch.randperm(count, generator=generator)[:size].tolist()
            with torch.enable_grad():
                weights = {each.layer: each.soft() for each in learned}
            _, gradients = error_and_gradients(block, weights, chosen)
            beta = None
            if turn >= warm_up:
                done = (turn - warm_up) / max(1, self.iterations - warm_up)
                beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * (1.0 - done)
            for each in learned:
                gradient = gradients[each.layer]
                if gradient is None or not bool(gradient.any()):
                    each.v.grad = None
                    continue
                reached.add(each.layer)
                scaled = gradient / (start * size)
                each.v.grad = each.gradient(weights[each.layer], scaled, beta, self.regularization)
            adam.step()
        return reached


class _Rounding:
    """One weight and what is learned of it.

    Args:
        layer: the layer.
        weight: as it was, in the shape that its operator takes.
        qparams: its scales and zero points.
    """

    def __init__(self, layer: Layer, weight: Tensor, qparams: QParams) -> None:
        self.layer, self.qparams, spec = layer, qparams, qparams.spec
        split, shape = split_blocks(weight, qparams.scale.shape)
        self.shape, self.scale = weight.shape, qparams.scale.reshape(shape)
        self.zero = qparams.zero_point.reshape(shape).to(torch.float32)
        steps = split / self.scale
        if spec.integer:
            steps = steps + self.zero
            floor = steps.floor()
            ends = spec.quant_min, spec.quant_max
            self.low, self.high = floor.clamp(*ends), (floor + 1.0).clamp(*ends)
        else:
            values = spec.values.to(steps.device)
            place = torch.bucketize(steps, values).clamp(1, len(values) - 1)
            self.low, self.high = values[place - 1], values[place]
        between = (steps - self.low) / (self.high - self.low).clamp(min=torch.finfo().tiny)
        stretched = (between.clamp(0.0, 1.0) - _GAMMA) / (_ZETA - _GAMMA)
        self.v = torch.logit(stretched).requires_grad_()

    def _h(self) -> Tensor:
        return (torch.sigmoid(self.v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)

    def _real(self, steps: Tensor) -> Tensor:
        steps = steps - self.zero if self.qparams.spec.integer else steps
        return (steps * self.scale).reshape(self.shape)

    def soft(self) -> Tensor:
        """The weight that the layer has while ``V`` is learned."""
        return self._real(self.low + self._h() * (self.high - self.low))

    def gradient(
        self, soft: Tensor, gradient: Tensor, beta: float | None, regularization: float
    ) -> Tensor:
        """Of the whole loss, at ``V``.

        Args:
            soft: of :meth:`soft`.
            gradient: of the error, at ``soft``.
            beta: None for the error alone.
            regularization: what the second term counts.
        """
        (found,) = torch.autograd.grad(soft, self.v, gradient)
        if beta is None:
            return found
        with torch.enable_grad():
            rest = (1.0 - (2.0 * self._h() - 1.0).abs().pow(beta)).mean() * regularization
        return found + torch.autograd.grad(rest, self.v)[0]

    def result(self) -> tuple[Tensor, QParams]:
        """Codes and what they stand for."""
        steps = torch.where(self.v.detach() >= 0.0, self.high, self.low)
        return self.qparams.spec.encode(steps).reshape(self.shape), self.qparams
