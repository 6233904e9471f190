"""Keep sizes dynamic under ``torch.jit.trace``.

Traced, ``aten.sym_size.int`` yields a plain int, and an ATen overload refuses a traced one. So sizes are
read by ``Tensor.size`` and every operator that takes one is called by its Python name, whose argument
parser records the size as a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.passes.base import PassContext

__all__ = ["dynamic_sizes"]

aten = torch.ops.aten


def slice_along(
    x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Tensor:
    """``x[..., start:end:step, ...]`` along ``dim``."""
    axis = dim if dim >= 0 else x.dim() + dim
    return x[(slice(None),) * axis + (slice(start, end, step),)]


def upsample_nearest(x: Tensor, size: Any, factors: Any = None) -> Tensor:
    return torch.nn.functional.interpolate(x, size, factors, mode="nearest")


def upsample_bilinear(x: Tensor, size: Any, align: bool, factors: Any = None) -> Tensor:
    return torch.nn.functional.interpolate(x, size, factors, mode="bilinear", align_corners=align)


def upsample_bicubic(x: Tensor, size: Any, align: bool, factors: Any = None) -> Tensor:
    return torch.nn.functional.interpolate(x, size, factors, mode="bicubic", align_corners=align)


_SPECIAL: dict[Any, Any] = {
    aten.slice.Tensor: slice_along,
    aten.upsample_nearest2d.vec: upsample_nearest,
    aten.upsample_bilinear2d.vec: upsample_bilinear,
    aten.upsample_bicubic2d.vec: upsample_bicubic,
}


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
            if node.target in _SPECIAL:
                node.target = _SPECIAL[node.target]
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
