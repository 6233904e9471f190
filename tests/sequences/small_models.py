"""Models as small as they can be, one for each way of being called, and several calls of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from awkward import CachedLayers, PlainCache
from flows import Inputs
from models import EncoderBlock, images, normal, seeded, tokens
from torch import Tensor, nn

__all__ = ["SMALL_MODELS", "SmallModel"]


@dataclass(frozen=True)
class SmallModel:
    """A model and kinds of calls: each makes new data by a salt, the same for the same one."""

    name: str
    build: Callable[[], nn.Module]
    calls: tuple[Callable[[int], Inputs], ...]
    refused: Inputs


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.next, self.head = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.next(x)).mean((2, 3)))


class Block(nn.Module):
    """Two inputs and a mask that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.mix = EncoderBlock(16, 2), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = x + self.mix(y)
        return {"out": self.block(x, None if mask is None else mask[:, None, None, :].bool())}


class Pieces(nn.Module):
    """Values decide which layer runs; a part that both take; the glue owns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.high = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.low = nn.Linear(16, 16)
        self.gain = nn.Parameter(torch.full((16,), 1.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        part = self.high if x.mean() > x.new_tensor(0.0) else self.low
        x = part(x) * self.gain
        return self.last(x), x


class Tied(nn.Module):
    """The head's weight is the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(32, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.table(ids)).relu())


def tied() -> nn.Module:
    model = seeded(Tied)
    model.head.weight = model.table.weight
    return model


class Cached(CachedLayers):
    """Writes to an object that the caller gives, if one is given."""

    def forward(self, x: Tensor, cache: PlainCache | None = None) -> Tensor:
        return self.run(x, PlainCache() if cache is None else cache)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.head(y)


def _mask(batch: int, length: int) -> Tensor:
    return (torch.arange(length) < length - torch.arange(batch)[:, None]).long()


def _pair(batch: int, length: int, salt: int) -> tuple[Tensor, Tensor]:
    return normal(batch, length, 16, salt=salt), normal(batch, length, 16, salt=salt + 50)


def _filled(salt: int) -> PlainCache:
    cache = PlainCache()
    cache.states = {i: normal(2, 3, 16, salt=salt + 60 + i) for i in range(2)}
    return cache


def _shifted(shift: float, batch: int) -> Callable[[int], Inputs]:
    return lambda salt: ((normal(batch, 16, salt=salt) + shift * torch.ones(16),), {})


SMALL_MODELS = [
    SmallModel(
        "cnn",
        lambda: seeded(Cnn),
        (
            lambda salt: ((images(4 + salt),), {}),
            lambda salt: ((images(1, 12 + 4 * salt),), {}),
            lambda salt: ((), {"x": images(3, 8 + 4 * salt)}),
        ),
        ((torch.zeros(2, 5, 16, 16),), {}),
    ),
    SmallModel(
        "two inputs and a mask",
        lambda: seeded(Block),
        (
            lambda salt: ((*_pair(3, 6, salt), _mask(3, 6)), {}),
            lambda salt: (_pair(2, 5, salt), {}),
            lambda salt: ((), {"y": normal(1, 4, 16), "x": normal(1, 4, 16, salt=salt + 9)}),
        ),
        ((torch.zeros(2, 3, 7), torch.zeros(2, 3, 7)), {}),
    ),
    SmallModel(
        "pieces",
        lambda: seeded(Pieces),
        (_shifted(0.0, 3), _shifted(3.0, 4), _shifted(-3.0, 1)),
        ((torch.zeros(2, 7),), {}),
    ),
    SmallModel(
        "tied weights",
        tied,
        (
            lambda salt: ((tokens(3 + salt, 6, 32),), {}),
            lambda salt: ((tokens(1, 4 + salt, 32),), {}),
            lambda salt: ((), {"ids": tokens(2, 5 + salt, 32)}),
        ),
        ((torch.full((2, 3), 99),), {}),
    ),
    SmallModel(
        "cache argument",
        lambda: seeded(Cached),
        (
            lambda salt: ((normal(2, 5, 16, salt=salt),), {}),
            lambda salt: ((normal(2, 1, 16, salt=salt), _filled(salt)), {}),
            lambda salt: ((), {"x": normal(2, 4, 16, salt=salt), "cache": PlainCache()}),
        ),
        ((torch.zeros(2, 3, 7),), {}),
    ),
    SmallModel(
        "lstm",
        lambda: seeded(Recurrent),
        (
            lambda salt: ((normal(3, 6, 8, salt=salt),), {}),
            lambda salt: ((normal(1, 4 + salt, 8),), {}),
            lambda salt: ((), {"x": normal(2, 9, 8, salt=salt)}),
        ),
        ((torch.zeros(2, 3, 7),), {}),
    ),
]
