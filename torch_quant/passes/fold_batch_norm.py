"""Fold an eval-mode batch norm into the convolution or linear layer before it.

    bn(w x + b) = g (w x + b - mean) / sqrt(var + eps) + beta
                = (w f) x + ((b - mean) f + beta),      f = g / sqrt(var + eps)

``f`` scales the weight's output channels. The new weight and bias are constant expressions over the
same parameters, computed when lowering; nothing is changed in the model. (Jacob et al. 2018,
section 3.2.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_quant.graph.sites import is_constant
from torch_quant.ops.arguments import argument, positional
from torch_quant.ops.table import OpPattern, pattern_of, size_hints
from torch_quant.passes.base import PassContext, call_again

__all__ = ["FoldedNorm", "fold_batch_norm", "folded_norms"]

aten = torch.ops.aten

_FOLDED = "torch_quant_folded_norm"
"""Entry of ``node.meta``: of a product, eps and momentum of what was folded into it; of a weight,
that it was multiplied by a factor."""


@dataclass(frozen=True)
class FoldedNorm:
    """What became of a batch norm, by the names of nodes of one graph; None for what it lacks.

    Args:
        product: the convolution or linear layer.
        weight: the weight of that, multiplied by ``f``.
        gain: gamma.
        beta: beta.
        mean: the running mean.
        var: the running variance.
        bias: of the product, before.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
    """

    product: str
    weight: str
    gain: str | None
    beta: str | None
    mean: str
    var: str
    bias: str | None
    eps: float
    momentum: float


def folded_norms(graph: fx.Graph) -> list[FoldedNorm]:
    """The batch norms that were folded into products of ``graph``, as far as they still stand so.

    Args:
        graph: canonical, or lowered from one with live weights.
    """
    products = (x for x in graph.nodes if _FOLDED in x.meta and x.target is not aten.to.dtype)
    found = (_folded_norm(node) for node in products)
    return [each for each in found if each is not None]


def _behind_casts(node: Any) -> Any:
    """What a node has before it is cast, as in a layer that fell back to bfloat16."""
    while isinstance(node, fx.Node) and node.target is aten.to.dtype:
        node = argument(node, "self")
    return node


def _folded_norm(product: fx.Node) -> FoldedNorm | None:
    if product.meta[_FOLDED] is True:
        return None  # a weight
    weight, bias = (_behind_casts(argument(product, place)) for place in (1, 2))
    while _FOLDED not in weight.meta:
        if weight.op != "call_function":
            return None
        weight = _behind_casts(argument(weight, 0))  # what rounds it
    if not isinstance(bias, fx.Node):
        return None
    eps, momentum, with_beta = product.meta[_FOLDED]
    bias, beta = positional(bias) if with_beta else (bias, None)
    shift, factor = positional(bias)
    gain, inverse = (None, factor) if factor.target is aten.rsqrt.default else positional(factor)
    var = argument(argument(inverse, "self"), "self")
    old, mean = (None, *positional(shift))[-2:]

    def name(node: Any) -> str | None:
        return None if node is None else str(node.name)

    return FoldedNorm(
        product.name,
        weight.name,
        gain=name(gain),
        beta=name(beta),
        mean=mean.name,
        var=var.name,
        bias=name(old),
        eps=eps,
        momentum=momentum,
    )


def _statistics_of(norm: fx.Node) -> list[Any]:
    """Gain, offset, mean and variance of a batch norm."""
    return [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]


def _weight_of(product: fx.Node, pattern: OpPattern) -> Any:
    assert pattern.weight is not None
    return argument(product, pattern.weight)


def _product_before(norm: fx.Node) -> tuple[fx.Node, OpPattern] | None:
    """The product whose only user is ``norm``, if its output channels are those of ``norm``."""
    node = argument(norm, "input")
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    pattern = pattern_of(node)
    if pattern is None or None in (pattern.weight, pattern.bias) or not pattern.activations:
        return None
    weight = _weight_of(node, pattern)
    if not isinstance(weight, fx.Node) or not is_constant(weight):
        return None
    rank, channels = len(size_hints(node)), size_hints(argument(norm, "running_mean"))
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
        if norm.target is not aten.batch_norm.default or argument(norm, "training"):
            continue
        statistics = [each for each in _statistics_of(norm) if each is not None]
        if argument(norm, "running_mean") is None or not all(map(is_constant, statistics)):
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
    gain, beta, mean, var = _statistics_of(norm)
    eps = argument(norm, "eps")

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    for each in (gain, beta, mean, var):
        _hoist(each, product)
    with graph.inserting_before(product):
        factor = call(aten.rsqrt.default, call(aten.add.Tensor, var, eps))
        if gain is not None:
            factor = call(aten.mul.Tensor, gain, factor)
        old_weight = _weight_of(product, pattern)
        shape = [1] * len(size_hints(old_weight))
        shape[pattern.weight_axis] = -1
        weight = call(aten.mul.Tensor, old_weight, call(aten.reshape.default, factor, shape))
        weight.meta |= {"val": old_weight.meta["val"], _FOLDED: True}
        assert pattern.weight is not None
        assert pattern.bias is not None
        old_bias = argument(product, pattern.bias)
        shift = (
            call(aten.neg.default, mean)
            if old_bias is None
            else call(aten.sub.Tensor, old_bias, mean)
        )
        bias = call(aten.mul.Tensor, shift, factor)
        if beta is not None:
            bias = call(aten.add.Tensor, bias, beta)
    folded = call_again(product, {pattern.weight: weight, pattern.bias: bias})
    folded.meta = norm.meta | {
        "nn_module_stack": product.meta.get("nn_module_stack"),
        _FOLDED: (eps, argument(norm, "momentum"), beta is not None),
    }
    norm.replace_all_uses_with(folded)
    graph.erase_node(norm)
    graph.erase_node(product)
