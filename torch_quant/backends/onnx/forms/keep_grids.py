"""Values that are selected from quantized ones stay on their grid.

dequantize -> max_pool -> quantize      the pooled values lie on the grid already: keep it
"""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import is_dequantized
from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.ops.table import DATA_MOVEMENT
from torch_quant.passes.base import PassContext

__all__ = ["keep_grids"]

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


def keep_grids(context: PassContext) -> int:
    """Quantize values selected from quantized ones on the same grid, which loses nothing."""
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=QUANTIZE):
        origin = node.args[0]
        while isinstance(origin, fx.Node) and origin.target in _SELECT:
            origin = origin.args[0]
        if origin is node.args[0] or not is_dequantized(origin):
            continue
        *grid, element = origin.args[1:]
        if element != node.args[3] or tuple(grid) == node.args[1:3]:
            continue
        for reader in (node, *_readers(node)):
            reader.args = (reader.args[0], *grid, element)
        changed += 1
    return changed


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
