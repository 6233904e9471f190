"""What int8 kernels ask for on every runtime: a weight's format, and instructions of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.core.spec import QuantSpec
from torch_quant.ops.arguments import argument
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR

__all__ = ["has_vnni", "int8_weight", "is_quantized_product", "symmetric_weight"]


def has_vnni() -> bool:
    """Whether u8 x s8 products accumulate in 32 bits; else pairs saturate at 16."""
    return bool(torch.cpu._is_vnni_supported())


def symmetric_weight(bits: int = 8) -> QuantSpec:
    """Signed, per-channel, zero point 0: the weight format of every int8 kernel."""
    return QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)


def int8_weight(node: fx.Node) -> tuple[Any, Any] | None:
    """Codes and scale of the argument ``weight`` of a call, None where it is not int8."""
    weight = argument(node, "weight")
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_PER_CHANNEL:
        return None
    return argument(weight, "q"), argument(weight, "scale")


def is_quantized_product(node: fx.Node) -> bool:
    """Whether the first two arguments of a call dequantize: an activation, and a weight."""
    x, weight = (getattr(argument(node, i), "target", None) for i in (0, 1))
    return x is DEQUANTIZE_PER_TENSOR and weight in (DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR)
