"""Which module makes the tensor that layers read, found by what numbers do, not by names.

The output channels of a module are multiplied by powers of two, and what the layers read is divided
by them. Both are exact. So if the block then gives the very same result, bit for bit, the module's
channels reach these layers and nothing else, and a scale can go from the one to the others. If the
module's own parameters times these numbers give that output too, it can be folded into them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.algorithms.blocks import Block, Layer, Sample
from torch_quant.core.rounded import Scaling

__all__ = ["find_producers"]

_NEAR = 12
"""Modules that ran last before a layer, of which one may make what it reads."""


def find_producers(
    block: Block, tied: Container[int] = (), guess: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Path of each layer with a producer -> path of that, both inside of the block.

    Args:
        block: one sample of it is run a few times.
        tied: ids of parameters that must not be scaled, as other modules have them too.
        guess: what was found in another block of the kind, tried first.
    """
    found: dict[str, str] = {}
    guess = guess or {}
    order = _order(block)
    sample = block.samples[0]
    exact = block.run(sample)
    for reading in block.reading():
        layers, lead = reading.layers, reading.layers[0].path
        channels = reading.layers[0].weight.shape[1]
        before = order[: order.index(lead)] if lead in order else order
        near = before[::-1][:_NEAR]
        tried = [guess[lead], *near] if lead in guess else near
        if any(_holds(layer.module, tied) for layer in layers):
            continue
        for path in dict.fromkeys(tried):
            module = block.module.get_submodule(path)
            if _holds(module, tied) or _channels(module, block.layers) != channels:
                continue
            if _is_producer(block, sample, exact, path, layers):
                found |= {layer.path: path for layer in layers}
                break
    return found


def _holds(module: nn.Module, ids: Container[int]) -> bool:
    return any(id(x) in ids for x in module._parameters.values() if x is not None)


def _order(block: Block) -> list[str]:
    """Paths of the modules with parameters of their own, in the order in which they run."""
    ran: list[str] = []
    with ExitStack() as stack:
        for path, module in block.module.named_modules():
            if path and any(x is not None for x in module._parameters.values()):

                def note(_: nn.Module, args: Any, path: str = path) -> None:
                    ran.append(path)

                stack.callback(module.register_forward_pre_hook(note).remove)
        block.call(block.samples[0])
    return [path for path in dict.fromkeys(ran) if ran.count(path) == 1]


def _channels(module: nn.Module, layers: Iterable[Layer]) -> int:
    """How many output channels the parameters of a module have, 0 if they do not agree."""
    layer = next((each for each in layers if each.module is module), None)
    if layer is not None:
        return layer.weight.shape[0]
    sizes = {x.shape[0] for x in module._parameters.values() if x is not None and x.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else 0


def _is_producer(
    block: Block, sample: Sample, exact: Tensor, path: str, layers: tuple[Layer, ...]
) -> bool:
    module = block.module.get_submodule(path)
    channels = layers[0].weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0])  # no channel is left as it is
    powers = 2.0 ** exponents[torch.randint(0, 4, (channels,), generator=generator)]
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, out: Any) -> None:
        outputs.append(out if isinstance(out, Tensor) else torch.empty(0))

    def divide(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] / powers, *args[1:])

    with ExitStack() as stack:
        handle = module.register_forward_hook(keep)
        stack.callback(handle.remove)
        block.run(sample)
        before = dict(module._parameters)
        stack.callback(module._parameters.update, before)
        turned = any(each.module is module and each.transposed for each in block.layers)
        for name, value in before.items():
            if value is not None:
                matrix = turned and name == "weight"
                how = Scaling(columns=powers) if matrix else Scaling(rows=powers)
                scaled = how.apply(value.detach())
                module._parameters[name] = nn.Parameter(scaled, requires_grad=False)
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(divide).remove)
        result = block.run(sample)
    if len(outputs) != 2 or outputs[0].shape[-1:] != powers.shape:
        return False
    return torch.equal(outputs[0] * powers, outputs[1]) and torch.equal(result, exact)
