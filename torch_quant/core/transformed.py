"""Transforms that are settled once: another graph of the model, or training, keeps them."""

from __future__ import annotations

from dataclasses import replace

from torch_quant.core.plan import QuantPlan, SitePlan

__all__ = ["transformed_as"]


def transformed_as(plan: QuantPlan, other: QuantPlan) -> QuantPlan:
    """``plan`` with the transforms of ``other``, at the sites which that quantizes.

    >>> from torch_quant import SmoothQuant
    >>> smoothed = SitePlan("query", "linear", transforms=(SmoothQuant(),))
    >>> plan = transformed_as(QuantPlan([SitePlan("query", "linear")]), QuantPlan([smoothed]))
    >>> plan["query"].transforms == smoothed.transforms
    True
    """

    def kept(site: SitePlan) -> SitePlan:
        known = other.get(site.name)
        if known is None or not known.quantized:
            return site
        return replace(site, transforms=known.transforms)

    return QuantPlan(map(kept, plan.values()), plan.float_ops)
