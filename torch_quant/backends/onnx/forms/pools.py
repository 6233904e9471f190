"""Zeros that a runtime would take for a max pool's own padding."""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.ops.arguments import argument, positional, retarget
from torch_quant.passes.base import PassContext

__all__ = ["padding_before_pools"]

aten = torch.ops.aten

_MAX_POOLS = frozenset({
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
})  # fmt: skip


def padding_before_pools(context: PassContext) -> int:
    """Zeros before a max pool are written as ``-0.0``, an equal number.

    onnxruntime makes a padding with 0 part of the pool behind it, which pads with minus infinity;
    where all values are negative, the results differ.
    """
    changed = 0
    for node in context.graph.nodes:
        if _pads_with_zeros(node) and any(user.target in _MAX_POOLS for user in node.users):
            x, pad, *_ = positional(node)
            retarget(node, aten.constant_pad_nd.default, (x, pad, -0.0))
            changed += 1
    return changed


def _pads_with_zeros(node: fx.Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return not argument(node, "value")
    if node.target is not aten.pad.default:
        return False
    return argument(node, "mode") == "constant" and not argument(node, "value")
