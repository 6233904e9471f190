"""Data moves as integers."""

from __future__ import annotations

import torch

from torch_quant.backends.onnx.forms.matching import is_target
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR
from torch_quant.ops.table import DATA_MOVEMENT
from torch_quant.passes.base import PassContext, call_again, call_like

__all__ = ["move_codes"]

aten = torch.ops.aten


def move_codes(context: PassContext) -> int:
    """``dequantize -> move`` becomes ``move -> dequantize``, next to the product that reads it."""
    changed = 0
    for node in list(context.graph.nodes):
        if node.target not in DATA_MOVEMENT:
            continue
        real = argument(node, 0)
        if not is_target(real, DEQUANTIZE_PER_TENSOR):
            continue
        codes, *grid = arguments(real).values()
        moved = call_again(node, {0: codes})
        new = call_like(node, DEQUANTIZE_PER_TENSOR, (moved, *grid))
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
        changed += 1
    return changed
