"""What Inductor puts on int8 kernels."""

from __future__ import annotations

from typing import Any

from torch import fx

from torch_quant.ops.arguments import argument
from torch_quant.ops.decomposed import decomposed
from torch_quant.ops.table import OPERATORS

__all__ = ["PRODUCTS", "TARGETS", "codes_of"]

PRODUCTS = ("linear", "conv2d")
"""Operators that Inductor puts on int8 kernels.

It would take ``conv1d`` too, but believes that the result is as much longer as zeros are around it.
"""
TARGETS = {name: OPERATORS[name].targets for name in PRODUCTS}
"""Their overloads."""


def codes_of(node: fx.Node, *products: str) -> Any:
    """Of a product in a lowered graph: the node of its weight's codes; None of any other node.

    Args:
        node: of any kind.
        products: which; all of ``PRODUCTS`` by default.
    """
    if not any(node.target in TARGETS[each] for each in products or PRODUCTS):
        return None
    weight = argument(node, "weight")
    dequantized = decomposed().dequantize_per_channel.default
    return argument(weight, 0) if getattr(weight, "target", None) is dequantized else None
