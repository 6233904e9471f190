"""Sums of quantized tensors are sums of integers.

dequantize + x, where x has codes       read x through its codes: an integer addition
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import is_dequantized
from torch_quant.ops.arguments import argument, arguments, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.passes.base import PassContext

__all__ = ["read_codes"]

aten = torch.ops.aten

_SUMS = frozenset({aten.add.Tensor})


def read_codes(context: PassContext) -> int:
    """Give a sum with one quantized operand the codes of the other, if it has any."""
    changed = 0
    for node in list(context.graph.nodes):
        if node.target not in _SUMS or argument(node, "alpha") != 1:
            continue
        for this, other in ((0, 1), (1, 0)):
            x = argument(node, this)
            quantizer = _quantizer_of(x, before=node)
            if quantizer is None or not is_dequantized(argument(node, other)):
                continue
            _, *grid = arguments(quantizer).values()
            with context.graph.inserting_before(node):
                real = context.graph.call_function(DEQUANTIZE, (quantizer, *grid))
            real.meta["val"] = x.meta["val"]
            set_arguments(node, {this: real})
            changed += 1
    return changed


def _quantizer_of(x: Any, before: fx.Node) -> fx.Node | None:
    """The ``quantize`` that reads the float tensor ``x`` and stands before ``before``."""
    if not isinstance(x, fx.Node) or x.target is DEQUANTIZE:
        return None
    return next((user for user in x.users if user.target is QUANTIZE and user < before), None)
