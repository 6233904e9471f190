"""Second moments of the patches of an image that a convolution multiplies by its weight.

A convolution is a linear layer that reads a patch of the image for each of its results. So the
error of its weight counts as a linear layer's does (:mod:`torch_quant.statistics.moments`), with
the moments of patches; those of each group of channels are a matrix of their own (Frantar, Singh
and Alistarh, "Optimal Brain Compression", 2022, section 4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.window import Window
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.statistics._symmetric import SymmetricSums, lower_sums
from torch_quant.statistics.base import (
    Statistic,
    check_observable,
    count_of,
    entry,
    register_statistic,
)
from torch_quant.statistics.moments import check_sums, require_finite_squares

__all__ = ["Patches", "patches"]

_FEWEST, _SHARE = 64, 4
"""Of an image, so many patches are taken, or one for each four of a patch's numbers if these are
more: what is left out costs time, and neighbours say much the same."""


def patches(window: Window) -> str:
    """What a statistic is for: the second moments of the patches under a window.

    >>> patches(Window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1)))
    'patches[3x3, stride=2x2, before=1x1, after=1x1]'
    """
    return f"patches[{window}]"


@register_statistic
class Patches(SymmetricSums, Statistic):
    """``mean(p p^T)`` of the patches ``p`` of images: ``[groups, n, n]``.

    ``n`` is the channels of a group times the elements of the window. Of an image with many
    windows, some are taken, the same in every image of a size: 64, or a quarter of ``n``.

    Args:
        window: where they lie.

    >>> pairs = Patches(Window((2,), (1,), (0,), (0,), (1,)))
    >>> pairs.observe(torch.tensor([[[1.0, 2.0, 3.0]]]))  # patches (1, 2) and (2, 3)
    >>> pairs.mean.tolist(), pairs.rows
    ([[[2.5, 4.0], [4.0, 6.5]]], 2)
    """

    name = "patches"
    in_place = False

    def __init__(self, window: Window | None = None) -> None:
        super().__init__()
        self.window = window or Window((1,), (1,), (0,), (0,), (1,))
        self.rows = 0
        self.sums = torch.zeros(0, 0, 0)

    @property
    def mean(self) -> Tensor:
        """The sums over the number of patches, float32."""
        return self.sums / max(self.rows, 1)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        check_observable(x)
        found = self._patches(x.detach().to(torch.float32))
        if self.batches and found.shape[::2] != self._sums.shape[::2]:
            raise QuantError(
                f"patches of {found.shape[2]} numbers after such of {self._sums.shape[2]}"
            )
        before = self._sums.to(found.device) if self.batches else None
        if len(found) == 1:
            sums = lower_sums(None if before is None else before[0], found[0])[None]
        else:
            sums = found.transpose(1, 2) @ found
            sums = sums if before is None else before + sums
        # No product is larger than two squares.
        if not bool(torch.isfinite(sums.diagonal(dim1=1, dim2=2)).all()):
            require_finite_squares(x)
        if len(found) == 1:
            self._store(sums)
        else:
            self.sums = sums
        self.rows, self.batches = self.rows + found.shape[1], self.batches + 1

    def _patches(self, x: Tensor) -> Tensor:
        """``[groups, patches, n]`` of images ``[..., channels, *spatial]``."""
        window, dims = self.window, len(self.window.kernel)
        if x.dim() <= dims or x.shape[-dims - 1] % window.groups:
            raise QuantError(
                f"a tensor of shape {tuple(x.shape)} holds no images of {dims} dimensions whose "
                f"channels are {window.groups} groups"
            )
        images = x.reshape(-1, *x.shape[-dims - 1 :])
        count, channels, *spatial = images.shape
        places = window.places(tuple(spatial))
        chosen = self._chosen(math.prod(places), channels // window.groups)
        index, inside = _index(window, places, tuple(spatial), chosen)
        index = index.flatten().to(images.device).expand(count, channels, -1)
        taken = images.flatten(2).gather(2, index).unflatten(2, (-1, len(chosen)))
        if inside is not None:
            taken *= inside.to(taken)
        # [images, channels, elements, patches]: what one element has in all patches lies together.
        together = taken.permute(1, 2, 0, 3).reshape(window.groups, -1, count * len(chosen))
        found: Tensor = together.transpose(1, 2)
        return found

    def _chosen(self, places: int, channels: int) -> Tensor:
        """Which of so many windows are taken."""
        most = max(_FEWEST, channels * self.window.elements // _SHARE)
        if places <= most:
            return torch.arange(places)
        order = torch.randperm(places, generator=torch.Generator().manual_seed(0))
        return order[:most].sort().values

    def __deepcopy__(self, memo: Any) -> Patches:
        copied = type(self)(self.window)
        copied.batches, copied.rows = self.batches, self.rows
        copied._share(self)
        return copied

    def _merge(self, other: Patches) -> None:
        if other.window != self.window or other.sums.shape != self.sums.shape:
            raise InvalidConfig("patches of other windows or channels cannot be merged")
        self.sums, self.rows = self.sums + other.sums, self.rows + other.rows

    def state_dict(self) -> dict[str, Any]:
        window = {name: list(x) if isinstance(x, tuple) else x
                  for name, x in asdict(self.window).items()}  # fmt: skip
        return {"batches": self.batches, "rows": self.rows, "sums": self.sums, "window": window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        batches, rows, sums = count_of(state), count_of(state, "rows"), entry(state, "sums", Tensor)
        window = _window(entry(state, "window", dict))
        square = sums.dim() == 3 and sums.shape[1] == sums.shape[2]
        fits = square and sums.shape[1] % window.elements == 0
        fits = fits and (not sums.numel() or len(sums) == window.groups)
        if sums.dtype != torch.float32 or not fits:
            raise InvalidConfig(
                f"'sums' is of shape {tuple(sums.shape)} and {sums.dtype}; expected [groups, n, n] "
                f"and torch.float32, for the window {window}"
            )
        check_sums(sums, rows, batches)
        self.window, self.batches, self.rows, self.sums = window, batches, rows, sums


def _window(data: Mapping[str, Any]) -> Window:
    """Undo what :meth:`Patches.state_dict` makes of a window."""
    names = [each.name for each in fields(Window)]
    if sorted(data) != sorted(names):
        raise InvalidConfig(f"'window' is {data!r}; expected {', '.join(names)}")
    *sides, groups = (data[name] for name in names)
    plain = all(isinstance(side, list) and len(side) == len(sides[0]) for side in sides)
    numbers = [groups, *itertools.chain.from_iterable(sides)] if plain else []
    least = [1, *(int(name not in ("before", "after")) for name in names[:-1] for _ in sides[0])]
    if not sides[0] or not numbers or any(
        type(x) is not int or not low <= x < 2**31 for x, low in zip(numbers, least, strict=True)
    ):  # fmt: skip
        raise InvalidConfig(f"'window' is {data!r}; expected sizes for each dimension")
    kernel, stride, before, after, dilation = map(tuple, sides)
    return Window(kernel, stride, before, after, dilation, groups)


def _index(
    window: Window, places: tuple[int, ...], image: tuple[int, ...], chosen: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Where the elements of the chosen windows lie in the flat image, and which lie inside of it.

    Returns:
        Their places, ``[elements, windows]``, at the border for those that lie outside; and which
        do not, same shape, None if all are inside.
    """
    rest, element = chosen, torch.arange(window.elements)[:, None]
    index = torch.zeros(window.elements, len(chosen), dtype=torch.int64)
    inside, step = torch.ones_like(index, dtype=torch.bool), 1
    sides = zip(places, image, window.kernel, window.stride, window.before, window.dilation,
                strict=True)  # fmt: skip
    for count, size, kernel, stride, before, dilation in reversed(list(sides)):
        at = rest % count * stride + element % kernel * dilation - before
        inside &= (at >= 0) & (at < size)
        index += at.clamp_(0, size - 1) * step
        rest, element, step = rest // count, element // kernel, step * size
    return index, None if bool(inside.all()) else inside
