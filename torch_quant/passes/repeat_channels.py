"""Repeat channels of a tensor, by the layer that computes them where there is one."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import computed_channels, is_vector, key_of, local_name
from torch_quant.ops.arguments import argument, positional, set_arguments
from torch_quant.ops.table import SIZES, size_hints
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, name_of, new_constant

__all__ = ["computing_layers", "picked_channels", "repeat_channels"]

aten = torch.ops.aten

_WEIGHT = 1
"""Its place among the arguments of ``aten.linear``."""


def repeat_channels(
    context: PassContext, x: fx.Node, readers: Collection[fx.Node], index: Tensor, name: str
) -> fx.Node:
    """The channels ``index`` of ``x``, a node whose last dimension they are.

    Where quantized linear layers compute them (:func:`computed_channels`) in every kind of call,
    these get more rows and ``x`` itself is returned. A layer in float is left as it is.

    Args:
        context: of the graph.
        x: read by ``readers`` alone, or by others too.
        readers: each will read what is returned.
        index: which channels, int64 of shape ``[n]``.
        name: of the constant that holds them.
    """
    chain = computing_layers(x, readers, context.plan)
    if not chain or not _in_all_graphs(context, chain, readers):
        return picked_channels(context, x, -1, index, min(readers), name)
    sizes = size_hints(x)
    for node in chain:
        layer, values = node.target is aten.linear.default, positional(node)
        places = [i for i, each in enumerate(values) if (i if layer else is_vector(each, sizes))]
        made = {i: _rows(context, node, values[i], index, i) for i in places if values[i]}
        set_arguments(node, made)
    for node in chain:
        _resize(node, len(index))
    return x


def computing_layers(x: fx.Node, readers: Collection[fx.Node], plan: QuantPlan) -> list[fx.Node]:
    """As :func:`computed_channels`, and empty where one of the layers is in float.

    Args:
        x: a tensor.
        readers: of it, which are to read the repeated channels.
        plan: what is done with each site.
    """
    chain = computed_channels(x, readers)
    layers = [each for each in chain if each.target is aten.linear.default]
    entries = [plan.get(key_of(each)) for each in layers]
    return chain if all(entry is not None and entry.quantized for entry in entries) else []


def _in_all_graphs(
    context: PassContext, chain: Collection[fx.Node], readers: Collection[fx.Node]
) -> bool:
    """Whether the layers compute channels for the same readers in every kind of call.

    Graphs share a weight then; in training its scales are one parameter, of one number of rows.
    """
    layers = {key_of(each) for each in chain if each.target is aten.linear.default}
    reading = {key_of(each) for each in readers}
    for gm in context.params.graphs():
        there = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
        if layers.isdisjoint(map(key_of, there)):
            continue
        wanting = [each for each in there if key_of(each) in reading]
        sources = {argument(each, 0) for each in wanting}
        if len(sources) != 1 or not computing_layers(sources.pop(), wanting, context.plan):
            return False
    return True


def _rows(
    context: PassContext, node: fx.Node, value: fx.Node, index: Tensor, place: int
) -> fx.Node:
    """The rows ``index`` of a constant: of weights an expression, of others their value."""
    local = local_name(node)
    if context.live or (node.target is aten.linear.default and place == _WEIGHT):
        return picked_channels(context, value, 0, index, node, f"{local}.rows")
    held = evaluate(context.gm, value).detach()[index]
    made = new_constant(context.gm, name_of(value, f"{local}.bias"), held, node)
    made.meta["val"] = held
    return made


def picked_channels(
    context: PassContext, x: fx.Node, dim: int, index: Tensor, before: fx.Node, name: str
) -> fx.Node:
    """The channels ``index`` along ``dim`` of ``x``, as an operator placed before ``before``."""
    picked = new_constant(context.gm, name, index, before)
    picked.meta["val"] = index
    with context.graph.inserting_before(before):
        made = context.graph.call_function(aten.index_select.default, (x, dim, picked))
    made.meta = {what: each for what, each in x.meta.items() if what in ("val", SIZES)}
    _resize(made, len(index), dim)
    return made


def _resize(node: fx.Node, channels: int, dim: int = -1) -> None:
    """Note that a tensor has so many channels."""
    value = node.meta.get("val")
    if value is not None:
        sizes = list(value.shape)
        sizes[dim] = channels
        node.meta["val"] = value.new_empty(sizes)
    if SIZES in node.meta:
        sizes = list(node.meta[SIZES])
        sizes[dim] = channels
        node.meta[SIZES] = tuple(sizes)
