"""Apply the transforms that the plan names, each once, in the order that sites have them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from torch_quant.core.methods import Transform
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import Site, find_sites
from torch_quant.ops.table import OpPattern
from torch_quant.passes.base import PassContext

__all__ = ["sites_with", "transform_sites"]


def sites_with(
    transform: Transform, plan: QuantPlan, graphs: Iterable[fx.GraphModule]
) -> Iterator[tuple[fx.GraphModule, fx.Node, OpPattern, Site]]:
    """Every quantized site whose plan has ``transform``: its graph, node, row and description."""
    for gm in graphs:
        for node, pattern, site in list(find_sites(gm.graph)):
            entry = plan.get(site.name)
            if entry is not None and entry.quantized and transform in entry.transforms:
                yield gm, node, pattern, site


@torch.no_grad()
def transform_sites(context: PassContext) -> int:
    """Run every transform of a quantized site of the graph; returns how many sites they changed."""
    if not any(entry.transforms for entry in context.plan.values()):
        return 0
    entries = (context.plan[site.name] for _, _, site in find_sites(context.graph))
    places: dict[Transform, int] = {}
    for entry in entries:
        for place, each in enumerate(entry.transforms if entry.quantized else ()):
            places[each] = max(place, places.get(each, 0))
    # Some sites may have the second only, and it must not run before the first of others.
    order = sorted(places, key=lambda each: (each.last, places[each]))
    return sum(each.apply(context) for each in order)
