"""Nested inputs as flat leaves, as ``torch.utils._pytree`` does it, but many times faster.

The nesting of a call seldom changes, so what pytree makes of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed

__all__ = ["Structure", "flatten"]

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_PLAIN = frozenset({Tensor, nn.Parameter, *_CONSTANTS})


@dataclass(frozen=True)
class Structure:
    """How leaves nest, as an object and as text, and which of them are tensors."""

    spec: pytree.TreeSpec
    nesting: str
    positions: tuple[int, ...]


_KNOWN: dict[tuple[Any, ...], Structure] = {}
_MOST = 1024
"""Structures that are kept."""


class _Unusual(Exception):
    """A container that only pytree itself knows how to take apart."""


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The leaves of nested containers, and their structure.

    Raises:
        CaptureFailed: a leaf is neither a tensor nor a plain constant.
    """
    if torch.compiler.is_compiling():
        return _flatten_slowly(value)
    leaves: list[Any] = []
    key: list[Any] = []
    try:
        _walk((value,), leaves.append, key.append)
    except _Unusual:
        return _flatten_slowly(value)
    found = tuple(key)
    structure = _KNOWN.get(found)
    if structure is None:
        leaves, structure = _flatten_slowly(value)
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[found] = structure
    return leaves, structure


def _flatten_slowly(value: Any) -> tuple[list[Any], Structure]:
    leaves, spec = pytree.tree_flatten(value)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise CaptureFailed(
                f"an input of type {type(leaf).__module__}.{type(leaf).__qualname__} is neither a "
                "tensor (torch.from_numpy makes one of an array), a constant nor a registered "
                "pytree; a module inside the model that takes such an input is captured in pieces"
            )
    positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return leaves, Structure(spec, repr(spec), positions)


def _walk(values: Iterable[Any], leaf: Callable[[Any], Any], note: Callable[[Any], Any]) -> None:
    """Leaves in pytree's order, and all that its spec depends on."""
    for value in values:
        kind = type(value)
        note(kind)
        if kind is Tensor:
            leaf(value)
        elif kind is tuple or kind is list:
            note(len(value))
            _walk(value, leaf, note)
        elif kind in _PLAIN:
            leaf(value)
        elif kind is dict:
            note(tuple(value))
            _walk(value.values(), leaf, note)
        elif kind in pytree.SUPPORTED_NODES:
            children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
            children = list(children)
            note(_hashable(context))
            note(len(children))
            _walk(children, leaf, note)
        else:
            raise _Unusual


def _hashable(context: Any) -> Any:
    """What a registered container keeps besides its children, if it can be compared."""
    if isinstance(context, (str, int, float, type, type(None))):
        return context
    if type(context) in (list, tuple):
        return tuple(_hashable(item) for item in context)
    raise _Unusual
