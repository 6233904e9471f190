"""An embedding gathers integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.graph.sites import KEY
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext, call_like
from torch_quant.passes.constants import constant_beside

__all__ = ["embedding_forms"]

aten = torch.ops.aten


def embedding_forms(context: PassContext) -> int:
    """Gather integers and their scales; dequantizing the whole table would cost more than all."""
    changed, gm = 0, context.gm
    for node in context.graph.find_nodes(op="call_function", target=aten.embedding.default):
        weight, indices = argument(node, "weight"), argument(node, "indices")
        if weight.target is DEQUANTIZE_PER_TENSOR:
            codes, *grid = arguments(weight).values()
            rows = call_like(node, aten.embedding.default, (codes, indices))
            real = call_like(node, DEQUANTIZE_PER_TENSOR, (rows, *grid))
        elif weight.target is DEQUANTIZE_PER_CHANNEL:
            codes, *grid, _ = arguments(weight).values()
            rows = call_like(node, aten.embedding.default, (codes, indices))
            real = call_like(node, aten.to.dtype, (rows, torch.float32))
            scale, zero_point = (gm.get_buffer(str(each.target)) for each in grid)
            if bool(zero_point.any()):
                centre = zero_point.to(torch.float32).unsqueeze(-1)
                real = _with_rows(gm, node, aten.sub.Tensor, real, "_zero_point_rows", centre)
            real = _with_rows(gm, node, aten.mul.Tensor, real, "_scale_rows", scale.unsqueeze(-1))
        else:
            continue
        node.replace_all_uses_with(real)
        context.graph.erase_node(node)
        changed += 1
    return changed


def _with_rows(
    gm: fx.GraphModule, node: fx.Node, target: Any, x: fx.Node, ending: str, column: Tensor
) -> fx.Node:
    codes = argument(argument(node, "weight"), "q")
    table = constant_beside(gm, codes, ending, column, node)
    rows = call_like(node, aten.embedding.default, (table, argument(node, "indices")))
    rows.meta.pop(KEY, None)
    return call_like(node, target, (x, rows))
