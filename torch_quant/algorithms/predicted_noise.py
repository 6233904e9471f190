"""What rounding is predicted to add to the outputs of the layers that read one tensor.

Rounding adds a variance of ``step^2 / 12`` to each element, so with ``y = x W^T`` the sum over the
outputs of a row is

    sum_j (step_x^2 / 12 + clip_j) sum_o w_oj^2  +  sum_o step_o^2 / 12 * sum_j E[x_j^2]

of which ``E[x_j^2]`` is recorded too. ``clip_j`` is what values lose that lie beyond all that were
seen: what evens out channels brings each near the end of the one range, and the largest of few
rows says little of the next. With the exponential tail that a normal distribution has there, one
more row than ``n`` of which the largest was ``r_j`` exceeds a limit ``L`` with a probability of
``exp((r_j - L) / t_j) / n``, by an excess of mean square ``2 t_j^2``; ``t_j = r_j / (2 ln n)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.methods import Transform
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.ops.arguments import argument
from torch_quant.passes.base import Params
from torch_quant.passes.constants import evaluate
from torch_quant.passes.transform import sites_with
from torch_quant.statistics import CHANNELS, MEAN_SQUARE, MeanSquare, MinMaxObserver

__all__ = ["Channels", "Readers", "check_gain", "gains", "predicted_noise"]


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


def check_gain(transform: Transform, gain: Any) -> None:
    """Raise :class:`InvalidConfig` unless ``gain`` is a factor that noise may be lowered by.

    >>> from torch_quant import SmoothQuant
    >>> check_gain(SmoothQuant(), 1.25)
    """
    number = isinstance(gain, (int, float)) and not isinstance(gain, bool)
    if not number or not 0.0 <= gain < math.inf:
        name = type(transform).__name__
        raise InvalidConfig(f"{name}(min_gain={gain!r}): expected a factor, 0 or more")


@dataclass
class Channels:
    """What calibration saw of a tensor.

    Args:
        low: smallest value of each channel, shape ``[channels]``.
        high: the largest.
        squares: mean square of each channel.
        rows: how many vectors were seen.
    """

    low: Tensor
    high: Tensor
    squares: Tensor
    rows: int

    @classmethod
    def of(cls, key: str, params: Params) -> Channels | None:
        """Of the tensor ``key``; None where channels were not asked for in time."""
        try:
            ends, squares = (params.statistic(key, what) for what in (CHANNELS, MEAN_SQUARE))
        except NotCalibrated:
            return None
        assert isinstance(ends, MinMaxObserver)
        assert isinstance(squares, MeanSquare)
        low, high = ends.min_val.flatten(), ends.max_val.flatten()
        return cls(low, high, squares.mean, squares.rows)

    @property
    def reach(self) -> Tensor:
        """Largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high).clamp(min=0)

    def divided(self, by: Tensor) -> Channels:
        """The same of channels divided by these numbers, which are above 0."""
        squares = self.squares / by.square()
        return Channels(self.low / by, self.high / by, squares, self.rows)

    def noise(self, weights: Iterable[Tensor], bits: int, weight_bits: int) -> float:
        """See :func:`predicted_noise`."""
        return predicted_noise(
            self.low, self.high, self.squares, self.rows, weights, bits, weight_bits
        )


@dataclass
class Readers:
    """The sites that read one tensor and are treated alike.

    Args:
        nodes: site -> where it stands, so that its weight can be computed.
    """

    nodes: dict[str, tuple[fx.GraphModule, fx.Node]] = field(default_factory=dict)

    @classmethod
    def found(cls, transform: Transform, plan: QuantPlan, params: Params) -> dict[str, Readers]:
        """Key of a tensor -> those that have ``transform``, over all graphs of the model."""
        groups: dict[str, Readers] = {}
        for gm, node, _, site in sites_with(transform, plan, params.graphs()):
            groups.setdefault(site.inputs[0], cls()).nodes[site.name] = gm, node
        return groups

    @cached_property
    def columns(self) -> Tensor:
        """Largest magnitude of each column, over all weights, shape ``[channels]``."""
        return torch.stack([weight.abs().amax(0) for weight in self.weights()]).amax(0)

    def weights(self) -> Iterable[Tensor]:
        """Each evaluated when it is asked for, ``[outputs, channels]``."""
        for gm, node in self.nodes.values():
            weight = argument(node, 1)
            assert isinstance(weight, fx.Node)
            yield evaluate(gm, weight).detach()

    def bits(self, plan: QuantPlan) -> tuple[int, int] | None:
        """Of activations and weights, 0 for float weights; None unless they are integers."""
        entry = plan[next(iter(self.nodes))]
        formats = [each for each in (entry.activation, entry.weight) if each is not None]
        if entry.activation is None or not all(each.element.integer for each in formats):
            return None
        return entry.activation.element.bits, entry.weight.element.bits if entry.weight else 0


def gains(
    groups: dict[str, Readers],
    plan: QuantPlan,
    params: Params,
    gain: Callable[[Readers, Channels, int, int], tuple[float, float]],
) -> dict[str, float]:
    """By what factor noise becomes smaller at each site, 0 where that is not known.

    A site may read one tensor in one graph and another in the next: the least counts.

    Args:
        groups: key of a tensor -> who reads it.
        plan: has their formats.
        params: has what was recorded.
        gain: gives the noise before and after, of readers, what they read, and bits.
    """
    found: dict[str, float] = {}
    for key, readers in groups.items():
        channels, bits, made = Channels.of(key, params), readers.bits(plan), 0.0
        if channels is not None and bits is not None:
            before, after = gain(readers, channels, *bits)
            made = before / after if after else math.inf
        for name in readers.nodes:
            found[name] = min(made, found.get(name, math.inf))
    return found
