"""What each observer does to the accuracy of static int8: MiniLM, and networks trained on digits.

The default observer of each op type (``torch_quant/observers/defaults.py``) is chosen from it.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from harness import minilm, report  # makes the examples importable
from torch import Tensor, nn

# isort: split
from digits_cnn_ptq import ResidualCNN, accuracy
from digits_data import load_digits_split, train
from minilm_data import embed, load_pairs, model_folder, retrieval

from torch_quant import QConfig, Quantizer, cosine, sqnr
from torch_quant.observers import OBSERVERS


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


def digits_rows(observers: list[str]) -> list[dict[str, Any]]:
    training, held_out = load_digits_split()
    rows = []
    for build in (ResidualCNN, DepthwiseCNN, SmallViT):
        torch.manual_seed(0)
        model = train(build(), training, epochs=15)
        expected = model(held_out.images).detach()
        for observer in observers:
            quantizer = Quantizer("reference", qconfig=QConfig(observer=observer))
            calib_model = quantizer.calib(model)
            for images in training.images[:256].split(32):
                calib_model(images)
            quant_model = quantizer.quantize(model)
            rows.append(
                {
                    "model": f"digits {build.__name__}",
                    "observer": observer,
                    "SQNR dB": sqnr(expected, quant_model(held_out.images)),
                    "task": f"{accuracy(quant_model, held_out):.2%}",
                    "task, float": f"{accuracy(model, held_out):.2%}",
                }
            )
    return rows


def minilm_rows(observers: list[str]) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    model, tokenizer, data = minilm(), AutoTokenizer.from_pretrained(model_folder()), load_pairs()
    texts = [[pair.query for pair in data.held_out], [pair.body for pair in data.held_out]]
    expected = [embed(model, tokenizer, each) for each in texts]
    rows = []
    for observer in observers:
        quantizer = Quantizer(qconfig=QConfig(observer=observer))
        calib_model = quantizer.calib(model)
        for body in data.calibration:
            embed(calib_model, tokenizer, [body])
        for backend in ("reference", quantizer.backend.name):
            quant_model = quantizer.quantize(model, backend=backend)
            actual = [embed(quant_model, tokenizer, each) for each in texts]
            angle = cosine(torch.cat(expected), torch.cat(actual))
            rows.append(
                {
                    "model": f"MiniLM, {backend}",
                    "observer": observer,
                    "cosine": float(angle.mean()),
                    "task": f"{retrieval(*actual)[0]:.4f}",
                    "task, float": f"{retrieval(*expected)[0]:.4f}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observers", nargs="+", default=sorted(OBSERVERS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    with torch.enable_grad():
        rows = digits_rows(options.observers)
    report("observers", rows + minilm_rows(options.observers))


if __name__ == "__main__":
    main()
