"""oneDNN's int8 products take unsigned activations."""

from __future__ import annotations

import torch

from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext

__all__ = ["unsigned_activations"]


def unsigned_activations(context: PassContext) -> int:
    """Signed 8-bit codes as unsigned ones, 128 higher: the same numbers on another grid.

    Convolutions take no signed codes, and without AMX a linear layer of them runs on a reference
    kernel, hundreds of times slower.
    """
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=DEQUANTIZE_PER_TENSOR):
        origin, zero_point = argument(node, "q"), argument(node, "zero_point")
        while origin.op == "call_function" and origin.target is not QUANTIZE_PER_TENSOR:
            origin = argument(origin, 0)
        if origin.target is QUANTIZE_PER_TENSOR and argument(origin, "dtype") is torch.int8:
            set_arguments(node, {"zero_point": zero_point + 128})
    for node in context.graph.find_nodes(op="call_function", target=QUANTIZE_PER_TENSOR):
        if argument(node, "dtype") is torch.int8:
            moved = ("zero_point", "quant_min", "quant_max")
            values = {name: argument(node, name) + 128 for name in moved}
            set_arguments(node, values | {"dtype": torch.uint8})
            changed += 1
    return changed
