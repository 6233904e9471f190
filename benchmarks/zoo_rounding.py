"""What 8 bits cost a model by themselves: PyTorch's own layers, with rounded inputs and weights.

A deep network with random weights may turn a small change of its input into a large one of its
output. Then 8 bits are far from float, whoever computes them. How far is measured here without the
package, by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["rounding"]

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
TRANSPOSED = nn.modules.conv._ConvTransposeNd

Range = tuple[Tensor, Tensor]


@contextmanager
def rounding(model: nn.Module, run: Callable[[], Any], bits: int = 8) -> Iterator[None]:
    """Round what linear layers and convolutions read, inside of the ``with``.

    Inputs have one asymmetric scale each, of the range found; weights a symmetric one for each
    output.

    Args:
        model: float, whose weights are as they were afterwards.
        run: calls the model with all that ranges are taken of.
        bits: of inputs and weights.
    """
    layers = [x for x in model.modules() if isinstance(x, LAYERS)]
    ranges: dict[nn.Module, Range] = {}
    kept = {x.weight: x.weight.detach().clone() for x in layers}

    def observe(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs:  # by keyword: it stays in float, which makes this way the nearer
            return
        low, high = inputs[0].aminmax()
        before = ranges.get(layer, (low, high))
        ranges[layer] = (torch.minimum(low, before[0]), torch.maximum(high, before[1]))

    def rounded(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not inputs:
            return inputs
        low, high = ranges[layer]
        return (_asymmetric(inputs[0], low, high, bits), *inputs[1:])

    with _hooks(layers, observe):
        run()
    for layer in layers:
        layer.weight.data.copy_(_by_output(layer.weight, isinstance(layer, TRANSPOSED), bits))
    try:
        with _hooks([x for x in layers if x in ranges], rounded):
            yield
    finally:
        for weight, values in kept.items():
            weight.data.copy_(values)


@contextmanager
def _hooks(layers: list[Any], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _asymmetric(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def _by_output(weight: Tensor, transposed: bool, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    axes = [axis for axis in range(weight.dim()) if axis != int(transposed)]
    scale = (weight.detach().abs().amax(axes, keepdim=True) / most).clamp_min(1e-30)
    return (weight.detach() / scale).round() * scale
