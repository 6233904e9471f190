"""Scaled dot-product attention: quantized, it is written as its two products.

    attention(Q, K, V) = softmax(scale Q K' + mask) V

A row whose mask leaves nothing gives zeros, as the fused operator does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.elements import IntegerType
from torch_quant.core.granularity import PerToken
from torch_quant.core.plan import SitePlan
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.table import (
    KEY,
    Inserter,
    OpPattern,
    call_sizes,
    register_operator,
    size_hints,
)

__all__ = ["decompose_attention", "sdpa_probabilities", "sdpa_scores"]

aten = torch.ops.aten


def decompose_attention(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Replace one attention node.

    Returns:
        The two ``matmul`` nodes, ``Q K'`` and ``P V``; the left argument of the second holds the
        probabilities.
    """
    graph = node.graph
    given = arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask, scale = given["attn_mask"], given["scale"]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    with graph.inserting_before(node):
        if given["enable_gqa"]:
            heads = size_hints(query)[-3]
            key, value = (
                call(aten.repeat_interleave.self_int, x, heads // size_hints(x)[-3], -3)
                for x in (key, value)
            )
        if scale is None:
            scale = 1.0 / math.sqrt(size_hints(query)[-1])
        first = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
        scores = call(aten.mul.Tensor, first, scale)
        if given["is_causal"]:
            mask = call(aten.tril.default, call(aten.ones_like.default, scores, dtype=torch.bool))
        if isinstance(mask, fx.Node):
            boolean = given["is_causal"] or mask.meta["val"].dtype == torch.bool
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


def _macs(args: Any, out: Any) -> int:
    query, key, value = map(call_sizes, args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def sdpa_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Masked, scaled scores of attention, shape ``[..., queries, keys]``, before the softmax."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    factor = scale if scale is not None else 1.0 / math.sqrt(query.size(-1))
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores.masked_fill(~keep, -torch.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf)
    return scores + attn_mask


def sdpa_probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The left operand of attention's second product; a fully masked row gives zeros, not NaN."""
    scores = sdpa_scores(query, key, attn_mask, is_causal, scale, enable_gqa)
    return torch.softmax(scores, -1).nan_to_num(0.0)


def _quantize(inserter: Inserter, node: fx.Node, entry: SitePlan) -> None:
    """Quantize what it reads, and the probabilities, which exist inside of it only."""
    spec = entry.activation
    assert spec is not None
    given = arguments(node)
    inserter.activations(node, [given[name] for name in ("query", "key", "value")], entry)
    _, second = decompose_attention(node)
    if any(each.row_scales for each in entry.transforms):
        spec = _by_row(spec)
    inserter.activation(second, argument(second, "self"), entry.inputs[-1], spec, "probabilities")


def _by_row(spec: QuantSpec) -> QuantSpec:
    """As many codes on a scale for each row, all from 0 up, since no probability is negative.

    Small floats, and scales that are powers of two, stay as they are, for the whole tensor.
    """
    element = spec.element
    powers = spec.scale_type is ScaleType.E8M0
    if powers or not spec.per_tensor or not isinstance(element, IntegerType):
        return spec
    codes = IntegerType(0, element.quant_max - element.quant_min)
    return QuantSpec(codes, granularity=PerToken(), dynamic=True)


register_operator(
    OpPattern(
        "scaled_dot_product_attention",
        (aten.scaled_dot_product_attention.default,),
        (0, 1, 2),
        None,
        0,
        _macs,
        internals={"probabilities": sdpa_probabilities},
        quantize=_quantize,
        columns=(2,),
    )
)
