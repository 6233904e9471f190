"""Deploy as ONNX: quantize/dequantize pairs, integer weights, the model's own names, free sizes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends.onnx import missing_packages
from torch_quant.backends.quantized import QuantizedGraph, QuantizedRegion
from torch_quant.errors import BackendUnavailable, InvalidConfig, UnsupportedOp
from torch_quant.graph.calls import bind, flatten_call
from torch_quant.graph.decomposed import NAMESPACE
from torch_quant.graph.outputs import leaf_names
from torch_quant.graph.sites import KEY
from torch_quant.version import __version__

__all__ = ["export_onnx"]

LOWEST_OPSET = 18
"""The lowest that PyTorch's exporter writes."""
_LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one file, which protobuf limits to 2 GB, the graph included."""

aten = torch.ops.aten
logger = logging.getLogger("torch_quant")

_PRODUCTS = frozenset({
    aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.linear.default, aten.embedding.default,
})  # fmt: skip
"""What the quantized graph computes its sites with."""


def export_onnx(
    quant_model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    opset: int | None = None,
    pieces: bool = False,
) -> list[Path]:
    """Write a quantized model as an ONNX file that onnxruntime and OpenVINO run on int8 kernels.

    The graph that serves the example is written. Inputs and outputs are named as the model's; the
    file tells in its metadata which version wrote it, the plan and how it was calibrated. It is
    written at the end, in one step; weights above 2 GB go to ``<path>.data`` beside it.

    Args:
        quant_model: what ``quantizer.quantize(model, backend=Backend.ONNX)`` returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords.
        path: where to write.
        dynamic: keep batch, length and image sizes free, as far as the model itself does.
        opset: the ONNX operator set, 18 or more; None for the exporter's own choice.
        pieces: write a model that was captured in pieces as one file for each graph that the
            example takes: ``model.onnx`` gives ``model.encoder.layer.0.onnx`` and so on.

    Returns:
        The files: one, or one for each piece.

    Raises:
        BackendUnavailable: onnx or onnxscript is not installed.
        InvalidConfig: not a model for Backend.ONNX, one in pieces, an opset or path that will not
            do.
        UnsupportedOp: an operator has no ONNX form; names where it is.
    """
    if missing := missing_packages("onnx", "onnxscript"):
        raise BackendUnavailable(f"export_onnx: {missing}")
    if opset is not None and opset < LOWEST_OPSET:
        raise InvalidConfig(
            f"export_onnx(opset={opset}): expected {LOWEST_OPSET} or more, the lowest that "
            "PyTorch exports to"
        )
    if not isinstance(quant_model, QuantizedRegion):
        raise InvalidConfig(
            f"expected a quantized model, got {type(quant_model).__name__}: "
            "quantizer.quantize(model, backend=Backend.ONNX)"
        )
    target = Path(path)
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise InvalidConfig(f"cannot write {target}: give a writable folder")
    calls = _graphs_called(quant_model, example_inputs)
    whole = [name for name, *_ in calls] == [""]
    if not whole and not pieces:
        raise InvalidConfig(_in_pieces(quant_model, target))
    written = []
    for name, graph, tensors in calls:
        _check_lowered(graph.body)
        program = _export(graph, tensors, dynamic=dynamic, opset=opset)
        _rename(program, graph, tensors)
        _describe(program, quant_model, "" if whole else name)
        file = target if whole else target.with_name(f"{target.stem}.{name}{target.suffix}")
        _save(program, file)
        written.append(file)
    return written


# Which graphs


def _graphs_called(
    model: QuantizedRegion, example_inputs: Any
) -> list[tuple[str, QuantizedGraph, tuple[Tensor, ...]]]:
    """(name, graph, tensors) of each graph that the example takes, in order, once each."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if model.glue is None:
        call = flatten_call(*bind(model.signature, args, kwargs))
        for graph in model.graphs:
            assert isinstance(graph, QuantizedGraph)
            if graph.mismatch(call) is None:
                return [("", graph, call.tensors)]
    names: dict[QuantizedGraph, str] = {}
    for region in model.modules():
        if isinstance(region, QuantizedRegion):
            for i, graph in enumerate(region.graphs):
                assert isinstance(graph, QuantizedGraph)
                names[graph] = region.path + (f".{i}" if i else "")
    found: dict[QuantizedGraph, tuple[Tensor, ...]] = {}

    def note(graph: Any, tensors: tuple[Tensor, ...]) -> None:
        found.setdefault(graph, tensors)

    hooks = [graph.register_forward_pre_hook(note) for graph in names]
    try:
        with torch.no_grad():
            model(*args, **kwargs)  # raises, saying why, where no graph serves the example
    finally:
        for hook in hooks:
            hook.remove()
    return [(names[graph], graph, tensors) for graph, tensors in found.items()]


