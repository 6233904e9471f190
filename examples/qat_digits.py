"""Train a depthwise CNN on scikit-learn's digits, quantize it to 4 bits, and train through that.

Depthwise convolutions at 4 bits lose too much when they are only calibrated. ``quantizer.qat``
trains the same plan, and ``quantizer.quantize`` deploys what was trained. ``--model vit`` does so
with a small vision transformer.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from common import print_table
from digits_data import Digits, load_digits_split, train
from digits_networks import SmallViT
from torch import Tensor, nn
from tqdm import tqdm

from torch_quant import QatSchedule, QConfig, Quantizer, QuantSpec


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with batch norm; a sum where shapes allow."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.depthwise(x)))
        y = self.bn2(self.pointwise(y))
        return x + y if self.residual else y


class DepthwiseCNN(nn.Module):
    """In the manner of MobileNet, for 8x8 images: ``(batch, 1, 8, 8) -> (batch, 10)``."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 36), depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks, channels = [], widths[0]
        for stage, out in enumerate(widths):
            for i in range(depth):
                blocks.append(Separable(channels, out, 2 if stage and not i else 1))
                channels = out
        self.stages = nn.Sequential(*blocks)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu6(self.bn(self.stem(x))))
        return self.head(self.drop(F.relu(x).mean((2, 3))))


@dataclass(frozen=True)
class Result:
    """Held-out accuracies, 0 to 1, and seconds.

    Args:
        float32: of the float model.
        calibrated: quantized after training.
        trained: quantized as trained with ``quantizer.qat``.
        seconds: that training took.
        equal: whether what was deployed gives the outputs of what was trained, to the bit.
    """

    float32: float
    calibrated: float
    trained: float
    seconds: float
    equal: bool


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": DepthwiseCNN, "vit": SmallViT}


def bits(weight: int, activation: int) -> QConfig:
    """Weights per output channel and activations per tensor, integers of so many bits."""
    return QConfig(
        input=QuantSpec.of(bits=activation),
        weight=QuantSpec.of(bits=weight, signed=True, symmetric=True, per_channel=True),
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    return float((model(data.images).argmax(1) == data.labels).double().mean())


@dataclass
class Progress:
    """What one run went through, an entry for each epoch.

    Args:
        loss: mean over the epoch.
        accuracy: on held-out digits, as would be deployed then.
        scales: scale of an activation -> its values, in units of the first.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    scales: dict[str, list[float]] = field(default_factory=dict)

    def note(self, model: nn.Module, loss: float, accuracy: float) -> None:
        """One epoch has ended."""
        self.loss.append(loss)
        self.accuracy.append(accuracy)
        for name, scale in model.state_dict().items():
            if name.endswith("input_scale"):
                self.scales.setdefault(name, []).append(float(scale))

    def plot(self, path: Path) -> None:
        """Loss, accuracy and scales by epoch, as an image."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.5), layout="constrained")
        for axes, title, values in zip(
            figure.subplots(1, 3),
            ("training loss", "held-out accuracy", "scales of activations, relative"),
            (
                {"": self.loss},
                {"": self.accuracy},
                {name: [x / all_[0] for x in all_] for name, all_ in self.scales.items()},
            ),
            strict=True,
        ):
            for curve in values.values():
                axes.plot(range(1, len(curve) + 1), curve, linewidth=1)
            axes.set(title=title, xlabel="epoch")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def train_quantized(
    quantizer: Quantizer,
    model: nn.Module,
    data: Digits,
    held_out: Digits,
    *,
    epochs: int,
    method: str,
    lr: float = 2e-3,
    batch: int = 64,
) -> tuple[nn.Module, Progress]:
    """Train ``model`` through its quantization; returns the QAT model in eval mode."""
    qat_model = quantizer.qat(model, method)
    groups = quantizer.parameter_groups(qat_model, lr=lr, scale_lr=lr / 2)
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (len(data.labels) // batch)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps
    )
    schedule = QatSchedule(qat_model, freeze_bn_at=steps * 2 // 3)
    progress = Progress()
    for _ in tqdm(range(epochs), desc=f"training through the plan, {method}", unit="epoch"):
        losses = []
        qat_model.train()
        for rows in torch.randperm(len(data.labels)).split(batch):
            if len(rows) < batch:
                continue
            loss = F.cross_entropy(qat_model(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            schedule.step()
            losses.append(float(loss.detach()))
        qat_model.eval()
        progress.note(qat_model, sum(losses) / len(losses), accuracy(qat_model, held_out))
    return qat_model.eval(), progress


def run(
    *,
    model: str = "cnn",
    seed: int = 0,
    weight: int = 4,
    activation: int = 4,
    epochs: int = 15,
    qat_epochs: int = 30,
    method: str = "lsq",
    lr: float = 2e-3,
    plot: Path | None = None,
) -> Result:
    """The whole comparison for one seed; the edges have 8 bits when trained."""
    training, held_out = load_digits_split()
    torch.manual_seed(seed)
    network = train(MODELS[model](), training, epochs=epochs)
    quantizer = Quantizer("reference", qconfig=bits(weight, activation))
    calib_model = quantizer.calib(network)
    with torch.no_grad():
        for images in training.images[:512].split(64):
            calib_model(images)
    reached = accuracy(network, held_out)
    calibrated = accuracy(quantizer.quantize(network), held_out)
    start = time.perf_counter()
    qat_model, progress = train_quantized(
        quantizer, network, training, held_out, epochs=qat_epochs, method=method, lr=lr
    )
    seconds = time.perf_counter() - start
    if plot is not None:
        progress.plot(plot)
    deployed = quantizer.quantize(qat_model)
    with torch.no_grad():
        equal = torch.equal(deployed(held_out.images), qat_model(held_out.images))
    return Result(reached, calibrated, accuracy(deployed, held_out), seconds, equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many; the table has the means")
    parser.add_argument("--model", choices=MODELS, default="cnn")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--qat-epochs", type=int, default=30)
    parser.add_argument("--method", default="lsq")
    parser.add_argument("--lr", type=float, default=2e-3, help="of weights (default 2e-3)")
    parser.add_argument("--plot", type=Path, help="an image of the last seed: loss, scales, ...")
    parser.add_argument("--json", type=Path, help="also write every seed's figures there")
    options = parser.parse_args()
    logging.getLogger("torch_quant").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = [
        run(
            model=options.model,
            seed=seed,
            weight=options.weight_bits,
            activation=options.activation_bits,
            epochs=options.epochs,
            qat_epochs=options.qat_epochs,
            method=options.method,
            lr=options.lr,
            plot=options.plot,
        )
        for seed in range(options.seeds)
    ]

    def mean(name: str) -> float:
        return sum(float(getattr(each, name)) for each in results) / len(results)

    columns = ("float32", "calibrated", "trained")
    format_ = f"W{options.weight_bits}A{options.activation_bits}"
    print_table(
        [
            (
                "held-out accuracy",
                *(f"{mean(x):.1%}" for x in columns),
            ),
            ("seconds of training so", "", "", f"{mean('seconds'):.0f}"),
        ],
        "float32",
        f"{format_}, calibrated",
        f"{format_}, trained",
    )
    worst = max(each.float32 - each.trained for each in results)
    print(f"\nworst seed: {worst:+.1%} below float")
    same = all(each.equal for each in results)
    print(f"deployed as trained, bit for bit: {'yes' if same else 'NO'}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
