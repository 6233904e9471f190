"""Whether a graph computes rightly for every value of the Python numbers that it takes as inputs.

A number arrives as a 0-dim tensor, and ``item`` makes a number of it again, as which all code reads
it: a branch on its value fails to export. What is left to exclude is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from torch_quant.graph.sealed import ConstantRead

__all__ = ["check_numbers"]

aten = torch.ops.aten

_ELEMENTWISE = frozenset({
    "add", "clamp", "clamp_max", "clamp_min", "div", "eq", "fill", "floor_divide", "fmod", "full",
    "full_like", "ge", "gt", "le", "lt", "masked_fill", "maximum", "minimum", "mul", "ne",
    "new_full", "pow", "remainder", "rsub", "scalar_tensor", "sub", "true_divide",
})  # fmt: skip
"""Operators that may be given such a number: no pass and no backend looks at its value."""


def check_numbers(graph: fx.Graph) -> None:
    """Raise unless the graph serves every value of its numbers.

    Args:
        graph: as exported, checks included.

    Raises:
        ConstantRead: a number decides a size or a check, what is computed of one is part of the
            output, or it goes into an operator that needs to know it.
    """
    for node in _readers(graph):
        name = str(node.target)
        packet = getattr(node.target, "_overloadpacket", None)
        plain = str(packet).removeprefix("aten.").removesuffix("_")
        if node.op != "call_function" or plain not in _ELEMENTWISE:
            raise ConstantRead(f"a number is read by {name}")
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or any(map(_depends_on_data, value.shape)):
            raise ConstantRead(f"a number decides the size of {name}")


def _readers(graph: fx.Graph) -> Iterator[fx.Node]:
    """Whatever reads a number, or what Python computes from one, and is no such computation."""
    waiting = list(graph.find_nodes(op="call_function", target=aten.item.default))
    seen = set(waiting)
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "call_function" and not hasattr(user.target, "_schema"):
                waiting.append(user)
            else:
                yield user


def _depends_on_data(size: Any) -> bool:
    if not isinstance(size, SymInt):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size))
