"""One form for products with all experts' matrices: ``grouped_linear(x, weight, ends)``.

PyTorch's ``_grouped_mm(x, W, offs)`` takes ``W`` as ``[experts, in, out]``, mostly a transposed
view of a parameter; transformers has an operator of its own where that cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.graph.sites import is_constant
from torch_quant.ops.arguments import arguments
from torch_quant.ops.experts import GROUPED_LINEAR
from torch_quant.ops.table import size_hints
from torch_quant.passes.base import PassContext, call_like

__all__ = ["normalize_experts"]

aten = torch.ops.aten
_TRANSPOSES = (aten.transpose.int, aten.swapaxes.default)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, W, where each expert's rows end) of a product with experts."""
    if node.op != "call_function":
        return None
    if node.target is aten._grouped_mm.default:
        given = arguments(node)
        if given["bias"] is not None or given["out_dtype"] not in (None, torch.float32):
            return None
        found: Any = (given["self"], given["mat2"], given["offs"])
    elif str(node.target) == "transformers.grouped_mm_fallback.default":
        given = arguments(node)
        found = tuple(given.values())[:3]
    else:
        return None
    return found if all(isinstance(each, fx.Node) for each in found) else None


def _stacked(weight: fx.Node, before: fx.Node) -> fx.Node:
    """``[experts, in, out]`` as ``[experts * out, in]``: a view of the parameter if it can be."""
    experts, inner, out = size_hints(weight)
    graph = before.graph

    def call(target: Any, x: fx.Node, *args: Any) -> fx.Node:
        new = graph.call_function(target, (x, *args))
        new.meta["val"] = target(x.meta["val"], *args)
        return new

    with graph.inserting_before(before):
        origin, axes = weight, set()
        if weight.target in _TRANSPOSES:
            origin, *dims = arguments(weight).values()
            axes = {axis % 3 for axis in dims}
        if axes != {1, 2}:
            origin = call(aten.transpose.int, weight, 1, 2)
        return call(aten.reshape.default, origin, [experts * out, inner])


def normalize_experts(context: PassContext) -> int:
    """Rewrite products with constant matrices of experts to ``grouped_linear``."""
    changed = 0
    for node in list(context.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        x, weight, ends = operands
        shapes = len(size_hints(x)), len(size_hints(weight)), len(size_hints(ends))
        if shapes != (2, 3, 1) or not is_constant(weight) or is_constant(x):
            continue
        new = call_like(node, GROUPED_LINEAR, (x, _stacked(weight, node), ends))
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
        changed += 1
    return changed
