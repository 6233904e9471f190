"""Questions that the passes of this room ask of a node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument
from torch_quant.ops.qdq import DEQUANTIZE, DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR, QUANTIZE
from torch_quant.ops.table import DATA_MOVEMENT

__all__ = ["ELEMENTWISE", "is_dequantized", "is_quantized_product", "is_target"]

aten = torch.ops.aten

ELEMENTWISE = frozenset({
    aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default, aten.tanh.default,
    aten.sigmoid.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default,
    aten.leaky_relu.default, aten.clamp.default, aten.elu.default, aten.mish.default,
})  # fmt: skip
"""Functions of one tensor that work on each element alone."""


def is_target(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def is_quantized_product(node: fx.Node) -> bool:
    weight = argument(node, 1)
    return is_target(argument(node, 0), DEQUANTIZE_PER_TENSOR) and (
        is_target(weight, DEQUANTIZE_PER_CHANNEL) or is_target(weight, DEQUANTIZE_PER_TENSOR)
    )


def is_dequantized(node: Any) -> bool:
    """Whether ``node`` dequantizes the codes of an activation."""
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and _source(node) is not None


def _source(node: fx.Node) -> fx.Node | None:
    """The ``quantize`` whose codes, moved or not, a ``dequantize`` reads."""
    codes = argument(node, "q")
    while codes.target in DATA_MOVEMENT:
        codes = argument(codes, 0)
    return codes if codes.target is QUANTIZE else None
