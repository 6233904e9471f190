"""ONNX files in two runtimes: float, ours, onnxruntime's own int8 and, where installed, NNCF's.

MiniLM at 8 x 128 and ResNet-50 on one image: latency in onnxruntime and OpenVINO, size, fidelity.
All are calibrated on the same data. ResNet-50 has random weights; its fidelity is that of features.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from harness import interleaved_latency, minilm, minilm_inputs, onnxruntime_session, report
from latency_models import resnet50
from latency_ways import Reader, arrays
from minilm_data import embed, load_pairs, model_folder, retrieval
from torch import Tensor, nn

from torch_quant import Backend, QConfig, Quantizer, SmoothQuant, cosine, export_onnx, sqnr

Feed = dict[str, Tensor]


def openvino_call(path: Path, feed: Feed) -> Callable[[], Any]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    values = arrays(feed)
    return lambda: request.infer(values)


class InRuntime(nn.Module):
    """A file as a model for ``embed``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if path.suffix == ".xml":
            import openvino

            self.request = openvino.Core().compile_model(path, "CPU").create_infer_request()
        else:
            self.session = onnxruntime_session(path)

    def forward(self, **inputs: Tensor) -> Any:
        feed = {k: v.numpy() for k, v in inputs.items() if k != "token_type_ids"}
        if self.path.suffix == ".xml":
            first = self.request.infer(feed)[0]
        else:
            first = self.session.run(None, feed)[0]
        return {"last_hidden_state": torch.from_numpy(first.copy())}


def peers(float_file: Path, feeds: list[Feed], folder: Path, kind: str) -> dict[str, Path]:
    """Files that others' tools make of the float one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / "prepared.onnx"
    quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
    formats = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    found = {"onnxruntime static": folder / "static.onnx"}
    quantize_static(
        prepared, found["onnxruntime static"], Reader(feeds), per_channel=True, **formats
    )
    if kind == "transformer":
        file = found["onnxruntime static, MatMul only"] = folder / "matmul.onnx"
        options = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
        quantize_static(prepared, file, Reader(feeds), **options, **formats)
        file = found["onnxruntime dynamic"] = folder / "dynamic.onnx"
        quantize_dynamic(prepared, file, weight_type=QuantType.QInt8)
    if importlib.util.find_spec("nncf") is not None:
        import nncf
        import openvino

        model_type = nncf.ModelType.TRANSFORMER if kind == "transformer" else None
        data = nncf.Dataset([arrays(feed) for feed in feeds])
        model = nncf.quantize(
            openvino.Core().read_model(float_file),
            data,
            model_type=model_type,
            subset_size=len(feeds),
        )
        file = found["NNCF"] = folder / "nncf.xml"
        openvino.save_model(model, file)
    return found


def ours(model: nn.Module, feeds: list[Feed], feed: Feed, path: Path, smooth: float | None) -> None:
    """Calibrate, quantize, export, and print what onnxruntime makes of the file."""
    quantizer = Quantizer(
        "onnx", qconfig=QConfig(transforms=[] if smooth is None else [SmoothQuant(smooth)])
    )
    calib_model = quantizer.calib(model)
    for each in feeds:
        calib_model(**each)
    quant_model = quantizer.quantize(model)
    start = time.perf_counter()
    export_onnx(quant_model, feed, path)
    seconds = time.perf_counter() - start
    print(f"{Backend.ONNX.verify(path)}\nexported in {seconds:.1f} s")


def size_of(path: Path) -> int:
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def measure(
    name: str, model: nn.Module, feeds: list[Feed], feed: Feed, folder: Path, kind: str
) -> list[dict[str, Any]]:
    """A row for each file."""
    sizes = {k: dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for k, x in feed.items()}
    if kind != "transformer":
        sizes = {key: {0: torch.export.Dim.AUTO} for key in feed}
    files = {"float32": folder / "float.onnx"}
    program = torch.onnx.export(
        model, (), kwargs=feed, dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    program.save(files["float32"], external_data=False)  # type: ignore[union-attr]
    alphas = {"torch_quant": None} | ({"torch_quant, smooth": 0.8} if kind == "transformer" else {})
    for each, alpha in alphas.items():
        files[each] = folder / f"{each}.onnx"
        ours(model, feeds, feed, files[each], alpha)
    files |= peers(files["float32"], feeds, folder, kind)
    calls: dict[str, Callable[[], Any]] = {}
    for each, path in files.items():
        if path.suffix == ".onnx":
            loaded, values = onnxruntime_session(path), arrays(feed)
            calls[f"onnxruntime {each}"] = lambda s=loaded, v=values: s.run(None, v)  # type: ignore[misc]
        if importlib.util.find_spec("openvino") is not None and "dynamic" not in each:
            calls[f"OpenVINO {each}"] = openvino_call(path, feed)
    times = interleaved_latency(calls, rounds=15 if kind == "transformer" else 60)
    full = size_of(files["float32"])
    rows = []
    for each, path in files.items():
        rows.append(
            {
                "model": name,
                "file": each,
                "onnxruntime ms": times.get(f"onnxruntime {each}"),
                "OpenVINO ms": times.get(f"OpenVINO {each}"),
                "size": f"{size_of(path) / full:.1%}",
                **fidelity(kind, path, files["float32"], feed),
            }
        )
    return rows


@functools.cache
def embeddings(path: Path) -> tuple[Tensor, Tensor]:
    """Of the held-out queries and of their bodies."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model, pairs = InRuntime(path), load_pairs().held_out
    queries = embed(model, tokenizer, [pair.query for pair in pairs])
    return queries, embed(model, tokenizer, [pair.body for pair in pairs])


def fidelity(kind: str, path: Path, float_file: Path, feed: Feed) -> dict[str, Any]:
    """Cosine and retrieval score of sentence embeddings, or SQNR of features."""
    if kind == "transformer":
        vectors, truth = embeddings(path), embeddings(float_file)
        score, _ = retrieval(*vectors)
        return {"cosine": float(cosine(torch.cat(truth), torch.cat(vectors)).mean()), "MRR": score}
    if path.suffix == ".xml" or path == float_file:
        return {}
    values = arrays(feed)
    outputs = [onnxruntime_session(each).run(None, values) for each in (float_file, path)]
    expected, found = ([torch.from_numpy(x) for x in each] for each in outputs)
    return {"SQNR dB": sqnr(expected, found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["minilm", "resnet50"], help="one of the two models")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    if options.only != "resnet50":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder())
        names = ("input_ids", "attention_mask")
        texts = load_pairs().calibration
        encoded = [
            tokenizer([text], truncation=True, max_length=128, return_tensors="pt")
            for text in texts
        ]
        feeds = [{name: each[name] for name in names} for each in encoded]
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(
                "MiniLM-L6, 8 x 128", minilm(), feeds, minilm_inputs(), Path(folder), "transformer"
            )
    if options.only != "minilm":
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(1, 3, 224, 224, generator=generator) for _ in range(8)]
        feeds = [{"pixel_values": image} for image in images]
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(
                "ResNet-50, 1 x 3 x 224 x 224", resnet50(), feeds, feeds[0], Path(folder), "cnn"
            )
    report("onnx_runtimes", rows, onnxruntime=onnxruntime.__version__)


if __name__ == "__main__":
    main()
