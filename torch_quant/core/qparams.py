"""Scale and zero point: the only place where a range becomes numbers of an integer grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = ["MIN_SCALE", "QParams", "choose_qparams"]

MIN_SCALE = 2.0**-48
"""Floor of every scale: products of two scales stay normal float32 numbers."""


@dataclass(frozen=True)
class QParams:
    """The grid of one tensor.

    Args:
        spec: the integer format.
        scale: float32, shape ``[]`` (per tensor) or ``[channels]``; a step in the tensor's units.
        zero_point: int32, same shape; the code of real 0.
        ch_axis: the channel axis, None per tensor.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    ch_axis: int | None = None

    def __post_init__(self) -> None:
        wanted = 1 if self.spec.per_channel else 0
        if self.scale.dim() != wanted or self.scale.shape != self.zero_point.shape:
            raise InvalidConfig(
                f"QParams of a {self.spec}: expected scale and zero_point of {wanted} dimension(s) "
                f"and one shape, got {tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            )
        if self.spec.per_channel != (self.ch_axis is not None):
            raise InvalidConfig(
                f"QParams of a {self.spec} with ch_axis={self.ch_axis}: "
                "give ch_axis with per-channel specs, and only with them"
            )


def choose_qparams(
    min_val: Tensor, max_val: Tensor, spec: QuantSpec, ch_axis: int | None = None
) -> QParams:
    """The grid that covers ``[min_val, max_val]`` and represents 0 exactly.

    Affine: ``scale = (max - min) / (quant_max - quant_min)`` over the range widened to hold 0.
    Symmetric: ``scale = max(|min|, |max|) / steps``, with as many steps as both sides have, so that
    neither end is clipped. A range of only zeros gets scale 1. (Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    section 2.1.)

    Args:
        min_val: shape ``[]`` or ``[channels]``, in the tensor's units.
        max_val: same shape.
        spec: the integer format.
        ch_axis: the channel axis of a per-channel spec.

    Raises:
        InvalidConfig: the range is not finite, or ``min_val > max_val``.
    """
    low = min_val.detach().to(torch.float32).clamp(max=0.0)
    high = max_val.detach().to(torch.float32).clamp(min=0.0)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise InvalidConfig("a range with NaN or Inf has no scale")
    if bool((min_val > max_val).any()):
        raise InvalidConfig("a range whose minimum lies above its maximum has no scale")
    if spec.symmetric:
        middle = 0 if spec.signed else (spec.quant_min + spec.quant_max + 1) // 2
        steps = min(middle - spec.quant_min, spec.quant_max - middle)
        scale = torch.maximum(-low, high) / steps
        zero_point = torch.full_like(scale, middle, dtype=torch.int32)
    else:
        # Halves first: the width of a range of huge numbers may not be a float32.
        levels = spec.quant_max - spec.quant_min
        scale = high / levels - low / levels
        safe = scale.clamp(min=MIN_SCALE)
        zero_point = (
            (spec.quant_min - low / safe)
            .round()
            .clamp(spec.quant_min, spec.quant_max)
            .to(torch.int32)
        )
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=MIN_SCALE))
    return QParams(spec, scale, zero_point, ch_axis)
