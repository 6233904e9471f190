"""Ranges that a file has for the sites of a model, as a migration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torch_quant.config import QConfig
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.policy import checked_capture
from torch_quant.migrate.result import Migration, Ranges, Rows
from torch_quant.quantizer import Quantizer

__all__ = ["migration_of", "sites_of"]


def sites_of(model: nn.Module, example_inputs: Any) -> QuantPlan:
    """Every site of a model captured as one graph, quantized as REFERENCE can.

    >>> import torch
    >>> [*sites_of(nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4))]
    ['0']
    """
    quantizer = Quantizer("reference", qconfig=QConfig(), capture="whole")
    return quantizer.coverage(model, example_inputs).plan


def migration_of(
    origin: str, plan: QuantPlan, ranges: Mapping[str, list[float]], rows: Rows
) -> Migration:
    """The migration of a plan that a file has decided.

    Args:
        origin: what was read.
        plan: the sites, quantized where the file has a range.
        ranges: tensor key -> the ends of its range.
        rows: the report; the sites are added to it.

    Raises:
        InvalidConfig: no site is quantized.
    """
    if not plan.quantized:
        names = ", ".join([*plan][:4])
        raise InvalidConfig(
            f"{origin}: none of its ranges is of a site of the model ({names}, ...): is it of "
            "another model?"
        )
    for name, site in plan.items():
        if site.quantized:
            ends = "; ".join(
                f"[{ranges[key][0]:.4g}, {ranges[key][1]:.4g}]"
                for key in site.inputs
                if key in ranges
            )
            rows.same(
                f"{site.op} {name}", f"{site.activation}, {ends}" if ends else "weights alone"
            )
        else:
            rows.left_out(f"{site.op} {name}", f"float: {site.reason}")
    taken = Ranges(plan, dict(ranges), checked_capture("whole"))
    return Migration(origin, QConfig(), rows=tuple(rows.found), ranges=taken)
