"""Nested inputs as flat leaves, as ``torch.utils._pytree`` does it, but many times faster.

The nesting of a call seldom changes, so what pytree makes of it is kept.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
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
_SEQUENCES = frozenset({list, tuple})
_WITHOUT_REFERENCES = 2
"""The version of ``marshal`` in which equal data always give the same bytes."""


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
        _walk((value,), leaves, key)
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


def _walk(values: Iterable[Any], leaves: list[Any], key: list[Any]) -> None:
    """Collect the leaves in pytree's order, and all that its spec depends on.

    Siblings that are plain leaves, or lists of them as in caches, are taken all at once.
    """
    if type(values) is not tuple:
        values = tuple(values)
    kinds = tuple(map(type, values))
    key.append(kinds)
    if _PLAIN.issuperset(kinds):
        leaves += values
        return
    if _SEQUENCES.issuperset(kinds):
        key.append(tuple(map(len, values)))
        _walk(chain.from_iterable(values), leaves, key)
        return
    for kind, value in zip(kinds, values, strict=True):
        if kind in _PLAIN:
            leaves.append(value)
        elif kind in _SEQUENCES:
            key.append(len(value))
            _walk(value, leaves, key)
        elif kind is dict:
            key.append(_hashable(list(value)))
            _walk(value.values(), leaves, key)
        elif kind in pytree.SUPPORTED_NODES:
            children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
            key.append(_hashable(context))
            _walk(children, leaves, key)
        else:
            raise _Unusual


def _hashable(context: Any) -> Any:
    """What a container keeps besides its children, if it can be compared.

    ``1``, ``1.0`` and ``True``, which are equal, are told apart.
    """
    try:
        return marshal.dumps(context, _WITHOUT_REFERENCES)
    except ValueError:  # it holds something else than plain data
        if isinstance(context, type):
            return context
        if type(context) in (list, tuple):
            return tuple(map(_hashable, context))
        raise _Unusual from None
