"""Fake-quantizers in the place of quantize and dequantize.

x -> quantize -> reshape -> dequantize -> linear     x -> reshape -> fake_quantize -> linear
int8 weight -> dequantize -> linear                  weight on its grid -> fake_quantize -> linear
linear -> quantize -> dequantize -> ...              linear -> fake_quantize -> ...

Each stands directly at the layer, which is where torch_blade looks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from torch_quant.graph.sites import KEY
from torch_quant.ops.arguments import argument, arguments, retarget, set_arguments
from torch_quant.ops.functions import graph_function
from torch_quant.ops.qdq import (
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    FAKE_QUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
)
from torch_quant.passes.base import PassContext

__all__ = ["fake_quantize", "fake_quantize_channels", "fake_quantizers"]

_LIMITS = (-128, 127)


@graph_function
def fake_quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """PyTorch's own fake-quantizer, which a trace records; ours for exporters.

    PyTorch has no rule for the sizes of its own where they are free.

    >>> fake_quantize(torch.tensor([0.26]), 0.5, 0, -128, 127)
    tensor([0.5000])
    """
    if torch.compiler.is_compiling():
        return FAKE_QUANTIZE_PER_TENSOR(x, scale, zero_point, low, high)  # type: ignore[no-any-return]
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)


@graph_function
def fake_quantize_channels(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int
) -> Tensor:
    """The same with a scale for each channel.

    >>> grid = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    >>> fake_quantize_channels(torch.tensor([[0.6]]), *grid, 0, -128, 127)
    tensor([[1.]])
    """
    if torch.compiler.is_compiling():
        shape = [1] * x.dim()
        shape[axis] = -1
        step = scale.reshape(shape)
        return (x * step.reciprocal()).round().clamp(low, high) * step
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, low, high)


def fake_quantizers(context: PassContext) -> int:
    """Put fake-quantizers at inputs, weights and results; returns how many."""
    changed = _weights(context)
    for node in list(context.graph.find_nodes(op="call_function", target=QUANTIZE_PER_TENSOR)):
        changed += _activation(context, node)
    return changed


def _weights(context: PassContext) -> int:
    """Integer weights as floats on their grid, which a fake-quantizer leaves as they are."""
    gm, changed = context.gm, 0
    for node in list(context.graph.nodes):
        if node.target not in (DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR):
            continue
        codes, scale, zero_point, *axis = arguments(node).values()
        if codes.op != "get_attr":
            continue
        path = str(codes.target)
        value = gm.get_buffer(path)
        if not value.is_floating_point():  # else it is shared, and done
            step = scale
            if axis:
                shape = [1] * value.dim()
                shape[axis[0]] = -1
                step = gm.get_buffer(str(scale.target)).reshape(shape)
            owner, _, name = path.rpartition(".")
            gm.get_submodule(owner).register_buffer(name, value.to(torch.float32) * step)
        if axis:
            grid = (scale, zero_point, *axis, *_LIMITS)
            retarget(node, fake_quantize_channels, (codes, *grid))
        else:
            retarget(node, fake_quantize, (codes, scale, zero_point, *_LIMITS))
        changed += 1
    return changed


def _activation(context: PassContext, quantize: fx.Node) -> int:
    """One tensor, at each place where it is read quantized."""
    graph = context.graph
    x, scale, zero_point, low, high, _ = arguments(quantize).values()
    grid = (scale, zero_point, low, high)
    entry = context.plan.get(x.meta.get(KEY, ""))
    is_result = entry is not None and entry.quantized and entry.quantized_output == x.meta[KEY]
    readers = _readers(quantize)
    made: dict[fx.Node, fx.Node] = {}
    if is_result:  # of a layer, at which it stands, whatever else reads it
        with graph.inserting_before(quantize):
            made[quantize] = graph.call_function(fake_quantize, (x, *grid))
    for reader in readers:
        place = argument(reader, "q")
        if place in made:
            reader.replace_all_uses_with(made[place])
            graph.erase_node(reader)
        else:
            retarget(reader, fake_quantize, (place, *grid))
            made[place] = reader
    stands_in = made[quantize] if is_result else x
    for user in list(quantize.users):
        for name, value in arguments(user).items():
            if value is quantize:
                set_arguments(user, {name: stands_in})
    graph.erase_node(quantize)
    return len(made)


def _readers(quantize: fx.Node) -> list[fx.Node]:
    """Every ``dequantize`` of the codes, moved or not, in the order of the graph."""
    found, seen = set(), {quantize}
    todo = [quantize]
    while todo:
        for user in todo.pop().users:
            if user.target is DEQUANTIZE_PER_TENSOR:
                found.add(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return [node for node in quantize.graph.nodes if node in found]
