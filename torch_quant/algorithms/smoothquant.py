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
predicted with and without it. Rounding adds a variance of ``step^2 / 12`` to each element, so with
``y = x W^T`` the sum over the outputs of a row is

    sum_j (step_x^2 / 12 + clip_j) sum_o w_oj^2  +  sum_o step_o^2 / 12 * sum_j E[x_j^2]

of which ``E[x_j^2]`` is recorded too. ``clip_j`` is what values lose that lie beyond all that were
seen: smoothing brings every channel near the end of the one range, and the largest of few rows says
little of the next. With the exponential tail that a normal distribution has there, one more row
than ``n`` of which the largest was ``r_j`` exceeds a limit ``L`` with a probability of
``exp((r_j - L) / t_j) / n``, by an excess of mean square ``2 t_j^2``; ``t_j = r_j / (2 ln n)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, fx

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

__all__ = ["SmoothQuant", "predicted_noise", "smoothing_factor"]


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


def predicted_noise(
    low: Tensor,
    high: Tensor,
    squares: Tensor,
    rows: int,
    weights: Iterable[Tensor],
    bits: int = 8,
    weight_bits: int = 8,
) -> float:
    """What quantization is predicted to add to the outputs of the layers that read one tensor.

    Args:
        low: smallest value seen of each input channel, shape ``[channels]``.
        high: the largest.
        squares: mean square of each channel.
        rows: how many vectors were seen.
        weights: of the layers, each of shape ``[outputs, channels]``; a scale per output channel.
        bits: of the activations, which have one scale.
        weight_bits: of the weights; 0 for float.

    Returns:
        Its energy for one row of inputs, in the square of the outputs' unit.

    >>> low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 99.0])
    >>> squares, weight = high.square() / 3, torch.tensor([[1.0, 0.01]])
    >>> noise = predicted_noise(low, high, squares, 10000, [weight])
    >>> low, squares, smoothed = low / high, squares / high.square(), weight * high
    >>> noise > 100 * predicted_noise(low, high / high, squares, 10000, [smoothed])
    True
    """
    top, bottom = high.max().clamp(min=0), low.min().clamp(max=0)
    step = (top - bottom).double() / (2**bits - 1)
    variance = step**2 / 12 + _clipping(high, top, rows) + _clipping(-low, -bottom, rows)
    noise = 0.0
    for weight in weights:
        noise += float((variance * weight.square().sum(0).double()).sum())
        if weight_bits:
            steps = weight.abs().amax(1).double() / (2 ** (weight_bits - 1) - 1)
            noise += float(steps.square().sum() / 12 * squares.double().sum())
    return noise


def _clipping(seen: Tensor, limit: Tensor, rows: int) -> Tensor:
    """The mean square of what values of each channel have beyond ``limit``, by their tails."""
    seen = seen.double().clamp(min=1e-30)
    tail = seen / (2 * math.log(max(rows, 2)))
    return 2 / max(rows, 2) * tail.square() * torch.exp((seen - limit.double()) / tail)


@dataclass
class _Group:
    """The sites that read one tensor and smooth it alike.

    Args:
        nodes: site -> where it stands, so that its weight can be computed.
    """

    nodes: dict[str, tuple[fx.GraphModule, fx.Node]] = field(default_factory=dict)

    @cached_property
    def columns(self) -> Tensor:
        """Largest magnitude of each column, over all weights, shape ``[channels]``."""
        found = [_weight(*place).abs().amax(0) for place in self.nodes.values()]
        return torch.stack(found).amax(0)

    def factor(self, channels: MinMaxObserver, alpha: float) -> Tensor:
        """What each channel is divided by."""
        low, high = channels.min_val.flatten(), channels.max_val.flatten()
        return smoothing_factor(torch.maximum(-low, high).clamp(min=0), self.columns, alpha)

    def known(self, key: str, params: Params) -> tuple[MinMaxObserver, MeanSquare] | None:
        """What was recorded of the tensor, None where channels were not asked for in time."""
        try:
            channels, squares = (params.statistic(key, what) for what in (CHANNELS, MEAN_SQUARE))
        except NotCalibrated:
            return None
        assert isinstance(channels, MinMaxObserver)
        assert isinstance(squares, MeanSquare)
        return channels, squares


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
        gain = self.min_gain
        number = isinstance(gain, (int, float)) and not isinstance(gain, bool)
        if not number or not 0.0 <= gain < math.inf:
            raise InvalidConfig(f"SmoothQuant(min_gain={gain!r}): expected a factor, 0 or more")

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
        groups = context.params.shared(self, lambda: self._groups(context.plan, context.params))
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
        self, context: PassContext, groups: dict[str, _Group], node: fx.Node, site: Site
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
        group = groups[key]
        factor = context.params.kept((self, key), lambda: group.factor(channels, self.alpha))
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

    def _groups(self, plan: QuantPlan, params: Params) -> dict[str, _Group]:
        """Key of a tensor -> who smooths it, over all graphs of the model."""
        groups: dict[str, _Group] = {}
        for gm, node, _, site in sites_with(self, plan, params.graphs()):
            groups.setdefault(site.inputs[0], _Group()).nodes[site.name] = gm, node
        return groups

    def settled(self, plan: QuantPlan, params: Params) -> dict[str, Transform | None]:
        """At each site that has it: itself, for good, where it lowers the noise enough.

        It does not where calibration recorded nothing of the channels.

        >>> from torch_quant.passes.base import NoParams
        >>> SmoothQuant(0.8, min_gain=1.5).settled(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        smoothed: set[str] = set()
        left: set[str] = set()
        for key, group in self._groups(plan, params).items():
            known = group.known(key, params)
            helps = known is not None and self._gain(*known, group, plan) >= self.min_gain
            (smoothed if helps else left).update(group.nodes)
        for_good = SmoothQuant(self.alpha)
        # A site may read one tensor in one graph and another in the next.
        return {site: None if site in left else for_good for site in smoothed | left}

    def _gain(
        self, channels: MinMaxObserver, squares: MeanSquare, group: _Group, plan: QuantPlan
    ) -> float:
        """By what factor the noise becomes smaller; infinite where there is none, 0 if unknown."""
        low, high = channels.min_val.flatten(), channels.max_val.flatten()
        mean, rows = squares.mean, squares.rows
        factor = group.factor(channels, self.alpha)
        entry = plan[next(iter(group.nodes))]
        formats = [each for each in (entry.activation, entry.weight) if each is not None]
        if entry.activation is None or not all(each.element.integer for each in formats):
            return 0.0
        bits = entry.activation.element.bits
        weight_bits = entry.weight.element.bits if entry.weight else 0
        plain = (_weight(*place) for place in group.nodes.values())
        before = predicted_noise(low, high, mean, rows, plain, bits, weight_bits)
        smooth = (_weight(*place) * factor for place in group.nodes.values())
        low, high, mean = low / factor, high / factor, mean / factor.square()
        after = predicted_noise(low, high, mean, rows, smooth, bits, weight_bits)
        return before / after if after else math.inf


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


def _weight(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    weight = argument(node, 1)
    assert isinstance(weight, fx.Node)
    return evaluate(gm, weight).detach()
