"""Keep sizes dynamic under ``torch.jit.trace``.

Traced, ``aten.sym_size.int`` yields a plain int, and an ATen overload refuses a traced one. So
sizes are read by ``Tensor.size`` and every operator that takes one is called by its Python name,
whose argument parser records the size as a value.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.passes.base import PassContext

__all__ = ["dynamic_sizes"]

aten = torch.ops.aten


def _slice_to_index(node: fx.Node) -> None:
    """``slice(x, dim, start, end, step)`` as ``x[..., start:end:step]``."""
    values: list[Any] = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    x, dim, start, end, step = values
    assert isinstance(x, fx.Node)
    assert isinstance(dim, int)
    axis = dim if dim >= 0 else x.meta["val"].dim() + dim
    index = (*[slice(None)] * axis, slice(start, end, step))
    node.target, node.args = operator.getitem, (x, index)


_UPSAMPLE: dict[Any, str] = {
    aten.upsample_nearest2d.vec: "nearest",
    aten.upsample_bilinear2d.vec: "bilinear",
    aten.upsample_bicubic2d.vec: "bicubic",
}


def _mode_of(node: fx.Node) -> str:
    target: Any = node.target
    return _UPSAMPLE[target]


def _upsample_to_interpolate(node: fx.Node) -> None:
    x, size, *rest = node.args
    kwargs = {"size": size, "mode": _mode_of(node), "scale_factor": rest[-1]}
    if kwargs["mode"] != "nearest":
        kwargs["align_corners"] = rest[0]
    node.target = torch.nn.functional.interpolate
    node.args, node.kwargs = (x,), kwargs


def _takes_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    return any(argument in sizes for argument in node.all_input_nodes)


def _is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "aten"


def dynamic_sizes(context: PassContext) -> int:
    """Rewrite size reads and their users; returns how many nodes changed."""
    sizes: set[fx.Node] = set()
    changed = 0
    for node in context.graph.nodes:
        if node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"
            sizes.add(node)
            changed += 1
        elif node.op == "call_function" and _takes_size(node, sizes):
            if not _is_aten(node):
                sizes.add(node)  # arithmetic of sizes
                continue
            if node.target is aten.slice.Tensor:
                _slice_to_index(node)
            elif node.target in _UPSAMPLE:
                _upsample_to_interpolate(node)
            else:
                _call_by_name(node)
            changed += 1
    return changed


def _call_by_name(node: fx.Node) -> None:
    name = node.target._opname  # type: ignore[union-attr]
    takes_tensor = bool(node.args) and isinstance(node.args[0], fx.Node)
    if takes_tensor and hasattr(Tensor, name):
        node.op, node.target = "call_method", name
    elif hasattr(torch, name):
        node.target = getattr(torch, name)
