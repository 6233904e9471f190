"""Bias correction: take what rounding a weight adds to the mean of an output off the bias.

The error ``E = W_q - W`` of a rounded weight adds ``E x`` to an output. Where inputs have a mean
that is not 0, as behind a ReLU, most of that is the same for every input: ``E mean(x)``. The bias
takes it back, and the layer computes as fast as before:

    b' = b - E mean(x)

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
section 4.2, with means from calibration where they take those of batch norms. A convolution reads
another mean at each of its taps, the more so the smaller an image is: zeros of the padding count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from torch_quant.core.functional import dequantize
from torch_quant.core.methods import Transform, Wanted, register_transform
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.window import Window
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.sites import Site, local_name
from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.table import OpPattern
from torch_quant.passes.base import Params, PassContext
from torch_quant.passes.constants import evaluate, name_of, new_constant
from torch_quant.passes.rounded import rounded_weight
from torch_quant.passes.transform import sites_with
from torch_quant.statistics import ChannelMean, WindowMean, channel_mean, window_mean

__all__ = ["BiasCorrection", "output_shift"]


def output_shift(error: Tensor, mean: Tensor) -> Tensor:
    """What an error of a weight adds to the mean of each output channel.

    Args:
        error: of the weight, shape ``[outputs, channels / groups, *kernel]``.
        mean: of each input channel, shape ``[channels]`` or ``[channels, 1]``, or of each at each
            element of the kernel, ``[channels, elements]``; channels go to the outputs in groups.

    Returns:
        Shape ``[outputs]``.

    >>> output_shift(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([10.0, 1.0])).tolist()
    [12.0, 1.0]
    >>> output_shift(torch.ones(2, 1, 3, 3), torch.tensor([1.0, 2.0])).tolist()  # depthwise
    [9.0, 18.0]
    """
    taps = error.reshape(*error.shape[:2], -1)
    means = (mean if mean.dim() == 2 else mean[:, None]).expand(-1, taps.shape[2])
    groups = len(means) // taps.shape[1]
    means = means.reshape(groups, -1, taps.shape[2]).repeat_interleave(len(taps) // groups, 0)
    return (taps * means).sum((1, 2))


@register_transform
@dataclass(frozen=True)
class BiasCorrection(Transform):
    """Take what rounding adds to the mean of each output channel off the bias.

    It serves linear layers and convolutions whose weight is rounded. It has to be asked for before
    calibrating.

    Args:
        always: whether a layer without a bias gets one, and it is an error if calibration has not
            recorded the means; else it is left out there.

    Raises:
        InvalidConfig: ``always`` is neither True nor False.

    >>> BiasCorrection().to_dict()
    {'name': 'bias_correction', 'always': True}
    """

    name = "bias_correction"
    last = True
    changes_input = False

    always: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.always, bool):
            raise InvalidConfig(f"BiasCorrection(always={self.always!r}): expected True or False")

    @property
    def optional(self) -> bool:
        return not self.always

    @property
    def condition(self) -> str:
        if self.always:
            return ""
        return "only layers with a bias, of whose input calibration recorded the means of channels"

    def refusal(self, site: Site) -> str:
        if site.channels is not None:
            return ""
        return "only linear layers and convolutions whose input's channels are as it was computed"

    def statistics(self, site: Site) -> Wanted:
        return {site.inputs[0]: {_purpose(site): partial(_statistic, site)}}

    def settled(self, plan: QuantPlan, params: Params) -> Mapping[str, Transform | None]:
        """At each site that has it: itself, for good, where there are means and a bias.

        >>> from torch_quant.passes.base import NoParams
        >>> BiasCorrection(always=False).settled(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        found: dict[str, Transform | None] = {}
        for _, node, pattern, site in sites_with(self, plan, params.graphs()):
            assert pattern.bias is not None
            # In another graph, the site may read its channels from elsewhere.
            if site.channels is None or argument(node, pattern.bias) is None:
                found[site.name] = None
                continue
            try:
                params.statistic(site.inputs[0], _purpose(site))
            except NotCalibrated:
                found[site.name] = None
            else:
                found.setdefault(site.name, BiasCorrection())
        return found

    def apply(self, context: PassContext) -> int:
        """Correct every site that the plan corrects, where its channels lie as recorded.

        Returns how many.

        Raises:
            NotCalibrated: calibration recorded no means there, or not from the start.
        """
        changed = 0
        for _, node, pattern, site in sites_with(self, context.plan, [context.gm]):
            entry = context.plan[site.name]
            if entry.weight is not None and site.channels is not None:
                _correct(context, node, pattern, site, entry)
                changed += 1
        return changed


def _window(site: Site) -> Window | None:
    """Where its taps read, if each may have another mean than the channel."""
    window = site.window
    return None if window is None or window.pointwise else window


def _purpose(site: Site) -> str:
    """What is recorded of the input."""
    assert site.channels is not None
    window = _window(site)
    return channel_mean(site.channels) if window is None else window_mean(window)


def _statistic(site: Site) -> ChannelMean:
    assert site.channels is not None
    window = _window(site)
    return ChannelMean(site.channels) if window is None else WindowMean(window)


def _means(context: PassContext, site: Site) -> ChannelMean:
    """Those of channels where a summary of an earlier version has no others, as it was meant."""
    assert site.channels is not None
    key = site.inputs[0]
    try:
        found = context.statistic(key, _purpose(site))
    except NotCalibrated as error:
        try:
            found = context.statistic(key, channel_mean(site.channels))
        except NotCalibrated:
            raise error from None
    assert isinstance(found, ChannelMean)
    return found


def _correct(
    context: PassContext, node: fx.Node, pattern: OpPattern, site: Site, entry: SitePlan
) -> None:
    assert pattern.weight is not None
    assert pattern.bias is not None
    known = _means(context, site)
    gm, place = context.gm, pattern.bias
    weight = evaluate(gm, argument(node, pattern.weight)).detach()
    error = dequantize(*rounded_weight(context, node, pattern, entry, weight)) - weight.float()
    mean = known.mean.to(weight.device)
    shift = output_shift(error, mean.reshape(known.channels, -1))
    bias = argument(node, place)
    name = f"{local_name(node)}.bias"
    if isinstance(bias, fx.Node):
        name, corrected = name_of(bias, name), evaluate(gm, bias).detach() - shift
    else:
        corrected = -shift
    if not bool(torch.isfinite(corrected).all()):  # means that float32 does not hold
        return
    corrected = corrected.to(weight.dtype)
    constant = new_constant(gm, name, corrected, node)
    constant.meta["val"] = corrected
    set_arguments(node, {place: constant})
