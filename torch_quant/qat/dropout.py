"""Dropout in a graph that was captured in eval mode, where it is the identity.

The captured graph has each call of it still, with ``train=False``; canonical graphs do not. So it
is put back into the lowered graph, behind the node that computes the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.graph.sites import ORIGIN, module_path
from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.table import IDENTITY
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE

__all__ = ["dropouts", "put_back_dropout", "turn_on"]

aten = torch.ops.aten

_ON_COPIES = {
    aten.dropout_.default: aten.dropout.default,
    aten.feature_dropout_.default: aten.feature_dropout.default,
    aten.alpha_dropout_.default: aten.alpha_dropout.default,
    aten.feature_alpha_dropout_.default: aten.feature_alpha_dropout.default,
}


_SHIFTING = (aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
"""What they do is no factor."""


def put_back_dropout(lowered: fx.GraphModule, captured: fx.GraphModule) -> list[str]:
    """Put every dropout of ``captured`` into ``lowered``, turned off.

    What it drops is rounded before: ``1 / (1 - p)`` of the values would leave the range, which was
    calibrated in eval mode.

    Returns:
        The modules whose dropout has no place there: its input was folded into something else, or
        is read by others too.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node in lowered.graph.nodes:
        if ORIGIN in node.meta and node.users:
            nodes.setdefault(node.meta[ORIGIN], []).append(node)
    left_out = []
    changed = False
    for call in captured.graph.nodes:
        if call.op != "call_function" or call.target not in IDENTITY or not argument(call, "p"):
            continue
        origin: Any = argument(call, 0)
        while origin.op == "call_function" and origin.target in IDENTITY:
            origin = argument(origin, 0)
        found = nodes.get(origin.name, [])
        if len(origin.users) > 1 or not found:
            left_out.append(module_path(call) or call.name)
            continue
        _insert(found, _ON_COPIES.get(call.target, call.target), argument(call, "p"))
        changed = True
    if changed:
        lowered.graph.lint()
        lowered.recompile()
    return left_out


def _insert(nodes: list[fx.Node], target: Any, probability: Any) -> None:
    """Drop the value that all of ``nodes`` have, rounded or not: the same elements everywhere."""
    graph, readers = nodes[0].graph, []
    for node in nodes:
        rounded = [user for user in node.users if user.target is TRAINED_FAKE_QUANTIZE]
        readers += [(each, list(each.users)) for each in rounded]
        if others := [user for user in node.users if user not in rounded]:
            readers.append((node, others))
    together = len(readers) > 1 and target not in _SHIFTING
    if together:
        with graph.inserting_before(_behind_inputs(nodes[0])):
            ones = graph.call_function(aten.ones_like.default, (nodes[0],))
            mask = graph.call_function(target, (ones, probability, False))
    for node, users in readers:
        behind = mask if together and node < mask else node
        with graph.inserting_before(_behind_inputs(behind)):
            if together:
                dropped = graph.call_function(aten.mul.Tensor, (node, mask))
            else:
                dropped = graph.call_function(target, (node, probability, False))
        dropped.meta["val"] = node.meta.get("val")
        for user in users:
            user.replace_input_with(node, dropped)


def _behind_inputs(node: fx.Node) -> fx.Node:
    """What follows ``node``, behind all inputs of the graph."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    return after


def turn_on(body: fx.GraphModule) -> None:
    """Have every dropout of a body drop."""
    for call in dropouts(body):
        set_arguments(call, {"train": True})


def dropouts(body: fx.GraphModule) -> list[fx.Node]:
    """Every call of a dropout."""
    return [x for x in body.graph.nodes if x.op == "call_function" and x.target in IDENTITY]
