"""The part of ``AWKWARD`` that is awkward in its weights and ops, and how an entry is registered.

Import ``AWKWARD`` from ``awkward``, which adds the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from models import images, normal, seeded, tokens
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["AWKWARD", "AwkwardEntry", "Call", "Linears", "awkward", "pictures", "rows"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
Inputs = Callable[[int], Call]
B = TypeVar("B", bound=Callable[[], nn.Module])


@dataclass(frozen=True)
class AwkwardEntry:
    """A model, what to call it with, and what is awkward about it.

    ``exports`` says whether torch.export (non-strict) captures the model whole.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    family: str
    note: str = ""
    exports: bool = True


AWKWARD: dict[str, AwkwardEntry] = {}


def awkward(family: str, inputs: Inputs, note: str, *, exports: bool = True) -> Callable[[B], B]:
    """Register a builder, a function or a class, under its name in snake case."""

    def register(build: B) -> B:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", build.__name__).lower()
        AWKWARD[name] = AwkwardEntry(name, partial(seeded, build), inputs, family, note, exports)
        return build

    return register


def rows(*shape: int) -> Inputs:
    """One positional tensor of shape ``(batch, *shape)``."""
    return lambda batch: ((normal(batch, *shape),), {})


def pictures(batch: int) -> Call:
    """One positional ``(batch, 3, 16, 16)``."""
    return (images(batch),), {}


class Linears(nn.Module):
    """``count`` linears 16 to 16, ``l0``, ``l1``, ...: a subclass says how they are called."""

    count = 2
    l0: nn.Linear
    l1: nn.Linear
    l2: nn.Linear
    l3: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for index in range(self.count):
            self.add_module(f"l{index}", nn.Linear(16, 16))


def draw(*shape: int) -> nn.Parameter:
    """A weight whose second to last dimension is summed over; products keep the variance."""
    return nn.Parameter(torch.randn(shape) / shape[-2] ** 0.5)


# ---- weights that are computed


@awkward("weights", rows(24, 16), "a linear's weight times a parameter")
class ScaledWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = draw(16, 16), nn.Parameter(torch.rand(16, 1) + 0.5)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.weight * self.scale).relu())


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w[0].numel() ** 0.5
        w = w / (w.std((1, 2, 3), keepdim=True) * w[0].numel() ** 0.5 + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


@awkward("weights", pictures, "weight-standardized convolutions, each with a group norm")
def standardized_conv() -> nn.Module:
    return nn.Sequential(
        StandardizedConv(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        StandardizedConv(8, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
    )


@awkward("weights", rows(24, 16), "weight_norm as a parametrization, on linears")
def normed_weights() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Linear(16, 32)), nn.ReLU(), weight_norm(nn.Linear(32, 8)), nn.Softplus()
    )


@awkward("weights", rows(24, 16), "a low-rank update beside a frozen linear")
class LowRank(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.l0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l1((self.l0(x) + 0.5 * self.up(self.down(x))).relu())


@awkward("weights", rows(24, 16), "the weight is an activation, one for each sample")
class DynamicWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.head = nn.Linear(16, 16 * 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x).mean(1).view(-1, 16, 8)
        return self.head(torch.bmm(x, weight).relu())


@awkward("weights", rows(24, 16), "channels of zeros only, and a layer whose output is all zeros")
class DeadChannels(Linears):
    count = 3

    def __init__(self) -> None:
        super().__init__()
        self.l2.bias.data.fill_(-100.0)

    def forward(self, x: Tensor) -> Tensor:
        alive = torch.arange(16, device=x.device) % 4 > 0
        return self.l1(self.l0(x).relu() * alive) + self.l2(x).relu()


# ---- products with a parameter that is no nn.Linear


@awkward("products", rows(24, 16), "mm, addmm, matmul and `@` with parameters")
class MatrixProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w0, self.w1, self.w2, self.w3 = draw(16, 32), draw(32, 32), draw(32, 16), draw(16, 16)
        self.bias = nn.Parameter(torch.randn(32) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.mm(x.flatten(0, 1), self.w0).relu()
        x = torch.addmm(self.bias, x, self.w1).relu()
        return torch.matmul(x, self.w2).relu() @ self.w3.t()


@awkward("products", rows(4, 6, 16), "one matrix for each head: bmm, baddbmm and a 4-D matmul")
class BatchedProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w0, self.w1, self.w2 = draw(4, 16, 16), draw(4, 16, 16), draw(4, 16, 8)
        self.bias = nn.Parameter(torch.randn(4, 1, 16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.transpose(0, 1).flatten(1, 2)
        heads = torch.bmm(heads, self.w0).relu()
        heads = torch.baddbmm(self.bias, heads, self.w1).relu()
        return heads.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1) @ self.w2


@awkward("products", rows(5, 16), "einsum with parameters, then between activations")
class Einsums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w0, self.w1, self.w2 = draw(2, 16, 8), draw(2, 16, 8), draw(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btc,hcd->bhtd", x, self.w0)
        k = torch.einsum("btc,hcd->bhtd", x, self.w1)
        mixed = torch.einsum("bhqd,bhkd->bqhk", q, k).softmax(-1).mean(2)
        return torch.einsum("bqk,bkc,cd->bqd", mixed, x, self.w2)


@awkward("products", rows(24, 16), "attention scores of minus infinity where masked")
class InfiniteMask(Linears):
    count = 4

    def forward(self, x: Tensor) -> Tensor:
        scores = self.l0(x) @ self.l1(x).transpose(1, 2) / 4
        later = torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool()
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.l3(weights @ self.l2(x))


# ---- convolutions and norms of every kind


@awkward("convs", rows(4, 96), "1-D: depthwise, 'same', dilated, transposed")
def convs_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=4),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Conv1d(8, 8, 5, padding="same"),
        nn.LeakyReLU(0.1),
        nn.Conv1d(8, 8, 3, dilation=2, padding=2, padding_mode="reflect"),
        nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1),
    )


@awkward("convs", pictures, "2-D: grouped, dilated, 'same', circular; transposed with a batch norm")
def convs_2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 3, groups=2, dilation=2, padding="same"),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
    )


