"""The part of ``AWKWARD`` about bags of embeddings and LSTMs, whose operators give several tensors.

Import ``AWKWARD`` from ``awkward``, which adds the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from awkward_ops import AWKWARD, Call, awkward, rows
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


# ---- LSTMs: output, last hidden state and last cell state, all read by somebody


class Sequences(nn.Module):
    """An LSTM between two linear layers; gives what ``read`` takes of its results."""

    def __init__(self, *, out: int = 16, **options: Any) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(16, 12), nn.LSTM(12, 16, **options)
        self.head = nn.Linear(out, 4)

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        output, (h_n, c_n) = self.lstm(self.stem(x), state or None)
        return self.head(self.read(output, h_n, c_n))

    def read(self, output: Tensor, h_n: Tensor, c_n: Tensor) -> Tensor:
        return output


@awkward("modules", rows(9, 16), "an LSTM of two layers and both directions")
def lstm_both_ways() -> nn.Module:
    return Sequences(out=32, num_layers=2, bidirectional=True, batch_first=True)


@awkward("modules", rows(9, 16), "an LSTM whose last hidden state is all that is read")
class LastHidden(Sequences):
    def __init__(self) -> None:
        super().__init__(out=32, num_layers=2, bidirectional=True, batch_first=True)

    def read(self, output: Tensor, h_n: Tensor, c_n: Tensor) -> Tensor:
        return torch.cat([h_n[-2], h_n[-1]], 1)


@awkward("modules", rows(9, 16), "an LSTM whose cell state is all that is read, without biases")
class LastCell(Sequences):
    def __init__(self) -> None:
        super().__init__(batch_first=True, bias=False)

    def read(self, output: Tensor, h_n: Tensor, c_n: Tensor) -> Tensor:
        return c_n[-1]


def _with_state(batch: int) -> Call:
    state = (normal(batch, 2, 16, salt=i).tanh() for i in (1, 2))
    return (normal(batch, 9, 16), *state), {}


@awkward("modules", _with_state, "an LSTM with a given state, all results read")
class GivenState(Sequences):
    def __init__(self) -> None:
        super().__init__(num_layers=2, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = (each.transpose(0, 1).contiguous() for each in (h, c))
        output, (h_n, c_n) = self.lstm(self.stem(x), (h, c))
        return self.head(output), h_n.transpose(0, 1), c_n.transpose(0, 1)


@awkward("modules", rows(9, 16), "an LSTM called twice, time first")
class TwiceTimeFirst(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).transpose(0, 1)
        first, state = self.lstm(x)
        second, _ = self.lstm(x.flip(0), state)
        return self.head(first + second).transpose(0, 1)


@awkward("modules", rows(9, 16), "an LSTM with projections, which stays in float")
def lstm_projected() -> nn.Module:
    return Sequences(out=8, proj_size=8, batch_first=True)
