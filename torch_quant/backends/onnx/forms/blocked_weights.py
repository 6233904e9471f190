"""Weights in blocks under float activations, in the form that ONNX runtimes match on.

    linear(x, dequantize(codes), bias)  ->  matmul(x, permute(onnx_weight(codes))) + bias

``onnx_weight`` computes what ``dequantize`` does and has a form in ONNX (``program/weights.py``).
Runtimes have kernels for blocks of 16 inputs or a larger power of two. Where a scale serves others,
it is repeated: the numbers stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.elements import element_type
from torch_quant.core.functional import dequantize_blocks
from torch_quant.graph.sites import KEY
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import DEQUANTIZE
from torch_quant.passes.base import PassContext, call_like
from torch_quant.passes.constants import constant_beside

__all__ = ["LEAST", "ONNX_WEIGHT", "blocked_weights"]

aten = torch.ops.aten

LEAST, LARGEST = 16, 128
"""Inputs of a block that runtimes have kernels for, and of one that is made from larger ones."""


def _onnx_weight(q: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
    return dequantize_blocks(q, scale, zero_point, element_type(element))


ONNX_WEIGHT = define_operator(
    "onnx_weight(Tensor q, Tensor scale, Tensor zero_point, str element) -> Tensor",
    _onnx_weight,
    lambda q, scale, zero_point, element: torch.empty_like(q, dtype=torch.float32),
)


def blocked_weights(context: PassContext) -> int:
    """Rewrite linear layers whose weight alone is quantized; returns how many."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.linear.default)):
        x, weight, bias = arguments(node).values()
        if _dequantizes(x) or not _dequantizes(weight) or argument(weight, "q").op != "get_attr":
            continue
        product = _product(context.gm, node, x, weight)
        if bias is not None:
            with context.graph.inserting_before(node):
                total = context.graph.call_function(aten.add.Tensor, (product, bias))
            total.meta = {key: value for key, value in node.meta.items() if key != KEY}
            node.replace_all_uses_with(total)
        else:
            node.replace_all_uses_with(product)
        context.graph.erase_node(node)
        if not weight.users:
            context.graph.erase_node(weight)  # of an int8 kernel, it would have another form
        changed += 1
    return changed


def _dequantizes(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE


def _product(gm: fx.GraphModule, node: fx.Node, x: Any, weight: Any) -> fx.Node:
    codes, scale, zero_point, element = arguments(weight).values()
    inputs = gm.get_buffer(str(codes.target)).shape[1]
    grid = [gm.get_buffer(str(each.target)) for each in (scale, zero_point)]
    times = _times(inputs // grid[0].shape[1])
    # Of its own: a table of embeddings that is the same tensor has its scales in another form.
    endings = ("_scale_blocks", "_zero_point_blocks")
    scale, zero_point = (
        constant_beside(gm, codes, ending, each.repeat_interleave(times, 1), node)
        for ending, each in zip(endings, grid, strict=True)
    )
    with node.graph.inserting_before(node):
        args: Any = (codes, scale, zero_point, element)
        real = node.graph.call_function(ONNX_WEIGHT, args)
        turned = node.graph.call_function(aten.permute.default, (real, [1, 0]))
    return call_like(node, aten.matmul.default, (x, turned))


def _times(size: int) -> int:
    """How many blocks that runtimes have kernels for make one of ``size`` inputs."""
    block = size & -size  # the largest power of two that divides it
    if block < LEAST:
        return 1
    return size // (block if block == size else min(block, LARGEST))
