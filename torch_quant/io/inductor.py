"""Deploy as AOTInductor's package: compiled code and integer weights in one file, no Python."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.backends.in_process import fixed_sizes, refuse_writes, told_sizes
from torch_quant.backends.inductor.backend import InductorBackend
from torch_quant.backends.inductor.packages import PackagedSession
from torch_quant.convert.exporting import input_shapes
from torch_quant.convert.quantized import QuantizedModule, check_finished, plan_of
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.metrics import difference
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.outputs import leaf_names
from torch_quant.io.called import graphs_called
from torch_quant.io.files import checked_target, staging
from torch_quant.version import __version__

__all__ = ["export_inductor"]

logger = logging.getLogger("torch_quant")


def export_inductor(
    quant_model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]
) -> dict[str, list[str]]:
    """Compile a quantized model into a package that runs without Python, from C++ too.

    The graph that serves the example is compiled, which takes 5 to 60 seconds; the package is then
    loaded and compared with the model on the example. It takes the model's tensors in one flat
    order and gives tensors in one flat order: those returned here, which its metadata tell too. It
    runs on the instruction set of the CPU that compiled it.

    Args:
        quant_model: what ``quantizer.quantize(model, backend=Backend.INDUCTOR)`` returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords; a list is one
            input.
        path: where to write; ends in ``.pt2``. Written at the end, in one step.

    Returns:
        ``{"inputs": [...], "outputs": [...]}``: the names of the tensors, in order, inputs with
        their sizes: ``x: (s0, 16)`` serves every ``s0``.

    Raises:
        InvalidConfig: not a model for Backend.INDUCTOR, one in pieces, or a path that will not do.
        UnsupportedOp: it cannot be exported or compiled, or writes to its tensors; says why.
        QuantError: the package does not give what the model gives.

    >>> export_inductor(nn.Linear(4, 2), torch.ones(8, 4), "model.pt2")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: expected a quantized model, got Linear: quantizer.quantize(...
    """
    model = _checked(quant_model)
    target = checked_target(path)
    if target.suffix != ".pt2":
        raise InvalidConfig(f"cannot write {target}: PyTorch loads packages that end in .pt2")
    ((name, graph, tensors), *others) = graphs_called(model, example_inputs)
    if name or others or graph is None:
        raise InvalidConfig(
            "the model was captured in pieces, with Python code between them, and cannot be one "
            "package; print(quantizer.coverage(model)) says why"
        )
    backend = graph.compiler
    assert isinstance(backend, InductorBackend)
    tensors = tuple(x.detach().contiguous() for x in tensors)
    refuse_writes(graph)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _written(model, graph, backend, tensors, target)


def _written(
    model: QuantizedModule,
    graph: QuantizedGraph,
    backend: InductorBackend,
    tensors: tuple[Tensor, ...],
    target: Path,
) -> dict[str, list[str]]:
    results = graph.body(*tensors)
    found = _names(graph, results)
    metadata = {
        "torch_quant.version": __version__,
        "torch_quant.plan": json.dumps(plan_of(model).to_dict()),
        "torch_quant.calibration": json.dumps(model.quantization.calibration),
        **{key: json.dumps(names) for key, names in found.items()},
    }
    with staging(target) as folder:
        file = folder / target.name
        exported = backend.package(graph, tensors, file, metadata)
        _compare(file, tensors, [x for x in results if isinstance(x, Tensor)])
        os.replace(file, target)
    if fixed := fixed_sizes(graph, input_shapes(exported)):
        logger.warning("export_inductor: the package serves %s only", told_sizes(graph, fixed))
    return found


def _checked(quant_model: nn.Module) -> QuantizedModule:
    if not isinstance(quant_model, QuantizedModule):
        raise InvalidConfig(
            f"expected a quantized model, got {type(quant_model).__name__}: "
            "quantizer.quantize(model, backend=Backend.INDUCTOR)"
        )
    check_finished(quant_model)
    backend = quant_model.quantization.backend
    if backend != "inductor":
        raise InvalidConfig(
            f"the model was quantized for {backend}: quantizer.quantize(model, "
            "backend=Backend.INDUCTOR) gives one that can be compiled, with the same calibration"
        )
    return quant_model


def _names(graph: QuantizedGraph, results: Any) -> dict[str, list[str]]:
    contract = graph.contract
    inputs = [
        f"{name}: ({', '.join(map(str, sizes))})"
        for name, sizes in zip(contract.names, contract.shapes, strict=True)
    ]
    wanted = zip(leaf_names(graph.out_spec), results, strict=True)
    return {"inputs": inputs, "outputs": [name for name, x in wanted if isinstance(x, Tensor)]}


def _compare(file: Any, tensors: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    """Raise :class:`QuantError` unless the package gives what the model gives on the example."""
    found = PackagedSession(file)(tensors)
    for i, (x, y) in enumerate(zip(expected, found, strict=True)):
        if reason := difference(x, y):
            raise QuantError(
                f"the package does not give what the model gives on the example: output {i} "
                f"{reason}; nothing was written"
            )
