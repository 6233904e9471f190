"""Divide the channels of a linear layer's input by factors, and multiply its weight by them.

x -> mul(1 / factor) -> linear(weight * factor)

In float this changes nothing but the last digit; behind it both sides are easier to quantize.
Layers that read one tensor share the multiplication. The weight's product is an expression in the
graph, which is evaluated when the weight is quantized, so only one of them takes memory at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from torch_quant.graph.sites import KEY, find_sites, local_name
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, expression, name_of, new_constant

__all__ = ["smooth_inputs", "smoothed_key"]


def smoothed_key(key: str, alpha: float) -> str:
    """The key of a tensor behind the multiplication."""
    return f"{key}[smooth={alpha:g}]"


@torch.no_grad()
def smooth_inputs(context: PassContext) -> int:
    """Smooth every site that the plan smooths; returns how many."""
    changed = 0
    smoothed: dict[tuple[fx.Node, str], fx.Node] = {}
    factors: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for node, _, site in list(find_sites(context.graph)):
        entry = context.plan[site.name]
        if not entry.quantized or entry.smooth is None:
            continue
        x, weight = node.args[:2]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        key = smoothed_key(site.inputs[0], entry.smooth)
        # Raises for a site that cannot be smoothed.
        factor = context.params.factor(entry, site.inputs[0])
        factor = factors.setdefault(key, factor)
        local = local_name(node)
        if (x, key) not in smoothed:
            inverse = new_constant(context.gm, f"{local}.smooth_inverse", 1 / factor, node)
            inverse.meta["val"] = 1 / factor
            with context.graph.inserting_before(node):
                mul = context.graph.call_function(torch.ops.aten.mul.Tensor, (x, inverse))
            mul.meta = {**x.meta, KEY: key}
            smoothed[x, key] = mul
        columns = new_constant(context.gm, f"{local}.smooth_factor", factor, node)
        with context.graph.inserting_before(node):
            scaled = context.graph.call_function(torch.ops.aten.mul.Tensor, (weight, columns))
        scaled.meta = {k: v for k, v in weight.meta.items() if k == "val"}
        if entry.weight is None:  # it stays in float: computed once and for all
            product = expression(context.gm, scaled)
            if product not in floats:
                floats[product] = evaluate(context.gm, scaled)
            name = name_of(weight, f"{local}.weight")
            scaled = new_constant(context.gm, name, floats[product], node)
            scaled.meta |= {k: v for k, v in weight.meta.items() if k == "val"}
        node.update_arg(0, smoothed[x, key])
        node.update_arg(1, scaled)
        changed += 1
    return changed
