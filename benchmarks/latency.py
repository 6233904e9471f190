"""Latency of float against int8, in one run: MiniLM 8 x 128, and ResNet-50 on one image.

Each is timed with one size, and with two in turn, as servers see them. ResNet-50 is transformers'
architecture with random weights; its latency does not depend on them.
For the backend ``onnx`` int8 is the exported file in onnxruntime, beside float in eager PyTorch;
``onnx_runtimes.py`` has both in onnxruntime and OpenVINO, and other tools' files. ``--runtimes``
adds the runtimes in this process and PyTorch's compiler, and the exported file in the runtimes,
called without us.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
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


Inputs = dict[str, Any]
Run = Callable[[Inputs], dict[str, Any]]


def torchscript(quant_model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    scripted = export_torchscript(quant_model, inputs, folder / "model.pt")
    return lambda given: dict(scripted(**given))


def onnxruntime(quant_model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    (file,) = export_onnx(quant_model, inputs, folder / "model.onnx")
    session = onnxruntime_session(file)
    names = [output.name for output in session.get_outputs()]

    def run(given: Inputs) -> dict[str, Any]:
        feed = {name: x.numpy() for name, x in given.items()}
        return dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))

    return run


def in_turns(run: Run, sizes: list[Inputs]) -> Callable[[], Any]:
    """Calls with one of ``sizes`` after the other: kernels that are made for a size show here."""
    turns = itertools.cycle(sizes)
    return lambda: run(next(turns))


def in_runtimes(
    quantizer: Quantizer, model: nn.Module, inputs: Inputs, folder: Path
) -> dict[str, Run]:
    """Our model in each runtime, and the exported file in the bare one."""
    import openvino

    written = quantizer.quantize(model, backend="onnx")
    (file,) = export_onnx(written, inputs, folder / "runtimes.onnx")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", options | {"INFERENCE_NUM_THREADS": 1})
    request, session = compiled.create_infer_request(), onnxruntime_session(file)
    runs: dict[str, Run] = {
        "bare openvino": lambda given: request.infer({k: x.numpy() for k, x in given.items()}),
        "bare onnxruntime": lambda given: session.run(
            None, {k: x.numpy() for k, x in given.items()}
        ),
    }
    for name in ("openvino", "onnxruntime", "inductor"):
        quant_model = quantizer.quantize(model, backend=name)
        start = time.perf_counter()
        quant_model(**inputs)
        print(f"{name}: compiled in {time.perf_counter() - start:.1f} s")
        runs[f"int8 {name}"] = lambda given, run=quant_model: dict(run(**given))
    return runs


def measure(
    name: str,
    model: nn.Module,
    sizes: list[Inputs],
    backend: str | None,
    runtimes: bool = False,
) -> list[dict[str, Any]]:
    """A row for the first size alone, and one for all in turns.

    Milliseconds in float and int8, the ratio, and the error at the output.
    """
    quantizer = Quantizer(backend)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        quantizer.calib(model)(**sizes[0])
        quant_model = quantizer.quantize(model)
        runs: dict[str, Run] = {"float32": lambda given: dict(model(**given))}
        if quantizer.backend is Backend.ONNX:  # in PyTorch it computes in float
            deployed = "int8 onnxruntime"
            runs[deployed] = onnxruntime(quant_model, sizes[0], Path(folder))
        elif quantizer.backend.not_in_torchscript:
            deployed = "int8"
            runs[deployed] = lambda given: dict(quant_model(**given))
        else:
            deployed = "int8 TorchScript"
            runs["int8"] = lambda given: dict(quant_model(**given))
            runs[deployed] = torchscript(quant_model, sizes[0], Path(folder))
        if runtimes:
            runs |= in_runtimes(quantizer, model, sizes[0], Path(folder))
        rows = []
        for title, given in ((name, sizes[:1]), (f"{name}, and a second size in turn", sizes)):
            calls = {each: in_turns(run, given) for each, run in runs.items()}
            times = interleaved_latency(calls)
            rows.append(
                {
                    "model": title,
                    "backend": quantizer.backend.name,
                    **{f"{each} ms": time for each, time in times.items()},
                    "speed-up": times["float32"] / times[deployed],
                    "output SQNR dB": sqnr(*(runs[r](sizes[0]) for r in ("float32", deployed))),
                    "MACs in int8": f"{quantizer.plan.coverage:.1%}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="default: the best of this machine")
    parser.add_argument(
        "--runtimes", action="store_true", help="openvino, onnxruntime and inductor too"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    rows = [
        *measure(
            "MiniLM-L6, 8 x 128",
            minilm(),
            [minilm_inputs(), minilm_inputs(3, 96)],
            options.backend,
            options.runtimes,
        ),
        *measure(
            "ResNet-50, 1 x 3 x 224 x 224",
            resnet50(),
            [{"pixel_values": torch.randn(1, 3, *size)} for size in ((224, 224), (192, 256))],
            options.backend,
            options.runtimes,
        ),
    ]
    report(f"latency_{options.backend}" if options.backend else "latency", rows)


if __name__ == "__main__":
    main()
