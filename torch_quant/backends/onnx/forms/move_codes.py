"""Data moves as integers."""

from __future__ import annotations

from typing import Any

import torch

from torch_quant.backends.onnx.forms.matching import is_target
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR
from torch_quant.ops.table import DATA_MOVEMENT
from torch_quant.passes.base import PassContext, call_like

__all__ = ["move_codes"]

aten = torch.ops.aten


def move_codes(context: PassContext) -> int:
    """``dequantize -> move`` becomes ``move -> dequantize``, next to the product that reads it."""
    changed = 0
    for node in list(context.graph.nodes):
        real: Any = node.args[0] if node.args else None
        if node.target not in DATA_MOVEMENT or not is_target(real, DEQUANTIZE_PER_TENSOR):
            continue
        moved = call_like(node, node.target, (real.args[0], *node.args[1:]), **node.kwargs)
        new = call_like(node, DEQUANTIZE_PER_TENSOR, (moved, *real.args[1:]))
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
        changed += 1
    return changed
