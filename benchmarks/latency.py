"""Latency of float against int8, in one run: MiniLM 8 x 128, and ResNet-50 on one image.

ResNet-50 is transformers' architecture with random weights; its latency does not depend on them.
For the backend ``onnx`` int8 is the exported file in onnxruntime, beside float in eager PyTorch;
``onnx_runtimes.py`` has both in onnxruntime and OpenVINO, and other tools' files.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import interleaved_latency, minilm, minilm_inputs, onnxruntime_session, report
from torch import nn

from torch_quant import Backend, Quantizer, export_onnx, export_torchscript, sqnr


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    return ResNetModel(ResNetConfig()).eval()


Call = Callable[[], dict[str, Any]]


def torchscript(quant_model: nn.Module, inputs: dict[str, Any], folder: Path) -> Call:
    scripted = export_torchscript(quant_model, inputs, folder / "model.pt")
    return lambda: dict(scripted(**inputs))


def onnxruntime(quant_model: nn.Module, inputs: dict[str, Any], folder: Path) -> Call:
    (file,) = export_onnx(quant_model, inputs, folder / "model.onnx")
    session = onnxruntime_session(file)
    feed = {name: x.numpy() for name, x in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    return lambda: dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))


def measure(name: str, model: nn.Module, inputs: dict[str, Any], backend: str | None) -> Any:
    """One row: milliseconds in float and int8, the ratio, and the error at the output."""
    quantizer = Quantizer(backend)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        quantizer.calib(model)(**inputs)
        quant_model = quantizer.quantize(model)
        calls: dict[str, Call] = {"float32": lambda: dict(model(**inputs))}
        if quantizer.backend is Backend.ONNX:  # in PyTorch it computes in float
            deployed = "int8 onnxruntime"
            calls[deployed] = onnxruntime(quant_model, inputs, Path(folder))
        else:
            deployed = "int8 TorchScript"
            calls["int8"] = lambda: dict(quant_model(**inputs))
            calls[deployed] = torchscript(quant_model, inputs, Path(folder))
        times = interleaved_latency(calls)
        error = sqnr(calls["float32"](), calls[deployed]())
    return {
        "model": name,
        "backend": quantizer.backend.name,
        **{f"{each} ms": time for each, time in times.items()},
        "speed-up": times["float32"] / times[deployed],
        "output SQNR dB": error,
        "MACs in int8": f"{quantizer.plan.coverage:.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="default: the best of this machine")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    rows = [
        measure("MiniLM-L6, 8 x 128", minilm(), minilm_inputs(), options.backend),
        measure(
            "ResNet-50, 1 x 3 x 224 x 224",
            resnet50(),
            {"pixel_values": torch.randn(1, 3, 224, 224)},
            options.backend,
        ),
    ]
    report(f"latency_{options.backend}" if options.backend else "latency", rows)


if __name__ == "__main__":
    main()
