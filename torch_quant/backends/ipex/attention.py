"""Decomposed attention in the form that IPEX fuses: product, scale, mask to add, plain softmax.

``softmax(scale Q K' + mask)`` with a finite mask gives a row that is masked everywhere equal
weights, where the fused operator gives zeros. Such rows are multiplied by zero behind the second
product, which is fused into it too.

Masks are made once for all layers, in a shape whose broadcast the fused kernels have: any other
runs in a reference kernel that takes a thousand times as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import argument, positional
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext

__all__ = ["FUSED_MASK", "plain_softmax"]

aten = torch.ops.aten

FUSED_MASK = "torch_quant_fused_mask"
"""Entry of ``node.meta``: the node's other operand has a shape whose broadcast is fused."""

_LOWEST = torch.finfo(torch.float32).min


@dataclass
class _Attention:
    """One decomposed attention: ``softmax(scores)``, ``product`` before the mask, ``second``."""

    softmax: fx.Node
    product: fx.Node
    second: fx.Node
    mask: fx.Node | None = None
    causal: bool = False

    @property
    def operands(self) -> tuple[Any, Any]:
        """Queries and transposed keys, as they were before they were quantized."""
        codes = [argument(real, "q") for real in positional(argument(self.product, "self"))]
        query, key = (argument(each, "x") for each in codes)
        return query, key

    @property
    def features(self) -> Any:
        """Sizes of a value."""
        return self.softmax.meta["val"].shape[-1]

    @property
    def sizes(self) -> tuple[str, ...]:
        """Sizes of the output, and of the keys."""
        _, key = self.operands
        while "val" not in key.meta:
            key = argument(key, 0)
        shapes = (self.softmax.meta["val"].shape, key.meta["val"].shape)
        return tuple(str(size) for shape in shapes for size in shape)


@dataclass
class _Masks:
    """What was made of each mask, so that layers share it."""

    made: dict[Any, tuple[fx.Node, fx.Node | None]] = field(default_factory=dict)

    def of(self, attention: _Attention) -> tuple[fx.Node, fx.Node | None]:
        """(mask to add, rows that see anything as factors, None if all do)."""
        memo = ("causal" if attention.causal else attention.mask, *attention.sizes)
        if memo not in self.made:
            self.made[memo] = _make(attention)
        return self.made[memo]


def _make(attention: _Attention) -> tuple[fx.Node, fx.Node | None]:
    before = attention.product
    query, key = attention.operands

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with before.graph.inserting_before(before):
            return before.graph.call_function(target, args, kwargs)

    def size(x: fx.Node, axis: int) -> fx.Node:
        return call(aten.sym_size.int, x, axis)

    rank = attention.softmax.meta["val"].dim()
    rows, columns = size(query, rank - 2), size(key, rank - 1)
    if attention.causal:
        ones = call(aten.ones.default, [rows, columns], dtype=torch.bool)
        mask, dims = call(aten.tril.default, ones), [False, False]
    else:
        assert attention.mask is not None
        mask = attention.mask
        dims = [isinstance(n, int) and n == 1 for n in mask.meta["val"].shape]
    if attention.causal or mask.meta["val"].dtype == torch.bool:
        additive = call(aten.where.Scalar, mask, 0.0, _LOWEST)
        seen = mask
    else:
        wide = call(aten.to.dtype, mask, torch.float32)
        additive = call(aten.clamp.default, wide, _LOWEST)
        seen = call(aten.gt.Scalar, wide, -math.inf)
    single = [True] * (rank - len(dims)) + dims
    heads: list[Any] = [size(query, axis) for axis in range(rank - 2)]
    if rank == 4 and single[1]:
        heads[1] = 1
    if not _is_fused(single):
        additive = call(
            aten.contiguous.default, call(aten.expand.default, additive, [*heads, rows, columns])
        )
    if attention.causal:
        return additive, None
    alive = call(aten.to.dtype, call(aten.any.dim, seen, -1, True), torch.float32)
    shape = [*heads, rows, attention.features]
    return additive, call(aten.contiguous.default, call(aten.expand.default, alive, shape))


def _is_fused(single: list[bool]) -> bool:
    """Whether a mask with size 1 at these dimensions is added by the fused kernel itself."""
    if len(single) != 4 or single[3]:
        return not any(single)
    batch, head, row, _ = single
    return (row or not batch) if head else not row


def _decomposed(softmax: fx.Node) -> _Attention | None:
    """The attention that ``softmax`` belongs to, as ``decompose_attention`` writes it."""
    scores = argument(softmax, "self")
    second = softmax
    for expected in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR, aten.matmul.default):
        if len(second.users) != 1:
            return None
        second = next(iter(second.users))
        if second.target is not expected:
            return None
    if scores.target is aten.mul.Tensor:
        return _Attention(softmax, scores, second)
    if scores.target not in (aten.add.Tensor, aten.masked_fill.Scalar):
        return None
    product, mask, *_ = positional(scores)
    if not isinstance(product, fx.Node) or not isinstance(mask, fx.Node):
        return None
    if product.target is not aten.mul.Tensor:
        return None
    if scores.target is aten.add.Tensor:
        return _Attention(softmax, product, second, mask)
    kept = argument(mask, "self")
    return _Attention(softmax, product, second, kept, kept.target is aten.tril.default)


def plain_softmax(context: PassContext) -> int:
    """Rewrite every decomposed attention; returns how many."""
    masks = _Masks()
    changed = 0
    target = aten._safe_softmax.default
    for node in list(context.graph.find_nodes(op="call_function", target=target)):
        attention = _decomposed(node)
        if attention is None or not isinstance(attention.features, int):
            continue
        scores = attention.product
        alive = None
        if attention.mask is not None:
            additive, alive = masks.of(attention)
            with node.graph.inserting_before(node):
                scores = node.graph.call_function(aten.add.Tensor, (scores, additive))
            scores.meta = {**attention.product.meta, FUSED_MASK: True}
        with node.graph.inserting_before(node):
            plain = node.graph.call_function(aten.softmax.int, (scores, -1))
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
        node.graph.erase_node(node)
        if alive is not None:
            second = attention.second
            with node.graph.inserting_after(second):
                living = node.graph.call_function(aten.mul.Tensor, (second, alive))
            living.meta = {**second.meta, FUSED_MASK: True}
            for user in [user for user in second.users if user is not living]:
                user.replace_input_with(second, living)
        changed += 1
    return changed
