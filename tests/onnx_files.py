"""What the tests of ONNX files share: export, run in onnxruntime or OpenVINO, look inside."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import Inputs, run
from torch import Tensor, nn

from torch_quant import Backend, CaptureFailed, Quantizer, export_onnx, sqnr
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.outputs import flatten_output

__all__ = [
    "check_free_sizes",
    "check_fused",
    "feeds",
    "free_sizes",
    "needs",
    "operators",
    "run_onnxruntime",
    "run_openvino",
    "run_session",
    "session",
    "tensors",
    "unread",
    "written",
]


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where a package is missing, saying how to get it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"missing: pip install {' '.join(missing)}, or -e '.[dev]' has all"
    )


def written(
    quantizer: Quantizer,
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    least: float | None = 25.0,
    **options: Any,
) -> QuantizedModule:
    """Quantize for ONNX, export with ``inputs`` as the example and try all sizes called free.

    Args:
        quantizer: calibrated.
        model: that it was calibrated with.
        inputs: the example.
        path: of the file.
        least: see :func:`check_free_sizes`; None where sizes belong together in ways that the
            example cut or repeated does not keep, or what is written is not ours.
        options: of ``export_onnx``.
    """
    quant_model = quantizer.quantize(model, backend="onnx")
    args, kwargs = bind(quant_model.signature, *inputs)
    export_onnx(quant_model, kwargs if kwargs and not args else args, path, **options)
    if least is not None:
        check_free_sizes(path, quant_model, inputs, least)
    return quant_model


def check_fused(
    quantizer: Quantizer, model: nn.Module, example: Inputs, inputs: Inputs, path: Path
) -> None:
    """The file computes on integer kernels, and what the float model does up to their noise."""
    quant_model = written(quantizer, model, example, path)
    report = Backend.get("onnx").verify(path)  # type: ignore[attr-defined]
    assert report.complete, str(report)
    found = run_onnxruntime(path, feeds(quant_model, inputs))
    assert sqnr(tensors(model, inputs), found) >= 30


def feeds(quant_model: QuantizedModule, inputs: Inputs) -> dict[str, Any]:
    """The tensors of a call under the names that the file gives its inputs."""
    call = flatten_call(*bind(quant_model.signature, *inputs))
    return {name: x.numpy() for name, x in zip(call.names(), call.tensors, strict=True)}


def tensors(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors among a model's outputs, in order."""
    return [x for x in flatten_output(run(model, inputs))[0] if isinstance(x, Tensor)]


def session(path: Path, **options: Any) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def run_onnxruntime(path: Path, feed: dict[str, Any], **options: Any) -> list[Tensor]:
    """The outputs on onnxruntime's CPU provider; inputs the file does not have are left out."""
    return run_session(session(path, **options), feed)


def run_session(loaded: Any, feed: dict[str, Any]) -> list[Tensor]:
    """The outputs of a file that is loaded already."""
    known = {each.name for each in loaded.get_inputs()}
    outputs = loaded.run(None, {name: x for name, x in feed.items() if name in known})
    return [torch.from_numpy(x) for x in outputs]


def run_openvino(path: Path, feed: dict[str, Any]) -> list[Tensor]:
    """The outputs on OpenVINO's CPU plugin, in float32 where it is not int8."""
    return _run_compiled(_compiled(path), feed)


def _compiled(path: Path) -> Any:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(path, "CPU", options)


def _run_compiled(compiled: Any, feed: dict[str, Any]) -> list[Tensor]:
    known = {name for each in compiled.inputs for name in each.names}
    outputs = compiled({name: x for name, x in feed.items() if name in known})
    return [torch.from_numpy(outputs[each].copy()) for each in compiled.outputs]


def operators(path: Path) -> list[str]:
    """Operators of the file, in order."""
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


def unread(path: Path) -> list[str]:
    """Initializers of the file that no node reads."""
    import onnx

    graph = onnx.load(path).graph
    read = {name for node in graph.node for name in node.input}
    return [each.name for each in graph.initializer if each.name not in read]


def free_sizes(path: Path) -> dict[str, list[tuple[str, int]]]:
    """Name of each size that the file calls free -> the inputs and axes that have it."""
    import onnx

    found: dict[str, list[tuple[str, int]]] = {}
    for each in onnx.load(path, load_external_data=False).graph.input:
        for axis, size in enumerate(each.type.tensor_type.shape.dim):
            if size.dim_param:
                found.setdefault(size.dim_param, []).append((each.name, axis))
    return found


def _resized(x: Tensor, axis: int, size: int) -> Tensor:
    """``x`` cut or repeated along ``axis``."""
    times = -(-size // max(x.shape[axis], 1))
    return torch.cat([x] * times, axis).narrow(axis, 0, size).contiguous()


def _others(size: int) -> tuple[int, ...]:
    """Those that are tried in place of ``size``; models serve some of them."""
    near = size + 1, size - 1, 2 * size, size // 2, size + 2, size - 2, size + 4, 3 * size
    return tuple(each for each in near if each > 0)


def check_free_sizes(
    path: Path,
    quant_model: QuantizedModule,
    inputs: Inputs,
    least: float = 25.0,
) -> list[str]:
    """Try each size that the file calls free at two other values, in both runtimes.

    The values are some that the quantized model serves, whose outputs the file must give. Each
    runtime loads the file once, so that one size follows another as in serving. Returns the names
    of the sizes.

    Args:
        path: of the file.
        quant_model: what it was written from.
        inputs: the example, whose tensors are cut or repeated.
        least: SQNR of the file against ``quant_model``, dB. Both round alike but for values at
            the border of two codes.
    """
    found = free_sizes(path)
    if not found:
        return []
    call = flatten_call(*bind(quant_model.signature, *inputs))
    example = dict(zip(call.names(), call.tensors, strict=True))
    runtimes = {"onnxruntime": partial(run_session, session(path))}
    if importlib.util.find_spec("openvino") is not None:
        runtimes["openvino"] = partial(_run_compiled, _compiled(path))
    for name, places in found.items():
        first, axis = places[0]
        now, tried = example[first].shape[axis], 0
        for size in dict.fromkeys(_others(now)):
            feed = dict(example)
            for place, at in places:
                feed[place] = _resized(feed[place], at, max(size, 1))
            args, kwargs = call.rebuild(tuple(feed[each] for each in call.names()))
            try:
                expected = tensors(quant_model, (args, kwargs))
            except (CaptureFailed, IndexError):  # a table of positions has an end
                continue  # the model itself does not serve it
            except RuntimeError as error:
                if "out of bounds" not in str(error):
                    raise
                continue
            arrays = {each: x.numpy() for each, x in feed.items()}
            for runtime, run_file in runtimes.items():
                outputs = run_file(arrays)
                where = (path.name, runtime, name, size)
                assert [x.shape for x in outputs] == [x.shape for x in expected], where
                assert sqnr(expected, outputs) > least, (*where, sqnr(expected, outputs))
            tried += 1
            if tried == 2:
                break
        assert tried == 2, f"{path.name} calls {name} free, but the model serves {now} only"
    return list(found)
