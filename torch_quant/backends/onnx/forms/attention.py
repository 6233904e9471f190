"""Attention's mask becomes one addition, its scale part of a dequantization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import is_target
from torch_quant.ops.arguments import argument, arguments, retarget, set_arguments
from torch_quant.ops.attention import decompose_attention
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext, call_again

__all__ = ["attention_forms"]

aten = torch.ops.aten


def attention_forms(context: PassContext) -> int:
    """Masks as additions, scales inside dequantization; returns the number of attentions.

    A row whose mask leaves nothing must give zeros. Its mask is taken away, and the result, which
    is much smaller than the scores, multiplied by 0.
    """
    for node in context.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        decompose_attention(node)
    masks: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=aten._safe_softmax.default):
        product = _product_behind(node)
        if product is not None:
            node.target = aten.softmax.int
            _add_mask(node, product, masks)
            changed += 1
    for node in context.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        _fold_scale(node)
    return changed


def _product_behind(softmax: fx.Node) -> fx.Node | None:
    """The product that alone reads the probabilities, quantized or not."""
    node = softmax
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is aten.matmul.default:
            return node
        if node.target not in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR):
            return None
    return None


def _add_mask(
    softmax: fx.Node, product: fx.Node, masks: dict[fx.Node, tuple[fx.Node, fx.Node]]
) -> None:
    graph, scores = softmax.graph, argument(softmax, "self")
    if scores.target is aten.masked_fill.Scalar:
        hidden = argument(scores, "mask")
        mask = argument(hidden, "self")
        if mask.target is aten.tril.default:
            _add_causal_mask(scores)
            return
    elif scores.target is aten.add.Tensor:
        hidden, mask = None, argument(scores, "other")
    else:
        return
    if mask not in masks:
        masks[mask] = _additive(graph, mask, boolean=hidden is not None)
    added, alive = masks[mask]
    value = argument(product, "other")
    if is_target(value, aten.to.dtype) and argument(value, "dtype") is torch.bfloat16:
        with graph.inserting_before(scores):  # the attention fell back to it, the mask did not
            added = graph.call_function(aten.to.dtype, (added, torch.bfloat16))
    retarget(scores, aten.add.Tensor, (argument(scores, "self"), added))
    with graph.inserting_after(product):
        masked = graph.call_function(aten.mul.Tensor, (product, alive))
    masked.meta["val"] = product.meta["val"]
    product.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)


def _additive(graph: fx.Graph, mask: fx.Node, *, boolean: bool) -> tuple[fx.Node, fx.Node]:
    """What to add to the scores, and a factor for each row of the result, behind ``mask``."""
    anchor = mask.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    with graph.inserting_before(anchor):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return graph.call_function(target, args, kwargs)

        keep = mask if boolean else call(aten.ne.Scalar, mask, -math.inf)
        alive = call(aten.any.dim, keep, -1, True)
        wanted = call(aten.logical_or.default, keep, call(aten.logical_not.default, alive))
        if boolean:
            base = call(aten.zeros_like.default, mask, dtype=torch.float32)
        else:
            base = call(aten.masked_fill.Scalar, mask, call(aten.logical_not.default, keep), 0.0)
        hidden = call(aten.logical_not.default, wanted)
        added = call(aten.masked_fill.Scalar, base, hidden, -math.inf)
        return added, call(aten.to.dtype, alive, torch.float32)


def _add_causal_mask(scores: fx.Node) -> None:
    """Every row of a causal mask keeps the first key, so none is dead."""
    graph, x = scores.graph, argument(scores, "self")
    with graph.inserting_before(scores):
        sizes = [graph.call_function(aten.sym_size.int, (x, dim)) for dim in (-2, -1)]
        options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        full = graph.call_function(aten.full.default, (sizes, -math.inf), options)
        added = graph.call_function(aten.triu.default, (full, 1))
    retarget(scores, aten.add.Tensor, (x, added))


def _fold_scale(node: fx.Node) -> None:
    """``product * number``: scale an operand's grid instead, where the product is quantized."""
    product, factor = arguments(node).values()
    if not (is_target(product, aten.matmul.default) and isinstance(factor, float)):
        return
    real = argument(product, "self")
    if len(product.users) > 1 or not is_target(real, DEQUANTIZE_PER_TENSOR) or factor <= 0:
        return
    scaled = call_again(real, {"scale": argument(real, "scale") * factor}, product)
    set_arguments(product, {"self": scaled})
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)
