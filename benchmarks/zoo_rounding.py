"""What 8 bits cost a model by themselves: PyTorch's own operators, with rounded inputs and weights.

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
from torch.overrides import TorchFunctionMode

__all__ = ["rounding"]

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
TRANSPOSED = nn.modules.conv._ConvTransposeNd

Range = tuple[Tensor, Tensor]


@contextmanager
def rounding(model: nn.Module, run: Callable[[], Any], bits: int = 8) -> Iterator[None]:
    """Round what linear layers, convolutions and products of two activations read.

    That is inside of the ``with``.

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

    products = _Products(bits)
    begins = [(model, products.begin)]
    with _hooks(layers, observe), _hooks_of(begins), products:
        run()
    products.rounds = True
    for layer in layers:
        layer.weight.data.copy_(_by_output(layer.weight, isinstance(layer, TRANSPOSED), bits))
    try:
        with _hooks([x for x in layers if x in ranges], rounded), _hooks_of(begins), products:
            yield
    finally:
        for weight, values in kept.items():
            weight.data.copy_(values)


class _Products(TorchFunctionMode):
    """Ranges of what products of activations read, by their order in a call; then rounds them."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.rounds, self._next = bits, False, 0
        self._ranges: dict[int, Range] = {}

    def begin(self, *_: Any) -> None:
        """A call of the model."""
        self._next = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in PRODUCTS and len(args) == 2:
            args = self._operand(args[0]), self._operand(args[1])
        return function(*args, **(kwargs or {}))

    def _operand(self, x: Any) -> Any:
        place, self._next = self._next, self._next + 1
        if not (isinstance(x, Tensor) and x.dtype is torch.float32 and x.numel()):
            return x
        low, high = x.aminmax()
        if not self.rounds:
            before = self._ranges.get(place, (low, high))
            self._ranges[place] = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            return x
        return _asymmetric(x, *self._ranges.get(place, (low, high)), self.bits)


def _hooks(layers: list[Any], hook: Callable[..., Any]) -> Any:
    return _hooks_of([(layer, hook) for layer in layers])


@contextmanager
def _hooks_of(pairs: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook) for layer, hook in pairs]
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
