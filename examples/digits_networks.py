"""Small networks of the kinds that quantize badly, to be trained on digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DepthwiseCNN", "SmallViT"]


class DepthwiseCNN(nn.Module):
    """Inverted residuals with depthwise convolutions and ReLU6, as MobileNetV2 on 8x8 images."""

    def __init__(self, width: int = 24, blocks: int = 4) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, size: int, groups: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
            return [layer, nn.BatchNorm2d(outputs)]

        def block() -> nn.Module:
            wide = 4 * width
            return nn.Sequential(
                *conv(width, wide, 1), nn.ReLU6(), *conv(wide, wide, 3, wide), nn.ReLU6(),
                *conv(wide, width, 1),
            )  # fmt: skip

        self.stem = nn.Sequential(*conv(1, width, 3), nn.ReLU6())
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class SmallViT(nn.Module):
    """Pre-norm transformer over 2x2 patches."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for i, qkv in enumerate(self.qkv):
            parts = qkv(self.norms[2 * i](x)).unflatten(-1, (3, self.heads, -1))
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value)
            x = x + self.out[i](mixed.transpose(1, 2).flatten(2))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x.mean(1))
