"""What a kernel does behind its product: an activation function, and rounding the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument, positional
from torch_quant.ops.qdq import QUANTIZE_PER_TENSOR

__all__ = ["Ending", "ending_of", "function_behind", "replace"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Ending:
    """How a kernel ends: the fused function, the format of the result, the node it replaces."""

    last: fx.Node
    post_op: str = "none"
    post_args: tuple[float, ...] = ()
    algorithm: str = "none"
    scale: float = 1.0
    zero_point: int = 0
    dtype: torch.dtype = torch.float32


def _post_op(node: fx.Node) -> tuple[str, tuple[float, ...], str] | None:
    """oneDNN's name for an activation function, its arguments and its algorithm."""
    if node.target is aten.relu.default:
        return "relu", (), "none"
    if node.target is aten.relu6.default:
        return "hardtanh", (0.0, 6.0), "none"
    if node.target is aten.hardtanh.default:
        low, high = argument(node, "min_val"), argument(node, "max_val")
        return "hardtanh", (float(low), float(high)), "none"
    if node.target is aten.gelu.default:
        return "gelu", (), str(argument(node, "approximate"))
    if node.target is aten.leaky_relu.default:
        return "leaky_relu", (float(argument(node, "negative_slope")),), "none"
    names = {
        aten.silu.default: "swish",
        aten.tanh.default: "tanh",
        aten.hardswish.default: "hardswish",
    }
    return (names[node.target], (), "none") if node.target in names else None


def function_behind(node: fx.Node, post_ops: set[str] | None = None) -> Ending:
    """The activation function behind ``node``, if its kernel has it."""
    users = list(node.users)
    post = _post_op(users[0]) if len(users) == 1 else None
    if post is not None and (post_ops is None or post[0] in post_ops):
        return Ending(users[0], *post)
    return Ending(node)


def ending_of(node: fx.Node, post_ops: set[str] | None = None) -> Ending:
    """Everything behind ``node`` that its kernel can do."""
    function = function_behind(node, post_ops)
    last, found = function.last, (function.post_op, function.post_args, function.algorithm)
    quantizers = list(last.users)
    if len(quantizers) == 1 and quantizers[0].target is QUANTIZE_PER_TENSOR:
        _, scale, zero_point, low, high, dtype = positional(quantizers[0])
        info = torch.iinfo(dtype)
        if (low, high) == (info.min, info.max):
            return Ending(quantizers[0], *found, scale, zero_point, dtype)
    return function


def replace(node: fx.Node, output: Ending, target: Any, args: tuple[Any, ...]) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(output.last.meta)
    output.last.replace_all_uses_with(new)
    chain, current = [], output.last
    while current is not node:
        chain.append(current)
        current = argument(current, 0)
    for dead in (*chain, node):
        graph.erase_node(dead)
