"""Biases of quantized products as int32 on the grid of the products they are added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.int8 import is_quantized_product
from torch_quant.core.qparams import MIN_SCALE
from torch_quant.graph.sites import local_name
from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL
from torch_quant.passes.base import PassContext, call_like
from torch_quant.passes.constants import evaluate, name_of, new_constants

__all__ = ["integer_bias"]

aten = torch.ops.aten

_BIAS_LIMIT = 2**30
"""Codes of a bias stay below it, which leaves room for the products that are added to it."""


_LAYERS = frozenset({
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default
})  # fmt: skip


def integer_bias(context: PassContext) -> int:
    """Biases of quantized layers as int32 on the grid of the products they are added to."""
    changed = 0
    for node in list(context.graph.nodes):
        if node.target in _LAYERS and is_quantized_product(node):
            changed += _round_bias(context.gm, node)
    return changed


def _round_bias(gm: fx.GraphModule, node: fx.Node) -> bool:
    """The bias as dequantized int32 codes, scale = that of the input times that of the weight."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    if bias is None:
        return False
    value = evaluate(gm, bias).detach().to(torch.float32)
    step = float(argument(x, "scale"))
    scale = argument(weight, "scale")
    if weight.target is DEQUANTIZE_PER_CHANNEL:
        scale = gm.get_buffer(str(scale.target))
        needed = (value.abs() / (step * _BIAS_LIMIT)).clamp(min=MIN_SCALE)
        codes = gm.get_buffer(str(argument(weight, "q").target))
        empty = (codes == 0).flatten(1).all(1)
        if bool(((needed > scale.abs()) | empty).any()):  # a full-range scale may be negative
            size = torch.where(empty, needed, torch.maximum(scale.abs(), needed))
            wanted = size.copysign(scale)
            scale = _widen(gm, node, weight, wanted)
    grid = (torch.as_tensor(scale, dtype=torch.float32) * step).expand(value.shape).contiguous()
    codes = (value / grid).round().clamp(-_BIAS_LIMIT, _BIAS_LIMIT).to(torch.int32)
    values = {"": codes, "_scale": grid, "_zero_point": torch.zeros_like(codes)}
    consts = new_constants(gm, name_of(bias, f"{local_name(node)}.bias"), values, node)
    set_arguments(node, {"bias": call_like(node, DEQUANTIZE_PER_CHANNEL, (*consts, 0))})
    return True


def _constants(weight: fx.Node) -> list[fx.Node]:
    """Codes, scale and zero point of a dequantized weight."""
    return [argument(weight, name) for name in ("q", "scale", "zero_point")]


def _widen(gm: fx.GraphModule, node: fx.Node, weight: Any, scale: Tensor) -> Tensor:
    """Channels whose weights vanish beside their bias, on grids that serve the bias.

    On a finer one the bias would not fit int32; without any weight, a coarse one would round it.
    """
    codes, old, zero_point = (gm.get_buffer(str(each.target)) for each in _constants(weight))
    shape = [-1] + [1] * (codes.dim() - 1)
    centred = (codes.to(torch.int32) - zero_point.reshape(shape)) * old.reshape(shape)
    info = torch.iinfo(codes.dtype)
    new = (centred / scale.reshape(shape)).round() + zero_point.reshape(shape)
    values = {
        "": new.clamp(info.min, info.max).to(codes.dtype),
        "_scale": scale,
        "_zero_point": zero_point,
    }
    name = name_of(argument(weight, "q"), "")
    set_arguments(weight, dict(enumerate(new_constants(gm, name, values, weight))))
    return scale
