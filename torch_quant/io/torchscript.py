"""Deploy as TorchScript: one file, sizes dynamic, integer weights."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torch_quant.backends import Backend
from torch_quant.convert.quantized import QuantizedModule, check_finished, quantized_graphs
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.metrics import difference
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.examples import example_call
from torch_quant.graph.outputs import flatten_output
from torch_quant.io.files import checked_target, staging, write_stream
from torch_quant.io.tracing import TensorReads
from torch_quant.ops.arguments import argument

__all__ = ["export_torchscript"]

logger = logging.getLogger("torch_quant")

_MESSAGE = 400
"""Characters of what PyTorch's tracer says, which can hold whole tensors."""


def export_torchscript(
    quant_model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]
) -> torch.jit.ScriptModule:
    """Trace a quantized model, freeze it unless that would unpack its weights, and save it.

    The file holds integer weights and the graph that serves the example: other batch sizes and
    lengths too, but where the model has several graphs (other arguments, or other code for other
    sizes), only that one; a warning names sizes that the code asks for. A process that loads it
    must ``import torch_quant`` first. The file is loaded and compared with the model on the example
    before it gets its name.

    Args:
        quant_model: what ``Quantizer.quantize`` returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords; a list is one
            input.
        path: where to save; written at the end, in one step.

    Returns:
        The traced module. Dictionaries among the outputs stay dictionaries.

    Raises:
        InvalidConfig: it is no quantized model, or one for ``Backend.ONNX``; nothing can be written
            to the path; the model cannot be traced, as Python code of a model in pieces decides by
            what a tensor holds (names file and line).
        QuantError: the file does not give what the model gives.

    >>> export_torchscript(nn.Linear(4, 2), torch.ones(8, 4), "model.pt")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: expected a quantized model, got Linear: ...
    """
    _check_model(quant_model)
    check_finished(quant_model)
    target = checked_target(path)
    args, kwargs = example_call(example_inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation; the tracer's, see TensorReads
        scripted = _traced(quant_model, args, kwargs)
        if _frozen(quant_model) and not _would_unpack_weights(quant_model):
            scripted = torch.jit.freeze(scripted)
        if _is_compiled(quant_model):
            for _ in range(2):  # the first call records shapes, the second builds the kernels
                scripted(*args, **kwargs)
        with staging(target) as folder:
            file = folder / target.name
            write_stream(file, functools.partial(torch.jit.save, scripted))
            relied_on = _compare(quant_model, file, args, kwargs)
            os.replace(file, target)
    if relied_on:
        logger.warning(
            "export_torchscript: the file does what the model does for the sizes of the example, "
            "and is right where %s",
            " and ".join(relied_on),
        )
    return scripted


def _check_model(model: Any) -> None:
    submodules = (
        [m for m in model.modules() if isinstance(m, QuantizedModule)]
        if isinstance(model, nn.Module)
        else []
    )
    if not submodules:
        raise InvalidConfig(
            f"expected a quantized model, got {type(model).__name__}: "
            "export_torchscript(quantizer.quantize(model), example_inputs, path)"
        )
    for backend in {Backend.get(submodule.quantization.backend) for submodule in submodules}:
        if backend.not_in_torchscript:
            raise InvalidConfig(
                f"the model was quantized for {backend!r}: {backend.not_in_torchscript}, or "
                "quantize for another backend, which needs no new calibration"
            )


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.jit.ScriptModule:
    """The model in eval mode as traced; raises :class:`InvalidConfig` if that cannot be right."""
    options: dict[str, Any] = {"strict": False, "check_trace": False}  # the file is, instead
    if kwargs:
        options["example_kwarg_inputs"] = kwargs
    else:
        options["example_inputs"] = args
    reads = TensorReads((args, kwargs))
    failure: Exception | None = None
    try:
        with reads:
            traced = torch.jit.trace(model, **options)
    except RuntimeError as error:
        failure = error
    if reads.of_values:
        raise InvalidConfig(
            "the model cannot be traced: Python code between its captured pieces reads what a "
            "tensor holds, and the file would repeat what that code did on the example, whatever "
            f"its input: {reads.describe(reads.of_values)}. Compute it with tensors "
            "(torch.where, masks) and quantize again; or save the quantized model itself, which "
            "keeps its Python code: torch_quant.save(quant_model, folder), and "
            "torch_quant.load(folder, model=...)"
        ) from failure
    if failure is not None:
        raise InvalidConfig(
            f"the quantized model cannot be traced: {str(failure)[:_MESSAGE]}. Inputs must be "
            "tensors, or lists, tuples or dictionaries of them, and outputs too"
        ) from failure
    if reads.of_sizes:
        logger.warning(
            "%s: Python code reads sizes, and the file does what that code did for the sizes of "
            "the example: %s",
            "export_torchscript",
            reads.describe(reads.of_sizes),
        )
    result: torch.jit.ScriptModule = traced.eval()
    return result


def _compare(
    model: nn.Module, file: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """The conditions on sizes that the model's graphs rely on.

    Raises:
        QuantError: the file does not give what the model gives on the example.
    """
    relied_on: dict[str, None] = {}

    def note(graph: nn.Module, tensors: tuple[Tensor, ...]) -> None:
        assert isinstance(graph, QuantizedGraph)
        call = flatten_call(tensors, {})
        relied_on.update(dict.fromkeys(graph.contract.relied_on(call)))

    def run(function: Any) -> list[Any]:
        again, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        return flatten_output(function(*again, **named))[0]

    hooks = [graph.register_forward_pre_hook(note) for _, graph in quantized_graphs(model)]
    try:
        expected = run(model)
    finally:
        for hook in hooks:
            hook.remove()
    found = run(torch.jit.load(str(file)))
    if len(expected) != len(found):
        raise QuantError(f"the traced model gives {len(found)} outputs, not {len(expected)}")
    for i, (x, y) in enumerate(zip(expected, found, strict=True)):
        if reason := difference(torch.as_tensor(x), torch.as_tensor(y)):
            raise QuantError(
                f"the traced model does not give what the quantized one gives on the example: "
                f"output {i} {reason}; nothing was written. torch_quant.save(quant_model, folder) "
                "saves the model itself"
            )
    return list(relied_on)


def _is_compiled(model: nn.Module) -> bool:
    """Whether its kernels come from a compiler that works on the traced graph."""
    return any(graph.compiler for _, graph in quantized_graphs(model))


def _frozen(model: nn.Module) -> bool:
    """Whether the backends of all graphs have them frozen."""
    parts = (each for each in model.modules() if isinstance(each, QuantizedModule))
    return all(Backend.get(each.quantization.backend).frozen for each in parts)


def _would_unpack_weights(model: nn.Module) -> bool:
    """Whether freezing would fold integer weights to float, as plain operators allow."""
    return any(
        node.target is torch.ops.aten.to.dtype and argument(node, "self").op == "get_attr"
        for _, graph in quantized_graphs(model)
        for module in graph.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
    )
