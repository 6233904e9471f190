"""For runtimes whose convolutions give integers: stay on a grid, and on integers, where possible.

dequantize -> max_pool -> quantize      the pooled values lie on the grid already: keep it
dequantize + x, where x has codes       read x through its codes: an integer addition
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.ops.table import DATA_MOVEMENT
from torch_quant.passes.base import PassContext

__all__ = ["keep_grids", "read_codes"]

aten = torch.ops.aten

_SELECT = DATA_MOVEMENT | {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
}
"""Operators whose output holds some of the values of their first argument and no others."""

_SUMS = frozenset({aten.add.Tensor})


def keep_grids(context: PassContext) -> int:
    """Quantize values selected from quantized ones on the same grid, which loses nothing."""
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=QUANTIZE):
        origin = node.args[0]
        while isinstance(origin, fx.Node) and origin.target in _SELECT:
            origin = origin.args[0]
        if origin is node.args[0] or not _is_dequantized(origin):
            continue
        *grid, element = origin.args[1:]
        if element != node.args[3] or tuple(grid) == node.args[1:3]:
            continue
        for reader in (node, *_readers(node)):
            reader.args = (reader.args[0], *grid, element)
        changed += 1
    return changed


def read_codes(context: PassContext) -> int:
    """Give a sum with one quantized operand the codes of the other, if it has any."""
    changed = 0
    for node in list(context.graph.nodes):
        if node.target not in _SUMS or node.kwargs:
            continue
        for this, other in ((0, 1), (1, 0)):
            quantizer = _quantizer_of(node.args[this], before=node)
            if quantizer is None or not _is_dequantized(node.args[other]):
                continue
            x = node.args[this]
            with context.graph.inserting_before(node):
                real = context.graph.call_function(DEQUANTIZE, (quantizer, *quantizer.args[1:]))
            real.meta["val"] = x.meta["val"]
            node.update_arg(this, real)
            changed += 1
    return changed


def _is_dequantized(node: Any) -> bool:
    """Whether ``node`` dequantizes the codes of an activation."""
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and _source(node) is not None


def _source(node: fx.Node) -> fx.Node | None:
    """The ``quantize`` whose codes, moved or not, a ``dequantize`` reads."""
    codes: Any = node.args[0]
    while codes.target in DATA_MOVEMENT:
        codes = codes.args[0]
    return codes if codes.target is QUANTIZE else None


def _readers(quantizer: fx.Node) -> list[fx.Node]:
    """Every ``dequantize`` of the codes, moved or not."""
    found, todo = [], list(quantizer.users)
    while todo:
        user = todo.pop()
        if user.target is DEQUANTIZE:
            found.append(user)
        elif user.target in DATA_MOVEMENT:
            todo += user.users
    return found


def _quantizer_of(x: Any, before: fx.Node) -> fx.Node | None:
    """The ``quantize`` that reads the float tensor ``x`` and stands before ``before``."""
    if not isinstance(x, fx.Node) or x.target is DEQUANTIZE:
        return None
    return next((user for user in x.users if user.target is QUANTIZE and user < before), None)
