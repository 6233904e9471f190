"""Integers beside a real number that is computed of sizes, as real numbers themselves.

PyTorch's exporter promotes such integers by an operator that takes its number as a constant, and
fails where it is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymFloat, Tensor, fx

from torch_quant.passes.base import PassContext

__all__ = ["real_integers"]

aten = torch.ops.aten

_OPERATORS = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor,
}  # fmt: skip
"""By the name of a tensor's method."""


def real_integers(context: PassContext) -> int:
    """Make integer tensors real before arithmetic with such a number; returns how many."""
    changed = 0
    for node in list(context.graph.nodes):
        result = node.meta.get("val")
        known = node.target in _OPERATORS if node.op == "call_method" else (
            node.target in _OPERATORS.values()
        )  # fmt: skip
        if not known or not isinstance(result, Tensor) or not result.is_floating_point():
            continue
        values = [_value(each) for each in node.args[:2]]
        if not any(isinstance(value, SymFloat) for value in values):
            continue
        for place, value in enumerate(values):
            if isinstance(value, Tensor) and not value.is_floating_point():
                with context.graph.inserting_before(node):
                    real = context.graph.call_function(
                        aten.to.dtype, (node.args[place], result.dtype)
                    )
                    real.meta["val"] = value.to(result.dtype)
                node.update_arg(place, real)
                changed += 1
    return changed


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument
