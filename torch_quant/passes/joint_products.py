"""Linear layers with integer weights that one call computes, as calling takes as long as they do.

last(f(gate(x)) * up(x)),  last(f(first(x)))     one call, with what stands between
query(x), key(x), value(x)                       one call, which rounds x once

The first is for weights alone, the second also for layers that round x to 8 bits at each call.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from torch_quant.native.dynamic import DYNAMIC_LINEAR, DYNAMIC_LINEARS
from torch_quant.native.joint import GATED_LINEAR, WEIGHT_ONLY_LINEARS
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR
from torch_quant.ops.arguments import argument, arguments, positional
from torch_quant.passes.base import PassContext

__all__ = ["join_gated", "join_products"]

aten = torch.ops.aten

_FUNCTIONS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def join_gated(context: PassContext) -> int:
    """Two layers of one input, the function between, and the layer that reads their product."""
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=WEIGHT_ONLY_LINEAR):
        found = None if node._erased else _first_layers(node)
        if found is None:
            continue
        layers, function, between = found
        if len({_optional(each) for each in (*layers, node)}) > 1:
            continue
        args = (argument(layers[0], "x"), *_lists([*layers, node]), function)
        with node.graph.inserting_before(node):
            new = node.graph.call_function(GATED_LINEAR, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        for dead in (node, *between, *layers):
            node.graph.erase_node(dead)
        changed += 1
    return changed


def join_products(context: PassContext) -> int:
    """All layers that read one tensor, and have zero points, biases and rounding alike."""
    by_input: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in context.graph.nodes:
        if node.target is WEIGHT_ONLY_LINEAR:
            alike: tuple[Any, ...] = _optional(node)
        elif node.target is DYNAMIC_LINEAR and argument(node, "post_op") == "none":
            alike = (argument(node, "signed"), argument(node, "bias") is not None)
        else:
            continue
        x = argument(node, "x")
        if all(each is x or each.op == "get_attr" for each in node.all_input_nodes):
            by_input.setdefault((x, node.target, *alike), []).append(node)
    groups = [nodes for nodes in by_input.values() if len(nodes) > 1]
    for nodes in groups:
        _join(nodes)
    return len(groups)


def _only_reader(x: Any) -> fx.Node | None:
    """``x`` if it is a call whose result one node reads."""
    return x if isinstance(x, fx.Node) and len(x.users) == 1 and x.op == "call_function" else None


def _function_of(x: Any) -> tuple[str, fx.Node] | None:
    """A function between two layers, and the layer before it."""
    node = _only_reader(x)
    if node is None:
        return None
    if node.target is aten.gelu.default:
        name = _GELU.get(argument(node, "approximate"))
    else:
        name = _FUNCTIONS.get(node.target)
    if name is None:
        return None
    layer = _layer(argument(node, 0))
    return None if layer is None else (name, layer)


def _layer(x: Any) -> fx.Node | None:
    node = _only_reader(x)
    return node if node is not None and node.target is WEIGHT_ONLY_LINEAR else None


def _first_layers(last: fx.Node) -> tuple[list[fx.Node], str, list[fx.Node]] | None:
    """The layers before ``last``, the first one's function, and what is between, last first."""
    inner = _only_reader(argument(last, "x"))
    if inner is None:
        return None
    if (alone := _function_of(inner)) is not None:
        return [alone[1]], alone[0], [inner]
    if inner.target is not aten.mul.Tensor:
        return None
    for gate, up in (positional(inner)[:2], positional(inner)[1::-1]):
        found, second = _function_of(gate), _layer(up)
        if found is not None and second is not None and gate is not up:
            name, first = found
            if argument(first, "x") is argument(second, "x") and _alike(first, second):
                return [first, second], name, [inner, gate]
    return None


def _alike(*layers: fx.Node) -> bool:
    """Whether their results have one shape, so that neither is repeated."""
    shapes = [getattr(layer.meta.get("val"), "shape", None) for layer in layers]
    return None not in shapes and len(set(map(str, shapes))) == 1


def _optional(node: fx.Node) -> tuple[bool, bool]:
    """Whether a layer has zero points and a bias: in a list, all have or none has."""
    return argument(node, "zero_point") is not None, argument(node, "bias") is not None


_LISTS = ("weight", "scale", "zero_point", "bias", "bits", "zero")


def _lists(nodes: list[fx.Node], names: tuple[str, ...] = _LISTS) -> tuple[list[Any], ...]:
    """An argument of all layers for each name, without those that are None."""
    found = ([arguments(node)[name] for node in nodes] for name in names)
    return tuple([each for each in values if each is not None] for values in found)


def _join(nodes: list[fx.Node]) -> None:
    graph, x = nodes[0].graph, argument(nodes[0], "x")
    if nodes[0].target is DYNAMIC_LINEAR:
        names, last = ("weight", "scale", "bias"), (argument(nodes[0], "signed"),)
        target, args = DYNAMIC_LINEARS, (*_lists(nodes, names), *last)
    else:
        target, args = WEIGHT_ONLY_LINEARS, _lists(nodes)
    with graph.inserting_before(nodes[0]):
        joint = graph.call_function(target, (x, *args))
    for constant in joint.all_input_nodes:
        if joint < constant:  # a tensor of the model, which is there from the start
            joint.prepend(constant)
    for i, node in reversed(list(enumerate(nodes))):
        with graph.inserting_after(joint):
            new = graph.call_function(operator.getitem, (joint, i))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
