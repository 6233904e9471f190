"""The operators of a quantized graph before a backend lowers it: quantize, dequantize, by name.

They are patterns to match; each backend puts its own form in their place. They also compute, by the
definition in ``core/functional.py``, so that an unlowered graph can be run and compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEQUANTIZE", "DEQUANTIZE_CHANNEL", "FAKE_QUANTIZE", "QUANTIZE", "library"]

library = torch.library.Library("torch_quant", "DEF")
library.define(
    "quantize(Tensor x, float scale, int zero_point, int quant_min, int quant_max, "
    "ScalarType dtype) -> Tensor"
)
library.define("dequantize(Tensor q, float scale, int zero_point) -> Tensor")
library.define(
    "fake_quantize(Tensor x, float scale, int zero_point, int quant_min, int quant_max) -> Tensor"
)
library.define("dequantize_channel(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")


def _quantize(
    x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    return ((x / scale).round() + zero_point).clamp(low, high).to(dtype)


def _fake_quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)


def _dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return (q.to(torch.int32) - zero_point).to(torch.float32) * scale


def _dequantize_channel(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    shape = [1] * q.dim()
    shape[axis] = -1
    centred = q.to(torch.int32) - zero_point.reshape(shape)
    return centred.to(torch.float32) * scale.reshape(shape)


for _name, _impl in (
    ("quantize", _quantize),
    ("dequantize", _dequantize),
    ("fake_quantize", _fake_quantize),
    ("dequantize_channel", _dequantize_channel),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
# ATen's own operator has no meta kernel, which exporting with dynamic sizes needs.
torch.library.register_fake(
    "torch_quant::fake_quantize", lambda x, *args: torch.empty_like(x), lib=library
)

QUANTIZE = torch.ops.torch_quant.quantize.default
DEQUANTIZE = torch.ops.torch_quant.dequantize.default
DEQUANTIZE_CHANNEL = torch.ops.torch_quant.dequantize_channel.default
FAKE_QUANTIZE = torch.ops.torch_quant.fake_quantize.default
