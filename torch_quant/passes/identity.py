"""Remove operators that return their input, and make views tolerate any memory layout."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from torch_quant.ops.arguments import argument, arguments, part_of
from torch_quant.ops.table import IDENTITY
from torch_quant.passes.base import PassContext
from torch_quant.passes.functionalize import may_alias_input, written_tensors

__all__ = ["remove_identities", "views_to_reshapes"]

aten = torch.ops.aten
_COPIES = (aten.lift_fresh_copy.default, aten.lift_fresh.default)
"""Copies of a constant of the code, needed only if it is written to."""
_CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
})  # fmt: skip
"""Operators that return their input itself where it has the dtype and device already."""


_SQUEEZES = frozenset({aten.squeeze.dim, aten.squeeze.dims})
_CUTS = frozenset({
    aten.split.Tensor, aten.unsafe_split.Tensor, aten.chunk.default, aten.slice.Tensor,
})  # fmt: skip
"""Operators that give less than they are asked for where there is less."""


def remove_identities(context: PassContext) -> int:
    """Dropout in eval mode, casts to the dtype at hand, squeezes of sizes other than 1.

    Users take the input instead. ONNX has no squeeze of another size.
    """
    written = written_tensors(context.graph)
    cut = _cut(context.graph)
    found = [
        n
        for n in context.graph.nodes
        if (n.target in IDENTITY and not argument(n, "train"))
        or n.target is aten.detach_.default
        or (n.target in _COPIES and n not in written)
        or (n.target in _CASTS and _casts_nothing(n))
        or (n.target in _SQUEEZES and n not in cut and _squeezes_nothing(n))
    ]
    for node in found:
        node.replace_all_uses_with(argument(node, 0))
        context.graph.erase_node(node)
    return len(found)


def _casts_nothing(node: fx.Node) -> bool:
    origin, *options = arguments(node).values()
    before, after = origin.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    plain = not any(x is True or isinstance(x, torch.memory_format) for x in options)
    return plain and (before.dtype, before.device) == (after.dtype, after.device)


def _cut(graph: fx.Graph) -> set[fx.Node]:
    """What depends on a part of a tensor with free sizes: smaller in calls with fewer elements.

    ``x.split(2)[0]`` has 2 rows where it was captured, and 1 where ``x`` has no more.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _CUTS:
            value = argument(node, 0).meta.get("val")
            free = not isinstance(value, Tensor) or any(type(n) is not int for n in value.shape)
            if free:
                found.add(node)
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _squeezes_nothing(node: fx.Node) -> bool:
    origin, dims = arguments(node).values()
    before = origin.meta.get("val")
    if not isinstance(before, Tensor) or not before.dim():
        return False
    sizes = [before.shape[dim] for dim in ([dims] if isinstance(dims, int) else dims)]
    return all(isinstance(size, int) and size != 1 for size in sizes)  # no size that is free


def views_to_reshapes(context: PassContext) -> int:
    """``view`` needs the strides of capture; an int8 convolution may give channels-last ones."""
    written = written_tensors(context.graph)  # a copy would not pass on what is written
    views = (aten.view.default, aten._unsafe_view.default)
    found = [n for n in context.graph.nodes if n.target in views and n not in written]
    for node in found:
        node.target = aten.reshape.default
    kept = [n for n in context.graph.nodes if n.target in views and n in written]
    return len(found) + sum([_make_contiguous(n) for n in kept])


def _make_contiguous(view: fx.Node) -> bool:
    """Give the tensor behind a view that has to stay one the layout that the view was made for."""
    base = view
    while base.op == "call_function" and may_alias_input(base):
        base = part_of(base)[0] if base.target is operator.getitem else argument(base, 0)
    if base.op != "call_function" or any(u.target is aten.contiguous.default for u in base.users):
        return False
    with base.graph.inserting_after(base):
        straight = base.graph.call_function(aten.contiguous.default, (base,))
    straight.meta = dict(base.meta)
    base.replace_all_uses_with(straight, delete_user_cb=lambda user: user is not straight)
    return True
