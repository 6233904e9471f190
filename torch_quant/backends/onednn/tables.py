"""Embeddings and bags of them: only the int8 rows that are asked for are read, where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.int8 import int8_weight
from torch_quant.backends.onednn.endings import Ending, replace
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.graph.sites import results
from torch_quant.native import library as native
from torch_quant.ops.arguments import argument
from torch_quant.ops.embedding_bags import bag_arguments, bags_of_rows
from torch_quant.ops.library import define_operator
from torch_quant.ops.rows import register_row_operator
from torch_quant.passes.base import PassContext

__all__ = ["EMBEDDING", "EMBEDDING_BAG", "table_kernels"]


def _embedding(weight: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    if (
        weight.dtype is torch.int8
        and indices.dtype is torch.int64
        and scale.dtype is torch.float32
        and weight.is_contiguous()
        and scale.is_contiguous()
        and scale.numel() == weight.shape[0]
        and (kernels := native.kernels()) is not None
    ):
        count, size = weight.shape
        indices = indices.contiguous()
        y = scale.new_empty((*indices.shape, size))
        bad = kernels.torch_quant_embedding(
            weight.data_ptr(), scale.data_ptr(), indices.data_ptr(), y.data_ptr(), indices.numel(),
            count, size,
        )  # fmt: skip
        if bad < 0:
            return y
        index = indices.flatten()[bad].item()
        raise IndexError(f"an embedding of {count} rows has no row {index}")
    rows = torch.nn.functional.embedding(indices, weight).to(torch.float32)
    return rows * torch.nn.functional.embedding(indices, scale.unsqueeze(-1))


def _fake_embedding(weight: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    return scale.new_empty((*indices.shape, weight.shape[1]))


def _fake_embedding_bag(weight: Tensor, scale: Tensor, *args: Any) -> Tensor:
    offsets, include_last_offset = args[1], args[4]
    return scale.new_empty((offsets.shape[0] - int(include_last_offset), weight.shape[1]))


EMBEDDING = define_operator(
    "int8_embedding(Tensor weight, Tensor scale, Tensor indices) -> Tensor",
    _embedding,
    _fake_embedding,
    keys=("CPU",),
)
EMBEDDING_BAG = define_operator(
    "int8_embedding_bag(Tensor weight, Tensor scale, Tensor indices, Tensor offsets, int mode, "
    "Tensor? per_sample_weights, bool include_last_offset, int? padding_idx) -> Tensor",
    bags_of_rows,
    _fake_embedding_bag,
    keys=("CPU",),
)

register_row_operator(EMBEDDING, 2)


def table_kernels(weight: Accepts) -> tuple[Kernel, ...]:
    """The rows of the kernel table; ``weight`` is what a table of int8 rows may be."""
    return (
        Kernel("embedding", None, weight, emit=_lower_embedding),
        Kernel("embedding_bag", None, weight, emit=_lower_embedding_bag),
    )


def _lower_embedding(context: PassContext, node: fx.Node) -> None:
    weight = int8_weight(node)
    if weight is None:
        return
    replace(node, Ending(node), EMBEDDING, (*weight, argument(node, "indices")))


def _lower_embedding_bag(context: PassContext, node: fx.Node) -> None:
    weight = int8_weight(node)
    if weight is None:
        return
    args = (*weight, *bag_arguments(node))
    with node.graph.inserting_before(node):
        new = node.graph.call_function(EMBEDDING_BAG, args)
    for bags in results(node):
        new.meta = dict(bags.meta)
        bags.replace_all_uses_with(new)
        node.graph.erase_node(bags)
    node.graph.erase_node(node)
