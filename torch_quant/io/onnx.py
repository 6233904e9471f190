"""Deploy as ONNX: quantize/dequantize pairs, integer weights, the model's own names, free sizes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.convert.quantized import QuantizedModule, check_finished, quantized_graphs
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.packages import missing_packages
from torch_quant.errors import BackendUnavailable, InvalidConfig, UnsupportedOp
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.examples import example_call
from torch_quant.graph.export import size_oblivious
from torch_quant.graph.progress import hidden
from torch_quant.graph.sites import KEY
from torch_quant.io.files import checked_target, staging
from torch_quant.io.onnx_names import describe, rename
from torch_quant.io.onnx_ops import own_forms
from torch_quant.io.onnx_recurrent import recurrent_layers, unrolled
from torch_quant.io.onnx_rewrites import rewrite
from torch_quant.io.onnx_weights import needed_opset, write_blocked
from torch_quant.passes.base import PassContext, copy_graph, run_passes

__all__ = ["export_onnx"]

LOWEST_OPSET = 18
"""The lowest that PyTorch's exporter writes."""
_LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one file, which protobuf limits to 2 GB, the graph included."""

logger = logging.getLogger("torch_quant")


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
    written at the end, in one step; weights above 2 GB go to ``<path>.data`` beside it.

    Args:
        quant_model: what ``quantizer.quantize(model, backend=Backend.ONNX)`` returned.
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
        InvalidConfig: not a model for Backend.ONNX, one in pieces, an opset or path that will not
            do.
        UnsupportedOp: an operator has no ONNX form; names where it is.

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
    if backend != "onnx":
        raise InvalidConfig(
            f"the model was quantized for {backend}, whose operators have no ONNX "
            "form: quantizer.quantize(model, backend=Backend.ONNX)"
        )
    calls = _graphs_called(quant_model, example_inputs)
    whole = [name for name, *_ in calls] == [""]
    if not whole and not pieces:
        raise InvalidConfig(_in_pieces(quant_model, target))
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
            bar.set_description(f"{file.name}: capturing")
            exported = _captured(graph, tensors, dynamic=dynamic)
            bar.update()
            bar.set_description(f"{file.name}: translating")
            chosen = needed_opset(graph.body, opset, matmul_nbits)
            program = _translated(exported, graph, chosen)
            write_blocked(program.model, graph.body, matmul_nbits)
            bar.update()
            bar.set_description(f"{file.name}: writing")
            rename(program, graph, tensors, paths[graph])
            describe(program, quant_model, "" if whole else piece)
            rewrite(program.model)
            _save(program, file)
            bar.update()
    return files


# Which graphs


def _graphs_called(
    model: QuantizedModule, example_inputs: Any
) -> list[tuple[str, QuantizedGraph, tuple[Tensor, ...]]]:
    """(name, graph, tensors) of each graph that the example takes, in order, once each."""
    args, kwargs = example_call(example_inputs)
    how = model.quantization
    if how.glue is None:
        call = flatten_call(*bind(how.signature, args, kwargs))
        for graph in how.graphs:
            accepted = graph.accept(call)
            if accepted is not None:
                return [("", graph, accepted.tensors)]
    names: dict[QuantizedGraph, str] = {}
    for submodule, graph in quantized_graphs(model):
        i = submodule.quantization.graphs.index(graph)
        names[graph] = submodule.quantization.path + (f".{i}" if i else "")
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


# Exporting


class _Tensors(nn.Module):
    """A graph whose outputs that are no tensors are left out, and repeated ones are their own."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = copy_graph(body)
        run_passes(PassContext(self.body), (recurrent_layers,))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        seen: set[int] = {id(x) for x in tensors}
        outputs = []
        for x in self.body(*tensors):
            if isinstance(x, Tensor):
                outputs.append(x.clone() if id(x) in seen else x)
                seen.add(id(x))
        return tuple(outputs)


def _captured(graph: QuantizedGraph, tensors: tuple[Tensor, ...], *, dynamic: bool) -> Any:
    """The graph as a program of PyTorch's exporter."""
    with torch.no_grad(), _quiet():
        exported = (
            _with_free_sizes(graph, tensors) if dynamic else _traced(graph, tensors, "static")
        )
    # The translation would evaluate them on the example, which can fix a size in the file.
    exported._guards_code = []
    return exported


def _with_free_sizes(graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Any:
    """A batch of 1 may have to be repeated for that."""
    left = unrolled(_Tensors(graph.body).body)
    if left:
        places = ", ".join(f"{_op_name(each)} at {each.meta.get(KEY, each.name)}" for each in left)
        logger.warning(
            "the ONNX file serves sizes as in the example only: %s has no ONNX operator and is "
            "written out step by step",
            places,
        )
        from torch._decomp import decomposition_table

        kinds = {each.target for each in left}
        steps = {kind: decomposition_table[kind] for kind in kinds if kind in decomposition_table}
        return _traced(graph, tensors, "static").run_decompositions(steps)
    twice = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in tensors)
    reasons: list[Exception] = []
    for example, mode in ((tensors, "oblivious"), (twice, "oblivious"), (twice, "dynamic")):
        try:
            exported = _traced(graph, example, mode)
            _tell_fixed(exported, graph)
            return exported
        except Exception as error:  # torch.export raises errors of many unrelated classes
            reasons.append(error)
    try:
        exported = _traced(graph, tensors, "static")
    except Exception as error:
        raise _without_form(reasons[0], graph.body) from error
    logger.warning("the ONNX file serves sizes as in the example only: %s", reasons[0])
    return exported


def _tell_fixed(exported: Any, graph: QuantizedGraph) -> None:
    """Log sizes that the exporter fixes though the quantized model leaves them free."""
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
    for name, mine, sizes in zip(names, graph.contract.names, graph.contract.shapes, strict=True):
        for axis, size in enumerate(sizes):
            found = values[name].shape[axis]
            free = isinstance(size, str) and isinstance(found, int)
            if free and not graph.contract.fixes(size, found):
                logger.warning(
                    "the ONNX file serves %s.shape[%d] = %d only: an operator is exported for the "
                    "example's size",
                    mine,
                    axis,
                    found,
                )


def _traced(graph: QuantizedGraph, tensors: tuple[Tensor, ...], mode: str) -> Any:
    from torch.export import Dim

    shapes = tuple(
        {
            i: Dim.AUTO
            for i, size in enumerate(sizes)
            if isinstance(size, str) and not graph.contract.fixes(size, x.shape[i])
        }
        or None
        for x, sizes in zip(tensors, graph.contract.shapes, strict=True)
    )
    with size_oblivious(mode == "oblivious"):
        return torch.export.export(
            _Tensors(graph.body),
            tuple(x.clone() for x in tensors),
            dynamic_shapes=None if mode == "static" else {"tensors": shapes},
            strict=False,
        )


def _translated(exported: Any, graph: QuantizedGraph, opset: int | None) -> Any:
    """The program in ONNX operators."""
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=own_forms(),
            )
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


# Saving


def _save(program: Any, target: Path) -> None:
    """Write into a folder of its own beside ``target``, then rename: all or nothing."""
    import onnx_ir as ir

    for node in program.model.graph:
        for key in [key for key in node.metadata_props if key.startswith("pkg.")]:
            del node.metadata_props[key]  # stack traces of the exporter
        node.doc_string = None
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
