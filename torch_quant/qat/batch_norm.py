"""Batch norms of a graph that trains, while their statistics move.

A norm behind a product is folded into its weight, and what is rounded is ``w f`` with
``f = gamma / sqrt(var + eps)``. In train mode a norm divides by the deviation of the batch, not by
the running one. Folding the batch's into the weight would move the rounded weight with each batch
(Jacob et al. 2018, section 3.2). So the weight is folded and rounded with the running deviation,
which is what is deployed, and the factor is taken out again before the norm:

    y = norm(conv(x, round(w f) / f) + b),    statistics of this batch

It is the correction of Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
inference: A whitepaper", section 3.2.2, with one convolution in the place of two: the statistics
are those of the rounded weight. ``f`` is a constant there; gradients reach gamma, beta and the
batch's deviation by way of the norm. Where statistics are frozen, the graph is the one that is
deployed, and the gradient reaches gamma by way of the folded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from torch_quant.ops.arguments import argument, positional, set_arguments
from torch_quant.passes.fold_batch_norm import FoldedNorm

__all__ = ["TINY", "let_move", "norms_of", "unfolded"]

aten = torch.ops.aten

TINY = 1e-12
"""A factor below is none to divide by: the norm multiplies by nothing there."""

OwnerOf = Callable[[str], nn.Module]
"""The module of the QAT model that holds the tensor of a node, by its target."""


def unfolded(rounded: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """``round(w f) / f``; the weight itself where the norm multiplies by nothing.

    It has the type of ``rounded``, which is bfloat16 in a layer that fell back to it.
    """
    tiny = factor.abs() < TINY
    return torch.where(tiny, weight, rounded / torch.where(tiny, 1.0, factor)).to(rounded.dtype)


def moving_norm(
    x: Tensor,
    gain: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    batches: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """A batch norm in train mode; a momentum of None is for the mean of all batches."""
    if batches is not None:
        batches.add_(1)
    share = 1.0 / float(batches) if momentum is None and batches is not None else momentum or 0.0
    return F.batch_norm(x, mean, var, gain, beta, True, share, eps)


def norms_of(body: fx.GraphModule, folded: Collection[FoldedNorm]) -> dict[str, str]:
    """Each norm with statistics that can move: its node, or its product -> target of its mean."""
    nodes = {node.name: node for node in body.graph.nodes}
    found = {each.product: str(nodes[each.mean].target) for each in folded}
    for node in body.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        mean = argument(node, "running_mean")
        if not argument(node, "training") and isinstance(mean, fx.Node) and mean.op == "get_attr":
            found[node.name] = str(mean.target)
    return found


def let_move(
    body: fx.GraphModule,
    folded: Collection[FoldedNorm],
    moving: Mapping[str, float | None],
    owner_of: OwnerOf,
) -> None:
    """Rewrite norms for train mode.

    Args:
        body: the graph.
        folded: the norms that were folded into products in it.
        moving: the name of each norm, as of :func:`norms_of` -> its momentum.
        owner_of: the module that holds a tensor.
    """
    nodes = {node.name: node for node in body.graph.nodes}
    products = {each.product: each for each in folded}
    for name, momentum in moving.items():
        node = nodes[name]
        if name in products:
            _unfold(node, products[name], nodes, momentum, owner_of)
        else:
            x, gain, beta, mean, var, _, _, eps, *_ = positional(node)
            _replace(node, x, gain, beta, mean, var, momentum, eps, owner_of)


def _unfold(
    product: fx.Node,
    norm: FoldedNorm,
    nodes: dict[str, fx.Node],
    momentum: float | None,
    owner_of: OwnerOf,
) -> None:
    def of(name: str | None) -> fx.Node | None:
        return None if name is None else nodes[name]

    graph, folded = product.graph, nodes[norm.weight]
    rounded, bias, before = argument(product, 1), argument(product, 2), of(norm.bias)
    old, factors = argument(folded, "self"), argument(folded, "other")
    with graph.inserting_before(factors):
        constant = graph.call_function(aten.detach.default, (argument(factors, "self"),))
    set_arguments(factors, {"self": constant})
    with graph.inserting_before(product):
        weight = graph.call_function(unfolded, (rounded, old, factors))
        if before is not None and bias.target is aten.to.dtype:
            cast = (before, argument(bias, "dtype"))
            before = graph.call_function(aten.to.dtype, cast)
    set_arguments(product, {1: weight, 2: before})
    gain, beta, mean, var = of(norm.gain), of(norm.beta), of(norm.mean), of(norm.var)
    _replace(product, None, gain, beta, mean, var, momentum, norm.eps, owner_of)


def _replace(
    node: fx.Node,
    x: Any,
    gain: Any,
    beta: Any,
    mean: Any,
    var: Any,
    momentum: float | None,
    eps: Any,
    owner_of: OwnerOf,
) -> None:
    """Put a norm in train mode behind ``node``, or in its place where ``x`` is what it reads."""
    graph, target = node.graph, str(mean.target)
    batches = None
    if owner_of(target)._buffers.get("num_batches_tracked") is not None:
        path = f"{target.rpartition('.')[0]}.num_batches_tracked".strip(".")
        with graph.inserting_before(node):
            batches = graph.get_attr(path)
    with graph.inserting_after(node):
        args = (x or node, gain, beta, mean, var, batches, momentum, eps)
        norm = graph.call_function(moving_norm, args)
    norm.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(norm, delete_user_cb=lambda user: user is not norm)
