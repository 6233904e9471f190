"""The values that a weight may have while GPTQ rounds it column by column."""

from __future__ import annotations

from torch import Tensor

from torch_quant.algorithms.clipping import rounded_steps, searched_qparams
from torch_quant.core.functional import quantize
from torch_quant.core.methods import WeightMethod
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec

__all__ = ["coded", "grids", "nearest"]


def coded(
    real: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, QParams]:
    """The codes of real values that the format has, ``[out, in]``, and what they stand for."""
    grid = spec.granularity.grid(real.shape)
    zero_point = zero_point.reshape(grid).to(spec.zero_point_dtype)
    qparams = QParams(spec, scale.reshape(grid), zero_point)
    return quantize(real, qparams), qparams


def nearest(spec: QuantSpec, column: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The values of the format nearest to a column, all of one shape."""
    return rounded_steps(column / scale, spec, zero_point).mul_(scale)


def grids(
    weight: Tensor,
    squares: Tensor,
    spec: QuantSpec,
    *,
    search: bool,
    full_range: bool,
    plain: WeightMethod,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points as floats, ``[rows of blocks, columns of blocks]``.

    Args:
        weight: ``[out, in]``.
        squares: mean square of each input, ``[in]`` or ``[out, in]``.
        spec: the format.
        search: for the least squared error, weighted by ``squares``.
        full_range: whether symmetric scales may be negative.
        plain: rounds without data, and gives the scales where there is no search.
    """
    if search:
        found = searched_qparams(weight, spec, importance=squares, full_range=full_range)
    else:
        found = plain.quantize(weight, spec, {})[1]
    shape = found.scale.shape if found.scale.dim() else (1, 1)
    return found.scale.reshape(shape).clone(), found.zero_point.reshape(shape).float()
