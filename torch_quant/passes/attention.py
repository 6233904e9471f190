"""Write scaled dot-product attention as its two products, so that both can be quantized.

    attention(Q, K, V) = softmax(scale Q K' + mask) V

A row whose mask leaves nothing gives zeros, as the fused operator does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from torch_quant.graph.ops import size_hints
from torch_quant.graph.sites import KEY

__all__ = ["decompose_attention"]

aten = torch.ops.aten


def decompose_attention(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Replace one attention node.

    Returns:
        The two ``matmul`` nodes, ``Q K'`` and ``P V``; the left argument of the second holds the
        probabilities.
    """
    graph = node.graph
    arguments = dict(zip(("q", "k", "v", "attn_mask", "p", "is_causal"), node.args, strict=False))
    arguments |= node.kwargs
    query, key, value = (arguments[name] for name in "qkv")
    mask = arguments.get("attn_mask")

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    with graph.inserting_before(node):
        if arguments.get("enable_gqa"):
            repeats = size_hints(query)[-3] // size_hints(key)[-3]
            key, value = (
                call(aten.repeat_interleave.self_int, x, repeats, -3) for x in (key, value)
            )
        scale = arguments.get("scale")
        if scale is None:
            scale = 1.0 / math.sqrt(size_hints(query)[-1])
        first = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
        scores = call(aten.mul.Tensor, first, scale)
        if arguments.get("is_causal"):
            mask = call(aten.tril.default, call(aten.ones_like.default, scores, dtype=torch.bool))
        if isinstance(mask, fx.Node):
            boolean = arguments.get("is_causal") or mask.meta["val"].dtype == torch.bool
            if boolean:
                hidden = call(aten.logical_not.default, mask)
                scores = call(aten.masked_fill.Scalar, scores, hidden, -math.inf)
            else:
                scores = call(aten.add.Tensor, scores, mask)
        probabilities = call(aten._safe_softmax.default, scores, -1)
        second = call(aten.matmul.default, probabilities, value)
    second.meta = dict(node.meta)
    for new in (first, scores, probabilities):
        new.meta[KEY] = f"{node.meta[KEY]}.{new.name}"
        new.meta["val"] = node.meta["val"]  # a float tensor, which is all that is asked of it
    node.replace_all_uses_with(second)
    graph.erase_node(node)
    return first, second
