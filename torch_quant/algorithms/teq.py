"""TEQ: scales between layers that are trained, so that what is rounded fits its format best.

As by AWQ, columns of a weight are multiplied by ``s``, and what it reads is divided by ``s`` where
that is made. Here the logarithms of ``s`` follow the gradient of the block's squared error against
the float block, through rounding that counts as the identity. Cheng et al., "TEQ: Trainable
Equivalent Transformation for Quantization of LLMs", 2023, sections 3.1 and 3.2; the error is that
of a block here, not the loss of the whole model, so that one block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_quant.algorithms.block_training import (
    Rounder,
    block_error,
    check_options,
    error_and_gradients,
)
from torch_quant.algorithms.blocks import Block, Layer, Reading
from torch_quant.core.methods import Transform, register_transform
from torch_quant.errors import InvalidConfig
from torch_quant.passes.base import PassContext

__all__ = ["TEQ"]


@register_transform
@dataclass(frozen=True)
class TEQ(Transform):
    """Train the scales of the channels between layers, a block at a time, by Adam.

    :meth:`Quantizer.round_weights` runs it, before whatever rounds the weights. It scales where a
    norm or a linear layer before can take the inverse. Scales that leave a larger error on all
    samples than none are not taken.

    Args:
        iterations: steps.
        batch_size: samples of each step, that is batches of ``round_weights``.
        learning_rate: of the first step, in logarithms; it falls to 0.
        seed: of the choice of samples.

    Raises:
        InvalidConfig: an option is of another type or range.

    >>> TEQ(learning_rate=0)
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: TEQ(learning_rate=0): expected a number above 0, at most 1
    """

    name = "teq"
    wants_blocks: ClassVar[bool] = True
    wants_targets: ClassVar[bool] = True

    iterations: int = 200
    batch_size: int = 1
    learning_rate: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, ("iterations", "batch_size"))
        rate = self.learning_rate
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not (number and 0 < rate <= 1):
            raise InvalidConfig(
                f"TEQ(learning_rate={rate!r}): expected a number above 0, at most 1"
            )

    def apply(self, context: PassContext) -> int:
        """Nothing: the scales are in the parameters that the graph reads."""
        return 0

    def scale_block(self, block: Block, layers: Sequence[Layer]) -> None:
        """Train, and scale every tensor that may be."""
        readings = [each for each in block.reading(layers) if each.producer is not None]
        if not readings:
            return
        scaled = {layer for reading in readings for layer in reading.layers}
        fixed = {
            layer: _rounder(layer, layer.weight).plain(layer.weight)
            for layer in layers
            if layer not in scaled
        }
        logs = [torch.zeros_like(each.layers[0].weight[0]).requires_grad_() for each in readings]
        optimizer = torch.optim.Adam(logs, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.iterations)
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.batch_size, len(block.samples))
        for _ in range(self.iterations):
            chosen = torch.randperm(len(block.samples), generator=generator)[:size].tolist()
            with torch.enable_grad():
                weights = _weights(readings, logs)
            _, gradients = error_and_gradients(block, {**fixed, **weights}, chosen)
            known = [(w, g) for layer, w in weights.items() if (g := gradients[layer]) is not None]
            optimizer.zero_grad()
            if not known:
                continue
            torch.autograd.backward([w for w, _ in known], [g for _, g in known], inputs=logs)
            optimizer.step()
            schedule.step()
        plain = _weights(readings, [torch.zeros_like(each) for each in logs])
        trained = _weights(readings, [each.detach() for each in logs])
        if block_error(block, {**fixed, **trained}) < block_error(block, {**fixed, **plain}):
            for reading, log in zip(readings, logs, strict=True):
                block.scale(reading, log.detach().exp())


def _weights(readings: Sequence[Reading], logs: Sequence[Tensor]) -> dict[Layer, Tensor]:
    """What layers would compute with: scaled, rounded, and with the scale taken out again."""
    found = {}
    for reading, log in zip(readings, logs, strict=True):
        factor = log.exp()
        for layer in reading.layers:
            weight = layer.weight * factor
            found[layer] = _rounder(layer, weight).plain(weight) / factor
    return found


def _rounder(layer: Layer, weight: Tensor) -> Rounder:
    return Rounder.of(weight, layer.spec, bool(getattr(layer.method, "full_range", False)))
