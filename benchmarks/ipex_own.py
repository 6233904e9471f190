"""int8 on IPEX: the graph of torch_quant beside that of IPEX's own ``prepare`` and ``convert``.

Side by side in one run: MiniLM on 8 x 128 tokens, calibrated and measured on one batch of random
ids, and calibrated on one set of docstrings and measured on another; ResNet-50 as transformers
writes it (IPEX cannot fold its batch norms) and as torchvision does (it can). Weights of ResNet-50
are random, its batch norms fitted to one batch; latency does not depend on them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved_latency, minilm, minilm_inputs, report
from latency_models import resnet50
from minilm_data import load_pairs, model_folder
from torch import Tensor, nn

from torch_quant import QConfig, Quantizer, SmoothQuant, sqnr
from torch_quant.backends import IPEXBackend

SMOOTH = 0.8
"""SmoothQuant's alpha."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = (
            nn.Conv2d(planes, 4 * planes, 1, bias=False),
            nn.BatchNorm2d(4 * planes),
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )
            if shortcut
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def plain_resnet50() -> nn.Module:
    """ResNet-50 in the usual modules."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inputs = 64
    for planes, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(inputs, planes, stride if i == 0 else 1, i == 0))
            inputs = 4 * planes
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    model = nn.Sequential(*layers)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for norm in norms:
        norm.momentum = None  # the statistics of one batch, as they are
    model.train()(torch.randn(8, 3, 96, 96))
    return model.eval()


class Tensors(nn.Module):
    """A model of tensors in and tensors out, which is what IPEX prepares."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Any:
        if not self.names:
            return (self.model(*tensors),)
        return tuple(self.model(**dict(zip(self.names, tensors, strict=True))).values())


Batch = tuple[Tensor, ...]


def ipex_own(model: nn.Module, batches: list[Batch]) -> Callable[..., Any]:
    """IPEX's documented recipe."""
    import intel_extension_for_pytorch as ipex
    from intel_extension_for_pytorch.quantization import convert, prepare

    mapping = ipex.quantization.default_static_qconfig_mapping
    prepared = prepare(copy.deepcopy(model), mapping, example_inputs=batches[0], inplace=False)
    for batch in batches:
        prepared(*batch)
    traced = torch.jit.trace(convert(prepared), batches[0], check_trace=False, strict=False)
    frozen = torch.jit.freeze(traced.eval())
    for _ in range(3):
        frozen(*batches[0])
    return frozen


def outputs(call: Callable[..., Any], batches: list[Batch], tokens: bool) -> list[Tensor]:
    """All outputs; of a text model the hidden states of real tokens, the rest is never read."""
    if not tokens:
        return [torch.cat(each) for each in zip(*(call(*batch) for batch in batches), strict=True)]
    return [torch.cat([call(*batch)[0][batch[1].bool()] for batch in batches])]


def measure(
    name: str, plain: nn.Module, calibration: list[Batch], held_out: list[Batch], *, tokens: bool
) -> list[Any]:
    """Rows of milliseconds on one batch, and of output SQNR on all that is held out."""
    tensors = held_out[0]
    calls: dict[str, Callable[..., Any]] = {"float32, eager": plain}
    fused: dict[str, str] = {}
    ours = {
        "torch_quant": (IPEXBackend(), QConfig()),
        "torch_quant, smooth": (IPEXBackend(), QConfig(transforms=[SmoothQuant(SMOOTH)])),
        "torch_quant, no int8_shortcuts": (IPEXBackend(int8_shortcuts=False), QConfig()),
        "torch_quant, bfloat16": (IPEXBackend(bfloat16=True), QConfig()),
    }
    del ours["torch_quant, no int8_shortcuts" if tokens else "torch_quant, smooth"]  # the same
    for label, (backend, config) in ours.items():
        quantizer = Quantizer(backend, qconfig=config)
        calib_model = quantizer.calib(plain)
        for batch in calibration:
            calib_model(*batch)
        calls[label] = quantizer.quantize(plain, example_inputs=tensors)
        fused[label] = str(backend.verify(calls[label], tensors)).splitlines()[0]  # type: ignore[arg-type]
    calls["IPEX prepare/convert"] = ipex_own(plain, calibration)
    expected = outputs(plain, held_out, tokens)
    quality = {
        label: sqnr(expected, outputs(call, held_out, tokens)) for label, call in calls.items()
    }
    times = interleaved_latency({k: lambda call=v: call(*tensors) for k, v in calls.items()})
    return [
        {
            "model": name,
            "who": label,
            "ms": times[label],
            "output SQNR dB": quality[label],
            "fused": fused.get(label, ""),
        }
        for label in calls
    ]


def docstrings() -> tuple[list[Batch], list[Batch]]:
    """Batches of 8 docstrings of 128 tokens: 8 to calibrate with, 16 held out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    split = load_pairs(calibration=64, held_out=128)

    def batches(texts: list[str]) -> list[Batch]:
        options = {"padding": "max_length", "truncation": True, "max_length": 128}
        encoded = tokenizer(texts, return_tensors="pt", **options)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return list(zip(ids.split(8), mask.split(8), strict=True))

    return batches(split.calibration), batches([pair.body for pair in split.held_out])


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore")  # IPEX and torch.jit are deprecated, and say so
    torch.set_num_threads(1)
    text_model = Tensors(minilm(), list(minilm_inputs())).eval()
    random = [tuple(minilm_inputs().values())]
    rows = measure("MiniLM-L6, 8 x 128 random ids", text_model, random, random, tokens=True)
    rows += measure("MiniLM-L6, 8 x 128, text", text_model, *docstrings(), tokens=True)
    image = [(torch.randn(1, 3, 224, 224),)]
    resnet = Tensors(resnet50(), ["pixel_values"]).eval()
    rows += measure("ResNet-50, transformers", resnet, image, image, tokens=False)
    rows += measure("ResNet-50, plain", Tensors(plain_resnet50(), []), image, image, tokens=False)
    report("ipex_own", rows)


if __name__ == "__main__":
    main()
