"""Run the sites that fell back to bfloat16 in it: operands and weight cast, result back to float32.

x -> bfloat16 -> product -> float32
"""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.graph.sites import find_sites, is_constant, is_float, local_name, results
from torch_quant.ops.arguments import argument
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, name_of, new_constant

__all__ = ["lower_precision"]

aten = torch.ops.aten


def lower_precision(context: PassContext) -> int:
    """Cast around every site that the plan has in a lower float precision; returns how many."""
    plan = context.plan.values()
    if all(entry.quantized or entry.precision == "float32" for entry in plan):
        return 0
    changed = 0
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node, pattern, site in list(find_sites(context.graph)):
        entry = context.plan[site.name]
        if entry.quantized or entry.precision == "float32":
            continue
        dtype = getattr(torch, entry.precision)
        weight = None if pattern.weight is None else argument(node, pattern.weight)
        for arg in node.all_input_nodes:
            if _is_float(context, arg):
                if (arg, dtype) not in casts:  # several sites may read one tensor
                    casts[arg, dtype] = _cast(
                        context, node, arg, dtype, "weight" if arg is weight else "bias"
                    )
                node.replace_input_with(arg, casts[arg, dtype])
        for result in results(node):
            with context.graph.inserting_after(result):
                back = context.graph.call_function(aten.to.dtype, (result, torch.float32))
            back.meta = dict(result.meta)
            result.replace_all_uses_with(back, lambda user, back=back: user is not back)  # type: ignore[misc]
        changed += 1
    return changed


def _is_float(context: PassContext, arg: fx.Node) -> bool:
    """Constants that a pass made carry no description of their value."""
    if is_constant(arg):
        return evaluate(context.gm, arg).is_floating_point()
    return is_float(arg)


def _cast(
    context: PassContext, user: fx.Node, arg: fx.Node, dtype: torch.dtype, role: str
) -> fx.Node:
    """``arg`` in ``dtype``: a constant once and for all, another tensor at every call."""
    if is_constant(arg) and not context.live:
        cast = evaluate(context.gm, arg).detach().to(dtype)
        name = name_of(arg, f"{local_name(user)}.{role}")
        new = new_constant(context.gm, name, cast, user)
    else:
        with context.graph.inserting_before(user):
            new = context.graph.call_function(aten.to.dtype, (arg, dtype))
    new.meta |= arg.meta  # the same tensor to whoever asks: its key, its sizes
    return new
