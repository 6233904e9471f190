"""Quantization as plain tensor arithmetic: the definition that every kernel is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_quant.core.element_type import ElementType
from torch_quant.core.granularity import split_blocks
from torch_quant.core.qparams import QParams

__all__ = [
    "dequantize",
    "dequantize_blocks",
    "fake_quantize",
    "fake_quantize_blocks",
    "quantize",
    "quantize_blocks",
]


_PART = 2**20
"""Elements that are computed together. Else the head of a language model would take the memory of
three more for what is thrown away at once."""


def _placed(values: Tensor, zero_point: Tensor) -> Tensor:
    """``values`` among the codes, before they saturate; written over.

    Integer zero points are added to what was rounded, so that halves go to even numbers of steps.
    """
    if zero_point.is_floating_point():
        return values.add_(zero_point)
    return values.round_().add_(zero_point)


def quantize_blocks(x: Tensor, scale: Tensor, zero_point: Tensor, element: ElementType) -> Tensor:
    """Codes of ``x``; see :func:`quantize`."""
    split, shape = split_blocks(x, scale.shape)
    values = split.to(torch.float32) / scale.reshape(shape)  # a new tensor: the rest is in place
    if element.integer:
        values = _placed(values, zero_point.reshape(shape))
    return element.encode(values).reshape(x.shape)


def dequantize_blocks(
    codes: Tensor, scale: Tensor, zero_point: Tensor, element: ElementType
) -> Tensor:
    """Real values of codes; see :func:`dequantize`."""
    split, shape = split_blocks(codes, scale.shape)
    if element.integer:
        values = (split.to(torch.int32) - zero_point.reshape(shape)).to(torch.float32)
    else:
        values = element.decode(split)
    return (values * scale.reshape(shape)).reshape(codes.shape)


def fake_quantize_blocks(
    x: Tensor, scale: Tensor, zero_point: Tensor, element: ElementType
) -> Tensor:
    """``x`` with the error of its format; see :func:`fake_quantize`."""
    split, shape = split_blocks(x, scale.shape)
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    values = split.to(torch.float32) / scale
    if element.integer:
        values = element.round(_placed(values, zero_point)).sub_(zero_point)
    else:
        values = element.round(values)
    return values.mul_(scale).reshape(x.shape)


def _in_parts(
    compute: Callable[[Tensor, Tensor, Tensor, ElementType], Tensor], x: Tensor, qparams: QParams
) -> Tensor:
    """What ``compute`` makes of ``x``; of a large one some rows at a time, to save memory."""
    scale, zero, element = qparams.scale, qparams.zero_point, qparams.spec.element
    count = scale.shape[0] if scale.dim() else 1
    parted = (
        type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and x.numel() > _PART
        and x.dim() > 1
        and x.is_contiguous()
        and count in (1, len(x))
        and zero.shape == scale.shape
        and not (scale.requires_grad and torch.is_grad_enabled())
    )
    if not parted:
        return compute(x, scale, zero, element)
    size = max(1, _PART // x[0].numel())
    made = None
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        where = part if count == len(x) and scale.dim() else ...
        found = compute(x[part], scale[where], zero[where], element)
        made = found.new_empty(x.shape) if made is None else made
        made[part] = found
    assert made is not None
    return made


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Codes of ``x``: those of ``round(x / scale) + zero_point``, saturating, halves to even.

    Of ``round(x / scale + zero_point)`` where zero points are floats.

    Args:
        x: a float tensor of any shape that the blocks of ``qparams`` divide.
        qparams: its scales and zero points.

    Returns:
        The codes, same shape, in the spec's dtype.

    Raises:
        InvalidConfig: the blocks do not divide it.
    """
    return _in_parts(quantize_blocks, x, qparams)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Real values of ``codes``: ``scale * (value of the code - zero_point)``, float32."""
    return _in_parts(dequantize_blocks, codes, qparams)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """``dequantize(quantize(x))``: ``x`` with the error of its format, same shape, float32."""
    return fake_quantize_blocks(x, qparams.scale, qparams.zero_point, qparams.spec.element)
