"""The mean that a convolution reads at each element of its window."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_quant.core.documents import shown
from torch_quant.core.window import Window
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.statistics.base import check_observable, entry, register_statistic
from torch_quant.statistics.moments import ChannelMean, Moments, require_finite_squares

__all__ = ["WindowMean", "mean_of", "window_mean"]


def window_mean(window: Window) -> str:
    """What a statistic is for: the mean of a channel at each element of a window.

    >>> window_mean(Window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 8))
    'window_mean[3x3, stride=2x2, before=1x1, after=1x1]'
    """
    return f"window_mean[{replace(window, groups=1)}]"


def mean_of(label: str) -> ChannelMean:
    """An empty statistic whose ``label`` this is.

    Raises:
        InvalidConfig: it is of none.

    >>> mean_of("-1").purpose, mean_of("-3, 3x3, before=1x1").purpose
    ('channel_mean[-1]', 'window_mean[3x3, before=1x1]')
    """
    axis, _, text = label.partition(", ")
    if axis not in ("-1", "-2", "-3", "-4"):
        raise InvalidConfig(f'axis {shown(axis)}; expected "-1" to "-4"')
    if not text:
        return ChannelMean(int(axis))
    found = WindowMean(Window.read(text))
    if found.axis != int(axis):
        dims = len(found.window.kernel)
        raise InvalidConfig(f"a window of {dims} dimensions along axis {axis}")
    return found


@register_statistic
class WindowMean(ChannelMean):
    """The mean of each channel at each element of a window, over images of that over their windows.

    Zeros of the padding count: of small images, some elements read little else. ``mean`` has the
    shape ``[channels * elements]``, in the order of a weight's.

    Args:
        window: where the windows lie.

    >>> means = WindowMean(Window((3,), (2,), (1,), (1,), (1,)))
    >>> means.observe(torch.tensor([[[1.0, 5.0]]]))  # one window: 0 of the padding, then these
    >>> means.mean.tolist()
    [0.0, 1.0, 5.0]
    """

    name = "window_mean"

    def __init__(self, window: Window | None = None) -> None:
        self.window = replace(window or Window((1,), (1,), (0,), (0,), (1,)), groups=1)
        super().__init__(-1 - len(self.window.kernel))

    @property
    def purpose(self) -> str:
        return window_mean(self.window)

    @property
    def label(self) -> str:
        return f"{self.axis}, {self.window}"

    @property
    def channels(self) -> int:
        return self.sums.numel() // self.window.elements

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        check_observable(x)
        dims = len(self.window.kernel)
        if x.dim() <= dims:
            raise QuantError(
                f"a tensor of shape {tuple(x.shape)} holds no images of {dims} dimensions"
            )
        images = x.detach().to(torch.float32).reshape(-1, *x.shape[-dims - 1 :])
        found = self._of_all(images.sum(0))
        if self.batches and found.numel() != self.sums.numel():
            raise QuantError(f"images of {len(images[0])} channels after such of {self.channels}")
        sums = self.sums.to(found.device) + found if self.batches else found
        if not bool(torch.isfinite(sums).all()):
            require_finite_squares(x, saturates=True)
            sums = torch.nan_to_num(sums)
        self.sums = sums
        self.rows, self.batches = self.rows + len(images), self.batches + 1

    def _of_all(self, image: Tensor) -> Tensor:
        """The means over the windows of an image ``[channels, *spatial]``."""
        window = self.window
        places = window.places(tuple(image.shape[1:]))
        sides = zip(reversed(window.before), reversed(window.after), strict=True)
        padded = pad(image, list(itertools.chain.from_iterable(sides)))
        means = []
        for element in itertools.product(*map(range, window.kernel)):
            taken = padded
            for axis, (at, count) in enumerate(zip(element, places, strict=True), 1):
                step, first = window.stride[axis - 1], at * window.dilation[axis - 1]
                taken = taken.narrow(axis, first, (count - 1) * step + 1)
                taken = taken[(slice(None),) * axis + (slice(None, None, step),)]
            means.append(taken.flatten(1).mean(1))
        return torch.stack(means, 1).flatten()

    def _empty(self) -> WindowMean:
        return type(self)(self.window)

    def _merge(self, other: Moments) -> None:
        if not isinstance(other, WindowMean) or other.window != self.window:
            raise InvalidConfig("means of other windows cannot be merged")
        super()._merge(other)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"window": str(self.window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        window = Window.read(entry(state, "window", str))
        super().load_state_dict(state)
        if self.axis != -1 - len(window.kernel) or self.sums.numel() % window.elements:
            raise InvalidConfig(
                f"'sums' has {self.sums.numel()} numbers, and 'axis' is {self.axis}: they are not "
                f"of the window {window}"
            )
        self.window = window
