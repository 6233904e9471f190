"""SmoothQuant: move the spread of an activation's channels into the weight that reads them.

A few channels of a transformer's activations are far larger than the rest, and the one scale that a
kernel allows has to cover them. Dividing channel ``j`` by ``s_j``, and multiplying column ``j`` of
the weight by it, changes nothing in float and evens out the channels:

    s_j = max|x_j| ** alpha / max|w_j| ** (1 - alpha)

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023, equation 4. Layers that read the same tensor share ``s``, and ``max|w_j|`` is taken
over all of them, so that the tensor is quantized once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.sites import find_sites
from torch_quant.model import CapturedModel
from torch_quant.passes.constants import evaluate
from torch_quant.passes.smooth_inputs import smoothed_key
from torch_quant.state import CHANNELS, QuantState
from torch_quant.statistics import MinMaxObserver

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
    """The sites that read one tensor smoothed alike.

    Args:
        key: of the tensor.
        alpha: as in the formula.
        columns: site -> largest magnitude of each column of its weight.
    """

    key: str
    alpha: float
    columns: dict[str, Tensor] = field(default_factory=dict)


class SmoothQuant:
    """Factors and grids of the sites that a plan smooths.

    Args:
        captured: the model's graphs.
        plan: says which sites, and how strongly.
        state: ranges from calibration, those of channels among them.
    """

    def __init__(self, captured: CapturedModel, plan: QuantPlan, state: QuantState) -> None:
        self._captured, self._plan, self._state = captured, plan, state

    def factor(self, entry: SitePlan, key: str) -> Tensor:
        """What the channels of a site's input are divided by, shape ``[channels]``.

        Args:
            entry: the site.
            key: of its input; a site may read different tensors in different graphs.

        Raises:
            NotCalibrated: calibration recorded no channels there, or not from the start.
            InvalidConfig: the site cannot be smoothed.
        """
        assert entry.smooth is not None
        group = self._groups.get(smoothed_key(key, entry.smooth))
        if group is None or entry.name not in group.columns:
            raise InvalidConfig(
                f"{entry.name} cannot be smoothed: only linear layers whose input's last dimension "
                'is as it was computed; set "smooth" to null there'
            )
        return self._factor(group)

    def grid(self, key: str, spec: QuantSpec) -> QParams:
        """The grid of a tensor, smoothed or not; raises as :meth:`factor` does."""
        if key not in self._groups:
            return self._state.qparams(key, spec)
        group = self._groups[key]
        low, high = self._extremes(group.key)
        factor = self._factor(group)
        return choose_qparams((low / factor).amin(), (high / factor).amax(), spec)

    def _factor(self, group: _Group) -> Tensor:
        low, high = self._extremes(group.key)
        columns = torch.stack(list(group.columns.values())).amax(0)
        return smoothing_factor(torch.maximum(-low, high).clamp(min=0), columns, group.alpha)

    @cached_property
    def _groups(self) -> dict[str, _Group]:
        """Smoothed key -> who reads it, over all graphs."""
        groups: dict[str, _Group] = {}
        if all(entry.smooth is None for entry in self._plan.values()):
            return groups  # without a walk over all graphs
        for prepared in self._captured.graphs():
            for node, _, site in find_sites(prepared.canonical.graph):
                entry = self._plan.get(site.name)
                if entry is None or not entry.quantized or entry.smooth is None:
                    continue
                if site.smoothable:
                    key = smoothed_key(site.inputs[0], entry.smooth)
                    group = groups.setdefault(key, _Group(site.inputs[0], entry.smooth))
                    group.columns[site.name] = _columns(prepared.canonical, node)
        return groups

    def _extremes(self, key: str) -> tuple[Tensor, Tensor]:
        whole, channels = self._state.find(key), self._state.find(key, CHANNELS)
        if not isinstance(channels, MinMaxObserver) or whole is None:
            raise NotCalibrated(
                f"the channels of {key} were not recorded: give QConfig(smooth=...) to the "
                "quantizer before running quantizer.calib(model)"
            )
        if channels.batches != whole.batches:
            raise NotCalibrated(
                f"the channels of {key} were recorded in {channels.batches} of {whole.batches} "
                "batches only: QConfig(smooth=...) came after calibration had begun; calibrate anew"
            )
        return channels.min_val.flatten(), channels.max_val.flatten()


def _columns(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return evaluate(gm, weight).detach().abs().amax(0)
