"""Questions that the passes of this room ask of what reads a tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from torch_quant.ops.table import DATA_MOVEMENT

__all__ = ["in_products", "readers_behind"]

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})


def readers_behind(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor, moved or not."""
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user.target in DATA_MOVEMENT:
            todo += user.users
        else:
            yield user


def in_products(node: fx.Node) -> bool:
    """Whether all that reads a tensor, moved or not, are products of two activations."""
    return all(each.target in _PRODUCTS for each in readers_behind(node))
