"""Sums of products of vectors with themselves: symmetric, so that half of each batch's will do."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SymmetricSums", "lower_sums"]

_BLOCK = 256
"""Rows that are computed at once; what lies right of the diagonal in these is computed too."""


def lower_sums(sums: Tensor | None, rows: Tensor) -> Tensor:
    """``sums + rows.T @ rows``, in a new tensor; what lies above the diagonal may be anything.

    Args:
        sums: ``[n, n]``, of which what lies on and below the diagonal is read; None for zeros.
        rows: ``[vectors, n]``.

    >>> lower_sums(None, torch.tensor([[1.0, 2.0]])).tril()
    tensor([[1., 0.],
            [2., 4.]])
    """
    size = rows.shape[1]
    if size <= _BLOCK:
        return rows.T @ rows if sums is None else torch.addmm(sums, rows.T, rows)
    found = rows.new_empty(size, size)
    for low in range(0, size, _BLOCK):
        high = min(low + _BLOCK, size)
        left, right, part = rows[:, low:high].T, rows[:, :high], found[low:high, :high]
        if sums is None:
            torch.mm(left, right, out=part)
        else:
            torch.addmm(sums[low:high, :high], left, right, out=part)
    return found


def _mirror(sums: Tensor) -> None:
    """Above the diagonal comes what lies below it."""
    for low in range(0, len(sums), _BLOCK):
        part = sums[low : low + _BLOCK]
        square = part[:, low : low + _BLOCK]
        square.copy_(square.tril() + square.tril(-1).T)
        sums[:low, low : low + _BLOCK] = part[:, :low].T


class SymmetricSums:
    """A statistic with sums of which the half above the diagonal is filled in when it is read.

    Otherwise they are replaced and never written to. So copies may share them: each fills in the
    same numbers.
    """

    _sums: Tensor
    _half = False

    @property
    def sums(self) -> Tensor:
        """The whole, symmetric, ``[n, n]`` or ``[groups, n, n]``."""
        if self._half:
            sums = self._sums.clone() if self._sums.is_inference() else self._sums
            _mirror(sums.view(sums.shape[-2:]))
            self.sums = sums
        return self._sums

    @sums.setter
    def sums(self, value: Tensor) -> None:
        self._sums, self._half = value, False

    @property
    def _stored(self) -> Tensor:
        """On and below the diagonal, the sums."""
        return self._sums

    def _store(self, sums: Tensor) -> None:
        """Take what :func:`lower_sums` gave."""
        self._sums, self._half = sums, True

    def _share(self, other: SymmetricSums) -> None:
        """Have the sums of another."""
        self._sums, self._half = other._sums, other._half
