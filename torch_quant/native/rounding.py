"""Rounding to a grid of integers while training, and its gradients, in one pass over memory each.

In operators of PyTorch, a rounding takes six passes and its gradients take fifteen. These compute
the same, the forward pass to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import IntegerType
from torch_quant.native import library as native

__all__ = ["round_gradient", "round_to_grid", "serves", "straight_gradient"]

_PLAIN = (Tensor, nn.Parameter)


def serves(x: Tensor, scale: Tensor, zero_point: Tensor, element: ElementType) -> bool:
    """Whether the kernels can round a tensor: integers, in float32 on a CPU, block behind block.

    Args:
        x: a tensor.
        scale: in the shape of the blocks' grid, which fits ``x``.
        zero_point: same shape.
        element: the values of a code.

    >>> from torch_quant.core.elements import element_type
    >>> scale, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    >>> serves(torch.ones(2).double(), scale, zero, element_type("int8"))
    False
    """
    return (
        type(x) in _PLAIN
        and type(scale) in _PLAIN
        and x.dtype is scale.dtype is torch.float32
        and zero_point.dtype is torch.int32
        and x.device.type == scale.device.type == "cpu"
        and isinstance(element, IntegerType)
        and x.numel() > 0
        and _in_order(x, scale)
        and not (x.is_neg() or scale.is_neg() or zero_point.is_neg())  # memory has the opposite
        and scale.is_contiguous()
        and zero_point.is_contiguous()
        and not torch._C._len_torch_dispatch_stack()  # whoever watches operators sees some
        and native.kernels() is not None
    )


def _in_order(x: Tensor, scale: Tensor) -> bool:
    """Whether the blocks of ``x`` lie in memory one behind the other, in the order of scales."""
    if not scale.dim():
        return x.is_contiguous() or torch.empty_like(x).stride() == x.stride()
    if not x.is_contiguous() or scale.dim() != x.dim():
        return False
    inside = False
    for size, count in zip(x.shape, scale.shape, strict=True):
        if size % count or (inside and count != 1):
            return False
        inside = inside or size != count
    return True


def round_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: ElementType,
    *,
    smallest: float,
    signed_scales: bool,
    multiplies: bool,
) -> tuple[Tensor, Tensor]:
    """``scale * (clamp(round(x / scale) + zero_point) - zero_point)``, of what is served.

    Args:
        x: float32.
        scale: float32, in the shape of the blocks' grid.
        zero_point: int32, same shape.
        element: of integers.
        smallest: a scale below is used as this.
        signed_scales: whether scales may be negative, and are of this size then.
        multiplies: ``x`` is multiplied by ``1 / scale``, which may round differently.

    Returns:
        The rounded tensor, strides as ``x`` has them, and the scales that were used.
    """
    assert isinstance(element, IntegerType)
    y, used, blocks = torch.empty_like(x), torch.empty_like(scale), scale.numel()
    _library().torch_quant_round(
        torch.get_num_threads(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        y.data_ptr(), used.data_ptr(), blocks, x.numel() // blocks,
        element.quant_min, element.quant_max, smallest, signed_scales, multiplies,
    )  # fmt: skip
    return y, used


def round_gradient(
    grad: Tensor,
    x: Tensor,
    rounded: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: ElementType,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gradients of :func:`round_to_grid` are made of.

    Args:
        grad: of a loss, with respect to ``rounded``.
        x: what was rounded.
        rounded: the result.
        scale: as it was used.
        zero_point: int32, same shape.
        element: of integers.

    Returns:
        ``grad`` inside of the range, ends included, and 0 outside; and three sums over each block,
        in the shape of ``scale``: of ``grad * (rounded - x)`` inside, and of ``grad * rounded`` and
        of ``grad`` outside.
    """
    sums = torch.empty((3, *scale.shape))
    of_x = _gradients(grad, x, rounded, scale, zero_point, element, sums, None, 1.0)
    inside, outside, ends = sums.unbind()
    return of_x, inside, outside, ends


def straight_gradient(
    grad: Tensor,
    x: Tensor,
    rounded: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: ElementType,
    factor: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`round_to_grid` where its rounding to the grid is taken for the identity.

    Args:
        grad: of a loss, with respect to ``rounded``.
        x: what was rounded.
        rounded: the result.
        scale: as it was used.
        zero_point: int32, same shape.
        element: of integers.
        factor: the scale's gradient is multiplied by it; None if it is not wanted.

    Returns:
        With respect to ``x``; and to ``scale``, ``(inside + outside) / scale * factor`` in the
        words of :func:`round_gradient`.
    """
    of_scale = None if factor is None else torch.empty_like(scale)
    how = grad, x, rounded, scale, zero_point, element, None, of_scale, factor or 0.0
    return _gradients(*how), of_scale


def _gradients(
    grad: Tensor,
    x: Tensor,
    rounded: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: ElementType,
    sums: Tensor | None,
    of_scale: Tensor | None,
    factor: float,
) -> Tensor:
    assert isinstance(element, IntegerType)
    if grad.dtype is not torch.float32 or grad.stride() != x.stride() or grad.is_neg():
        grad = torch.empty_like(x).copy_(grad)
    of_x, blocks = torch.empty_like(x), scale.numel()
    failed = _library().torch_quant_round_gradient(
        torch.get_num_threads(), grad.data_ptr(), x.data_ptr(), rounded.data_ptr(),
        scale.data_ptr(), zero_point.data_ptr(), of_x.data_ptr(),
        None if sums is None else sums.data_ptr(),
        None if of_scale is None else of_scale.data_ptr(),
        blocks, x.numel() // blocks, element.quant_min, element.quant_max, factor,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the gradients of {blocks} scales")
    return of_x


def _library() -> Any:
    found = native.kernels()
    assert found is not None
    return found
