"""Residual sums behind linear layers, which Inductor would fuse into the product.

oneDNN has no kernel for that where the other summand lies in memory the other way round, as behind
a transposition: its reference takes 40 ms for what two operators do in one. Where it does is not
known before.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from torch_quant.backends.inductor.products import codes_of
from torch_quant.ops.arguments import argument, retarget
from torch_quant.passes.base import PassContext

__all__ = ["sums_apart"]

aten = torch.ops.aten


def sums_apart(context: PassContext) -> int:
    """``x + linear(y)`` as ``x - (-linear(y))``: the same bits, in one loop, and no fused sum."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        x, y = argument(node, "self"), argument(node, "other")
        if argument(node, "alpha") != 1 or not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            continue
        if codes_of(x, "linear") is not None:
            x, y = y, x
        value = x.meta.get("val")
        if codes_of(y, "linear") is None or not isinstance(value, Tensor):
            continue
        with context.graph.inserting_before(node):
            if not value.is_floating_point():  # as a sum does; of masks there is no difference
                x = context.graph.call_function(aten.to.dtype, (x, torch.float32))
            negative = context.graph.call_function(aten.neg.default, (y,))
        retarget(node, aten.sub.Tensor, (x, negative))
        changed += 1
    return changed
