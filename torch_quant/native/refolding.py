"""A weight that is folded with a norm, rounded and unfolded again, in one call of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import IntegerType
from torch_quant.native import library as native

__all__ = ["Refolded", "refold", "refold_gradient"]


@dataclass(frozen=True)
class Refolded:
    """A weight ``round(w f) / f`` and what its gradient is made of. All float32.

    Args:
        weight: the result, in the shape of ``w``.
        factor: ``f`` of each channel, shape ``[channels]``.
        folded: ``w f``.
        rounded: the same on the grid.
        scale: the steps as they were used, in the shape of the blocks' grid.
    """

    weight: Tensor
    factor: Tensor
    folded: Tensor
    rounded: Tensor
    scale: Tensor


def refold(
    weight: Tensor,
    gain: Tensor | None,
    var: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: ElementType,
    *,
    eps: float,
    tiny: float,
    smallest: float,
) -> Refolded | None:
    """``round(w f) / f`` with ``f = gain / sqrt(var + eps)``, of what ``rounding.serves``.

    Args:
        weight: float32 and contiguous, ``[channels, ...]``.
        gain: of a norm, shape ``[channels]``; None for ones.
        var: its running variance, same shape.
        scale: of ``w f``; a negative one counts by its size.
        zero_point: int32, same shape.
        element: of integers.
        eps: added to the variance.
        tiny: a factor below it, in size, is none to divide by.
        smallest: a scale below is used as this.

    Returns:
        None where a factor is below ``tiny``.
    """
    assert isinstance(element, IntegerType)
    folded, rounded, y = (torch.empty_like(weight) for _ in range(3))
    factor, used = torch.empty_like(var), torch.empty_like(scale)
    library = native.kernels()
    assert library is not None
    nothing = library.torch_quant_refold(
        torch.get_num_threads(), weight.data_ptr(), None if gain is None else gain.data_ptr(),
        var.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), factor.data_ptr(),
        folded.data_ptr(), rounded.data_ptr(), used.data_ptr(), y.data_ptr(),
        weight.shape[0], scale.numel(), weight.numel(), element.quant_min, element.quant_max,
        eps, tiny, smallest,
    )  # fmt: skip
    return None if nothing else Refolded(y, factor, folded, rounded, used)


def refold_gradient(
    grad: Tensor,
    factor: Tensor,
    folded: Tensor,
    rounded: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: ElementType,
    share: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`refold`, its rounding to the grid taken for the identity.

    Args:
        grad: of a loss, with respect to the result.
        factor: and the next three: what :func:`refold` gave.
        folded: see there.
        rounded: see there.
        scale: see there.
        zero_point: int32.
        element: of integers.
        share: the scale's gradient is multiplied by it; None if it is not wanted.

    Returns:
        With respect to the weight, and to ``scale``; ``factor`` is a constant.
    """
    assert isinstance(element, IntegerType)
    if grad.dtype is not torch.float32 or not grad.is_contiguous() or grad.is_neg():
        grad = torch.empty_like(folded).copy_(grad)
    of_weight = torch.empty_like(folded)
    of_scale = None if share is None else torch.empty_like(scale)
    library = native.kernels()
    assert library is not None
    failed = library.torch_quant_refold_gradient(
        torch.get_num_threads(), grad.data_ptr(), factor.data_ptr(), folded.data_ptr(),
        rounded.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), of_weight.data_ptr(),
        None if of_scale is None else of_scale.data_ptr(),
        folded.shape[0], scale.numel(), folded.numel(), element.quant_min, element.quant_max,
        share or 0.0,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the gradient of a weight of shape {tuple(folded.shape)}")
    return of_weight, of_scale
