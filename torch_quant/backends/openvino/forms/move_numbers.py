"""The dequantizer of a product's operand stands right behind its quantizer."""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import origin_of
from torch_quant.backends.openvino.forms.readers import in_products
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext

__all__ = ["move_numbers"]


def move_numbers(context: PassContext) -> int:
    """``quantize -> move -> dequantize`` becomes ``quantize -> dequantize -> move``.

    OpenVINO makes one operator of the pair, and then moves integers. Products of two activations
    need that; linear layers don't, and OpenVINO does not roll integers.
    """
    graph, changed = context.graph, 0
    made: dict[tuple[fx.Node, tuple[object, ...]], fx.Node] = {}

    def numbers_of(codes: fx.Node, like: fx.Node) -> fx.Node:
        """What ``codes`` stand for, dequantized before they move."""
        _, *grid = arguments(like).values()
        key = (codes, tuple(grid))
        if key not in made:
            if codes.target is QUANTIZE_PER_TENSOR:
                target, args = DEQUANTIZE_PER_TENSOR, (codes, *grid)
            else:
                real = numbers_of(argument(codes, 0), like)
                target, args = codes.target, (real, *codes.args[1:])
            with graph.inserting_after(codes):
                made[key] = graph.call_function(target, args, dict(codes.kwargs))
            made[key].meta = {k: x for k, x in codes.meta.items() if k != "val"}
            if "val" in codes.meta:
                made[key].meta["val"] = codes.meta["val"].to(torch.float32)
        return made[key]

    for node in list(graph.find_nodes(op="call_function", target=DEQUANTIZE_PER_TENSOR)):
        codes = argument(node, "q")
        origin = origin_of(codes)
        if origin is codes or origin.target is not QUANTIZE_PER_TENSOR:
            continue  # it stands there already, or they are no quantizer's
        if in_products(node):
            node.replace_all_uses_with(numbers_of(codes, node))
            graph.erase_node(node)
            changed += 1
    return changed
