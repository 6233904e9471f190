"""What the tests of weight methods share: weights, correlated inputs, every format, and errors."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_quant import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    RoundToNearest,
    WeightMethod,
)
from torch_quant.core.functional import dequantize
from torch_quant.statistics import HESSIAN, MEAN_SQUARE, Hessian, MeanSquare, Statistic

__all__ = ["SPECS", "heavy", "inputs", "output_error", "seen", "weight_error"]

OUT, IN = 32, 64
_ELEMENTS = (
    *(f"int{bits}" for bits in range(2, 9)), *(f"uint{bits}" for bits in range(2, 9)), "int16",
    "int8[-127, 127]", "float4_e2m1", "float6_e3m2", "float6_e2m3", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
_GRANULARITIES: tuple[Granularity, ...] = (
    PerTensor(), PerChannel(0), PerChannel(1), PerGroup(16, 1), PerBlock((8, 16)),
)  # fmt: skip


def _specs() -> list[QuantSpec]:
    found = [QuantSpec.of(each, granularity=g) for each in _ELEMENTS for g in _GRANULARITIES]
    found += [
        QuantSpec.of(bits=bits, signed=signed, symmetric=not signed, granularity=PerGroup(16, 1))
        for bits in (2, 4, 8)
        for signed in (False, True)
    ]
    found += [
        QuantSpec.of(each, symmetric=True, granularity=PerGroup(32, 1), scale_type=scale)
        for each in ("float4_e2m1", "float6_e2m3", "float8_e4m3fn", "int8")
        for scale in ("e8m0", "float16", "bfloat16")
    ]
    found += [
        QuantSpec.of(each, granularity=granularity, float_zero_points=True)
        for each in ("uint2", "uint3", "uint4", "int4", "uint8")
        for granularity in (PerChannel(0), PerGroup(16, 1))
    ]
    return found


SPECS = {str(spec): spec for spec in _specs()}
"""Every element type with every granularity, and what else a format can be."""


def heavy(seed: int = 0, out: int = OUT, columns: int = IN) -> Tensor:
    """A weight with outliers: Student's t with 4 degrees of freedom."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.distributions.StudentT(4.0).sample((out, columns)) * 0.05


def inputs(seed: int = 0, count: int = 512, columns: int = IN) -> Tensor:
    """Vectors whose channels depend on few factors, and differ in size up to seven times."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(columns // 4, columns, generator=generator)
    size = (torch.rand(columns, generator=generator) * 2).exp()
    generator.manual_seed(seed)
    factors = torch.randn(count, columns // 4, generator=generator)
    noise = torch.randn(count, columns, generator=generator)
    return (factors @ mix / (columns // 4) ** 0.5 + 0.3 * noise) * size


def seen(x: Tensor | None = None) -> dict[str, Statistic]:
    """What calibration with ``x`` has recorded."""
    found: dict[str, Statistic] = {HESSIAN: Hessian(), MEAN_SQUARE: MeanSquare()}
    for each in found.values():
        each.observe(inputs() if x is None else x)
    return found


def output_error(method: WeightMethod, spec: QuantSpec, weight: Tensor | None = None) -> float:
    """Squared output error on inputs that the method has not seen, over that of rounding."""
    weight = heavy() if weight is None else weight
    x = inputs(1, columns=weight.shape[1])
    statistics = seen(inputs(columns=weight.shape[1]))
    errors = []
    for each in (method, RoundToNearest()):
        real = dequantize(*each.quantize(weight, spec, statistics))
        errors.append(float((x @ (real - weight).T).square().mean()))
    return errors[0] / errors[1]


def weight_error(method: WeightMethod, spec: QuantSpec, weight: Tensor | None = None) -> float:
    """Squared error of the weight over that of rounding."""
    weight = heavy() if weight is None else weight
    errors = [
        float((dequantize(*each.quantize(weight, spec, seen())) - weight).square().mean())
        for each in (method, RoundToNearest())
    ]
    return errors[0] / errors[1]
