"""Values of constant expressions, and buffers that take their place in a graph."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["evaluate", "expression", "new_constant"]


@torch.no_grad()
def evaluate(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a constant node: a parameter, or an expression over parameters and buffers.

    Returns:
        The very parameter for a plain reference, else a new tensor.
    """
    if node.op == "get_attr":
        value: Tensor = operator.attrgetter(str(node.target))(gm)
        return value
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: evaluate(gm, n))
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def expression(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a constant node computes, as text: the same for the same operators on the same tensors.

    It holds no tensor, so it can be remembered where the value would take memory. It is valid as
    long as ``gm`` holds the tensors.
    """
    if node.op == "get_attr":
        return f"tensor {id(operator.attrgetter(str(node.target))(gm))}"
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: expression(gm, n))
    return f"{node.target!r} {args!r} {kwargs!r}"


def new_constant(gm: fx.GraphModule, name: str, value: Any, before: fx.Node) -> fx.Node:
    """Register a buffer and return the node that reads it, placed before ``before``.

    Args:
        name: a site's name and role; made unique if another tensor has it.
    """
    base = re.sub(r"\W", "_", name).strip("_")
    unique, count = base, 0
    while hasattr(gm, unique):
        if getattr(gm, unique) is value:
            break
        count += 1
        unique = f"{base}_{count}"
    else:
        gm.register_buffer(unique, value)
    with before.graph.inserting_before(before):
        return before.graph.get_attr(unique)
