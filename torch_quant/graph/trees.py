"""How containers nest, as plain data: pytree's own class for it changes and warns when copied."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["Packed", "pack_tree", "unpack_tree"]

Packed = Any
"""(type, context, children) of a spec, all the way down; None for a leaf."""


def pack_tree(spec: pytree.TreeSpec) -> Packed:
    """``spec`` as tuples and lists.

    >>> pack_tree(pytree.tree_structure([0, {"a": 1}]))
    (<class 'list'>, None, [None, (<class 'dict'>, ['a'], [None])])
    """
    if spec.is_leaf():
        return None
    if hasattr(spec, "_children"):
        return spec.type, spec._context, [pack_tree(child) for child in spec._children]
    return spec.type, spec.context, [pack_tree(child) for child in spec.children_specs]


def unpack_tree(packed: Packed) -> pytree.TreeSpec:
    """Undo :func:`pack_tree`."""
    if packed is None:
        return pytree.tree_flatten(0)[1]
    kind, context, children = packed
    return pytree.TreeSpec(kind, context, [unpack_tree(child) for child in children])
