"""``chunk`` and ``split`` of a size that is free, as a split into sizes that are computed.

PyTorch's exporter writes them as parts of one size. Where that size is no number, onnxscript's
optimizer cannot tell how many parts there are, and fails.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from torch_quant.ops.arguments import arguments, retarget
from torch_quant.passes.base import PassContext

__all__ = ["free_parts"]

aten = torch.ops.aten

_CHUNKS = (aten.chunk.default, aten.unsafe_chunk.default)
_SPLITS = (aten.split.Tensor, aten.unsafe_split.Tensor)
_METHODS = ("split", "unsafe_split")
"""What :func:`dynamic_sizes` makes of a split into parts of a size that is computed."""


class _Parts(NamedTuple):
    x: fx.Node
    each: Any
    """The size of a part; of ``chunk``, how many there are to be."""
    dim: int


def free_parts(context: PassContext) -> int:
    """Give each part its size; returns how many operators were rewritten.

    ``chunk(x, n)`` of ``s`` rows is ``split(x, c)`` with ``c = ceil(s / n)``, and the last of
    ``k`` parts has the rest, ``s - (k - 1) c`` rows. How many there are, the graph knows.
    """
    changed = 0
    for node in list(context.graph.nodes):
        parts = _parts(node)
        if parts is None or "val" not in parts.x.meta or "val" not in node.meta:
            continue
        x, each, dim = parts
        if isinstance(each, int) and isinstance(x.meta["val"].shape[dim], int):
            continue
        before = len(node.meta["val"]) - 1
        call = context.graph.call_function
        with context.graph.inserting_before(node):
            size = call(aten.sym_size.int, (x, dim))
            if node.target in _CHUNKS:
                each = call(operator.floordiv, (call(operator.add, (size, each - 1)), each))
            rest = call(operator.sub, (size, call(operator.mul, (each, before))))
        node.op = "call_function"
        retarget(node, aten.split_with_sizes.default, (x, [each] * before + [rest], dim))
        changed += 1
    return changed


def _parts(node: fx.Node) -> _Parts | None:
    """What a node cuts into parts of one size; None where it does not."""
    if node.target in (*_CHUNKS, *_SPLITS):
        return _Parts(*arguments(node).values())
    if node.op == "call_method" and node.target in _METHODS and not isinstance(node.args[1], list):
        x, each, *dim = node.args
        return _Parts(x, each, *dim or [0])  # type: ignore[arg-type]
    return None
