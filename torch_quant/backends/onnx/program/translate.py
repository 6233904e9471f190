"""A quantized graph as an ONNX program: what ``export_onnx`` writes, and runtimes compile."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.onnx.program.complex_moves import complex_moves
from torch_quant.backends.onnx.program.floors import floors
from torch_quant.backends.onnx.program.large import LARGE, tidied
from torch_quant.backends.onnx.program.names import rename
from torch_quant.backends.onnx.program.ops import own_forms
from torch_quant.backends.onnx.program.parts import free_parts
from torch_quant.backends.onnx.program.promoted import real_integers
from torch_quant.backends.onnx.program.recurrent import recurrent_layers, unrolled
from torch_quant.backends.onnx.program.repeats import free_repeats
from torch_quant.backends.onnx.program.rewrites import rewrite
from torch_quant.backends.onnx.program.untraced import UntracedProgram
from torch_quant.backends.onnx.program.weights import needed_opset, write_blocked
from torch_quant.convert.exporting import OnlyTensors, exported_at_once, input_shapes
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.errors import InvalidConfig, UnsupportedOp
from torch_quant.graph.sites import KEY
from torch_quant.passes.base import Pass

__all__ = ["LOWEST_OPSET", "program_of"]

LOWEST_OPSET = 18
"""The lowest that PyTorch's exporter writes."""

Tell = Callable[[str], None]

_PASSES: tuple[Pass, ...] = (
    recurrent_layers, free_parts, free_repeats, complex_moves, real_integers, floors,
)  # fmt: skip


def _untold(_: str) -> None:
    pass


def program_of(
    graph: QuantizedGraph,
    tensors: tuple[Tensor, ...],
    path: str = "",
    *,
    dynamic: bool = True,
    opset: int | None = None,
    matmul_nbits: bool = False,
    on_fixed: Tell = _untold,
    on_step: Tell = _untold,
) -> Any:
    """The graph in ONNX operators, with the model's names.

    Args:
        graph: of a model that was lowered to ONNX's forms.
        tensors: an example of its inputs.
        path: of its module in the model.
        dynamic: keep the sizes free that the graph leaves free, as far as the exporter can.
        opset: the ONNX operator set; None for what its weights need, or the exporter's choice.
        matmul_nbits: see :func:`torch_quant.export_onnx`.
        on_fixed: is told why sizes are as in the example only.
        on_step: is told what begins: ``capturing``, then ``translating``.

    Returns:
        PyTorch's ``ONNXProgram``.

    Raises:
        InvalidConfig: an opset that will not do.
        UnsupportedOp: an operator has no ONNX form; names where it is.
    """
    on_step("capturing")
    exported = _captured(graph, tensors, dynamic, on_fixed)
    on_step("translating")
    program = _translated(exported, graph, needed_opset(graph.body, opset, matmul_nbits))
    write_blocked(program.model, graph.body, matmul_nbits)
    rename(program, graph, tensors, path)
    rewrite(program.model)
    for node in program.model.graph:
        for key in [key for key in node.metadata_props if key.startswith("pkg.")]:
            del node.metadata_props[key]  # stack traces of the exporter
        node.doc_string = None
    return program


def _captured(graph: QuantizedGraph, tensors: tuple[Tensor, ...], dynamic: bool, tell: Tell) -> Any:
    """The graph as a program of PyTorch's exporter."""
    with torch.no_grad(), _quiet():
        exported = (
            _with_free_sizes(graph, tensors, tell)
            if dynamic
            else exported_at_once(graph, tensors, "static", _PASSES)
        )
    # The translation would evaluate them on the example, which can fix a size in the file.
    exported._guards_code = []
    return exported


