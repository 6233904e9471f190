"""Remove operators that return their input, and make views tolerate any memory layout."""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.graph.ops import IDENTITY
from torch_quant.passes.base import PassContext

__all__ = ["remove_identities", "views_to_reshapes"]

aten = torch.ops.aten


def remove_identities(context: PassContext) -> int:
    """Dropout in eval mode and the like: users take the input instead."""
    found = [n for n in context.graph.nodes if n.op == "call_function" and n.target in IDENTITY]
    for node in found:
        origin = node.args[0]
        assert isinstance(origin, fx.Node)
        node.replace_all_uses_with(origin)
        context.graph.erase_node(node)
    return len(found)


def views_to_reshapes(context: PassContext) -> int:
    """``view`` needs the strides of capture; an int8 convolution may give channels-last ones."""
    found = [
        n for n in context.graph.nodes if n.target in (aten.view.default, aten._unsafe_view.default)
    ]
    for node in found:
        node.target = aten.reshape.default
    return len(found)
