"""Outlier channels split: what one channel has more than all others need not cost them precision.

One scale covers all channels of an activation, so one channel with values ten times those of the
rest takes 3 of 8 bits from all. With ``k`` copies of channel ``j``, each of a ``k``-th of it, the
layer that reads them computes the same with the weight's column ``j`` at each copy:

    w_j x_j = sum over k copies of w_j (x_j / k)

and the range ends at ``max|x_j| / k``. Unlike smoothing it leaves the weight as it is, whose own
scales would have to cover a larger column. The channel itself keeps the precision that it had.

Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel
Splitting", 2019, halve weights or activations that way. Here the copies go to the channels with the
largest values, one by one, until ``share`` of all channels are copies. Where functions of single
elements, such as GELU, lie between the layer and another linear layer, that one computes the
copies, at no more cost than those rows take, by rows of its weight that are repeated:

    linear -> gelu -> linear   becomes   linear(more rows) -> gelu -> mul(1 / k) -> linear

Else ``index_select`` copies them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from torch_quant.algorithms.predicted_noise import Channels, Readers, check_gain, gains
from torch_quant.core.granularity import PerChannel
from torch_quant.core.methods import Transform, Wanted, register_transform
from torch_quant.core.plan import QuantPlan, is_share
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.graph.sites import KEY, Site, key_of, local_name, source
from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.passes.base import Params, PassContext
from torch_quant.passes.constants import new_constant
from torch_quant.passes.repeat_channels import computing_layers, picked_channels, repeat_channels
from torch_quant.passes.transform import sites_with
from torch_quant.statistics import (
    CHANNELS,
    MEAN_SQUARE,
    RANGE,
    MeanSquare,
    MinMaxObserver,
    Statistic,
    channel_mean,
)
from torch_quant.statistics.moments import Moments

__all__ = ["OutlierSplit", "copies_of", "grown_sizes"]

_BLOCK = 8
"""Kernels multiply so many channels at once: what is added fills whole blocks, where a share of
the channels is half of one at least."""


_PART = "split_part"
"""What the constant is called by which copies are multiplied, behind the name of the layer."""


def grown_sizes(tensors: Mapping[str, Tensor]) -> set[tuple[int, int]]:
    """How many channels tensors of a quantized model had, and have with their copies.

    Args:
        tensors: of the model, by name.

    >>> grown_sizes({"down.split_part": torch.tensor([0.5, 1.0, 0.5])})
    {(2, 3)}
    """
    names = re.compile(rf"(.*\.)?{_PART}(_\d+)?")
    return {
        (round(float(part.sum())), len(part))  # the parts of each channel add up to 1
        for name, part in tensors.items()
        if names.fullmatch(name)
    }


def copies_of(reach: Tensor, extra: int) -> Tensor:
    """How often each channel stands, so that the largest share of one is as small as can be.

    Args:
        reach: largest magnitude of each channel, shape ``[channels]``.
        extra: how many channels are added.

    Returns:
        int64 of shape ``[channels]``, 1 and more, whose sum is ``channels + extra``.

    >>> copies_of(torch.tensor([1.0, 12.0, 4.0, 2.0]), 2).tolist()
    [1, 3, 1, 1]
    """
    copies, share = torch.ones(reach.shape, dtype=torch.int64), reach.double().clone()
    for _ in range(extra):
        largest = int(share.argmax())
        copies[largest] += 1
        share[largest] = float(reach[largest]) / int(copies[largest])
    return copies


@register_transform
@dataclass(frozen=True)
class OutlierSplit(Transform):
    """Give channels that are far larger than the rest several copies, each of a part of them.

    It serves linear layers whose activations have one scale, and has to be asked for before
    calibrating. After SmoothQuant it splits what that leaves.

    Args:
        share: how many channels are added, of those that there are; in whole blocks of eight where
            these are.
        min_gain: split only where layers before compute the copies, and where the noise of rounding
            is predicted to become smaller by this factor, from what calibration recorded; 0
            splits everywhere. Where SmoothQuant has a ``min_gain`` too, a site gets what gains
            most.

    Raises:
        InvalidConfig: ``share`` is no number above 0, or above 1, or ``min_gain`` is negative.

    >>> OutlierSplit(0.05).to_dict()
    {'name': 'outlier_split', 'share': 0.05, 'min_gain': 0.0}
    """

    name = "outlier_split"
    trains = True

    share: float = 1 / 64
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        check_gain(self, self.min_gain)
        if isinstance(self.share, bool) or not is_share(self.share) or not self.share:
            raise InvalidConfig(
                f"OutlierSplit(share={self.share!r}): expected a number above 0, and 1 at most"
            )

    def refusal(self, site: Site) -> str:
        if site.smoothable:
            return ""
        return (
            "only linear layers can read copies of channels whose input's last dimension is as it "
            "was computed"
        )

    @property
    def optional(self) -> bool:
        return self.min_gain > 0

    @property
    def condition(self) -> str:
        if not self.optional:
            return ""
        return (
            "only where linear layers before compute the copies, and the noise is predicted to "
            f"fall by a factor of {self.min_gain:g}, from channels that calibration recorded"
        )

    def statistics(self, site: Site) -> Wanted:
        wanted: dict[str, Callable[[], Statistic]] = {}
        wanted[CHANNELS] = partial(MinMaxObserver, PerChannel(-1))
        if self.optional:
            wanted[MEAN_SQUARE] = MeanSquare
        return {site.inputs[0]: wanted}

    def settled(self, plan: QuantPlan, params: Params) -> Mapping[str, Transform | None]:
        """At each site that has it: itself, for good, where it lowers the noise enough.

        >>> from torch_quant.passes.base import NoParams
        >>> OutlierSplit(min_gain=1.5).settled(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        split, found = OutlierSplit(self.share), self.gains(plan, params).items()
        return {site: split if gain >= self.min_gain else None for site, gain in found}

    def gains(self, plan: QuantPlan, params: Params) -> Mapping[str, float]:
        """By what factor it lowers the noise of rounding at each site; 0 where it costs time.

        >>> from torch_quant.passes.base import NoParams
        >>> OutlierSplit(min_gain=1.5).gains(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        found = gains(Readers.found(self, plan, params), plan, params, self._noise)
        for _, _, _, site in sites_with(self, plan, params.graphs()):
            if not site.repeatable:
                found[site.name] = 0.0
        return found

    def hindered(self, plan: QuantPlan, params: Params) -> Collection[str]:
        """Sites for which no quantized layers would compute the copies, so that these cost time.

        >>> from torch_quant.passes.base import NoParams
        >>> OutlierSplit(min_gain=1.5).hindered(QuantPlan(), NoParams())  # nothing asks for it
        set()
        """
        readers: dict[fx.Node, list[fx.Node]] = {}
        for _, node, *_ in sites_with(self, plan, params.graphs()):
            readers.setdefault(argument(node, 0), []).append(node)
        found = ((nodes, computing_layers(x, nodes, plan)) for x, nodes in readers.items())
        return {key_of(node) for nodes, layers in found if not layers for node in nodes}

    def _noise(
        self, readers: Readers, channels: Channels, bits: int, weight_bits: int
    ) -> tuple[float, float]:
        """What rounding adds without it, and with it.

        All copies of a channel are rounded alike, so their errors add up: a channel is rounded as
        if it was divided by the number of its copies and its column multiplied. But the weight
        is rounded as it is.
        """
        copies = torch.bincount(self._index(channels.low, channels.high)).float()
        whole = channels.noise(readers.weights(), bits, weight_bits)
        columns = (weight * copies for weight in readers.weights())
        after = channels.divided(copies).noise(columns, bits, 0)
        return whole, whole - channels.noise(readers.weights(), bits, 0) + after

    def apply(self, context: PassContext) -> int:
        """Split the inputs of every site that the plan splits so.

        Raises:
            NotCalibrated: calibration recorded no channels there, or not from the start.
        """
        readers: dict[fx.Node, list[fx.Node]] = {}
        for _, node, *_ in sites_with(self, context.plan, [context.gm]):
            readers.setdefault(argument(node, 0), []).append(node)
        for x, nodes in readers.items():
            self._split(context, x, nodes)
        return sum(map(len, readers.values()))

    def _split(self, context: PassContext, x: fx.Node, readers: list[fx.Node]) -> None:
        key, first = key_of(source(x)), min(readers)
        channels = context.statistic(key, CHANNELS)
        assert isinstance(channels, MinMaxObserver)
        low, high = channels.min_val.flatten(), channels.max_val.flatten()
        recorded = context.plan[key_of(first)].inputs[0]
        index = context.params.kept((self, recorded), lambda: self._index(low, high))
        part = _part(index)
        local = local_name(first)
        repeated = repeat_channels(context, x, readers, index, f"{local}.split_index")
        made = f"{key}[split={self.share:g}]"
        if made not in context.derived:
            context.derive(made, self._known(context, key, index, part))
        factor = new_constant(context.gm, f"{local}.{_PART}", part, first)
        factor.meta["val"] = part
        with context.graph.inserting_before(first):
            mul = context.graph.call_function(torch.ops.aten.mul.Tensor, (repeated, factor))
        mul.meta = {**x.meta, **repeated.meta, KEY: made}
        for node in readers:
            name = f"{local_name(node)}.split_columns"
            columns = picked_channels(context, argument(node, 1), 1, index, node, name)
            set_arguments(node, {0: mul, 1: columns})

    def _index(self, low: Tensor, high: Tensor) -> Tensor:
        """Which channel stands where: all of them, and their further copies behind."""
        extra = max(1, round(self.share * len(low)))
        block = math.gcd(len(low), _BLOCK)
        if 2 * extra > block:
            extra = math.ceil(extra / block) * block
        copies = copies_of(torch.maximum(-low, high).clamp(min=0), extra)
        every = torch.arange(len(copies))
        return torch.cat([every, every.repeat_interleave(copies - 1)])

    def _known(
        self, context: PassContext, key: str, index: Tensor, part: Tensor
    ) -> Mapping[str, Statistic]:
        """What is known of the parts."""
        channels = context.statistic(key, CHANNELS)
        assert isinstance(channels, MinMaxObserver)
        both = channels.min_val.flatten(), channels.max_val.flatten()
        ends = torch.stack([each[index] * part for each in both])
        found: dict[str, Statistic] = {
            RANGE: MinMaxObserver(),
            CHANNELS: MinMaxObserver(PerChannel(-1)),
        }
        for each in found.values():
            each.observe(ends)
        try:
            means = context.statistic(key, channel_mean(-1))
        except NotCalibrated:
            return found
        assert isinstance(means, Moments)
        return {**found, channel_mean(-1): means.at(index).scaled(part)}

    def moved(
        self, statistics: Mapping[str, Statistic], key: str, params: Params
    ) -> Mapping[str, Statistic] | None:
        """Moments of the parts of each channel; of others nothing is known."""
        if not all(isinstance(each, Moments) for each in statistics.values()):
            return None
        index = params.kept((self, key), _not_split)
        found = {}
        for what, each in statistics.items():
            assert isinstance(each, Moments)
            empty = not each.rows  # no data reached the layer
            found[what] = each if empty else each.at(index).scaled(_part(index).to(each.sums))
        return found


def _part(index: Tensor) -> Tensor:
    """What share of its channel each has."""
    return 1 / torch.bincount(index)[index].float()


def _not_split() -> Tensor:
    raise QuantError("the weight of a layer is rounded before its input was split")
