"""One form for every product with a constant matrix: ``linear(x, weight, bias)``.

``addmm(b, x, W)``, ``mm(x, W)`` and ``matmul(x, W)`` with a constant ``W`` of shape ``[in, out]``
equal ``linear(x, W.T, b)``. The transposed weight is a constant expression, computed once when
lowering.
"""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.graph.sites import is_constant
from torch_quant.ops.arguments import arguments
from torch_quant.ops.table import size_hints
from torch_quant.passes.base import PassContext, call_like

__all__ = ["normalize_linear"]

aten = torch.ops.aten


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node] | None:
    """(bias, x, W) of a product that may be a linear layer."""
    if node.target is aten.addmm.default:
        bias, x, weight, beta, alpha = arguments(node).values()
        if (beta, alpha) != (1, 1):
            return None
    elif node.target in (aten.mm.default, aten.matmul.default):
        bias, (x, weight) = None, arguments(node).values()
    else:
        return None
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)):
        return None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    return bias, x, weight


def normalize_linear(context: PassContext) -> int:
    """Rewrite products with a constant two-dimensional right side to ``aten.linear``."""
    changed = 0
    for node in list(context.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        bias, x, weight = operands
        if len(size_hints(weight)) != 2 or not is_constant(weight) or is_constant(x):
            continue
        fits = bias is None or (len(size_hints(bias)) == 1 and is_constant(bias))
        with context.graph.inserting_before(node):
            transposed = context.graph.call_function(aten.t.default, (weight,))
        transposed.meta["val"] = weight.meta["val"].t()
        linear = call_like(node, aten.linear.default, (x, transposed, bias if fits else None))
        result = linear if fits else call_like(node, aten.add.Tensor, (linear, bias))
        node.replace_all_uses_with(result)
        context.graph.erase_node(node)
        changed += 1
    return changed
