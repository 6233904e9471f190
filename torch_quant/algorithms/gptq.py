"""GPTQ: round a column after the other, and let the columns to come make up for the error.

The output error of a weight row is ``e H e^T`` with the second moments ``H`` of the inputs. Frantar
et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
equations 2 to 4: what column ``j`` is rounded by moves to the columns behind it. With
``H = (I + U) D (I + U)^T``, ``U`` strictly upper triangular, that is

    q_j = round(w_j + sum over i < j of (w_i - q_i) U_ij)

(Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", 2023, theorem 6),
which takes one Cholesky factorization and no inverse. A convolution is a linear layer that reads
patches of an image, each group of channels for itself. Columns go in blocks: inside one, each error
is added to what follows at once; those of all blocks before come as one product. What is rounded
can make up for the layers before, too (:mod:`torch_quant.algorithms.drift`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from torch_quant.algorithms.blocks import Block, Layer
from torch_quant.algorithms.drift import drifts, made_up_for
from torch_quant.algorithms.gptq_factor import unit_factor
from torch_quant.algorithms.gptq_grids import coded, grids, nearest
from torch_quant.algorithms.gptq_groups import factors, round_groups
from torch_quant.algorithms.rtn import without_data
from torch_quant.core.granularity import PerChannel
from torch_quant.core.memory import give_back_behind
from torch_quant.core.methods import Wanted, WeightMethod, register_weight_method
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.core.telling import tell
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.sites import Site
from torch_quant.statistics import HESSIAN, Hessian, Patches, Statistic, patches

__all__ = ["GPTQ"]

_SWITCHES = (
    "act_order", "static_groups", "clip_search", "full_range", "sequential", "match_float",
)  # fmt: skip
_DAMPINGS = 4
"""How often the damping is raised, tenfold, until the factorization succeeds."""
_BLOCKS = (
    "the weight of a convolution is rounded to nearest where it has other scales than one, or one "
    "for each output channel"
)
_ENOUGH = 2
"""Vectors for each input channel; with fewer, a fit to the float model's would be one to noise."""
_UNREACHED = (
    "no calibration data reached it, so that its weight is rounded to nearest; run inputs that do "
    "through the proxy of quantizer.calib(model)"
)
_FEW = (
    "fewer calibration vectors than input channels, so that damping decides on the directions that "
    "none of them has; calibrate with more data"
)
_SINGULAR = (
    "the Hessian of its input has no Cholesky factor, however damped, so that its weight is "
    "rounded to nearest; give GPTQ a damping above 0, and look for huge activations"
)


