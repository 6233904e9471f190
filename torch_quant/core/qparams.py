"""Scale and zero point: the only place where a range becomes numbers of a format."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.errors import InvalidConfig

__all__ = ["MIN_SCALE", "QParams", "choose_qparams", "storable_scale", "unchecked_qparams"]

MIN_SCALE = 2.0**-48
"""Floor of every scale: products of two scales stay normal float32 numbers."""


@dataclass(frozen=True)
class QParams:
    """Scales and zero points of one tensor, one for each block of it.

    Args:
        spec: the format.
        scale: float32; ``[]`` per tensor, else as many dimensions as the tensor, how many blocks
            there are in each: ``[out, 1]`` per channel, ``[out, in / 64]`` per group of 64. A step
            in the tensor's units, or what a float of value 1 stands for. Ranges give positive ones;
            a weight method may give negative ones, which turn the values of the codes round.
        zero_point: same shape; int32, the code of real 0, or float32 where the format has
            ``float_zero_points``: the place of real 0 among the codes.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        given = f"got {tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
        if self.scale.shape != self.zero_point.shape:
            raise InvalidConfig(
                f"QParams of a {self.spec}: expected scale and zero_point of one shape, {given}"
            )
        if self.zero_point.is_floating_point() != self.spec.float_zero_points:
            raise InvalidConfig(
                f"QParams of a {self.spec}: expected zero points of {self.spec.zero_point_dtype}, "
                f"got {self.zero_point.dtype}"
            )
        if (self.scale.dim() == 0) != self.spec.per_tensor:
            wanted = "no dimension" if self.spec.per_tensor else "as many dimensions as the tensor"
            raise InvalidConfig(
                f"QParams of a {self.spec}: expected scale and zero_point of {wanted}, {given}"
            )


def choose_qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> QParams:
    """The scales that cover ``[min_val, max_val]`` and represent 0 exactly.

    Affine: ``scale = (max - min) / (quant_max - quant_min)`` over the range widened to hold 0.
    Symmetric: ``scale = max(|min|, |max|) / steps``, with as many steps as both sides have, so that
    neither end is clipped. (Jacob et al. 2018, "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", section 2.1.) Floats: ``steps`` is their largest
    value. Scales that are powers of two: ``2^(floor(log2(max(|min|, |max|))) - emax)`` with the
    exponent ``emax`` of the largest value, so that ends may saturate ("OCP Microscaling Formats
    (MX) Specification", version 1.0, section 6.3). A range of only zeros gets scale 1.
    With float zero points the range is not widened: ``zero_point = quant_min - min / scale``.

    Args:
        min_val: ``[]`` per tensor, else one for each block; in the tensor's units.
        max_val: same shape.
        spec: the format.

    Raises:
        InvalidConfig: the range is not finite, or ``min_val > max_val``.

    >>> low, high = torch.tensor(-1.0), torch.tensor(12.0)
    >>> choose_qparams(low, high, QuantSpec.of("float4_e2m1")).scale
    tensor(2.)
    """
    if not bool(torch.isfinite(min_val).all() & torch.isfinite(max_val).all()):
        raise InvalidConfig("a range with NaN or Inf has no scale")
    if bool((min_val > max_val).any()):
        raise InvalidConfig("a range whose minimum lies above its maximum has no scale")
    return unchecked_qparams(min_val, max_val, spec)


def unchecked_qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> QParams:
    """:func:`choose_qparams` for values met while serving: NaN gives NaN, and nothing is read."""
    low, high = min_val.detach().to(torch.float32), max_val.detach().to(torch.float32)
    if spec.float_zero_points:
        scale = high / (spec.quant_max - spec.quant_min) - low / (spec.quant_max - spec.quant_min)
        scale = _usable(scale, scale == 0, spec)
        return QParams(spec, scale, spec.quant_min - low / scale)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        middle = 0 if spec.signed else (spec.quant_min + spec.quant_max + 1) // 2
        steps = min(middle - spec.quant_min, spec.quant_max - middle)
        reach = torch.maximum(-low, high)
        if spec.scale_type is ScaleType.E8M0:
            scale = spec.scale_type.round(reach) * 2.0 ** -_exponent(steps)
        else:
            scale = reach / steps
        scale = _usable(scale, (reach == 0) | (scale == 0), spec)
        return QParams(spec, scale, torch.full_like(scale, middle, dtype=torch.int32))
    # Halves first: the width of a range of huge numbers may not be a float32.
    levels = spec.quant_max - spec.quant_min
    scale = high / levels - low / levels
    scale = _usable(scale, scale == 0, spec)
    zero_point = (spec.quant_min - low / scale).round().clamp(spec.quant_min, spec.quant_max)
    return QParams(spec, scale, zero_point.to(torch.int32))


def _exponent(value: float) -> int:
    """``floor(log2(value))``."""
    return math.frexp(value)[1] - 1


def storable_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """``scale`` as near as the format's type of scales comes to it, with its sign, not 0.

    >>> storable_scale(torch.tensor([3.0, -3.0]), QuantSpec.of("int4", scale_type="float16"))
    tensor([ 3., -3.])
    """
    return spec.scale_type.round(scale.abs()).clamp(min=MIN_SCALE).copysign(scale)


def _usable(scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``scale`` as its type can hold it, and 1 where the range is ``zero``."""
    return torch.where(zero, torch.ones_like(scale), storable_scale(scale, spec))
