"""``repeat_interleave`` a number of times that is computed, as an axis of its own.

PyTorch's exporter puts such a number before the sizes of the axes in front of it, so that another
axis is repeated, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument, retarget
from torch_quant.passes.base import PassContext

__all__ = ["free_repeats"]

aten = torch.ops.aten


def free_repeats(context: PassContext) -> int:
    """Write each as ``unsqueeze``, ``expand`` and ``flatten``; returns how many there were.

    ``x.repeat_interleave(n, d)`` is ``x.unsqueeze(d + 1).expand(.., n, ..).flatten(d, d + 1)``;
    without a dimension it is that of ``x.flatten()``.
    """
    changed = 0
    for node in list(context.graph.nodes):
        x, repeats, dim = _arguments(node)
        if not isinstance(repeats, fx.Node) or "val" not in node.meta:
            continue
        rank, call = node.meta["val"].dim(), context.graph.call_function  # alike with a dimension
        with context.graph.inserting_before(node):
            if dim is None:
                x, dim = call(aten.flatten.using_ints, (x,)), 0
            dim = dim % rank
            apart = call(aten.unsqueeze.default, (x, dim + 1))
            sizes: list[Any] = [-1] * (rank + 1)
            sizes[dim + 1] = repeats
            repeated = call(aten.expand.default, (apart, sizes))
        node.op = "call_function"
        retarget(node, aten.flatten.using_ints, (repeated, dim, dim + 1))
        changed += 1
    return changed


def _arguments(node: fx.Node) -> tuple[Any, Any, int | None]:
    """What is repeated, how often, and along which dimension; Nones of other nodes."""
    if node.target is aten.repeat_interleave.self_int:
        names = ("self", "repeats", "dim")
        x, repeats, dim = (argument(node, name) for name in names)
    elif node.op == "call_method" and node.target == "repeat_interleave":
        (x, repeats, *rest), named = node.args, node.kwargs
        dim = rest[0] if rest else named.get("dim")
    else:
        return None, None, None
    return x, repeats, dim
