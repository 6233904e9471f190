"""Quantize and dequantize as IPEX reads them off a traced graph: PyTorch's quantized tensors.

``torch.export`` knows no quantized tensors: for it, they are the same arithmetic in float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_quant.ops.functions import graph_function
from torch_quant.ops.qdq import FAKE_QUANTIZE_PER_TENSOR

__all__ = ["dequantize", "dequantize_weight", "quantize"]

_STORAGE = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


@graph_function
def quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """``x`` as a quantized tensor; while exporting, rounded to the same grid in float."""
    if torch.compiler.is_compiling():
        info = torch.iinfo(dtype)
        return FAKE_QUANTIZE_PER_TENSOR(x, scale, zero_point, info.min, info.max)  # type: ignore[no-any-return]
    return torch.quantize_per_tensor(x.float(), scale, zero_point, _STORAGE[dtype])


@graph_function
def dequantize(x: Tensor) -> Tensor:
    """Real values of a quantized tensor."""
    return x.dequantize() if x.is_quantized else x


@graph_function
def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Real values of an int8 weight; the codes stay what is saved."""
    if torch.compiler.is_compiling():
        shape = [1] * codes.dim()
        shape[axis] = -1
        return (codes.to(torch.float32) - zero_point.reshape(shape)) * scale.reshape(shape)
    weight = torch._make_per_channel_quantized_tensor(codes, scale, zero_point, axis)
    return weight.dequantize()
