"""Weights that several products read."""

from __future__ import annotations

from typing import Any

from torch import fx

from torch_quant.backends.inductor.products import TARGETS
from torch_quant.backends.int8 import int8_weight
from torch_quant.ops.arguments import argument, arguments, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import constant_beside

__all__ = ["scales_apart"]

_PRODUCTS = {target for targets in TARGETS.values() for target in targets}


def scales_apart(context: PassContext) -> int:
    """Another copy of the scales for each further product with one weight, as a layer called twice.

    Inductor makes one of equal dequantized weights, and fuses none that two products read.
    """
    changed, seen = 0, set[str]()
    for node in list(context.graph.nodes):
        known = int8_weight(node) if node.target in _PRODUCTS else None
        if known is None:
            continue
        codes = str(known[0].target)
        if codes in seen:
            _apart(context.gm, node)
            changed += 1
        seen.add(codes)
    return changed


def _apart(gm: fx.GraphModule, node: fx.Node) -> None:
    weight: Any = argument(node, "weight")
    codes, scale, *rest = arguments(weight).values()
    copy = constant_beside(gm, codes, "_scale", gm.get_buffer(str(scale.target)).clone(), node)
    with node.graph.inserting_before(node):
        again = node.graph.call_function(DEQUANTIZE_PER_CHANNEL, (codes, copy, *rest))
    again.meta = dict(weight.meta)
    set_arguments(node, {"weight": again})
