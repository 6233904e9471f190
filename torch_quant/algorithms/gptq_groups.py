"""GPTQ for the groups of a convolution, of which a depthwise one has as many as channels.

Each group has a small weight and moments of its own. So all of them are rounded together, a column
after the other, as :mod:`torch_quant.algorithms.gptq` rounds one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["factors", "round_groups"]


def factors(moments: Tensor, order: Tensor, damping: float, turns: int) -> Tensor | None:
    """``I + U`` of ``H = (I + U) D (I + U)^T`` for each group, with a diagonal of ones.

    Args:
        moments: ``H``, ``[groups, n, n]``.
        order: which column comes when, ``[groups, n]``.
        damping: added to the diagonal, as a share of its mean over the group.
        turns: how often that is raised, tenfold, until all have a factor.

    Returns:
        Upper triangular, in the order in which columns are rounded; None if one has none.
    """
    backwards = order.flip(1)
    turned = moments.gather(1, backwards[..., None].expand_as(moments))
    turned = turned.gather(2, backwards[:, None].expand_as(moments))
    squares = turned.diagonal(dim1=1, dim2=2)
    dead = squares <= 0
    level = torch.where(dead, 0.0, squares).sum(1) / (~dead).sum(1).clamp_min(1)
    level = torch.where(level > 0, level, 1.0)[:, None]
    for turn in range(turns + 1):
        tried = turned.clone()
        diagonal = tried.diagonal(dim1=1, dim2=2)
        diagonal[dead] = 1.0
        diagonal += damping * 10.0**turn * level
        lower, failed = torch.linalg.cholesky_ex(tried)
        unit = lower / lower.diagonal(dim1=1, dim2=2)[:, None]
        if not bool(failed.any()) and bool(torch.isfinite(unit.sum())):
            factor: Tensor = unit.flip(1, 2)
            return factor
    return None


def round_groups(
    weight: Tensor, factor: Tensor, order: Tensor, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """Values of the format for the weights of all groups.

    Args:
        weight: ``[groups, out, n]``.
        factor: of :func:`factors`.
        order: which column comes when, ``[groups, n]``.
        rounded: gives the values nearest to a column, both ``[groups, out]``.

    >>> eye = torch.eye(2)[None]
    >>> round_groups(torch.tensor([[[0.4, 1.6]]]), eye, torch.tensor([[0, 1]]), torch.round)
    tensor([[[0., 2.]]])
    """
    at = order[:, None].expand_as(weight)
    real = weight.gather(2, at)
    rest, found = real.clone(), torch.empty_like(real)
    for column in range(weight.shape[2]):
        found[..., column] = rounded(rest[..., column])
        error = real[..., column] - found[..., column]
        rest[..., column + 1 :] += error[..., None] * factor[:, column, None, column + 1 :]
    return torch.empty_like(found).scatter_(2, at, found)