def _in_pieces(model: QuantizedRegion, target: Path) -> str:
    glue = [
        region.path or "(root)"
        for region in model.modules()
        if isinstance(region, QuantizedRegion) and region.glue is not None
    ]
    return (
        f"the model was captured in pieces, with Python code between them in {', '.join(glue)}, "
        "and cannot be one ONNX graph; print(quantizer.coverage(model)) says why. "
        f"export_onnx(..., {target.name!r}, pieces=True) writes a file for each piece"
    )


def _check_lowered(body: fx.GraphModule) -> None:
    """Other backends' operators have no ONNX form."""
    names = {str(node.target) for node in body.graph.nodes if node.op == "call_function"}
    if any(name.startswith("torch_quant.") for name in names) or not any(
        name.startswith(NAMESPACE) for name in names
    ):
        raise InvalidConfig(
            "the model was not quantized for ONNX: quantizer.quantize(model, backend=Backend.ONNX)"
        )


# Exporting


class _Tensors(nn.Module):
    """A graph whose outputs that are no tensors are left out, and repeated ones are their own."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        seen: set[int] = {id(x) for x in tensors}
        outputs = []
        for x in self.body(*tensors):
            if isinstance(x, Tensor):
                outputs.append(x.clone() if id(x) in seen else x)
                seen.add(id(x))
        return tuple(outputs)


def _captured(graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Any:
    """The exported graph with its sizes free; a batch of 1 may have to be repeated for that."""
    twice = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in tensors)
    reasons: list[Exception] = []
    for example, mode in ((tensors, "oblivious"), (twice, "oblivious"), (twice, "dynamic")):
        try:
            return _traced(graph, example, mode)
        except Exception as error:  # torch.export raises errors of many unrelated classes
            reasons.append(error)
    try:
        exported = _traced(graph, tensors, "static")
    except Exception as error:
        raise _without_form(reasons[0], graph.body) from error
    logger.warning("the ONNX file serves sizes as in the example only: %s", reasons[0])
    return exported


def _traced(graph: QuantizedGraph, tensors: tuple[Tensor, ...], mode: str) -> Any:
    from torch.export import Dim
    from torch.fx.experimental import _config as fx_config

    shapes = tuple(
        {i: Dim.AUTO for i, size in enumerate(sizes) if isinstance(size, str)} or None
        for sizes in graph.contract.shapes
    )
    oblivious = (
        fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        if mode == "oblivious"
        else contextlib.nullcontext()
    )
    with oblivious:
        return torch.export.export(
            _Tensors(graph.body),
            tuple(x.clone() for x in tensors),
            dynamic_shapes=None if mode == "static" else {"tensors": shapes},
            strict=False,
        )


def _export(
    graph: QuantizedGraph, tensors: tuple[Tensor, ...], *, dynamic: bool, opset: int | None
) -> Any:
    with torch.no_grad(), _quiet():
        exported = _captured(graph, tensors) if dynamic else _traced(graph, tensors, "static")
        try:
            program = torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False)
        except Exception as error:
            raise _without_form(error, graph.body) from error
    assert program is not None
    version = program.model.opset_imports.get("", 0)
    if opset is not None and version != opset:
        raise InvalidConfig(
            f"export_onnx(opset={opset}): PyTorch {torch.__version__} and the installed onnxscript "
            f"export this model to opset {version} only"
        )
    program.exported_program = exported
    return program


_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)|<built-in[^>]*>")


def _without_form(error: BaseException, body: fx.GraphModule) -> Exception:
    """What the exporter raised, as an error that names the operator and the place."""
    text, cause = "", error
    while cause is not None:
        text += f"{cause}\n"
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    match = _OPERATOR.search(text)
    if match is None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return UnsupportedOp(f"the model cannot be exported to ONNX: {' '.join(lines[:3])[:500]}")
    name = f"{match[1]}.{match[2]}" if match[1] else match[0]
    operator = name.split(".")[-2] if "." in name else name
    places = [
        str(node.meta.get(KEY, node.name))
        for node in body.graph.nodes
        if node.op == "call_function" and _op_name(node).startswith(operator.strip("_"))
    ]
    where = f" at {', '.join(places[:3])}" if places else ""
    return UnsupportedOp(
        f"{name}{where} has no ONNX form in PyTorch {torch.__version__} and the installed "
        "onnxscript; rewrite it in the model, or export the rest of the model without it"
    )


def _op_name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.name)).strip("_")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns of matters that are not the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


# Names and metadata


def _rename(program: Any, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> None:
    """The model's names on inputs and outputs, sites' names on nodes."""
    model = program.model
    _name_products(program, graph.body)
    with torch.no_grad():
        leaves = graph.body(*tensors)
    wanted = leaf_names(graph.out_spec)
    outputs = [name for name, x in zip(wanted, leaves, strict=True) if isinstance(x, Tensor)]
    names = {
        id(value): name
        for value, name in zip(model.graph.inputs, graph.contract.names, strict=True)
    }
    names |= {id(value): name for value, name in zip(model.graph.outputs, outputs, strict=True)}
    taken = set(names.values())
    for node in model.graph.all_nodes() if hasattr(model.graph, "all_nodes") else model.graph:
        for value in node.outputs:
            if value.name in taken and id(value) not in names:
                value.name = f"{value.name}_inner"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names[id(value)]
    _name_sizes(program, tensors)


def _name_sizes(program: Any, tensors: tuple[Tensor, ...]) -> None:
    """``batch`` for the first dimension, ``sequence`` for a text's second, else input and axis.

    One name means one size: where the example has two, they are numbered.
    """
    import onnx_ir as ir

    renamed: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for value, x in zip(program.model.graph.inputs, tensors, strict=True):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value and size.value not in renamed:
                text = axis == 1 and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
                base = "batch" if axis == 0 else "sequence" if text else f"{value.name}_{axis}"
                name, count = base, 1
                while sizes.setdefault(name, x.shape[axis]) != x.shape[axis]:
                    count += 1
                    name = f"{base}_{count}"
                renamed[size.value] = name
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


def _describe(program: Any, quant_model: QuantizedRegion, piece: str) -> None:
    model = program.model
    model.producer_name, model.producer_version = "torch_quant", __version__
    model.metadata_props["torch_quant.version"] = __version__
    model.metadata_props["torch_quant.plan"] = json.dumps(quant_model.plan.to_dict())
    model.metadata_props["torch_quant.calibration"] = json.dumps(quant_model.calibration)
    if piece:
        model.metadata_props["torch_quant.piece"] = piece
    _sums_before_norms(model)


def _sums_before_norms(model: Any) -> None:
    """Write the residual sum before a layer norm as ``Sum``, which computes what ``Add`` does.

    onnxruntime puts ``Add`` and the norm together into one operator whose CPU kernel takes eight
    times as long as both (MiniLM, 8 x 128: 1.6 ms against 0.2, twelve times).
    """
    for node in model.graph:
        if node.op_type == "LayerNormalization" and node.inputs[0] is not None:
            before = node.inputs[0].producer()
            if before is not None and (before.domain, before.op_type) == ("", "Add"):
                before.op_type = "Sum"


# Saving


def _save(program: Any, target: Path) -> None:
    """Write into a folder of its own beside ``target``, then rename: all or nothing."""
    import onnx_ir as ir

    for node in program.model.graph:
        for key in [key for key in node.metadata_props if key.startswith("pkg.")]:
            del node.metadata_props[key]  # stack traces of the exporter
        node.doc_string = None
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise InvalidConfig(
            f"cannot write {target}: {error.strerror}; give a writable folder"
        ) from error
    try:
        data = f"{target.name}.data"
        external = data if size > _LARGEST else None
        ir.save(program.model, folder / target.name, external_data=external)
        if external:
            os.replace(folder / data, target.with_name(data))
        os.replace(folder / target.name, target)
    except OSError as error:
        raise InvalidConfig(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
