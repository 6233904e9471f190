"""The part of ``AWKWARD`` about bags of embeddings and LSTMs, whose operators give several tensors.

Import ``AWKWARD`` from ``awkward``, which adds the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from awkward_ops import AWKWARD, Call, awkward
from models import normal, tokens
from torch import Tensor, nn

__all__ = ["AWKWARD"]


def _ids(batch: int) -> Call:
    return (tokens(batch, 12, 60),), {}


def _weighted_ids(batch: int) -> Call:
    return (tokens(batch, 12, 60), normal(batch, 12).sigmoid()), {}


class Bags(nn.Module):
    """Bags of each row of ids, and a linear layer over all of them."""

    def __init__(self, *options: dict[str, Any]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(60, 16, **each) for each in options)
        self.head = nn.Linear(16 * len(options), 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([bag(ids) for bag in self.bags], 1))


@awkward("modules", _ids, "bags of embeddings in every mode")
def embedding_bags() -> nn.Module:
    return Bags({"mode": "sum"}, {"mode": "mean"}, {"mode": "max"})


@awkward("modules", _ids, "bags in which padding does not count")
def padded_bags() -> nn.Module:
    return Bags({"mode": "sum", "padding_idx": 3}, {"mode": "mean", "padding_idx": -2})


@awkward("modules", _weighted_ids, "bags given by offsets, some empty, and with weights")
class OffsetBags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.EmbeddingBag(60, 16, mode="sum")
        self.last = nn.EmbeddingBag(60, 16, mode="sum", include_last_offset=True)
        self.weighted = nn.EmbeddingBag(60, 16, mode="sum")
        self.head = nn.Linear(48, 4)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        ends = torch.arange(ids.size(0) + 1) * ids.size(1)
        flat, starts = ids.reshape(-1), ends[:-1]
        uneven = starts - starts % 24  # two bags begin at the same place: the first one is empty
        parts = [
            self.plain(flat, uneven),
            self.last(flat, ends),
            self.weighted(flat, starts, weights.reshape(-1)),
        ]
        return self.head(torch.cat(parts, 1))
