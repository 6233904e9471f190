"""Rows cut into blocks with known extremes: where the few largest elements of many are found."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Blocks"]

_SIZE = 128  # of a block: the larger, the faster the extremes and the slower the search


class Blocks:
    """The extremes of every block of ``rows``, ``[channels, n]``; one pass over the data."""

    def __init__(self, rows: Tensor) -> None:
        count = rows.shape[1] // _SIZE
        whole = count * _SIZE
        parts = rows[:, :whole].view(len(rows), count, _SIZE), rows[:, None, whole:]
        # Each [channels, blocks, elements]; the second is what is left over, as one block.
        self._parts = [part for part in parts if part.numel() > 0]
        self._low = [part.amin(dim=-1) for part in self._parts]
        self._high = [part.amax(dim=-1) for part in self._parts]

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Exact minimum and maximum, float32, ``[channels]``; NaN where there is one."""
        low, high = torch.cat(self._low, dim=1), torch.cat(self._high, dim=1)
        return low.amin(dim=1).to(torch.float32), high.amax(dim=1).to(torch.float32)

    def beyond(self, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The blocks with an element ``< low`` or ``>= high``, both ``[channels, 1]``.

        Returns:
            Pairs of blocks, ``[k, elements]``, and the channel of each, ``[k]``.
        """
        found = []
        for part, lows, highs in zip(self._parts, self._low, self._high, strict=True):
            block = ((lows < low) | (highs >= high)).flatten().nonzero().flatten()
            # Whole blocks are copied, which is much faster than to index elements.
            found.append((part.flatten(0, 1).index_select(0, block), block // part.shape[1]))
        return found
