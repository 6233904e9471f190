"""Deploy as TorchScript: one file, sizes dynamic, integer weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from torch_quant.backends.quantized import QuantizedGraph, QuantizedRegion
from torch_quant.errors import InvalidConfig
from torch_quant.io.files import write_atomically
from torch_quant.model import call_example

__all__ = ["export_torchscript"]


def export_torchscript(
    quant_model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]
) -> torch.jit.ScriptModule:
    """Trace a quantized model, freeze it unless that would unpack its weights, and save it.

    The file holds integer weights and the graph that serves the example: other batch sizes and
    lengths too, but where the model has several graphs (other arguments, or other code for other
    sizes), only that one. A process that loads it must ``import torch_quant`` first.

    Args:
        quant_model: what ``Quantizer.quantize`` returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords.
        path: where to save; written at the end, in one step.

    Returns:
        The traced module. Dictionaries among the outputs stay dictionaries.

    Raises:
        InvalidConfig: the folder does not exist, the model cannot be traced, or is for
            ``Backend.ONNX``.
    """
    regions = (m for m in quant_model.modules() if isinstance(m, QuantizedRegion))
    if any(region.backend == "onnx" for region in regions):
        raise InvalidConfig(
            "the model was quantized for ONNX, whose operators a process that loads the file does "
            "not know: export_onnx(...) writes it, or quantize for another backend, which needs "
            "no new calibration"
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation, and the tracer's on constants
        try:
            # A compiler's kernels may round otherwise than the graph it is given.
            options: dict[str, Any] = {
                "strict": False,
                "check_trace": not _is_compiled(quant_model),
            }
            if isinstance(example_inputs, Mapping):
                options["example_kwarg_inputs"] = dict(example_inputs)
                traced = torch.jit.trace(quant_model, **options)
            else:
                traced = torch.jit.trace(quant_model, example_inputs, **options)
        except RuntimeError as error:
            raise InvalidConfig(
                f"the quantized model cannot be traced: {error}. Outputs must be tensors, or "
                "tuples or dictionaries of them; data-dependent Python code between captured "
                "pieces is traced as it ran"
            ) from error
        scripted: torch.jit.ScriptModule = traced.eval()
        if not _would_unpack_weights(quant_model):
            scripted = torch.jit.freeze(scripted)
        if _is_compiled(quant_model):
            for _ in range(2):  # the first call records shapes, the second builds the kernels
                call_example(scripted, example_inputs)
    write_atomically(path, lambda file: torch.jit.save(scripted, file))
    return scripted


def _is_compiled(model: nn.Module) -> bool:
    """Whether its kernels come from a compiler that works on the traced graph."""
    return any(isinstance(m, QuantizedGraph) and m.compiler for m in model.modules())


def _would_unpack_weights(model: nn.Module) -> bool:
    """Whether freezing would fold integer weights to float, as plain operators allow."""
    return any(
        node.target is torch.ops.aten.to.dtype and node.args[0].op == "get_attr"
        for module in model.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
    )
