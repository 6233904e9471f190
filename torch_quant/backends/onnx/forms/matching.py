"""Questions that the passes of this room ask of a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_PER_TENSOR,
)
from torch_quant.ops.table import DATA_MOVEMENT

__all__ = [
    "ELEMENTWISE",
    "free_ranks",
    "is_dequantized",
    "is_target",
    "origin_of",
    "readers_behind",
]

aten = torch.ops.aten

ELEMENTWISE = frozenset({
    aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default, aten.tanh.default,
    aten.sigmoid.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default,
    aten.leaky_relu.default, aten.clamp.default, aten.elu.default, aten.mish.default,
})  # fmt: skip
"""Functions of one tensor that work on each element alone."""


_SQUEEZES = frozenset({aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims})


def free_ranks(graph: fx.Graph) -> set[fx.Node]:
    """What a squeeze of a free size leads to: where that size is 1, it has fewer dimensions.

    The captured sizes do not say so, even if the example's size is 1.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        squeezes = node.target in _SQUEEZES and _squeezes_free_size(node)
        if squeezes or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _squeezes_free_size(node: fx.Node) -> bool:
    x, *dims = arguments(node).values()
    while x.target in (QUANTIZE, QUANTIZE_PER_TENSOR):
        x = argument(x, 0)
    value = x.meta.get("val")
    if not isinstance(value, Tensor):
        return True
    axes = dims[0] if dims else range(value.dim())
    sizes = [value.shape[axis] for axis in ([axes] if isinstance(axes, int) else axes)]
    return not all(isinstance(size, int) for size in sizes)


def is_target(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def is_dequantized(node: Any) -> bool:
    """Whether ``node`` dequantizes the codes of an activation."""
    return is_target(node, DEQUANTIZE) and is_target(origin_of(argument(node, "q")), QUANTIZE)


def origin_of(node: fx.Node) -> fx.Node:
    """What gives the values that were moved to ``node``; ``node`` itself if nothing moved."""
    while node.target in DATA_MOVEMENT:
        node = argument(node, 0)
    return node


def readers_behind(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor, moved or not."""
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user.target in DATA_MOVEMENT:
            todo += user.users
        else:
            yield user
