"""Complex tensors given another shape, as the pairs of real numbers that ONNX has for them.

PyTorch's exporter has ``view_as_real``, and few of the operators that move data, for complex ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_quant.ops.arguments import arguments, retarget
from torch_quant.passes.base import PassContext

__all__ = ["complex_moves"]

aten = torch.ops.aten

_WITH_PAIRS: dict[Any, Callable[..., tuple[Any, ...]]] = {
    aten.unsqueeze.default: lambda rank, dim: (dim % (rank + 1),),
    aten.select.int: lambda rank, dim, index: (dim % rank, index),
    aten.index_select.default: lambda rank, dim, index: (dim % rank, index),
    aten.expand.default: lambda rank, sizes, *_: ([*sizes, -1],),
    aten.repeat.default: lambda rank, repeats: ([*repeats, 1],),
}
"""An operator -> its arguments behind the tensor, where that has one more dimension at the end."""


_METHODS = {"expand": aten.expand.default, "repeat": aten.repeat.default}
"""Those that stand as methods in a graph where sizes are free."""


def complex_moves(context: PassContext) -> int:
    """Move pairs; returns how many operators moved complex numbers."""
    changed = 0
    for node in list(context.graph.nodes):
        method = _METHODS.get(node.target) if node.op == "call_method" else None
        arguments_of = _WITH_PAIRS.get(method or node.target)
        value = node.meta.get("val")
        if arguments_of is None or not isinstance(value, Tensor) or not value.is_complex():
            continue
        x, *rest = node.args if method else arguments(node).values()
        call = context.graph.call_function
        with context.graph.inserting_before(node):
            pairs = call(aten.view_as_real.default, (x,))
            args = (pairs, *arguments_of(x.meta["val"].dim(), *rest))
            moved = context.graph.create_node(node.op, node.target, args)
        node.op = "call_function"
        retarget(node, aten.view_as_complex.default, (moved,))
        changed += 1
    return changed
