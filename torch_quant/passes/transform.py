"""Apply the transforms that the plan names, each once, in the order that sites have them in."""

from __future__ import annotations

import torch

from torch_quant.graph.sites import find_sites
from torch_quant.passes.base import PassContext

__all__ = ["transform_sites"]


@torch.no_grad()
def transform_sites(context: PassContext) -> int:
    """Run every transform of a quantized site of the graph; returns how many sites they changed."""
    entries = (context.plan[site.name] for _, _, site in find_sites(context.graph))
    found = dict.fromkeys(each for entry in entries if entry.quantized for each in entry.transforms)
    return sum(each.apply(context) for each in found)
