"""What an exported ONNX model is told of where it came from: names, sizes, sites, metadata."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.convert.quantized import QuantizedModule, plan_of
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.graph.outputs import leaf_names
from torch_quant.graph.sites import KEY
from torch_quant.version import __version__

__all__ = ["describe", "rename"]

aten = torch.ops.aten

_PRODUCTS = frozenset({
    aten.mm.default, aten.matmul.default, aten.bmm.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.linear.default, aten.embedding.default,
})  # fmt: skip
"""What the quantized graph computes its sites with."""
_BODY = "body."
"""Where the exported module has its graph."""


def rename(
    program: Any, graph: QuantizedGraph, tensors: tuple[Tensor, ...], path: str = ""
) -> None:
    """The model's names on inputs, outputs and weights, sites' names on nodes.

    Args:
        program: as PyTorch's exporter gives it.
        graph: what was exported.
        tensors: its inputs.
        path: of its module in the model.
    """
    model = program.model
    _name_products(program, graph.body)
    with torch.no_grad():
        leaves = graph.body(*tensors)
    wanted = leaf_names(graph.out_spec)
    outputs = _once(
        [name for name, x in zip(wanted, leaves, strict=True) if isinstance(x, Tensor)],
        graph.contract.names,
    )
    names = {
        id(value): name
        for value, name in zip(model.graph.inputs, graph.contract.names, strict=True)
    }
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        names.setdefault(id(value), name)  # an input stays what it is called
    taken = set(names.values())
    for node in model.graph.all_nodes() if hasattr(model.graph, "all_nodes") else model.graph:
        for value in node.outputs:
            if value.name in taken and id(value) not in names:
                value.name = f"{value.name}_inner"
    for value in list(model.graph.initializers.values()):
        if value.name in taken:
            _call(model.graph, value, f"{value.name}_inner")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names[id(value)]
    _name_weights(model.graph, path)
    _name_sizes(program, tensors, graph.contract.shapes)


def _once(outputs: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """Names of outputs, each of them once and none of them an input's: ``x_out``, ``y_1``."""
    wanted, found = {*outputs, *inputs}, dict.fromkeys(inputs)
    for name in outputs:
        if name in found:
            base = f"{name}_out" if name in inputs else name
            tries = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1)))
            name = next(each for each in tries if each not in wanted and each not in found)
        found[name] = None
    return list(found)[len(inputs) :]


def _call(graph: Any, initializer: Any, name: str) -> None:
    del graph.initializers[initializer.name]
    initializer.name = initializer.const_value.name = name
    graph.register_initializer(initializer)


def _name_weights(graph: Any, path: str) -> None:
    """What the model calls them, and ``<weight>_scale`` and ``_zero_point`` for their grids."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph for value in node.outputs}

    def call(value: Any, name: str) -> None:
        if name not in taken:
            _call(graph, value, name)
            taken.add(name)

    for value in list(graph.initializers.values()):
        if value.name.startswith(_BODY):
            call(value, f"{path}.{value.name.removeprefix(_BODY)}".removeprefix("."))
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
            codes, *grid = node.inputs
            for value, role in zip(grid, ("scale", "zero_point"), strict=False):
                if value.is_initializer() and len(value.uses()) == 1:
                    call(value, f"{codes.name}_{role}")


def _name_sizes(
    program: Any, tensors: tuple[Tensor, ...], shapes: Sequence[Sequence[int | str]]
) -> None:
    """``batch`` for the first dimension, ``sequence`` for a text's second, else input and axis.

    One name means one size: where the example has two, they are numbered. Sizes that the model
    wants to be equal (``shapes``, of its inputs) have one name, whatever the exporter says.
    """
    import onnx_ir as ir

    renamed: dict[str, str] = {}
    sizes: dict[str, int] = {}
    equal: dict[int | str, str] = {}
    for value, x, wanted in zip(program.model.graph.inputs, tensors, shapes, strict=True):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value and size.value not in renamed:
                own = wanted[axis]
                if own in equal:
                    renamed[size.value] = equal[own]
                    continue
                text = axis == 1 and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
                base = "batch" if axis == 0 else "sequence" if text else f"{value.name}_{axis}"
                name, count = base, 1
                while sizes.setdefault(name, x.shape[axis]) != x.shape[axis]:
                    count += 1
                    name = f"{base}_{count}"
                renamed[size.value] = name
                if isinstance(own, str):
                    equal[own] = name
    values = [value for node in program.model.graph for value in node.outputs]
    for value in (*program.model.graph.inputs, *values):
        if value.shape is None or not any(isinstance(d, ir.SymbolicDim) for d in value.shape):
            continue
        value.shape = ir.Shape(
            [
                ir.SymbolicDim(renamed.get(str(d.value), d.value))
                if isinstance(d, ir.SymbolicDim)
                else d
                for d in value.shape
            ]
        )


def _name_products(program: Any, body: fx.GraphModule) -> None:
    """Call each product's node what its site is called.

    The exporter names a value by its node in the exported graph, which holds the same calls of each
    operator in the same order.
    """
    sites: dict[Any, list[str]] = defaultdict(list)
    exported: dict[Any, list[str]] = defaultdict(list)
    for node in body.graph.nodes:
        if node.target in _PRODUCTS:
            sites[node.target].append(str(node.meta.get(KEY, "")))
    for node in program.exported_program.graph.nodes:
        if node.target in _PRODUCTS:
            exported[node.target].append(node.name)
    names: dict[str, str] = {}
    for target, found in sites.items():
        if len(found) == len(exported[target]):
            names |= dict(zip(exported[target], found, strict=True))
    taken: set[str] = set()
    for node in program.model.graph:
        site = names.get(node.outputs[0].name, "") if node.outputs else ""
        if site and site not in taken:
            node.name = site
            taken.add(site)


def describe(program: Any, quant_model: QuantizedModule, piece: str) -> None:
    """Which version wrote it, the plan, the calibration and, if so, which piece of the model."""
    model = program.model
    model.producer_name, model.producer_version = "torch_quant", __version__
    model.metadata_props["torch_quant.version"] = __version__
    model.metadata_props["torch_quant.plan"] = json.dumps(plan_of(quant_model).to_dict())
    calibration = quant_model.quantization.calibration
    model.metadata_props["torch_quant.calibration"] = json.dumps(calibration)
    if piece:
        model.metadata_props["torch_quant.piece"] = piece
