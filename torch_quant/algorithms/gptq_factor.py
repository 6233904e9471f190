"""The factor of GPTQ's Hessian, computed in the memory that the Hessian lies in.

Of 8192 channels a Hessian takes 268 MB. So the factor replaces it, panel by panel (Golub and Van
Loan, "Matrix Computations", section 4.2.6, the blocked factorization that looks left): what lies
above the diagonal stays as it was, and gives the rest back where more damping is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["unit_factor"]

_PANEL = 512
"""Columns that are computed at once: temporary tensors have as many."""


def unit_factor(
    sums: Tensor, order: Tensor, rows: int, damping: float, turns: int
) -> Tensor | None:
    """``I + U`` of ``H = (I + U) D (I + U)^T``, with a diagonal of ones; None if there is none.

    Args:
        sums: ``H`` times ``rows``, ``[n, n]``, contiguous; the result takes its place.
        order: which column is rounded when, ``[n]``.
        rows: how many vectors there were.
        damping: added to the diagonal, as a share of its mean.
        turns: how often that is raised, tenfold, until there is a factor.

    Returns:
        It in the order of columns from the last to be rounded to the first, so that it is lower
        triangular.

    >>> sums = torch.tensor([[8.0, 4.0], [4.0, 4.0]])
    >>> unit_factor(sums, torch.tensor([0, 1]), rows=2, damping=0.0, turns=0)
    tensor([[1., 0.],
            [1., 1.]])
    """
    backwards = order.flip(0)
    for columns in sums.split(_PANEL, 1):
        columns.copy_(columns[backwards])
    for part in sums.split(_PANEL):
        part.copy_(part[:, backwards].div_(rows))
    squares = sums.diagonal().clone()
    dead = squares <= 0
    level = float(squares[~dead].mean()) if not bool(dead.all()) else 1.0
    squares[dead] = 1.0
    for turn in range(turns + 1):
        if turn:
            _mirror(sums)
        sums.diagonal().copy_(squares + damping * 10.0**turn * level)
        if _factorized(sums):
            return _unit(sums)
    return None


def _panels(size: int) -> list[tuple[int, int]]:
    """The first column of each, and the one behind its last."""
    return [(low, min(low + _PANEL, size)) for low in range(0, size, _PANEL)]


def _factorized(matrix: Tensor) -> bool:
    """Put the Cholesky factor on and below the diagonal; above it, all stays."""
    for low, high in _panels(len(matrix)):
        before, square = matrix[low:high, :low], matrix[low:high, low:high]
        lower, failed = torch.linalg.cholesky_ex(square - before @ before.T)
        if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
            return False
        square.copy_(lower + square.triu(1))
        below = matrix[high:, low:high]
        below.addmm_(matrix[high:, :low], before.T, alpha=-1)
        below.copy_(torch.linalg.solve_triangular(lower.T, below, upper=True, left=False))
        diagonal = lower.diagonal()
        if not bool(torch.isfinite((below / diagonal).sum() + (lower / diagonal).sum())):
            return False
    return True


def _mirror(matrix: Tensor) -> None:
    """Below the diagonal comes what lies above it."""
    for low, high in _panels(len(matrix)):
        square = matrix[low:high, low:high]
        square.copy_(square.triu(1) + square.triu(1).T)
        matrix[high:, low:high] = matrix[low:high, high:].T


def _unit(factor: Tensor) -> Tensor:
    """The factor with a diagonal of ones and nothing above, in its place."""
    scale = factor.diagonal().clone()
    for low, high in _panels(len(factor)):
        square = factor[low:high, low:high]
        square.copy_(square.tril())
        factor[:low, low:high] = 0.0
    return factor.div_(scale)
