"""Turn in-place operators into their functional form where no alias can see the difference.

After ``y = op_(x)``, ``x`` and ``y`` are one tensor. If nothing else shares its memory, later uses
of ``x`` may read ``y`` and the operator may leave ``x`` alone. Writes through views stay as they
are; the tensors they reach are recorded, since a grid taken before the write would be stale.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from torch_quant.ops.arguments import arguments, part_of
from torch_quant.passes.base import PassContext

__all__ = ["functionalize", "writes_attributes", "may_alias_input", "written_tensors"]


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def may_alias_input(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # a part of what chunk, split or unbind gave, or an LSTM
        return may_alias_input(part_of(node)[0])
    schema = _schema(node)
    return schema is not None and any(each.alias_info is not None for each in schema.arguments)


def _writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` writes to."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable or node.target is torch.ops.aten.detach_.default:
        return []
    return [
        value
        for declared, value in zip(schema.arguments, arguments(node).values(), strict=True)
        if declared.alias_info is not None and declared.alias_info.is_write
        and isinstance(value, fx.Node)
    ]  # fmt: skip


def writes_attributes(graph: fx.Graph) -> bool:
    """Whether an operator writes to a buffer, so that calls leave something for later ones."""
    return any(written.op == "get_attr" for node in graph.nodes for written in _writes(node))


def _functional_form(node: fx.Node) -> Any | None:
    name, overload = str(node.target).removeprefix("aten.").rsplit(".", 1)
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if not name.endswith("_") or name.startswith("_") or packet is None:
        return None
    return getattr(packet, overload, None)


def _would_promote(node: fx.Node, x: fx.Node) -> bool:
    """Whether the functional form may give another dtype than that of ``x``."""
    dtype = x.meta["val"].dtype
    others = [n.meta.get("val") for n in node.all_input_nodes if n is not x]
    given = (*node.args, *node.kwargs.values())
    numbers = [each for each in given if isinstance(each, int | float)]
    tensors = [value for value in others if isinstance(value, torch.Tensor)]
    return any(torch.promote_types(value.dtype, dtype) != dtype for value in tensors) or (
        bool(numbers) and not dtype.is_floating_point
    )


def functionalize(context: PassContext) -> int:
    """Rewrite every in-place operator on a tensor that nothing aliases."""
    order = {node: i for i, node in enumerate(context.graph.nodes)}
    changed = 0
    for node in list(context.graph.nodes):
        written = _writes(node)
        if len(written) != 1:
            continue
        x = written[0]
        functional = _functional_form(node)
        aliased = may_alias_input(x) or any(may_alias_input(u) for u in x.users if u is not node)
        if functional is None or x.op != "call_function" or aliased or _would_promote(node, x):
            continue
        node.target = functional
        for user in [u for u in x.users if order[u] > order[node]]:
            user.replace_input_with(x, node)
        changed += 1
    return changed


def written_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose tensor some operator still writes to after it was made, aliases included."""
    dirty: set[fx.Node] = set()
    stack = [
        x for node in graph.nodes for x in (*_writes(node), *([node] if _writes(node) else []))
    ]
    while stack:
        node = stack.pop()
        if node in dirty:
            continue
        dirty.add(node)
        if may_alias_input(node):
            stack.extend(node.all_input_nodes)
        stack.extend(user for user in node.users if may_alias_input(user))
    return dirty
