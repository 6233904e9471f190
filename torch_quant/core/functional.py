"""Quantization as plain tensor arithmetic: the definition that every kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_quant.core.qparams import QParams

__all__ = ["dequantize", "fake_quantize", "quantize"]


def _broadcast(values: Tensor, qparams: QParams, dim: int) -> Tensor:
    if qparams.ch_axis is None:
        return values
    shape = [1] * dim
    shape[qparams.ch_axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Codes of ``x``: ``clamp(round(x / scale) + zero_point)``, rounding halves to even.

    Args:
        x: a float tensor of any shape.
        qparams: its grid.

    Returns:
        The codes, same shape, in the spec's dtype.
    """
    spec = qparams.spec
    scale = _broadcast(qparams.scale, qparams, x.dim())
    zero_point = _broadcast(qparams.zero_point, qparams, x.dim())
    codes = x.to(torch.float32) / scale  # a new tensor, so that the rest needs no further memory
    codes.round_().add_(zero_point).clamp_(spec.quant_min, spec.quant_max)
    return codes.to(spec.dtype)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Real values of ``codes``: ``scale * (codes - zero_point)``, float32."""
    scale = _broadcast(qparams.scale, qparams, codes.dim())
    zero_point = _broadcast(qparams.zero_point, qparams, codes.dim())
    return (codes.to(torch.int32) - zero_point).to(torch.float32) * scale


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """``dequantize(quantize(x))``: ``x`` with the error of its grid, same shape, float32."""
    return dequantize(quantize(x, qparams), qparams)
