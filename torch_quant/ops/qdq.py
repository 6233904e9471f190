"""The operators of a quantized graph before a backend lowers it: quantize, dequantize.

One pair serves every format: the element type goes by its name, and scales and zero points are
tensors in the shape of the blocks' grid, ``[]`` for one of a whole tensor. They compute by the
definition in ``core/functional.py``, so that an unlowered graph can be run and compared.

``choose_qparams`` finds the scales of what it meets, for formats that are dynamic.

Int8 kernels take a scale as a number, or as one dimension of channels. The operators that end in
``per_tensor`` and ``per_channel`` are that form; ``passes/fold_scales.py`` puts them in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_quant.core import functional
from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import element_type
from torch_quant.core.granularity import Granularity, block_extremes
from torch_quant.core.qparams import unchecked_qparams
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.ops.library import define_operator

__all__ = [
    "CHOOSE_QPARAMS",
    "DECODE",
    "DEQUANTIZE",
    "DEQUANTIZE_PER_CHANNEL",
    "DEQUANTIZE_PER_TENSOR",
    "FAKE_QUANTIZE",
    "FAKE_QUANTIZE_PER_TENSOR",
    "QUANTIZE",
    "QUANTIZE_PER_TENSOR",
]


def _by_name(
    function: Callable[[Tensor, Tensor, Tensor, ElementType], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, str], Tensor]:
    def of_element(x: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
        return function(x, scale, zero_point, element_type(element))

    return of_element


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
    kind = element_type(element)
    if kind.integer and not scale.dim() and not zero_point.is_floating_point():
        # What torch.fake_quantize_per_tensor_affine computes, in a tenth of its time.
        codes = (x.to(torch.float32) * scale.reciprocal()).round_().add_(zero_point)
        return codes.clamp_(kind.quant_min, kind.quant_max).sub_(zero_point).mul_(scale)
    return functional.fake_quantize_blocks(x, scale, zero_point, kind)


def _decode(q: Tensor, element: str) -> Tensor:
    values = element_type(element).decode(q)
    return values.clone() if values is q else values


@functools.lru_cache(maxsize=64)
def _spec(element: str, symmetric: bool, granularity: str, scale_type: str) -> QuantSpec:
    kinds = (Granularity.parse(granularity), ScaleType(scale_type))
    return QuantSpec(element_type(element), symmetric, *kinds, dynamic=True)


def _choose_qparams(x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    spec = _spec(*how)
    if not x.numel():
        return _fake_choose_qparams(x, *how)
    qparams = unchecked_qparams(*block_extremes(x, spec.granularity), spec)
    return qparams.scale, qparams.zero_point


def _fake_choose_qparams(x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    grid = _spec(*how).granularity.grid(x.shape)
    return x.new_ones(grid, dtype=torch.float32), x.new_zeros(grid, dtype=torch.int32)


def _quantize_per_tensor(
    x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    return ((x / scale).round() + zero_point).clamp(low, high).to(dtype)


def _fake_quantize_per_tensor(
    x: Tensor, scale: float, zero_point: int, low: int, high: int
) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)


def _dequantize_per_tensor(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return (q.to(torch.int32) - zero_point).to(torch.float32) * scale


def _dequantize_per_channel(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    shape = [1] * q.dim()
    shape[axis] = -1
    centred = q.to(torch.int32) - zero_point.reshape(shape)
    return centred.to(torch.float32) * scale.reshape(shape)


def _floats_like(x: Tensor, *args: Any) -> Tensor:
    """Of the sizes of blocks nothing need be known while exporting."""
    return torch.empty_like(x, dtype=torch.float32)


def _codes_like(x: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
    return torch.empty_like(x, dtype=element_type(element).dtype)


QUANTIZE = define_operator(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, str element) -> Tensor",
    _by_name(functional.quantize_blocks),
    _codes_like,
)
DEQUANTIZE = define_operator(
    "dequantize(Tensor q, Tensor scale, Tensor zero_point, str element) -> Tensor",
    _by_name(functional.dequantize_blocks),
    _floats_like,
)
FAKE_QUANTIZE = define_operator(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, str element) -> Tensor",
    _fake_quantize,
    _floats_like,
)
CHOOSE_QPARAMS = define_operator(
    "choose_qparams(Tensor x, str element, bool symmetric, str granularity, str scale_type) -> "
    "(Tensor scale, Tensor zero_point)",
    _choose_qparams,
    _fake_choose_qparams,
)
DECODE = define_operator("decode(Tensor q, str element) -> Tensor", _decode, _floats_like)
QUANTIZE_PER_TENSOR = define_operator(
    "quantize_per_tensor(Tensor x, float scale, int zero_point, int quant_min, int quant_max, "
    "ScalarType dtype) -> Tensor",
    _quantize_per_tensor,
    None,
)
DEQUANTIZE_PER_TENSOR = define_operator(
    "dequantize_per_tensor(Tensor q, float scale, int zero_point) -> Tensor",
    _dequantize_per_tensor,
    None,
)
DEQUANTIZE_PER_CHANNEL = define_operator(
    "dequantize_per_channel(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor",
    _dequantize_per_channel,
    None,
)
FAKE_QUANTIZE_PER_TENSOR = define_operator(
    "fake_quantize_per_tensor(Tensor x, float scale, int zero_point, int quant_min, "
    "int quant_max) -> Tensor",
    _fake_quantize_per_tensor,
    lambda x, *args: torch.empty_like(x),  # ATen's has none, exporting with dynamic sizes needs it
)
