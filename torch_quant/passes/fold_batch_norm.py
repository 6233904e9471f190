"""Fold an eval-mode batch norm into the convolution or linear layer before it.

    bn(w x + b) = g (w x + b - mean) / sqrt(var + eps) + beta
                = (w f) x + ((b - mean) f + beta),      f = g / sqrt(var + eps)

``f`` scales the weight's output channels. The new weight and bias are constant expressions over the
same parameters, computed when lowering; nothing is changed in the model. (Jacob et al. 2018,
section 3.2.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.graph.sites import is_constant
from torch_quant.ops.table import OpPattern, pattern_of, size_hints
from torch_quant.passes.base import PassContext, call_like

__all__ = ["fold_batch_norm"]

aten = torch.ops.aten


def _product_before(norm: fx.Node) -> tuple[fx.Node, OpPattern] | None:
    """The product whose only user is ``norm``, if its output channels are those of ``norm``."""
    node = norm.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    pattern = pattern_of(node)
    if pattern is None or pattern.weight is None or not pattern.activations:
        return None
    weight = node.args[pattern.weight]
    if not isinstance(weight, fx.Node) or not is_constant(weight):
        return None
    rank, channels = len(size_hints(node)), size_hints(norm.args[3])
    if rank != (2 if pattern.name == "linear" else len(size_hints(weight))):
        return (
            None  # batch norm's channels are axis 1, a deeper linear's or an unbatched image's not
        )
    if size_hints(weight)[pattern.weight_axis :][:1] != channels:
        return None  # a grouped transposed convolution: its axis 1 is only a group's share
    return node, pattern


def fold_batch_norm(context: PassContext) -> int:
    """Fold every ``product -> batch_norm`` in eval mode; returns how many."""
    changed = 0
    for norm in list(context.graph.nodes):
        if norm.target is not aten.batch_norm.default or norm.args[5]:
            continue
        statistics = [arg for arg in norm.args[1:5] if isinstance(arg, fx.Node)]
        if norm.args[3] is None or not all(is_constant(each) for each in statistics):
            continue
        if (found := _product_before(norm)) is None:
            continue
        product, pattern = found
        _fold(context.graph, norm, product, pattern)
        changed += 1
    return changed


def _hoist(node: Any, before: fx.Node) -> None:
    """Move a constant expression up if it stands behind ``before``; it may stand anywhere."""
    if isinstance(node, fx.Node) and before < node:
        for each in node.all_input_nodes:
            _hoist(each, before)
        before.prepend(node)


def _fold(graph: fx.Graph, norm: fx.Node, product: fx.Node, pattern: OpPattern) -> None:
    _, gain, beta, mean, var = norm.args[:5]
    eps = norm.args[7]

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    for each in (gain, beta, mean, var):
        _hoist(each, product)
    with graph.inserting_before(product):
        factor = call(aten.rsqrt.default, call(aten.add.Tensor, var, eps))
        if gain is not None:
            factor = call(aten.mul.Tensor, gain, factor)
        assert pattern.weight is not None
        old_weight = product.args[pattern.weight]
        assert isinstance(old_weight, fx.Node)
        shape = [1] * len(size_hints(old_weight))
        shape[pattern.weight_axis] = -1
        weight = call(aten.mul.Tensor, old_weight, call(aten.reshape.default, factor, shape))
        weight.meta["val"] = old_weight.meta["val"]
        old_bias = product.args[2] if len(product.args) > 2 else None
        shift = (
            call(aten.neg.default, mean)
            if old_bias is None
            else call(aten.sub.Tensor, old_bias, mean)
        )
        bias = call(aten.mul.Tensor, shift, factor)
        if beta is not None:
            bias = call(aten.add.Tensor, bias, beta)
    args = (product.args[0], weight, bias, *product.args[3:])
    folded = call_like(product, product.target, args, **product.kwargs)
    folded.meta = norm.meta | {"nn_module_stack": product.meta.get("nn_module_stack")}
    norm.replace_all_uses_with(folded)
    graph.erase_node(norm)
    graph.erase_node(product)
