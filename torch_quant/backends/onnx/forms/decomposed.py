"""The operators that PyTorch's exporter knows, in the place of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

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
            node.target = ops.quantize_per_tensor.default
            info = torch.iinfo(node.args[5])
            node.args = (*node.args[:3], info.min, info.max, node.args[5])
        elif node.target is DEQUANTIZE_PER_TENSOR:
            node.target = ops.dequantize_per_tensor.default
            node.args = (*node.args, *_full_range(context.gm, node.args[0]))
        elif node.target is DEQUANTIZE_PER_CHANNEL:
            node.target = ops.dequantize_per_channel.default
            node.args = (*node.args, *_full_range(context.gm, node.args[0]))
        else:
            continue
        changed += 1
    return changed


def _cut_range(node: fx.Node) -> None:
    """ONNX quantizes to all codes of the type: a narrower range is cut off before."""
    x, scale, zero_point, low, high, dtype = node.args
    info = torch.iinfo(dtype)  # type: ignore[arg-type]
    if (low, high) != (info.min, info.max):
        ends = [(end - zero_point) * scale for end in (low, high)]  # type: ignore[operator]
        with node.graph.inserting_before(node):
            cut = node.graph.call_function(torch.ops.aten.clamp.default, (x, *ends))
        node.update_arg(0, cut)


def _full_range(gm: fx.GraphModule, codes: Any) -> tuple[int, int, torch.dtype]:
    """Limits and dtype of integers: a buffer's, or those of the quantizer behind their moves."""
    quantize = decomposed().quantize_per_tensor.default
    while codes.op == "call_function" and codes.target is not quantize:
        codes = codes.args[0]
    dtype = gm.get_buffer(str(codes.target)).dtype if codes.op == "get_attr" else codes.args[5]
    info = torch.iinfo(dtype)
    return info.min, info.max, dtype
