"""Divisions of sizes that round down where the dividend is negative, as ``-(-n // 4)`` has it.

PyTorch's exporter writes a division of integers, which in ONNX rounds towards zero.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import SymInt, fx

from torch_quant.passes.base import PassContext

__all__ = ["floors"]


def floors(context: PassContext) -> int:
    """Divide what leaves no rest: ``a // b = (a - a % b) / b``; returns how many were rewritten."""
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=operator.floordiv):
        dividend, divisor = node.args
        if not isinstance(dividend, fx.Node) or _is_positive(dividend.meta.get("val")):
            continue
        with context.graph.inserting_before(node):
            rest = context.graph.call_function(operator.mod, (dividend, divisor))
            whole = context.graph.call_function(operator.sub, (dividend, rest))
        node.update_arg(0, whole)
        changed += 1
    return changed


def _is_positive(value: Any) -> bool:
    """Whether it is known not to be negative."""
    if isinstance(value, SymInt):
        known = value.node.shape_env.bound_sympy(value.node.expr)
        return bool(known.lower >= 0)
    return isinstance(value, int) and value >= 0
