"""Bags of embeddings on IPEX: sums on its int8 kernel, means and maxima of gathered int8 rows.

``ipex::qembedding_bag`` stands for ``dequantize -> embedding_bag -> quantize``. It knows sums
alone, one scale for the whole table and symmetric int8 results. Where the step of the result is not
larger than the table's by 1e-4, it copies the codes of a row into bags of one, and of none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_quant.backends.ipex.alone import Alone
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import KEY, key_of, results
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.embedding_bags import BAGS, bag_arguments, bags_of_rows
from torch_quant.ops.functions import graph_function
from torch_quant.ops.qdq import (
    DEQUANTIZE_PER_TENSOR,
    FAKE_QUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
)
from torch_quant.passes.base import PassContext

__all__ = ["BAG_KERNEL", "look_up_bags"]

_SYMMETRIC = QuantSpec.of(signed=True, symmetric=True)
_COARSER = 1.01e-4


@graph_function
def sum_bags(
    codes: Tensor,
    scale: float,
    indices: Tensor,
    offsets: Tensor,
    include_last_offset: bool,
    out_scale: float,
) -> Tensor:
    """Sums of rows of an int8 table as a quantized tensor, in the form that IPEX fuses."""
    if torch.compiler.is_compiling():
        bags = bags_of_rows(codes, scale, indices, offsets, 0, None, include_last_offset, None)
        return FAKE_QUANTIZE_PER_TENSOR(bags, out_scale, 0, -128, 127)  # type: ignore[no-any-return]
    with torch.autocast("cpu", enabled=False):
        table = torch._make_per_tensor_quantized_tensor(codes, scale, 0).dequantize()
        bags = torch.ops.torch_ipex.embedding_bag(
            table, indices, offsets, False, include_last_offset
        )
    return torch.quantize_per_tensor(bags, out_scale, 0, torch.qint8)


def look_up_bags(context: PassContext) -> int:
    """Read int8 rows, instead of dequantizing the whole table."""
    changed = 0
    for node in list(context.graph.nodes):
        table = argument(node, "weight") if node.target in BAGS else None
        if table is None or table.target is not DEQUANTIZE_PER_TENSOR:
            continue
        codes, scale, _ = arguments(table).values()
        (bags,) = results(node)
        quantize, *others = bags.users  # stored quantized, but where it is written to
        indices, offsets, mode, weights, include_last_offset, padding_idx = bag_arguments(node)
        plain = mode == 0 and weights is None and padding_idx is None
        stored = quantize.target is QUANTIZE_PER_TENSOR and not others
        out_scale = argument(quantize, "scale") if stored else 0.0
        coarser = out_scale - scale > _COARSER
        args: tuple[Any, ...]
        with context.graph.inserting_before(quantize if stored else bags):
            if stored and plain and coarser and _is_long(indices) and _is_long(offsets):
                args = (codes, scale, indices, offsets, include_last_offset, out_scale)
                new, old = context.graph.call_function(sum_bags, args), quantize
            else:
                args = (codes, scale, *bag_arguments(node))
                new, old = context.graph.call_function(bags_of_rows, args), bags
        new.meta = dict(bags.meta) | {KEY: key_of(node)}
        old.replace_all_uses_with(new)
        context.graph.erase_node(old)
        changed += 1
    context.graph.eliminate_dead_code()
    return changed


def _is_long(node: Any) -> bool:
    return bool(node.meta["val"].dtype == torch.int64)


def _row(weight: Accepts) -> Kernel:
    table = Accepts(_SYMMETRIC, lambda spec: spec == _SYMMETRIC, f"IPEX sums bags of {_SYMMETRIC}")
    return Kernel("embedding_bag", None, table, table)


BAG_KERNEL = Alone(
    "embedding_bag",
    _row,
    "ipex::qembedding_bag",
    (sum_bags, bags_of_rows),
    look_up_bags,
    "IPEX's kernel only sums, to larger steps: int8 rows are gathered and reduced in float",
)
