"""A quantized linear layer is a two-dimensional product, ONNX' Gemm."""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.int8 import is_quantized_product
from torch_quant.backends.onnx.forms.matching import ELEMENTWISE, free_ranks
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.ops.table import size_hints
from torch_quant.passes.base import PassContext

__all__ = ["linear_forms_2d"]

aten = torch.ops.aten


def linear_forms_2d(context: PassContext) -> int:
    """Quantized ``linear`` of 2-D tensors, ONNX' Gemm; what follows is kept 2-D if it can be.

    Those of tensors whose rank depends on sizes stay as they are.
    """
    changed, unknown = 0, free_ranks(context.graph)
    for node in list(context.graph.find_nodes(op="call_function", target=aten.linear.default)):
        if is_quantized_product(node) and node not in unknown:
            _rewrite(context.gm, node)
            changed += 1
    return changed


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
    graph, (x, weight, bias) = node.graph, arguments(node).values()
    rank = len(size_hints(x))
    outputs, inputs = gm.get_buffer(str(argument(weight, "q").target)).shape
    with graph.inserting_before(node):
        source, *grid = arguments(x).values()
        sizes = [graph.call_function(aten.sym_size.int, (source, i)) for i in range(rank - 1)]
        if rank != 2:
            source = graph.call_function(aten.reshape.default, (source, [-1, inputs]))
        rows = graph.call_function(DEQUANTIZE_PER_TENSOR, (source, *grid))
        product = graph.call_function(aten.linear.default, (rows, weight, bias))
    product.meta = dict(node.meta)
    last = _chain_to_quantize(node) if rank != 2 else node
    node.replace_all_uses_with(product)
    if rank != 2:
        last = product if last is node else last
        with graph.inserting_after(last):
            shaped = graph.call_function(aten.reshape.default, (last, [*sizes, outputs]))
        shaped.meta = {"val": last.meta["val"]} if "val" in last.meta else {}
        last.replace_all_uses_with(shaped, delete_user_cb=lambda user: user is not shaped)
    graph.erase_node(node)


def _chain_to_quantize(node: fx.Node) -> fx.Node:
    """The quantizer behind ``node`` and at most one element-wise function, or ``node``."""
    last = node
    for _ in range(2):
        if len(last.users) != 1:
            return node
        last = next(iter(last.users))
        if last.target is QUANTIZE_PER_TENSOR:
            return last
        if last.target not in ELEMENTWISE:
            return node
    return node
