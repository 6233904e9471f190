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
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from torch_quant.core.granularity import PerChannel
from torch_quant.core.methods import Transform, Wanted, register_transform
from torch_quant.core.plan import is_share
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import KEY, Site, find_sites, local_name
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, expression, name_of, new_constant
from torch_quant.statistics import CHANNELS, RANGE, MinMaxObserver

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


@dataclass
class _Group:
    """The sites that read one tensor and smooth it alike.

    Args:
        columns: site -> largest magnitude of each column of its weight.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)


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

    Raises:
        InvalidConfig: ``alpha`` is not 0 to 1.

    >>> SmoothQuant(0.5).to_dict()
    {'name': 'smoothquant', 'alpha': 0.5}
    """

    name = "smoothquant"

    alpha: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not is_share(self.alpha):
            raise InvalidConfig(f"SmoothQuant(alpha={self.alpha!r}): expected a number from 0 to 1")

    def refusal(self, site: Site) -> str:
        if site.smoothable:
            return ""
        return (
            "only linear layers can be smoothed whose input's last dimension is as it was computed"
        )

    def statistics(self, site: Site) -> Wanted:
        return {site.inputs[0]: {CHANNELS: partial(MinMaxObserver, PerChannel(-1))}}

    def apply(self, context: PassContext) -> int:
        """Smooth every site that the plan smooths so.

        Raises:
            NotCalibrated: calibration recorded no channels there, or not from the start.
            InvalidConfig: another transform has changed the input before.
        """
        groups = context.params.shared(self, lambda: self._groups(context))
        changed = 0
        smoothed: dict[fx.Node, tuple[fx.Node, Tensor]] = {}
        floats: dict[str, Tensor] = {}
        for node, _, site in list(find_sites(context.graph)):
            entry = context.plan[site.name]
            if not entry.quantized or self not in entry.transforms:
                continue
            x, weight = node.args[:2]
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
            if entry.weight is None:  # it stays in float: computed once and for all
                product = expression(context.gm, scaled)
                if product not in floats:
                    floats[product] = evaluate(context.gm, scaled)
                name = name_of(weight, f"{local}.weight")
                scaled = new_constant(context.gm, name, floats[product], node)
                scaled.meta |= {k: v for k, v in weight.meta.items() if k == "val"}
            node.update_arg(0, mul)
            node.update_arg(1, scaled)
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
        columns = torch.stack(list(groups[key].columns.values())).amax(0)
        factor = smoothing_factor(torch.maximum(-low, high).clamp(min=0), columns, self.alpha)
        made = f"{key}[smooth={self.alpha:g}]"
        if made not in context.derived:
            ends = torch.stack([low / factor, high / factor])
            found = {RANGE: MinMaxObserver(), CHANNELS: MinMaxObserver(PerChannel(-1))}
            for each in found.values():
                each.observe(ends)
            context.derive(made, found)
        x = node.args[0]
        assert isinstance(x, fx.Node)
        name = f"{local_name(node)}.smooth_inverse"
        inverse = new_constant(context.gm, name, 1 / factor, node)
        inverse.meta["val"] = 1 / factor
        with context.graph.inserting_before(node):
            mul = context.graph.call_function(torch.ops.aten.mul.Tensor, (x, inverse))
        mul.meta = {**x.meta, KEY: made}
        return mul, factor

    def _groups(self, context: PassContext) -> dict[str, _Group]:
        """Key of a tensor -> who smooths it, over all graphs of the model."""
        groups: dict[str, _Group] = {}
        for gm in context.params.graphs():
            for node, _, site in find_sites(gm.graph):
                entry = context.plan.get(site.name)
                if entry is None or not entry.quantized or self not in entry.transforms:
                    continue
                group = groups.setdefault(site.inputs[0], _Group())
                group.columns[site.name] = _columns(gm, node)
        return groups


def _columns(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return evaluate(gm, weight).detach().abs().amax(0)
