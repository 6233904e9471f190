"""What the attributes of a model are, to be compared later: users change them after capture."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.graph.effects import CONTAINERS, NOT_STATE, PLAIN, content_of, items_of
from torch_quant.graph.hooks import CALLED, records_outputs

__all__ = ["attributes", "fact_of", "is_empty"]

_DEEPEST = 12
_NOT_FORWARD = frozenset({
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
})  # fmt: skip
"""Entries of a module's dictionary that compute nothing in a forward pass."""


class _Identity:
    """Equal to itself only: stands for an object whose insides do not count."""

    def __init__(self, value: Any) -> None:
        self.key = id(value)
        self.version = value._version if _has_version(value) else 0
        try:  # what stands for a part of a model must not keep the model alive
            self.get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.get = lambda: value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity):
            return False
        value = self.get()
        return value is not None and value is other.get() and self.version == other.version

    def __hash__(self) -> int:
        return self.key


def _has_version(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def attributes(model: nn.Module) -> dict[str, Any]:
    """What the forward of ``model`` may read beside parameters and buffers.

    Returns:
        ``child.attribute`` -> a fact that compares equal as long as the attribute is the same; and
        ``class of child``.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    seen: dict[int, Any] = {id(x): name for name, x in tensors}  # which others look after
    classes = {f"class of {prefix}": type(each) for prefix, each in model.named_modules() if prefix}
    facts = {
        f"{prefix}.{name}".strip("."): fact
        for prefix, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, value in vars(module).items()
        if (fact := _fact(name, value, seen)) is not None
    }
    return classes | facts


def _fact(name: str, value: Any, seen: dict[int, Any]) -> Any:
    """Of an entry of a module's dictionary; None if no forward pass depends on it."""
    if name in NOT_STATE or name in _NOT_FORWARD or is_empty(name, value):
        return None
    if records_outputs(name, None):
        return None
    if name in CALLED:
        own = [(key, x) for key, x in value.items() if not records_outputs(key, x)]
        return tuple((key, fact_of(x, seen)) for key, x in own) or None
    return "None" if value is None else fact_of(value, seen)


def is_empty(name: str, value: Any) -> bool:
    """A private container that holds nothing, as PyTorch's own of hooks."""
    return name.startswith("_") and (value is None or (isinstance(value, CONTAINERS) and not value))


def fact_of(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """What compares equal as long as ``value`` is the same; ``seen`` has what was met already."""
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, nn.Module):
        return id(value)  # others notice that it was replaced
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, weakref.ReferenceType):
        return "a weak reference"  # an LSTM keeps those of its first parameters
    fact: Any = _Identity(value)
    seen[id(value)] = fact
    if isinstance(value, tuple):
        fact = tuple(fact_of(item, seen, depth + 1) for item in value)
    elif depth < _DEEPEST and (content := content_of(value)) is not None:
        items = [(key, fact_of(item, seen, depth + 1)) for key, item in items_of(content)]
        fact = (type(value), id(value), items)
    seen[id(value)] = fact
    return fact
