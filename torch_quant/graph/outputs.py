"""Model outputs as flat leaves and back, plain objects such as key-value caches included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["flatten_output", "unflatten_output"]


@dataclass(frozen=True)
class _Constant:
    value: Any


@dataclass(frozen=True)
class _Object:
    """A plain object that pytree does not know: its class and the spec of its attributes."""

    cls: type
    attributes: tuple[str, ...]
    specs: tuple[Any, ...]


@dataclass(frozen=True)
class _Tree:
    tree: pytree.TreeSpec
    leaves: tuple[Any, ...]


_LEAF = "leaf"


def flatten_output(output: Any) -> tuple[list[Any], Any]:
    """(tensor and number leaves, spec). Other leaves are constants of the spec.

    A leaf that is an object with a ``__dict__`` (a cache, say) is taken apart into its attributes,
    and made again by :func:`unflatten_output`.
    """
    leaves: list[Any] = []
    return leaves, _flatten(output, leaves, depth=0)


def _flatten(value: Any, leaves: list[Any], depth: int) -> Any:
    items, tree = pytree.tree_flatten(value)
    specs: list[Any] = []
    for item in items:
        # Any number may be a size of this call, so none is taken for a constant.
        if isinstance(item, (Tensor, int, float, SymInt)) and not isinstance(item, bool):
            leaves.append(item)
            specs.append(_LEAF)
        elif hasattr(item, "__dict__") and depth < 8 and not isinstance(item, (type, nn.Module)):
            names = tuple(vars(item))
            inner = tuple(_flatten(vars(item)[name], leaves, depth + 1) for name in names)
            specs.append(_Object(type(item), names, inner))
        else:
            specs.append(_Constant(item))
    return _Tree(tree, tuple(specs))


def unflatten_output(leaves: Any, spec: Any) -> Any:
    """Undo :func:`flatten_output`."""
    return _unflatten(iter(leaves), spec)


def _unflatten(leaves: Any, spec: _Tree) -> Any:
    items = []
    for item in spec.leaves:
        if isinstance(item, str):
            items.append(next(leaves))
        elif isinstance(item, _Constant):
            items.append(item.value)
        else:
            new = item.cls.__new__(item.cls)
            for name, inner in zip(item.attributes, item.specs, strict=True):
                new.__dict__[name] = _unflatten(leaves, inner)
            items.append(new)
    return pytree.tree_unflatten(items, spec.tree)
