"""Which sites can only be in int8, or in float, together."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Hashable

from torch import fx

from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import find_sites, weights
from torch_quant.model import CapturedModel

__all__ = ["find_groups", "shared_inputs"]


def find_groups(
    captured: CapturedModel, plan: QuantPlan, share_precision: Collection[str]
) -> list[tuple[str, ...]]:
    """The quantized sites of ``plan``, each in one group, in the order they run.

    Args:
        captured: the model.
        plan: which sites are quantized.
        share_precision: what must not be shared between int8 and float: ``"weight"``, ``"input"``.
    """
    leader = {name: name for name in plan.quantized}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    order = {name: i for i, name in enumerate(leader)}
    for names in _sharing(captured, plan, share_precision).values():
        for name in names[1:]:
            first, second = sorted((find(names[0]), find(name)), key=order.__getitem__)
            leader[second] = first
    groups: dict[str, list[str]] = defaultdict(list)
    for name in leader:
        groups[find(name)].append(name)
    return [tuple(names) for names in groups.values()]


def _sharing(
    captured: CapturedModel, plan: QuantPlan, share_precision: Collection[str]
) -> dict[Hashable, list[str]]:
    """Shared thing -> the quantized sites that share it."""
    sharing: dict[Hashable, list[str]] = defaultdict(list)
    quantized = set(plan.quantized)
    for prepared in captured.graphs():
        for node, pattern, site in find_sites(prepared.canonical.graph):
            if site.name not in quantized:
                continue
            things: list[Hashable] = []
            if "weight" in share_precision:
                things += [_parameter(prepared.canonical, each) for each in weights(node, pattern)]
            if "input" in share_precision:
                things += site.inputs
            for thing in things:
                if site.name not in sharing[thing]:
                    sharing[thing].append(site.name)
    return sharing


def shared_inputs(plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """Site -> the other quantized sites that read one of its quantized tensors."""
    readers: dict[str, list[str]] = defaultdict(list)
    for name in plan.quantized:
        for key in plan[name].inputs:
            readers[key].append(name)
    return {
        name: tuple(
            dict.fromkeys(o for key in plan[name].inputs for o in readers[key] if o != name)
        )
        for name in plan.quantized
    }


def _parameter(gm: fx.GraphModule, weight: fx.Node) -> int:
    """Identity of the largest tensor that a constant expression reads."""
    if weight.op == "get_attr":
        return id(operator.attrgetter(str(weight.target))(gm))
    stack, found = [weight], []
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            found.append(operator.attrgetter(str(node.target))(gm))
        stack += node.all_input_nodes
    return id(max(found, key=lambda x: int(x.numel())))
