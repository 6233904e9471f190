"""Root mean square norms of rows of floats, with the residual sum before them, in one pass.

``x / sqrt(mean(x^2) + eps) * (weight + offset)`` (Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019; Gemma's weights have an offset of 1). As PyTorch's operators one by one give
it, to some 3e-7 of each number. Where the library of kernels is missing, and for floats of other
types, those operators run: the norm is then float32, and rounded before the weight multiplies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.native.ops import plain
from torch_quant.ops.library import define_operator
from torch_quant.ops.rows import register_row_operator

__all__ = ["ADD_RMS_NORM", "RMS_NORM"]


def _check(name: str, x: Tensor, weight: Tensor | None, more: Tensor | None) -> None:
    if not (x.is_floating_point() and x.dim()):
        got = x.dtype, tuple(x.shape)
        raise InvalidConfig(f"torch_quant::{name}: expected floats with a dimension, got {got}")
    if weight is not None and weight.shape != x.shape[-1:]:
        sizes = tuple(x.shape[-1:]), tuple(weight.shape)
        raise InvalidConfig(f"torch_quant::{name}: expected a weight of {sizes[0]}, got {sizes[1]}")
    if more is not None and more.shape != x.shape:
        sizes = tuple(x.shape), tuple(more.shape)
        raise InvalidConfig(f"torch_quant::{name}: expected x and more of one shape, got {sizes}")


def _by_operators(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    real = x.to(torch.float32)
    real = real * torch.rsqrt(real.pow(2).mean(-1, keepdim=True) + eps)
    real = real.to(x.dtype)
    if weight is None:
        return real
    factor = weight + offset if offset else weight
    return (real * factor).to(torch.promote_types(x.dtype, weight.dtype))


def _run(
    x: Tensor,
    more: Tensor | None,
    weight: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    eps: float,
    offset: float,
) -> bool:
    """Whether the kernel computed it."""
    kernels = native.kernels()
    tensors = [each for each in (x, more, weight) if each is not None]
    if kernels is None or [1 for each in tensors if each.dtype is not torch.float32]:
        return False
    count, size = y.numel(), x.shape[-1]
    if not count:
        return True
    x = plain(x, torch.float32)  # what is copied has to live until the kernel is through
    more = None if more is None else plain(more, torch.float32)
    weight = None if weight is None else plain(weight, torch.float32)
    failed = kernels.torch_quant_rms_norm(
        torch.get_num_threads(), x.data_ptr(), None if more is None else more.data_ptr(),
        None if weight is None else weight.data_ptr(), None if total is None else total.data_ptr(),
        y.data_ptr(), count // size, size, eps, offset,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"torch_quant::rms_norm: no memory for a row of {size} numbers")
    return True


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    if weight is not None and x.dtype is weight.dtype is torch.float32 and x.is_contiguous():
        size, kernels = x.shape[-1:], native.kernels()
        if weight.shape == size and weight.is_contiguous() and kernels is not None and size[0]:
            y = torch.empty_like(x)
            count = x.numel() // size[0]
            if not (x.is_neg() or weight.is_neg()) and not kernels.torch_quant_rms_norm(
                torch.get_num_threads(), x.data_ptr(), None, weight.data_ptr(), None, y.data_ptr(),
                count, size[0], eps, offset,
            ):  # fmt: skip
                return y
    _check("rms_norm", x, weight, None)
    y = _fake_rms_norm(x, weight, eps, offset)
    if _run(x, None, weight, None, y, eps, offset):
        return y
    return y.copy_(_by_operators(x, weight, eps, offset))


def _add_rms_norm(
    x: Tensor, more: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, weight, more)
    total, y = _fake_add_rms_norm(x, more, weight, eps, offset)
    if _run(x, more, weight, total, y, eps, offset):
        return total, y
    torch.add(x, more, out=total)
    return total, y.copy_(_by_operators(total, weight, eps, offset))


def _fake_rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _fake_add_rms_norm(
    x: Tensor, more: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, more.dtype))
    return total, _fake_rms_norm(total, weight, eps, offset)


RMS_NORM = define_operator(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    _rms_norm,
    _fake_rms_norm,
    keys=("CPU",),
)
ADD_RMS_NORM = define_operator(
    "add_rms_norm(Tensor x, Tensor more, Tensor? weight, float eps, float offset) "
    "-> (Tensor, Tensor)",
    _add_rms_norm,
    _fake_add_rms_norm,
    keys=("CPU",),
)
"""``x + more``, and its norm."""

register_row_operator(RMS_NORM, 0)
