"""Masks of booleans that several attentions read, as the floats that each would make of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.passes.base import PassContext

__all__ = ["share_masks"]

aten = torch.ops.aten


def share_masks(context: PassContext) -> int:
    """Turn a mask into floats once for all attentions that read it; returns how many masks.

    ``scaled_dot_product_attention`` itself adds 0 where a mask is true and minus infinity where it
    is not, so nothing changes but that it is not made again in each layer. They have the dtype of
    the queries in each call: a model may be moved to another.
    """
    readers: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    target = aten.scaled_dot_product_attention.default
    for node in context.graph.find_nodes(op="call_function", target=target):
        mask, query = argument(node, "attn_mask"), _value(argument(node, "query"))
        value = _value(mask)
        if value is not None and value.dtype is torch.bool and query is not None:
            readers.setdefault((mask, query.dtype), []).append(node)
    shared = {key: nodes for key, nodes in readers.items() if len(nodes) > 1}
    for (mask, _), nodes in shared.items():
        graph, query = mask.graph, argument(nodes[0], "query")
        with graph.inserting_before(nodes[0]):
            seen, hidden = (
                graph.call_function(aten.new_full.default, (query, [], number))
                for number in (0.0, -math.inf)
            )
            floats = graph.call_function(aten.where.self, (mask, seen, hidden))
        for node in nodes:
            set_arguments(node, {"attn_mask": floats})
    return len(shared)


def _value(x: Any) -> Tensor | None:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return value if isinstance(value, Tensor) else None
