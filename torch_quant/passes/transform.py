"""Apply the transforms that the plan names, each once, in the order that sites have them in."""

from __future__ import annotations

import torch

from torch_quant.core.methods import Transform
from torch_quant.graph.sites import find_sites
from torch_quant.passes.base import PassContext

__all__ = ["transform_sites"]


@torch.no_grad()
def transform_sites(context: PassContext) -> int:
    """Run every transform of a quantized site of the graph; returns how many sites they changed."""
    entries = (context.plan[site.name] for _, _, site in find_sites(context.graph))
    places: dict[Transform, int] = {}
    for entry in entries:
        for place, each in enumerate(entry.transforms if entry.quantized else ()):
            places[each] = max(place, places.get(each, 0))
    # Some sites may have the second only, and it must not run before the first of others.
    order = sorted(places, key=lambda each: (each.last, places[each]))
    return sum(each.apply(context) for each in order)
