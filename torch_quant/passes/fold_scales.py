"""Scales and zero points in the form that int8 kernels take: numbers, or a dimension of channels.

quantize(x, scale, zero_point)     -> quantize_per_tensor(x, 0.02, 128, 0, 255)
dequantize(q, scale, zero_point)   -> dequantize_per_tensor(q, 0.02, 128)
                                      dequantize_per_channel(q, scale[out], zero_point[out], 0)

Kernels then read no tensor to know a number, and what is packed for one is packed once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from torch_quant.core.elements import element_type
from torch_quant.ops.arguments import argument, arguments, retarget
from torch_quant.ops.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE,
    QUANTIZE_PER_TENSOR,
)
from torch_quant.ops.table import pattern_of
from torch_quant.passes.base import PassContext

__all__ = ["fold_scales", "number"]


def fold_scales(context: PassContext) -> int:
    """Fold the scales of every integer per tensor or per channel; the rest stays as it is."""
    gm, changed = context.gm, 0
    flat: dict[int, Tensor] = {}
    for node in list(context.graph.nodes):
        if node.target not in (QUANTIZE, DEQUANTIZE):
            continue
        x, scale, zero_point, name = arguments(node).values()
        element = element_type(name)
        if not element.integer or scale.op != "get_attr":
            continue
        value = gm.get_buffer(str(scale.target))
        if not value.dim() and gm.get_buffer(str(zero_point.target)).is_floating_point():
            continue
        if not value.dim():
            grid = (number(gm, scale), int(number(gm, zero_point)))
            if node.target is QUANTIZE:
                ends = (int(element.quant_min), int(element.quant_max), element.dtype)
                retarget(node, QUANTIZE_PER_TENSOR, (x, *grid, *ends))
            else:
                retarget(node, DEQUANTIZE_PER_TENSOR, (x, *grid))
        elif node.target is DEQUANTIZE and (axis := _channel_axis(node, value)) is not None:
            for each in (scale, zero_point):
                _flatten(gm, str(each.target), flat)
            retarget(node, DEQUANTIZE_PER_CHANNEL, (x, scale, zero_point, axis))
        else:
            continue
        changed += 1
    return changed


def number(gm: fx.GraphModule, node: Any) -> float:
    """The value of a scale or zero point of a whole tensor."""
    return gm.get_buffer(str(node.target)).item()


def _channel_axis(node: fx.Node, scale: Tensor) -> int | None:
    """The axis whose indices have a scale each, None if blocks are of another kind."""
    codes = argument(node, "q")
    if codes.op != "get_attr":
        return None
    shape = node.graph.owning_module.get_buffer(str(codes.target)).shape  # type: ignore[union-attr]
    user = next(iter(node.users), None)
    pattern = None if user is None else pattern_of(user)
    first = 0 if pattern is None else pattern.weight_axis  # where all sizes are 1
    axes = sorted(range(len(shape)), key=lambda axis: axis != first)
    for axis in axes:
        grid = [1] * len(shape)
        grid[axis] = shape[axis]
        if list(scale.shape) in (grid, grid[axis : axis + 1]):  # or flat already, a shared weight
            return axis
    return None


def _flatten(gm: fx.GraphModule, path: str, flat: dict[int, Tensor]) -> None:
    """Make a buffer one-dimensional; equal names of one tensor stay one tensor."""
    owner, _, name = path.rpartition(".")
    value = gm.get_buffer(path)
    if value.dim() != 1:
        flat.setdefault(id(value), value.flatten())
        gm.get_submodule(owner).register_buffer(name, flat[id(value)])
