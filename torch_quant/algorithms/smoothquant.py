"""SmoothQuant: move the spread of an activation's channels into the weight that reads them.

A few channels of a transformer's activations are far larger than the rest, and the one scale that a
kernel allows has to cover them. Dividing channel ``j`` by ``s_j``, and multiplying column ``j`` of
the weight by it, changes nothing in float and evens out the channels:

    s_j = max|x_j| ** alpha / max|w_j| ** (1 - alpha)

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023, equation 4. Layers that read the same tensor share ``s``, and ``max|w_j|`` is taken
over all of them, so that the tensor is quantized once. In the graph:

    x -> mul(1 / factor) -> linear(weight * factor)

The product with the weight is an expression in the graph, which is evaluated when the weight is
quantized, so that only one of them takes memory at a time.

Where it is only asked for if it helps (``min_gain``), the noise of the layers that read a tensor is
predicted with it and without (:mod:`torch_quant.algorithms.predicted_noise`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from torch_quant.algorithms.predicted_noise import Channels, Readers, check_gain, gains
from torch_quant.core.granularity import PerChannel
from torch_quant.core.methods import Transform, Wanted, register_transform
from torch_quant.core.plan import QuantPlan, is_share
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.graph.sites import KEY, Site, local_name
from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.passes.base import Params, PassContext
from torch_quant.passes.constants import evaluate, expression, name_of, new_constant
from torch_quant.passes.transform import sites_with
from torch_quant.statistics import (
    CHANNELS,
    MEAN_SQUARE,
    RANGE,
    ChannelMean,
    Hessian,
    MeanSquare,
    MinMaxObserver,
    Statistic,
    channel_mean,
)

__all__ = ["SmoothQuant", "smoothing_factor"]


def smoothing_factor(reach: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """What each channel is divided by.

    Args:
        reach: largest magnitude of each input channel, shape ``[channels]``.
        weight: largest magnitude of each column of the weight, shape ``[channels]``.
        alpha: 0 evens out the weight alone, 1 the activation alone.

    Returns:
        Positive factors, shape ``[channels]``; 1 where a channel or its column is all zeros.
    """
    factor = reach**alpha / weight ** (1 - alpha)
    used = (reach > 0) & (weight > 0)
    return torch.where(used, factor, torch.ones_like(factor))


@register_transform
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Move the spread of the channels of a linear layer's input into its weight.

    It has to be asked for before calibrating. The input's range is then that of its channels,
    whatever its observer is.

    Args:
        alpha: 0 to 1, how much of the spread goes over to the weight; 0.7 to 0.8 help
            transformers, whose activations have a few channels far larger than the rest. (The
            paper's default is 0.5.)
        min_gain: smooth only where the noise of rounding is predicted to become smaller by this
            factor, and where calibration recorded the channels; 0 smooths everywhere.

    Raises:
        InvalidConfig: ``alpha`` is not 0 to 1, or ``min_gain`` is negative.

    >>> SmoothQuant(0.5).to_dict()
    {'name': 'smoothquant', 'alpha': 0.5, 'min_gain': 0.0}
    """

    name = "smoothquant"
    trains = True

    alpha: float = 0.8
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not is_share(self.alpha):
            raise InvalidConfig(f"SmoothQuant(alpha={self.alpha!r}): expected a number from 0 to 1")
        check_gain(self, self.min_gain)

    @property
    def optional(self) -> bool:
        return self.min_gain > 0

    @property
    def condition(self) -> str:
        if not self.optional:
            return ""
        return (
            f"only where the noise is predicted to fall by a factor of {self.min_gain:g}, from "
            "channels that calibration recorded"
        )

    def refusal(self, site: Site) -> str:
        if site.smoothable:
            return ""
        return (
            "only linear layers can be smoothed whose input's last dimension is as it was computed"
        )

    def statistics(self, site: Site) -> Wanted:
        wanted: dict[str, Callable[[], Statistic]] = {}
        wanted[CHANNELS] = partial(MinMaxObserver, PerChannel(-1))
        if self.optional:
            wanted[MEAN_SQUARE] = MeanSquare
        return {site.inputs[0]: wanted}

    def apply(self, context: PassContext) -> int:
        """Smooth every site that the plan smooths so.

        Raises:
            NotCalibrated: calibration recorded no channels there, or not from the start.
            InvalidConfig: another transform has changed the input before.
        """
        plan, params = context.plan, context.params
        groups = params.shared(self, lambda: Readers.found(self, plan, params))
        changed = 0
        smoothed: dict[fx.Node, tuple[fx.Node, Tensor]] = {}
        floats: dict[str, Tensor] = {}
        for _, node, _, site in sites_with(self, context.plan, [context.gm]):
            x, weight = argument(node, 0), argument(node, 1)
            assert isinstance(x, fx.Node)
            assert isinstance(weight, fx.Node)
            if x not in smoothed:
                smoothed[x] = self._smoothed(context, groups, node, site)
            mul, factor = smoothed[x]
            local = local_name(node)
            columns = new_constant(context.gm, f"{local}.smooth_factor", factor, node)
            with context.graph.inserting_before(node):
                scaled = context.graph.call_function(torch.ops.aten.mul.Tensor, (weight, columns))
            scaled.meta = {k: v for k, v in weight.meta.items() if k == "val"}
            if context.plan[site.name].weight is None and not context.live:  # once for all
                product = expression(context.gm, scaled)
                if product not in floats:
                    floats[product] = evaluate(context.gm, scaled)
                name = name_of(weight, f"{local}.weight")
                scaled = new_constant(context.gm, name, floats[product], node)
                scaled.meta |= {k: v for k, v in weight.meta.items() if k == "val"}
            set_arguments(node, {0: mul, 1: scaled})
            changed += 1
        return changed

    def _smoothed(
        self, context: PassContext, groups: dict[str, Readers], node: fx.Node, site: Site
    ) -> tuple[fx.Node, Tensor]:
        """The input of ``node`` divided by factors, in the graph, and the factors."""
        key = site.inputs[0]
        if key not in groups:
            raise InvalidConfig(
                f"{site.name}: SmoothQuant knows no channels of {key}, which another transform "
                "made; let SmoothQuant come first"
            )
        channels = context.statistic(key, CHANNELS)
        assert isinstance(channels, MinMaxObserver)
        low, high = channels.min_val.flatten(), channels.max_val.flatten()
        group, reach = groups[key], torch.maximum(-low, high).clamp(min=0)
        factor = context.params.kept(
            (self, key), lambda: smoothing_factor(reach, group.columns, self.alpha)
        )
        made = f"{key}[smooth={self.alpha:g}]"
        if made not in context.derived:
            ends = torch.stack([low / factor, high / factor])
            found = {RANGE: MinMaxObserver(), CHANNELS: MinMaxObserver(PerChannel(-1))}
            for each in found.values():
                each.observe(ends)
            context.derive(made, {**found, **_means(context, key, factor)})
        x = argument(node, 0)
        assert isinstance(x, fx.Node)
        name = f"{local_name(node)}.smooth_inverse"
        inverse = new_constant(context.gm, name, 1 / factor, node)
        inverse.meta["val"] = 1 / factor
        with context.graph.inserting_before(node):
            mul = context.graph.call_function(torch.ops.aten.mul.Tensor, (x, inverse))
        mul.meta = {**x.meta, KEY: made}
        return mul, factor

    def moved(
        self, statistics: Mapping[str, Statistic], key: str, params: Params
    ) -> Mapping[str, Statistic] | None:
        """Second moments of the channels divided by their factors; of others nothing is known."""
        if not all(isinstance(each, (Hessian, MeanSquare)) for each in statistics.values()):
            return None
        factor = params.kept((self, key), _not_smoothed)
        return {what: _divided(each, factor) for what, each in statistics.items()}

    def settled(self, plan: QuantPlan, params: Params) -> dict[str, Transform | None]:
        """At each site that has it: itself, for good, where it lowers the noise enough.

        It does not where calibration recorded nothing of the channels.

        >>> from torch_quant.passes.base import NoParams
        >>> SmoothQuant(0.8, min_gain=1.5).settled(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        smooth = SmoothQuant(self.alpha)
        found = self.gains(plan, params).items()
        return {site: smooth if gain >= self.min_gain else None for site, gain in found}

    def gains(self, plan: QuantPlan, params: Params) -> Mapping[str, float]:
        """By what factor it lowers the noise of rounding at each site that has it.

        >>> from torch_quant.passes.base import NoParams
        >>> SmoothQuant(0.8, min_gain=1.5).gains(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        return gains(Readers.found(self, plan, params), plan, params, self._noise)

    def _noise(
        self, readers: Readers, channels: Channels, bits: int, weight_bits: int
    ) -> tuple[float, float]:
        """What rounding adds without it, and with it."""
        factor = smoothing_factor(channels.reach, readers.columns, self.alpha)
        smooth = (weight * factor for weight in readers.weights())
        after = channels.divided(factor).noise(smooth, bits, weight_bits)
        return channels.noise(readers.weights(), bits, weight_bits), after


def _means(context: PassContext, key: str, factor: Tensor) -> dict[str, Statistic]:
    """The means of the smoothed channels, if those of the tensor were recorded."""
    try:
        known = context.statistic(key, channel_mean(-1))
    except NotCalibrated:
        return {}
    assert isinstance(known, ChannelMean)
    return {channel_mean(-1): known.scaled(1 / factor)}


def _not_smoothed() -> Tensor:
    raise QuantError("the weight of a layer is rounded before its input was smoothed")


def _divided(statistic: Statistic, factor: Tensor) -> Statistic:
    """Moments of channels that are divided by ``factor``."""
    assert isinstance(statistic, (Hessian, MeanSquare))
    if not statistic.rows:  # no data reached the layer
        return statistic
    inverse = 1 / factor.to(statistic.sums)
    return statistic.scaled(inverse)
