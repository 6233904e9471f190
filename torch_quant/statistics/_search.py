"""The search for a clipping range: the same for every cost that a histogram can be given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from torch_quant.core.granularity import PerChannel
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.statistics._bins import Bins

__all__ = ["Cost", "Range", "best_range", "grids", "shrink"]

Range = tuple[Tensor, Tensor]
Cost = Callable[[Tensor, Tensor], Tensor]
"""Maps candidate ranges, ``low`` and ``high`` of ``[channels, k]``, to costs ``[channels, k]``."""

_STEP = 0.75
_COARSE = torch.arange(16.0)  # the range times 1 down to 0.013
_AROUND = torch.tensor([0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0])  # the best so far wins a tie
_ROUNDS = (_COARSE, _AROUND / 4, _AROUND / 16, _AROUND / 64)  # the last: 0.5 percent apart
_MOST_LEVELS = 256
_ELEMENTS = 2**16  # of a temporary, about: it should stay in the cache


def grids(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """The scales of many candidate ranges at once, ``[channels, k]``, flattened to one axis."""
    flat = dataclasses.replace(spec, granularity=PerChannel(0))
    return choose_qparams(low.flatten(), high.flatten(), flat)


def shrink(low: Tensor, high: Tensor, symmetric: bool, cost: Cost) -> Range:
    """The cheapest of ``[a * low, b * high]`` with ``0 < a, b <= 1``, and ``a == b`` if symmetric.

    Coarse to fine, the two ends together, on a geometric grid: no descent that could stop halfway.
    The whole range is a candidate, so the result never costs more. All shapes ``[channels]``.
    """
    best = torch.ones(len(low), 1, 2)
    for powers in _ROUNDS:
        factors = _STEP**powers
        same = factors[:, None].expand(-1, 2)
        pairs = same if symmetric else torch.cartesian_prod(factors, factors)
        ratios = (best * pairs).clamp(max=1.0)
        costs = cost(ratios[..., 0] * low[:, None], ratios[..., 1] * high[:, None])
        winner = costs.argmin(dim=1)[:, None, None].expand(-1, 1, 2)
        best = ratios.gather(1, winner)
    return best[:, 0, 0] * low, best[:, 0, 1] * high


def best_range(
    bins: Bins,
    low: Tensor,
    high: Tensor,
    spec: QuantSpec,
    pick: Callable[[Bins, Range], Range],
    *,
    cells: int,
) -> Range:
    """What ``pick`` makes of each channel's range, never wider than the one recorded.

    Args:
        bins: what was recorded.
        low: the exact minimum, of any shape, one for each row of ``bins``.
        high: the exact maximum, same shape.
        spec: the format; with more than 256 levels nothing is worth clipping.
        pick: maps some channels' bins and range to a range; ``low <= 0 <= high``, all
            ``[channels]``. For a symmetric spec, ``low == -high``.
        cells: how many numbers a candidate range takes, about; so many channels go together.

    Returns:
        The ends, on the device and of the shape of ``low`` and ``high``.
    """
    if spec.levels > _MOST_LEVELS:
        return low, high
    bottom, top = low.reshape(-1).cpu().clamp(max=0.0), high.reshape(-1).cpu().clamp(min=0.0)
    candidates = len(_COARSE) if spec.symmetric else len(_COARSE) ** 2
    chunk = max(1, _ELEMENTS // (candidates * cells))
    picked = []
    for begin in range(0, len(top), chunk):
        part = slice(begin, begin + chunk)
        ends = bottom[part], top[part]
        if spec.symmetric:
            reach = torch.maximum(-ends[0], ends[1])
            ends = -reach, reach
        picked.append(pick(bins[part], ends))
    lows, highs = (torch.cat(ends) for ends in zip(*picked, strict=True))
    lows, highs = torch.maximum(lows, bottom), torch.minimum(highs, top)
    return lows.view_as(low).to(low.device), highs.view_as(high).to(high.device)
