"""Values that are selected from quantized ones stay on their grid.

dequantize -> max_pool -> quantize      the pooled values lie on the grid already: keep it
"""

from __future__ import annotations

import torch

from torch_quant.backends.onnx.forms.matching import is_dequantized, readers_behind
from torch_quant.ops.arguments import argument, arguments, set_arguments
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
        x, *here = arguments(node).values()
        origin = x
        while origin.target in _SELECT:
            origin = argument(origin, 0)
        if origin is x or not is_dequantized(origin):
            continue
        _, *grid = arguments(origin).values()
        *_, element = here
        if element != argument(origin, "element") or grid == here:
            continue
        readers = (each for each in readers_behind(node) if each.target is DEQUANTIZE)
        for reader in (node, *readers):
            set_arguments(reader, dict(enumerate(grid, 1)))
        changed += 1
    return changed
