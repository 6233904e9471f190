"""Latency of float against int8, in one run: MiniLM 8 x 128, and ResNet-50 on one image.

ResNet-50 is transformers' architecture with random weights; its latency does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import interleaved_latency, minilm, minilm_inputs, report

from torch_quant import Quantizer, export_torchscript, sqnr


def resnet50() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    return ResNetModel(ResNetConfig()).eval()


def measure(name: str, model: torch.nn.Module, inputs: dict[str, Any], backend: str | None) -> Any:
    """One row: milliseconds in float and int8, the ratio, and the error at the output."""
    quantizer = Quantizer(backend)
    with torch.no_grad():
        quantizer.calib(model)(**inputs)
        quant_model = quantizer.quantize(model)
        with tempfile.TemporaryDirectory() as folder:
            scripted = export_torchscript(quant_model, inputs, Path(folder) / "model.pt")
        times = interleaved_latency(
            {
                "float32": lambda: model(**inputs),
                "int8": lambda: quant_model(**inputs),
                "int8 TorchScript": lambda: scripted(**inputs),
            }
        )
        error = sqnr(dict(model(**inputs)), dict(quant_model(**inputs)))
    return {
        "model": name,
        "backend": quantizer.backend.name,
        "float32 ms": times["float32"],
        "int8 ms": times["int8"],
        "int8 TorchScript ms": times["int8 TorchScript"],
        "speed-up": times["float32"] / times["int8 TorchScript"],
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
