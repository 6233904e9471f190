"""The codes of a constant weight: rounded once for all that asks for them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from torch_quant.core.memory import give_back_behind
from torch_quant.core.plan import SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.ops.arguments import argument
from torch_quant.ops.table import OpPattern
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, expression

__all__ = ["rounded_weight"]


@torch.no_grad()
def rounded_weight(
    context: PassContext,
    node: fx.Node,
    pattern: OpPattern,
    site: SitePlan,
    value: Tensor | None = None,
) -> tuple[Tensor, QParams]:
    """Codes of the weight that a site reads, with their grid.

    Args:
        context: remembers them.
        node: the call.
        pattern: its row in the op table; it has a weight.
        site: what is done with it; the weight is quantized.
        value: the weight in float, where the caller has evaluated it.
    """
    assert pattern.weight is not None
    assert site.weight is not None
    old, axis, method = argument(node, pattern.weight), pattern.weight_axis, site.method
    data = method is not None and (method.wants_statistics or method.wants_blocks)
    scaled = any(each.wants_blocks for each in site.transforms)
    alone = site.name if data or scaled else ""
    memo = (expression(context.gm, old), site.weight, axis, method, alone)
    if memo not in context.weights:
        value = evaluate(context.gm, old).detach() if value is None else value
        codes, qparams = context.params.weight(site.name, value, site.weight, axis)
        context.weights[memo] = codes.contiguous(), qparams  # as kernels pack it
        give_back_behind(codes)
    return context.weights[memo]
