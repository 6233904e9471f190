"""Operators that compute each row of a tensor by itself, so that its rank does not matter."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import (
    CHOOSE_QPARAMS,
    DEQUANTIZE_PER_TENSOR,
    FAKE_QUANTIZE,
    QUANTIZE,
    QUANTIZE_PER_TENSOR,
)

__all__ = ["computes_rows", "register_row_operator"]

aten = torch.ops.aten

_ROWS: dict[Any, int] = {
    aten.linear.default: 0, aten.embedding.default: 1,
    QUANTIZE_PER_TENSOR: 0, DEQUANTIZE_PER_TENSOR: 0,
}  # fmt: skip
"""Operator -> the argument whose rows, or numbers, it computes one by one."""
_ROUNDING = (QUANTIZE, FAKE_QUANTIZE)


def register_row_operator(target: Any, position: int) -> None:
    """Make an operator known that computes the rows of its argument at ``position`` one by one."""
    _ROWS[target] = position


def computes_rows(body: fx.GraphModule) -> bool:
    """Whether a graph gives, for one tensor of any rank, what it gives for its rows.

    >>> graph = fx.Graph()
    >>> x, weight = graph.placeholder("x"), graph.get_attr("weight")
    >>> _ = graph.output(graph.call_function(aten.linear.default, (x, weight)))
    >>> computes_rows(fx.GraphModule({"weight": torch.ones(2, 4)}, graph))
    True
    """
    given = list(body.graph.find_nodes(op="placeholder"))
    if len(given) != 1:
        return False
    of_rows = set(given)
    for node in body.graph.nodes:
        if node.op != "call_function" or not of_rows & set(node.all_input_nodes):
            continue
        if not _by_rows(body, node, of_rows):
            return False
        of_rows.add(node)
    return True


def _by_rows(body: fx.GraphModule, node: fx.Node, of_rows: set[fx.Node]) -> bool:
    """Whether a node computes rows, given which others do."""
    if node.target in _ROUNDING:
        scale = argument(node, "scale")
        return scale in of_rows or body.get_buffer(str(scale.target)).dim() == 0
    if node.target is CHOOSE_QPARAMS:
        return bool(argument(node, "granularity") != "per_tensor")
    if node.target is operator.getitem:  # scale and zero point
        return True
    position = _ROWS.get(node.target)
    given = enumerate(arguments(node).values() if position is not None else ())
    return [i for i, x in given if isinstance(x, fx.Node) and x in of_rows] == [position]