def _with_free_sizes(graph: QuantizedGraph, tensors: tuple[Tensor, ...], tell: Tell) -> Any:
    """Or those of the example, where an operator is written out step by step."""
    left = unrolled(OnlyTensors(graph.body, _PASSES).body)
    if left:
        places = ", ".join(f"{_op_name(each)} at {each.meta.get(KEY, each.name)}" for each in left)
        tell(
            f"sizes as in the example only: {places} has no ONNX operator and is written out step "
            "by step"
        )
        from torch._decomp import decomposition_table

        kinds = {each.target for each in left}
        steps = {kind: decomposition_table[kind] for kind in kinds if kind in decomposition_table}
        fixed = exported_at_once(graph, tensors, "static", _PASSES)
        return fixed.run_decompositions(steps)
    try:
        return _exported(graph, tensors, tell)
    except Exception as error:  # torch.export raises errors of many unrelated classes
        raise _without_form(error, graph.body) from error


def _exported(graph: QuantizedGraph, tensors: tuple[Tensor, ...], tell: Tell) -> Any:
    """The graph with free sizes, as far as the exporter can.

    A batch of 1 may have to be repeated for that: some operators take it for all batches of 1 and 2
    alone, without a word.

    Args:
        graph: what is exported.
        tensors: an example of its inputs.
        tell: is told of sizes that are fixed though the graph leaves them free.

    Returns:
        An ``ExportedProgram`` of :class:`OnlyTensors`.

    Raises:
        Exception: of many unrelated classes of PyTorch: it cannot be exported at all.
    """
    twice = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in tensors)
    repeated = any(x is not each for x, each in zip(twice, tensors, strict=True))
    reasons: list[Exception] = []
    limited: list[Any] = []
    for example, mode in ((tensors, "oblivious"), (twice, "oblivious"), (twice, "dynamic")):
        try:
            exported = exported_at_once(graph, example, mode, _PASSES)
        except Exception as error:  # torch.export raises errors of many unrelated classes
            reasons.append(error)
            continue
        limited.append(exported)
        if not repeated or _unlimited(exported) or example is twice:
            break
    if limited:
        exported = max(limited, key=_most)
        _tell_fixed(exported, graph, tell)
        return exported
    try:
        exported = exported_at_once(graph, tensors, "static", _PASSES)
    except Exception as error:
        raise reasons[0] from error
    tell(f"sizes as in the example only: {reasons[0]}")
    return exported


def _unlimited(exported: Any) -> bool:
    return _most(exported) == math.inf


def _most(exported: Any) -> float:
    """The least of the largest values that free sizes may have."""
    ends = [float(each.upper) for each in exported.range_constraints.values()]
    return min(ends, default=math.inf)


def _tell_fixed(exported: Any, graph: QuantizedGraph, tell: Tell) -> None:
    """Tell of sizes that the exporter fixes though the quantized model leaves them free."""
    contract = graph.contract
    shapes = input_shapes(exported)
    for name, found, sizes in zip(contract.names, shapes, contract.shapes, strict=True):
        for axis, size in enumerate(sizes):
            free = isinstance(size, str) and isinstance(found[axis], int)
            if free and not contract.fixes(size, found[axis]):
                tell(
                    f"{name}.shape[{axis}] = {found[axis]} only: an operator is exported for the "
                    "example's size"
                )


def _translated(exported: Any, graph: QuantizedGraph, opset: int | None) -> Any:
    """The program in ONNX operators."""
    large = len(exported.graph.nodes) > LARGE
    with torch.no_grad(), _quiet():
        try:
            program = _in_operators(exported, optimize=not large, opset_version=opset)
            if large:
                tidied(program)
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


def _in_operators(exported: Any, **options: Any) -> Any:
    """The program in ONNX operators, traced anew only where that writes an operator out in steps.

    PyTorch's exporter traces all programs for that, which takes as long as the rest of its work;
    most graphs of this package hold nothing to be written out.
    """
    options |= {"dynamo": True, "verbose": False, "custom_translation_table": own_forms()}
    untouched = UntracedProgram(exported)
    try:
        return torch.onnx.export(untouched.program, **options)
    except Exception:
        if not untouched.taken:
            raise
        return torch.onnx.export(exported, **options)


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
