"""A quantized linear layer is a two-dimensional product with an int32 bias, ONNX' Gemm."""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.onnx.forms.biases import bias_codes
from torch_quant.backends.onnx.forms.matching import is_quantized_product
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.ops.table import size_hints
from torch_quant.passes.base import PassContext

__all__ = ["linear_forms_2d"]

aten = torch.ops.aten

_ELEMENTWISE = frozenset({
    aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default, aten.tanh.default,
    aten.sigmoid.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default,
    aten.leaky_relu.default, aten.clamp.default, aten.elu.default, aten.mish.default,
})  # fmt: skip


def linear_forms_2d(context: PassContext) -> int:
    """Quantized ``linear`` of 2-D tensors, ONNX' Gemm; what follows is kept 2-D if it can be."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.linear.default)):
        if is_quantized_product(node):
            _rewrite(context.gm, node)
            changed += 1
    return changed


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
    graph, rank = node.graph, len(size_hints(node.args[0]))
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    outputs, inputs = gm.get_buffer(str(weight.args[0].target)).shape  # type: ignore[union-attr]
    if bias is not None:
        bias = bias_codes(gm, node, x, weight, bias)
    with graph.inserting_before(node):
        source = x.args[0]
        sizes = [graph.call_function(aten.sym_size.int, (source, i)) for i in range(rank - 1)]
        if rank != 2:
            source = graph.call_function(aten.reshape.default, (source, [-1, inputs]))
        rows = graph.call_function(DEQUANTIZE_PER_TENSOR, (source, *x.args[1:]))
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
        if last.target not in _ELEMENTWISE:
            return node
    return node
