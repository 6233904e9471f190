"""The operators of a quantized graph before a backend lowers it: quantize, dequantize, by name.

They are patterns to match; each backend puts its own form in their place. They also compute, by the
definition in ``core/functional.py``, so that an unlowered graph can be run and compared.

Those that end in ``blocks`` serve any format: the element type goes by its name, and scales are
tensors in the shape of the blocks' grid. The others are what int8 kernels are matched by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_quant.core import functional
from torch_quant.core.elements import ElementType, element_type

__all__ = [
    "DECODE",
    "DEQUANTIZE",
    "DEQUANTIZE_BLOCKS",
    "DEQUANTIZE_CHANNEL",
    "FAKE_QUANTIZE",
    "FAKE_QUANTIZE_BLOCKS",
    "QUANTIZE",
    "QUANTIZE_BLOCKS",
    "library",
]

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
for _name in ("quantize_blocks", "dequantize_blocks", "fake_quantize_blocks"):
    library.define(f"{_name}(Tensor x, Tensor scale, Tensor zero_point, str element) -> Tensor")
library.define("decode(Tensor q, str element) -> Tensor")


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


def _by_name(
    function: Callable[[Tensor, Tensor, Tensor, ElementType], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, str], Tensor]:
    def of_blocks(x: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
        return function(x, scale, zero_point, element_type(element))

    return of_blocks


def _decode(q: Tensor, element: str) -> Tensor:
    values = element_type(element).decode(q)
    return values.clone() if values is q else values


for _name, _impl in (
    ("quantize", _quantize),
    ("dequantize", _dequantize),
    ("fake_quantize", _fake_quantize),
    ("dequantize_channel", _dequantize_channel),
    ("quantize_blocks", _by_name(functional.quantize_blocks)),
    ("dequantize_blocks", _by_name(functional.dequantize_blocks)),
    ("fake_quantize_blocks", _by_name(functional.fake_quantize_blocks)),
    ("decode", _decode),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
# ATen's own operator has no meta kernel, which exporting with dynamic sizes needs.
torch.library.register_fake(
    "torch_quant::fake_quantize", lambda x, *args: torch.empty_like(x), lib=library
)
# Of the sizes of blocks nothing need be known while exporting.
for _name in ("dequantize_blocks", "fake_quantize_blocks", "decode"):
    torch.library.register_fake(
        f"torch_quant::{_name}",
        lambda x, *args: torch.empty_like(x, dtype=torch.float32),
        lib=library,
    )
torch.library.register_fake(
    "torch_quant::quantize_blocks",
    lambda x, scale, zero_point, element: torch.empty_like(x, dtype=element_type(element).dtype),
    lib=library,
)

QUANTIZE = torch.ops.torch_quant.quantize.default
DEQUANTIZE = torch.ops.torch_quant.dequantize.default
DEQUANTIZE_CHANNEL = torch.ops.torch_quant.dequantize_channel.default
QUANTIZE_BLOCKS = torch.ops.torch_quant.quantize_blocks.default
DEQUANTIZE_BLOCKS = torch.ops.torch_quant.dequantize_blocks.default
FAKE_QUANTIZE_BLOCKS = torch.ops.torch_quant.fake_quantize_blocks.default
DECODE = torch.ops.torch_quant.decode.default
FAKE_QUANTIZE = torch.ops.torch_quant.fake_quantize.default
