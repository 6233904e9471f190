"""Train a small residual CNN on scikit-learn's digits, quantize it, compare it with float."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from common import check_in_fresh_process, file_size, interleaved_latency, print_table
from digits_data import Digits, load_digits_split, train
from torch import Tensor, nn
from tqdm import tqdm

from torch_quant import Quantizer, export_torchscript


class Block(nn.Module):
    """Two 3x3 convolutions and the sum with their input."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.skip = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResidualCNN(nn.Module):
    """Three stages on 8x8 images: ``(batch, 1, 8, 8) -> (batch, 10)``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(x.mean((2, 3)))


def accuracy(model: nn.Module, data: Digits) -> float:
    with torch.no_grad():
        return float((model(data.images).argmax(1) == data.labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backend", choices=("reference", "onednn"), help="default: the best of this machine"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("out/digits_int8.pt"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)

    training, held_out = load_digits_split()
    torch.manual_seed(0)
    model = train(ResidualCNN(), training, epochs=options.epochs)

    quantizer = Quantizer(options.backend)
    calib_model = quantizer.calib(model)
    for images in tqdm(training.images[:256].split(32), desc="calibrating", unit="batch"):
        with torch.no_grad():
            calib_model(images)
    quant_model = quantizer.quantize(model)
    print(f"\n{quantizer.coverage(model)}\n")

    batch = held_out.images[:64]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    scripted = export_torchscript(quant_model, (batch,), options.output)
    latency = interleaved_latency(
        {
            "float32": lambda: model(batch),
            "int8": lambda: quant_model(batch),
            "TorchScript": lambda: scripted(batch),
        }
    )
    size, int8_size = file_size(model), options.output.stat().st_size
    print_table(
        [
            (
                "held-out accuracy",
                f"{accuracy(model, held_out):.2%}",
                f"{accuracy(quant_model, held_out):.2%}",
            ),
            ("file", f"{size / 1e3:.0f} kB", f"{int8_size / 1e3:.0f} kB ({int8_size / size:.1%})"),
            (
                "latency, eager, batch 64",
                f"{latency['float32']:.2f} ms",
                f"{latency['int8']:.2f} ms",
            ),
            ("latency, TorchScript", "", f"{latency['TorchScript']:.2f} ms"),
            (
                "speed-up over eager float32",
                "1",
                f"{latency['float32'] / latency['TorchScript']:.2f}x",
            ),
        ],
        "float32",
        "int8",
    )
    with torch.no_grad():
        check_in_fresh_process(options.output, (batch,), scripted(batch))
    print(f"\n{options.output}: loaded in a fresh process, the outputs are the same bit for bit")


if __name__ == "__main__":
    main()
