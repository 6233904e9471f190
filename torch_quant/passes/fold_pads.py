"""Make zeros around an image part of the convolution that reads them.

    pad(x, p, 0) -> conv(padding=q)   is   conv(x, padding=p + q)

Networks that came from TensorFlow pad by themselves. A padded copy of an image takes longer than
many a convolution of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.table import size_hints, spread
from torch_quant.passes.base import PassContext

__all__ = ["fold_pads", "zeros_around"]

aten = torch.ops.aten
_CONVS = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3,
}  # fmt: skip
_NUMBERS: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
"""What takes its padding as a name -> the same with numbers."""


def zeros_around(node: fx.Node, dims: int) -> list[tuple[int, int]] | None:
    """What a call adds before and behind each of the last dimensions; None if it is no such call.

    Args:
        node: may pad a tensor with zeros.
        dims: how many dimensions there are that may be padded.

    >>> graph = fx.Graph()
    >>> pad = graph.call_function(aten.pad.default, (graph.placeholder("x"), [1, 2]))
    >>> zeros_around(pad, 2)
    [(0, 0), (1, 2)]
    """
    if node.target is aten.pad.default:
        if argument(node, "mode") != "constant":
            return None
    elif node.target is not aten.constant_pad_nd.default:
        return None
    pads: Sequence[Any] = argument(node, "pad")
    value = argument(node, "value")
    known = all(isinstance(each, int) and each >= 0 for each in pads)
    if not known or isinstance(value, fx.Node) or (value or 0) != 0:
        return None
    sides = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    if any(each != (0, 0) for each in sides[dims:]):
        return None
    return [*[(0, 0)] * (dims - len(sides)), *reversed(sides[:dims])]


def fold_pads(context: PassContext) -> int:
    """Fold paddings that add as much on both sides; returns how many convolutions took one."""
    changed = 0
    for target, dims in _CONVS.items():
        for node in context.graph.find_nodes(op="call_function", target=target):
            changed += _fold(node, dims)
    return changed


def _fold(conv: fx.Node, dims: int) -> bool:
    pad, padding = argument(conv, "input"), argument(conv, "padding")
    sides = zeros_around(pad, dims) if pad.op == "call_function" else None
    if sides is None or any(a != b for a, b in sides) or len(size_hints(pad)) < dims + 1:
        return False
    if isinstance(padding, str):
        if padding != "valid":
            return False
        padding = 0
        conv.target = _NUMBERS[conv.target]
    total = [p + each for p, (each, _) in zip(spread(padding, dims), sides, strict=True)]
    set_arguments(conv, {"input": argument(pad, 0), "padding": total})
    if not pad.users:
        conv.graph.erase_node(pad)
    return True
