"""Embeddings and bags of them; a bag of int8 rows is gathered, and reduced as PyTorch does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.ops.arguments import arguments, part_of
from torch_quant.ops.capturing import Capturing, register_capturing
from torch_quant.ops.functions import graph_function
from torch_quant.ops.table import OpPattern, register_operator

__all__ = ["BAGS", "bag_arguments", "bags_of_rows"]

aten = torch.ops.aten

BAGS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)


def bag_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Indices, offsets, mode, weights of the samples, whether the last offset is an end, padding.

    The mode is 0 for sums, 1 for means and 2 for maxima.
    """
    given = arguments(node)
    names = ("indices", "offsets", "mode", "per_sample_weights", "include_last_offset")
    return (*(given[name] for name in names), given.get("padding_idx"))


@graph_function
def bags_of_rows(
    codes: Tensor,
    scale: Tensor | float,
    indices: Tensor,
    offsets: Tensor,
    mode: int,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """Bags of an int8 table, float32, shape ``[bags, features]``.

    Args:
        codes: int8, shape ``[rows, features]``; their zero point is 0.
        scale: float32, shape ``[rows]``, or one number for all rows.
        indices: rows to read, shape ``[n]``.
        offsets: where in ``indices`` the bags begin.
        mode: 0 for sums, 1 for means, 2 for maxima.
        per_sample_weights: factor of each index, shape ``[n]``; for sums only.
        include_last_offset: the last offset is the end of the last bag.
        padding_idx: a row that does not count; negative, from the end.
    """
    rows = aten.embedding.default(codes, indices).to(torch.float32)
    if isinstance(scale, Tensor):
        scale = aten.embedding.default(scale.unsqueeze(-1), indices)
    rows = rows * scale
    # In the place of the table, one row for each index; the first one stands for padding.
    table = torch.cat([rows.new_zeros((1, codes.size(1))), rows])
    places = torch.ones_like(indices).cumsum(0)
    if padding_idx is not None:
        places = places * (indices != padding_idx % codes.shape[0])
    bags: Tensor = aten.embedding_bag.padding_idx(
        table, places, offsets, False, mode, False, per_sample_weights, include_last_offset, 0
    )[0]
    return bags


def _obstacle(node: fx.Node) -> str:
    others = any(part_of(user)[1] != 0 for user in node.users)
    return "more of its results than the bags are read" if others else ""


register_operator(OpPattern("embedding", (aten.embedding.default,), (), 0, 0, lambda args, out: 0))
register_operator(
    OpPattern(
        "embedding_bag",
        BAGS,
        (),
        0,
        0,
        lambda args, out: 0,
        output=frozenset(),
        obstacle=_obstacle,
    )
)


@contextlib.contextmanager
def _own_bags() -> Iterator[None]:
    """PyTorch's own ``embedding_bag``: what extensions put there may read beyond the ids."""
    found = torch.embedding_bag
    torch.embedding_bag = torch._VF.embedding_bag
    try:
        yield
    finally:
        torch.embedding_bag = found


register_capturing(Capturing(running=_own_bags))
