"""Programs that PyTorch's exporter need not trace anew.

The exporter traces each program to write out operators that ONNX has not, which takes as long as
the rest of its work. Most graphs of this package hold nothing to be written out but casts and
operators that give a tensor another shape, which are written here as the tracing writes them.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from torch_quant.passes.base import copy_graph

__all__ = ["UntracedProgram", "stays"]

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_WHOLE = (
    aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.layer_norm.default, aten.max_pool2d.default, aten.pad.default,
    aten.softmax.int, aten.sym_size.int,
)  # fmt: skip
"""Operators made of others that the tracing leaves whole if they have a form in ONNX."""
_SHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)


class UntracedProgram:
    """A program of PyTorch's exporter that is traced anew only if that may change it.

    Args:
        exported: an ``ExportedProgram``, which stays as it is.

    Attributes:
        program: one of the same graph, to be given away and changed.
        taken: whether its graph was taken as it is.
    """

    def __init__(self, exported: Any) -> None:
        self.program, self.taken = copy.copy(exported), False
        self.program._graph_module = copy_graph(exported.graph_module)
        graph = self.program.graph_module.graph
        _write_casts(graph)
        _write_shapes(graph)

        def run_decompositions(table: Any = None, **options: Any) -> Any:
            if table is None or not all(stays(node, table) for node in graph.nodes):
                return exported.run_decompositions(table, **options)
            self.taken = True
            return self.program

        self.program.run_decompositions = run_decompositions


def stays(node: fx.Node, table: Container[Any]) -> bool:
    """Whether a node is the same in a graph traced anew with the decompositions of ``table``.

    >>> graph = fx.Graph()
    >>> kept = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    >>> stays(kept, {}), stays(kept, {torch.ops.aten.relu.default: torch.relu})
    (True, False)
    >>> stays(graph.call_function(torch.ops.aten.relu_.default, (kept,)), {})
    False
    """
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    target = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "torch", "math")
    if target in table or target._schema.is_mutable:
        return False
    return target in _WHOLE or not target.has_kernel_for_dispatch_key(_COMPOSITE)


def _write_casts(graph: fx.Graph) -> None:
    """As copies of another dtype, or not at all."""
    for node in graph.find_nodes(op="call_function", target=aten.to.dtype):
        x, dtype, *others = node.args
        if others or node.kwargs:
            continue
        if x.meta["val"].dtype is dtype:
            if any(user.op == "output" for user in node.users):
                continue
            node.replace_all_uses_with(x)
            graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}


def _write_shapes(graph: fx.Graph) -> None:
    """As views of all sizes, of a copy, which is an identity in ONNX."""
    for node in list(graph.nodes):
        if node.target not in _SHAPES:
            continue
        x, *others = node.args
        whole = node.target is aten.reshape.default
        sizes = others[0] if whole else _sizes(graph, node, node.meta["val"].shape)
        if sizes is None:
            continue
        with graph.inserting_before(node):
            copied = graph.call_function(
                aten.clone.default, (x,), {"memory_format": torch.contiguous_format}
            )
        copied.meta = {**node.meta, "val": x.meta["val"]}
        node.target, node.args, node.kwargs = aten._unsafe_view.default, (copied, sizes), {}


def _sizes(graph: fx.Graph, before: fx.Node, shape: Sequence[Any]) -> list[Any] | None:
    """Nodes of free sizes, which are those of inputs or have been computed; None if one is not."""
    known: dict[Any, tuple[fx.Node, int | None]] = {}
    for node in graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            known[value.node.expr] = node, None
        elif node.op == "placeholder" and isinstance(value, torch.Tensor):
            for i, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    known.setdefault(size.node.expr, (node, i))
    if any(isinstance(size, torch.SymInt) and size.node.expr not in known for size in shape):
        return None
    found: list[Any] = []
    for size in shape:
        if not isinstance(size, torch.SymInt):
            found.append(size)
            continue
        node, axis = known[size.node.expr]
        if axis is not None:
            with graph.inserting_before(before):
                node = graph.call_function(aten.sym_size.int, (node, axis))
            node.meta["val"] = size
        found.append(node)
    return found