@register_weight_method
@dataclass(frozen=True)
class GPTQ(WeightMethod):
    """Error feedback along the columns of a weight, by what calibration saw.

    It rounds linear layers and convolutions, the latter with one scale, or one for each output
    channel.

    Columns that no data excited are rounded to nearest, and so is a layer that no token reached (an
    expert, say), with a warning. Experts whose weights are one tensor share the moments of all
    their rows after ``quantizer.calib``; :meth:`Quantizer.round_weights` has those of each.
    Codes lie in the plain order of the columns whatever the options.

    Args:
        block_size: columns between two products with all errors so far; it changes the speed alone.
        act_order: round the columns with the largest inputs first, when most columns can still make
            up for them. Scales are then static.
        damping: added to the diagonal of ``H``, as a share of its mean; "percdamp".
        static_groups: choose all scales from the weight as it was. Else each group's scales come
            from the weight as the columns before have left it.
        clip_search: choose scales by least squared error, weighted by the inputs, in place of the
            whole range. Few bits want that.
        full_range: let symmetric scales be negative, as :class:`RoundToNearest` does.
        sequential: with :meth:`Quantizer.round_weights`, record the inputs of the later layers of a
            block once those before them are rounded; "true_sequential". It runs the block once for
            each tensor that layers read.
        match_float: with :meth:`Quantizer.round_weights`, have the rounded layers give for the
            inputs at hand what the float model's give for its own. A second stream of data goes
            through the float blocks.

    Raises:
        InvalidConfig: an option is of another type or range.

    >>> GPTQ(block_size=0)
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: GPTQ(block_size=0): expected an integer, 1 or more
    """

    name = "gptq"
    serves_unreached = True

    block_size: int = 128
    act_order: bool = True
    damping: float = 0.01
    static_groups: bool = True
    clip_search: bool = True
    full_range: bool = False
    sequential: bool = False
    match_float: bool = False

    def __post_init__(self) -> None:
        size, damping = self.block_size, self.damping
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidConfig(f"GPTQ(block_size={size!r}): expected an integer, 1 or more")
        number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
        if not number or not 0 <= damping <= 1:
            raise InvalidConfig(f"GPTQ(damping={damping!r}): expected a number from 0 to 1")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidConfig(f"GPTQ({name}={value!r}): expected True or False")

    def refusal(self, site: Site) -> str:
        if site.smoothable or site.window is not None:
            return ""
        return (
            "only linear layers whose input's last dimension is as it was computed, and "
            "convolutions whose image is, have a Hessian"
        )

    def statistics(self, site: Site) -> Wanted:
        if site.window is not None:
            return {site.inputs[0]: {patches(site.window): partial(Patches, site.window)}}
        return {site.inputs[0]: {HESSIAN: Hessian}}

    @property
    def wants_floats(self) -> bool:  # type: ignore[override]
        return self.match_float

    def learned(
        self, block: Block, layers: Sequence[Layer]
    ) -> tuple[Mapping[str, Mapping[str, Statistic]], Mapping[Layer, Tensor]]:
        """With ``match_float``, also weights that make up for what the layers before have lost."""
        if not self.match_float or block.floats is None:
            return super().learned(block, layers)
        found = drifts(block, layers)
        others = [layer for layer in layers if layer not in found]
        statistics = dict(block.observe(others, self)) if others else {}
        weights = {}
        for layer, (hessian, drift) in found.items():
            statistics[layer.site] = {HESSIAN: hessian}
            if hessian.rows >= _ENOUGH * len(drift):
                moments = hessian.mean.to(layer.weight)
                weights[layer] = made_up_for(layer.weight, drift, moments, self.damping)
        return statistics, weights

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        """As the base class says; ``statistics`` has the Hessian of the input.

        Raises:
            InvalidConfig: the Hessian is that of another number of channels.
            NotCalibrated: it is not there.
        """
        images = next((each for each in statistics.values() if isinstance(each, Patches)), None)
        if images is not None:
            return self._convolution(weight, spec, images)
        hessian = statistics.get(HESSIAN)
        if hessian is None:
            raise NotCalibrated("GPTQ needs the Hessian of the layer's input")
        assert isinstance(hessian, Hessian)
        if not hessian.rows:
            tell(_UNREACHED)
            return without_data(self).quantize(weight, spec, {})
        channels = weight.shape[-1]
        if len(hessian.sums) != channels:
            raise InvalidConfig(
                f"a Hessian of {len(hessian.sums)} channels, a weight of {channels}"
            )
        if hessian.rows < channels:
            tell(_FEW)
        squares = hessian.sums.diagonal().to(weight) / hessian.rows
        order = torch.arange(channels, device=weight.device)
        if self.act_order:
            order = squares.argsort(descending=True, stable=True)
        rows, sums = hessian.rows, hessian.taken().to(weight)
        factor = unit_factor(sums, order, rows, self.damping, _DAMPINGS)
        if factor is None:
            tell(_SINGULAR)
            return without_data(self).quantize(weight, spec, {})
        rounding = _Rounding(self, weight, spec, squares, factor, order)
        del sums, factor  # it lets go of it
        made = rounding.run()
        give_back_behind(weight)
        return made

    def _convolution(
        self, weight: Tensor, spec: QuantSpec, images: Patches
    ) -> tuple[Tensor, QParams]:
        """Of a weight ``[out, channels of a group, *kernel]``."""
        grid, groups = spec.granularity.grid(weight.shape), images.window.groups
        flat = weight.reshape(len(weight), -1)
        if not images.rows or math.prod(grid) not in (1, len(weight)):
            tell(_UNREACHED if not images.rows else _BLOCKS)
            return without_data(self).quantize(weight, spec, {})
        if images.sums.shape[1] != flat.shape[1]:
            raise InvalidConfig(
                f"patches of {images.sums.shape[1]} numbers, a weight of {flat.shape[1]}"
            )
        rows = replace(spec, granularity=PerChannel(0)) if math.prod(grid) > 1 else spec
        if groups == 1:
            hessian = Hessian()
            hessian.sums, hessian.rows, hessian.batches = images.sums[0], images.rows, 1
            codes, found = self.quantize(flat, rows, {HESSIAN: hessian})
        else:
            codes, found = self._groups(flat, rows, images)
        scale, zero_point = found.scale.reshape(grid), found.zero_point.reshape(grid)
        return codes.reshape(weight.shape), QParams(spec, scale, zero_point)

    def _groups(self, weight: Tensor, spec: QuantSpec, images: Patches) -> tuple[Tensor, QParams]:
        """Of a weight ``[out, n]`` whose rows are of several groups, in their order."""
        moments, groups = images.mean.to(weight), images.window.groups
        squares = moments.diagonal(dim1=1, dim2=2)
        order = torch.arange(weight.shape[1], device=weight.device).expand_as(squares)
        if self.act_order:
            order = squares.argsort(dim=1, descending=True, stable=True)
        factor = factors(moments, order, self.damping, _DAMPINGS)
        if factor is None:
            tell(_SINGULAR)
            return without_data(self).quantize(weight, spec, {})
        each = len(weight) // groups
        scale, zero_point = self.grids(weight, squares.repeat_interleave(each, 0), spec)
        both = (x.expand(len(weight), 1).reshape(groups, each) for x in (scale, zero_point))
        scales, zeros = both
        parts = weight.reshape(groups, each, -1)
        real = round_groups(parts, factor, order, lambda x: nearest(spec, x, scales, zeros))
        return coded(real.reshape(weight.shape), spec, scale, zero_point)

    def grids(self, weight: Tensor, squares: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :func:`torch_quant.algorithms.gptq_grids.grids`.

        >>> scale, _ = GPTQ(clip_search=False).grids(
        ...     torch.tensor([[7.0, 1.0]]), torch.ones(2), QuantSpec.of("int4")
        ... )
        >>> scale
        tensor([[1.]])
        """
        return grids(
            weight,
            squares,
            spec,
            search=self.clip_search,
            full_range=self.full_range,
            plain=without_data(self),
        )


@dataclass
class _Rounding:
    """One weight, column by column.

    Args:
        method: the options.
        weight: ``[out, in]``.
        spec: the format.
        squares: mean square of each input channel, ``[in]``.
        factor: ``I + U`` for the columns from the last to be rounded to the first.
        order: which column comes when, ``[in]``.
    """

    method: GPTQ
    weight: Tensor
    spec: QuantSpec
    squares: Tensor
    factor: Tensor
    order: Tensor

    def run(self) -> tuple[Tensor, QParams]:
        scale, zero_point = self.method.grids(self.weight, self.squares, self.spec)
        channels, count = self.weight.shape[1], scale.shape[1]
        width = channels // count  # columns that share a scale
        static = self.method.act_order or self.method.static_groups or count == 1
        block = self.method.block_size if static else -(-self.method.block_size // width) * width
        columns = self.order
        group = (columns // width).tolist()
        scales, zeros = self._spread(scale), self._spread(zero_point)
        real = self.weight.T[columns].contiguous()  # a column is a row, whose numbers lie together
        errors = torch.empty_like(real)
        for start in range(0, channels, block):
            rest = real[start : start + block].clone()
            end = start + len(rest)
            first, last = channels - start, channels - end  # of the block, from behind
            if start:
                before = self.factor[first:, last:first].flip(0, 1)
                rest.addmm_(before.T, errors[:start])
            inside = self.factor[last:first, last:first].flip(0, 1)
            for at in range(start, end):
                if not static and at % width == 0:
                    ends = at - start, at - start + width
                    found = self._group(rest[slice(*ends)], at)
                    for whole, spread, new in zip(
                        (scale, zero_point), (scales, zeros), found, strict=True
                    ):
                        whole[:, group[at]] = new
                        spread[group[at]] = self._spread(new[:, None])[0]
                column = rest[at - start]
                rounded = nearest(self.spec, column, scales[group[at]], zeros[group[at]])
                torch.sub(real[at], rounded, out=errors[at])
                real[at] = rounded
                if at + 1 < end:
                    rest[at - start + 1 :].addr_(inside[at - start, at - start + 1 :], errors[at])
        del errors, rest, inside
        self.factor = self.factor[:0]
        plain = torch.empty_like(real)
        plain[columns] = real
        del real
        return coded(plain.T.contiguous(), self.spec, scale, zero_point)

    def _spread(self, grid: Tensor) -> Tensor:
        """``[rows of blocks, k]`` as ``[k, out]``."""
        return grid.repeat_interleave(len(self.weight) // len(grid), 0).T.contiguous()

    def _group(self, columns: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the columns from ``at`` on, ``[rows of blocks]``."""
        squares = self.squares[at : at + len(columns)]
        scale, zero_point = self.method.grids(columns.T.contiguous(), squares, self.spec)
        return scale[:, 0], zero_point[:, 0]
