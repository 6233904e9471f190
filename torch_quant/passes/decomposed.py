"""The operators that PyTorch's exporter knows, in the place of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument, arguments, positional, retarget, set_arguments
from torch_quant.ops.decomposed import decomposed
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext

__all__ = ["to_decomposed"]


def to_decomposed(context: PassContext) -> int:
    """Our quantize and dequantize as the operators that PyTorch's exporter knows."""
    ops, graph, changed = decomposed(), context.graph, 0
    for node in list(graph.nodes):
        if node.target is QUANTIZE_PER_TENSOR:
            _cut_range(node)
            x, scale, zero_point, *_, dtype = arguments(node).values()
            args = (x, scale, zero_point, *_ends(dtype), dtype)
            retarget(node, ops.quantize_per_tensor.default, args)
        elif node.target is DEQUANTIZE_PER_TENSOR:
            retarget(node, ops.dequantize_per_tensor.default, _with_range(context.gm, node))
        elif node.target is DEQUANTIZE_PER_CHANNEL:
            retarget(node, ops.dequantize_per_channel.default, _with_range(context.gm, node))
        else:
            continue
        changed += 1
    return changed


def _cut_range(node: fx.Node) -> None:
    """ONNX quantizes to all codes of the type: a narrower range is cut off before."""
    x, scale, zero_point, low, high, dtype = arguments(node).values()
    if (low, high) != _ends(dtype):
        ends = [(end - zero_point) * scale for end in (low, high)]
        with node.graph.inserting_before(node):
            cut = node.graph.call_function(torch.ops.aten.clamp.default, (x, *ends))
        set_arguments(node, {"x": cut})


def _with_range(gm: fx.GraphModule, dequantize: fx.Node) -> tuple[Any, ...]:
    """The arguments, and limits and dtype of the integers.

    They are a buffer's, or those of the quantizer behind their moves.
    """
    codes, quantize = argument(dequantize, "q"), decomposed().quantize_per_tensor.default
    while codes.op == "call_function" and codes.target is not quantize:
        codes = argument(codes, 0)
    constant = codes.op == "get_attr"
    dtype = gm.get_buffer(str(codes.target)).dtype if constant else argument(codes, "dtype")
    return (*positional(dequantize), *_ends(dtype), dtype)


def _ends(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max
