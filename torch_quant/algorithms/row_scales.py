"""Attention's probabilities on a scale for each row, which costs nothing.

One scale for all probabilities has to reach 1, and rows that look at many keys have small ones.
With

    P = E / sum(E),  E = exp(S - max(S)),

each over a row of scores ``S``, the largest number of a row of ``E`` is 1. So codes of ``E`` on one
grid are those of ``P`` on a grid for each row, from 0 to its largest, and the division by the sum
becomes one of the rows of ``E V``. That is how Zhang et al. round probabilities in "SageAttention:
Accurate 8-Bit Attention for Plug-and-play Inference Acceleration", 2025, section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch_quant.core.methods import Transform, register_transform
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import Site
from torch_quant.passes.base import Params, PassContext

__all__ = ["RowScales"]


@register_transform
@dataclass(frozen=True)
class RowScales(Transform):
    """Round attention's probabilities on a scale for each row, in place of one for all.

    It serves ``scaled_dot_product_attention`` in static integers, on ONEDNN and REFERENCE; kernels
    of others take one scale. So do formats whose scales are powers of two. Models that are trained
    have one scale, too, which is trained.

    >>> RowScales().to_dict()
    {'name': 'row_scales'}
    """

    name = "row_scales"
    changes_input = False
    row_scales = True

    def refusal(self, site: Site) -> str:
        if site.op == "scaled_dot_product_attention":
            return ""
        return "only attention has probabilities"

    @property
    def optional(self) -> bool:
        return True

    @property
    def condition(self) -> str:
        return "only where the kernel has scales for rows, and in no model that is trained"

    def settled(self, plan: QuantPlan, params: Params) -> Mapping[str, Transform | None]:
        """At each site that has it, itself.

        >>> from torch_quant.passes.base import NoParams
        >>> RowScales().settled(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        return {name: self for name in plan.quantized if self in plan[name].transforms}

    def apply(self, context: PassContext) -> int:
        """Change nothing: where attention is quantized, its plan is asked.

        >>> from torch import fx, nn
        >>> RowScales().apply(PassContext(fx.symbolic_trace(nn.ReLU())))
        0
        """
        return 0
