"""Tiny seeded models for unit tests, with inputs to match.

Every builder gives the same float32 weights at each call, in eval mode, batch norms with statistics
as if trained; ``example(name)`` gives the positional arguments:

    >>> mlp()(*example("mlp", batch=3)).shape
    torch.Size([3, 10])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "EXAMPLES",
    "MODELS",
    "Compute",
    "Two",
    "attention_explicit",
    "exact_copy",
    "example",
    "images",
    "mlp",
    "mobile_cnn",
    "normal",
    "randomize_batch_norms",
    "scale_weights",
    "seeded",
    "small_cnn",
    "tiny_transformer",
    "tokens",
]

M = TypeVar("M", bound=nn.Module)

VOCAB = 64
LENGTH = 12


def seeded(build: Callable[[], M], *, seed: int = 0) -> M:
    """``build()`` under a fixed seed, in eval mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        scale_weights(model)
        randomize_batch_norms(model)
    return model.eval()


def scale_weights(model: nn.Module, *, gain: float = 1.3) -> None:
    """Redraw linear and convolution weights with variance ``gain**2 / fan_in``.

    Torch's own initialization has variance ``1 / (3 * fan_in)``: some layers on, the biases are all
    that is left of the signal and the output hardly depends on the input.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                fan_in = module.weight.shape[0] // module.groups * module.weight[0, 0].numel()
            with torch.no_grad():
                module.weight.normal_(0.0, gain / math.sqrt(fan_in))


def randomize_batch_norms(model: nn.Module) -> None:
    """Give every batch norm statistics and an affine map that are not the identity.

    Fresh ones divide by 1 and add 0, so a wrong fold would go unseen.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, 0.0, 0.1)


def normal(*shape: int, salt: int = 0) -> Tensor:
    """N(0, 1) values, seeded by the first dimension (the batch) and by ``salt``."""
    generator = torch.Generator().manual_seed(1000 * (salt + 1) + shape[0])
    return torch.randn(shape, generator=generator)


def images(batch: int, size: int = 16, channels: int = 3) -> Tensor:
    """Blocks, smaller blocks and noise, unit variance, shape ``(batch, channels, size, size)``.

    White noise would not do: a global pool averages it away, and all images look alike.
    """
    coarse, fine = (normal(batch, channels, n, n, salt=n) for n in (4, 8))
    blocks = 0.7 * F.interpolate(coarse, size=(size, size)) + 0.55 * F.interpolate(
        fine, (size, size)
    )
    return blocks + 0.45 * normal(batch, channels, size, size)


def tokens(batch: int, length: int = LENGTH, vocab: int = VOCAB, *, low: int = 0) -> Tensor:
    """Token ids in ``[low, vocab)``, shape ``(batch, length)``, a function of the arguments."""
    generator = torch.Generator().manual_seed(7000 + batch)
    return torch.randint(low, vocab, (batch, length), generator=generator)


class Compute(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Two(nn.Module):
    """Two linears 16 to 16; a subclass says how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        return self.l1(self.l0(x).relu())


def exact_copy(features: int) -> nn.Linear:
    """The identity: its weight is exact in int8, so it shows the integers before it."""
    layer = nn.Linear(features, features, bias=False)
    layer.weight.data.copy_(torch.eye(features))
    return layer


def mlp() -> nn.Sequential:
    """Linear, ReLU, Linear, GELU, Linear: ``(batch, 16) -> (batch, 10)``."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10)
        )
    )


class Residual(nn.Module):
    """``relu(x + conv-bn(conv-bn-relu(x)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class SmallCnn(nn.Module):
    """The ResNet ops once each: conv-bn-relu, max pool, residual, global pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = Residual(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        x = F.adaptive_avg_pool2d(self.block(x), 1).flatten(1)
        return self.head(x)


def small_cnn() -> nn.Module:
    """A residual network of four layers: ``(batch, 3, 16, 16) -> (batch, 10)``."""
    return seeded(SmallCnn)


class Separable(nn.Module):
    """Depthwise then pointwise convolution; a residual where the shapes allow one."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False
        )
        self.bn1 = nn.BatchNorm2d(inputs)
        self.activation = activation
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn1(self.depthwise(x)))
        y = self.bn2(self.pointwise(y))
        return x + y if self.residual else y


def mobile_cnn() -> nn.Module:
    """Depthwise-separable, with ReLU6 and Hardswish: ``(batch, 3, 16, 16) -> (batch, 10)``."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            Separable(8, 8, nn.ReLU6()),
            Separable(8, 16, nn.Hardswish(), stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
    )


class EncoderBlock(nn.Module):
    """Pre-norm attention, then a GELU feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (self.split(linear(y)) for linear in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """Token and position embeddings, two blocks, the mean over tokens, a classifier."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        allowed = None if mask is None else mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, allowed)
        return self.head(self.norm(x).mean(1))


def tiny_transformer() -> nn.Module:
    """An encoder: token ids ``(batch, up to 12)``, an optional mask alike -> ``(batch, 10)``."""
    return seeded(TinyTransformer)


class AttentionExplicit(nn.Module):
    """Attention spelt out, so that both of its products are matmul nodes."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        mixed = torch.matmul(scores.softmax(-1), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attention_explicit() -> nn.Module:
    """Attention by matmul, softmax, matmul: ``(batch, length, 16) -> (batch, length, 16)``."""
    return seeded(AttentionExplicit)


def _masked_tokens(batch: int) -> tuple[Tensor, ...]:
    kept = LENGTH - 2 - torch.arange(batch)[:, None]
    return tokens(batch), (torch.arange(LENGTH) < kept).long()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "small_cnn": small_cnn,
    "mobile_cnn": mobile_cnn,
    "tiny_transformer": tiny_transformer,
    "attention_explicit": attention_explicit,
}

EXAMPLES: dict[str, Callable[[int], tuple[Tensor, ...]]] = {
    "mlp": lambda batch: (normal(batch, 16),),
    "small_cnn": lambda batch: (images(batch),),
    "mobile_cnn": lambda batch: (images(batch),),
    "tiny_transformer": _masked_tokens,
    "attention_explicit": lambda batch: (normal(batch, LENGTH, 16),),
}


def example(name: str, batch: int = 2) -> tuple[Tensor, ...]:
    """Positional arguments for ``MODELS[name]()``; another batch size is other data."""
    return EXAMPLES[name](batch)
