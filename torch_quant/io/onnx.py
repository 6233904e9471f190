"""Deploy as ONNX: quantize/dequantize pairs, integer weights, the model's own names, free sizes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from torch_quant.backends.onnx.program.names import describe
from torch_quant.backends.onnx.program.translate import LOWEST_OPSET, program_of
from torch_quant.convert.quantized import QuantizedModule, check_finished, quantized_graphs
from torch_quant.core.packages import missing_packages
from torch_quant.errors import BackendUnavailable, InvalidConfig
from torch_quant.graph.progress import hidden
from torch_quant.io.called import graphs_called
from torch_quant.io.files import checked_target, staging

__all__ = ["export_onnx"]

_LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one file, which protobuf limits to 2 GB, the graph included."""

logger = logging.getLogger("torch_quant")

_WRITTEN = frozenset({"onnx", "onnxruntime", "openvino"})
"""Backends whose graphs are of operators that ONNX has."""


def export_onnx(
    quant_model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    opset: int | None = None,
    pieces: bool = False,
    matmul_nbits: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write a quantized model as an ONNX file that onnxruntime and OpenVINO run on int8 kernels.

    The graph that serves the example is written. Inputs and outputs are named as the model's; the
    file tells in its metadata which version wrote it, the plan and how it was calibrated. It is
    written at the end, in one step; weights above 2 GB go to ``<path>.data`` beside it. A warning
    names the layers in bfloat16, which onnxruntime has no kernels for.

    Args:
        quant_model: what ``quantizer.quantize(model, backend=Backend.ONNX)`` returned, for every
            runtime; of ``Backend.OPENVINO`` the file has the form that OpenVINO is fastest with.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords; a list is one
            input.
        path: where to write.
        dynamic: keep batch, length and image sizes free, as far as the model itself does.
        opset: the ONNX operator set, 18 or more, 21 for weights in blocks; None for the exporter's
            own choice.
        pieces: write a model that was captured in pieces as one file for each graph that the
            example takes: ``model.onnx`` gives ``model.encoder.layer.0.onnx`` and so on.
        matmul_nbits: write linear layers with quantized weights and float activations as
            onnxruntime's own operator, not as ONNX's ``DequantizeLinear`` in blocks, of which
            onnxruntime makes the same, and which others read too.
        progress: whether to show a progress bar.

    Returns:
        The files: one, or one for each piece.

    Raises:
        BackendUnavailable: onnx or onnxscript is not installed.
        InvalidConfig: a model for a backend without ONNX operators, one in pieces, an opset or path
            that will not do.
        UnsupportedOp: an operator has no ONNX form; names where it is.

    >>> import torch
    >>> export_onnx(nn.Linear(4, 2), torch.ones(8, 4), "model.onnx")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: expected a quantized model, got Linear: quantizer.quantize(...
    """
    if missing := missing_packages("onnx", "onnxscript"):
        raise BackendUnavailable(f"export_onnx: {missing}")
    if opset is not None and opset < LOWEST_OPSET:
        raise InvalidConfig(
            f"export_onnx(opset={opset}): expected {LOWEST_OPSET} or more, the lowest that "
            "PyTorch exports to"
        )
    if not isinstance(quant_model, QuantizedModule):
        raise InvalidConfig(
            f"expected a quantized model, got {type(quant_model).__name__}: "
            "quantizer.quantize(model, backend=Backend.ONNX)"
        )
    check_finished(quant_model)
    target = checked_target(path)
    backend = quant_model.quantization.backend
    if backend not in _WRITTEN:
        raise InvalidConfig(
            f"the model was quantized for {backend}, whose operators have no ONNX "
            "form: quantizer.quantize(model, backend=Backend.ONNX)"
        )
    calls = graphs_called(quant_model, example_inputs)
    whole = [name for name, *_ in calls] == [""]
    if not whole and not pieces:
        raise InvalidConfig(_in_pieces(quant_model, target))
    if lower := _in_bfloat16(quant_model):
        logger.warning("%s", lower)
    from tqdm import tqdm

    files = [
        target
        if whole
        else checked_target(target.with_name(f"{target.stem}.{name}{target.suffix}"))
        for name, *_ in calls
    ]
    paths = {graph: each.quantization.path for each, graph in quantized_graphs(quant_model)}
    with tqdm(total=3 * len(calls), unit="step", disable=hidden(progress)) as bar:
        for file, (piece, graph, tensors) in zip(files, calls, strict=True):

            def step(name: str, file: Path = file) -> None:
                bar.set_description(f"{file.name}: {name}")
                bar.update(name != "capturing")

            program = program_of(
                graph,
                tensors,
                paths[graph],
                dynamic=dynamic,
                opset=opset,
                matmul_nbits=matmul_nbits,
                on_fixed=lambda what: logger.warning("the ONNX file serves %s", what),
                on_step=step,
            )
            describe(program, quant_model, "" if whole else piece)
            step("writing")
            _save(program, file)
            bar.update()
    return files


def _in_pieces(model: QuantizedModule, target: Path) -> str:
    glue = [
        submodule.quantization.path or "(root)"
        for submodule in model.modules()
        if isinstance(submodule, QuantizedModule) and submodule.quantization.glue is not None
    ]
    return (
        f"the model was captured in pieces, with Python code between them in {', '.join(glue)}, "
        "and cannot be one ONNX graph; print(quantizer.coverage(model)) says why. "
        f"export_onnx(..., {target.name!r}, pieces=True) writes a file for each piece"
    )


def _in_bfloat16(model: QuantizedModule) -> str:
    """What a file with products in bfloat16 is good for; empty without any.

    Looking up rows of a table is no product: onnxruntime has it in bfloat16.
    """
    names = [
        site.name
        for site in model.quantization.plan.values()
        if site.precision == "bfloat16" and site.op != "embedding"
    ]
    if not names:
        return ""
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return (
        f"the ONNX file has {some} in bfloat16, which onnxruntime's CPU provider has no kernels "
        "for, so it does not load the file; OpenVINO does. For onnxruntime, leave them in float: "
        f"quantizer.set({names[0]!r}, None), or quantizer.reset_fallback() if they fell back"
    )


# Saving


def _save(program: Any, target: Path) -> None:
    """Write into a folder of its own beside ``target``, then rename: all or nothing."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    data = f"{target.name}.data"
    external = data if size > _LARGEST else None
    try:
        with staging(target) as folder:
            ir.save(program.model, folder / target.name, external_data=external)
            if external:
                os.replace(folder / data, target.with_name(data))
            os.replace(folder / target.name, target)
    except OSError as error:
        raise InvalidConfig(f"cannot write {target}: {error.strerror}") from error
