"""A question that the passes of this room ask of what reads a tensor."""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import readers_behind

__all__ = ["in_products"]

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})


def in_products(node: fx.Node) -> bool:
    """Whether all that reads a tensor, moved or not, are products of two activations."""
    return all(each.target in _PRODUCTS for each in readers_behind(node))