@awkward("convs", rows(2, 6, 8, 8), "3-D, with its batch norm, and a pool")
def convs_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.AvgPool3d(2),
        nn.Conv3d(8, 8, (1, 3, 3), groups=8, padding="valid"),
        nn.Flatten(),
        nn.Linear(96, 8),
    )


@awkward("convs", rows(24, 16), "batch norms behind linears; one without an affine map; one alone")
def linear_batch_norms() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(0, 1),
        nn.BatchNorm1d(16),
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 16, bias=False),
        nn.BatchNorm1d(16, affine=False),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(16, 8),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.reduce(F.adaptive_avg_pool2d(x, 1)).relu()
        return x * F.hardsigmoid(self.expand(gate))


@awkward("convs", pictures, "squeeze and excite: a gate of one pixel times its image")
def squeeze_excite() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), SqueezeExcite(8), nn.Conv2d(8, 4, 1)
    )


@awkward("convs", pictures, "a small U-net: pool, upsample, concatenate, and parts split again")
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.down(x))
        deep = F.silu(self.deep(F.max_pool2d(wide, 2)))
        deep = F.interpolate(deep, scale_factor=2.0, mode="bilinear", align_corners=False)
        value, gate = self.up(torch.cat([wide, deep], 1)).chunk(2, dim=1)
        return self.head(value * gate.sigmoid())


# ---- torch's own large modules, buffers, and modes


@awkward("modules", rows(7, 16), "nn.MultiheadAttention, with and without its weights")
class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(16, 2, batch_first=True)
        self.second = nn.MultiheadAttention(16, 4, batch_first=True, kdim=16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.first(x, x, x)
        y, _ = self.second(x + y, x, x, need_weights=False)
        return x + y, weights


@awkward("modules", rows(7, 16), "nn.TransformerEncoderLayer: a fused op on its eval path")
def encoder_layers() -> nn.Module:
    return nn.Sequential(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", norm_first=True),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.stem, self.recurrent = nn.Linear(16, 12), kind(12, 8, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.stem(x).relu())[0])


@awkward("modules", rows(7, 16), "an LSTM between two linears")
def lstm_middle() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=True, num_layers=2)


@awkward("modules", rows(7, 16), "a GRU of both directions between two linears")
def gru_middle() -> nn.Module:
    return Recurrent(nn.GRU, batch_first=True, bidirectional=True)


@awkward("modules", rows(5, 16), "buffers, one not saved, and a plain tensor attribute")
class Buffers(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(16))
        self.register_buffer("mixing", torch.randn(5, 5) / 2, persistent=False)
        self.steps = torch.linspace(0.5, 1.5, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.l0(x - self.shift) * self.steps
        return self.l1((self.mixing @ x).relu())


@awkward("modules", rows(24, 16), "a part under torch.no_grad, which export wraps in a subgraph")
class NoGradPart(Linears):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.l0(x).relu()
        return self.l1(x)


@awkward("modules", lambda b: ((tokens(b), normal(b, 12)), {}), "sums and products of integer ids")
class IntegerMath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(130, 16), nn.Embedding(16, 16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, score: Tensor) -> Tensor:
        kept = (score > -1).long()
        places = kept.cumsum(1) * kept
        x = self.words(2 * ids + kept) + self.places(places)
        return self.head((self.mix(x).relu() * kept.unsqueeze(-1)).sum(1) / kept.sum(1, True))
