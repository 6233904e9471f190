"""A small model of blocks for methods that work on blocks, with data of few factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from weights import inputs

from torch_quant import FLOAT, PerGroup, QConfig, Quantizer, QuantSpec, RoundToNearest, sqnr

__all__ = ["GROUPED", "Decoder", "data", "decoder", "quality", "quantizer_of"]

GROUPED = QuantSpec.of("int3", granularity=PerGroup(16))


class Gated(nn.Module):
    """A gated layer behind a norm, and a product of two of its tensors: scales may go through."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        made: Tensor = self.down(torch.sigmoid(self.gate(read)) * self.up(read))
        return x + made


class Decoder(nn.Module):
    """Two such blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(2))
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        made: Tensor = self.head(x)
        return made


def decoder() -> Decoder:
    """With weights of heavy tails, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder().eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if name.endswith("weight") and weight.dim() == 2:
                drawn = torch.distributions.StudentT(4.0).sample(weight.shape)
                weight.copy_(drawn / (1.4 * weight.shape[1] ** 0.5))
    return model


def data(seed: int = 0, count: int = 8) -> list[Tensor]:
    """Batches of 32 vectors with few factors."""
    return list(inputs(seed, 32 * count).split(32))


def quantizer_of(method: Any = None, transforms: Any = (), spec: QuantSpec = GROUPED) -> Quantizer:
    """Weights alone, a block at a time."""
    config = QConfig(FLOAT, spec, method=method or RoundToNearest(), transforms=transforms)
    return Quantizer("reference", qconfig=config, capture="modules")


def quality(
    method: Any = None,
    transforms: Any = (),
    spec: QuantSpec = GROUPED,
    model: nn.Module | None = None,
) -> float:
    """Output SQNR in dB on data that the method has not seen."""
    model = decoder() if model is None else model
    quantizer = quantizer_of(method, transforms, spec)
    quantizer.round_weights(model, data(), progress=False)
    quant_model, x = quantizer.quantize(model), torch.cat(data(1))
    return sqnr(model(x), quant_model(x))
