"""Model outputs as flat leaves and back, plain objects such as key-value caches included."""

from __future__ import annotations

import operator
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import reduce
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed
from torch_quant.graph.effects import assign
from torch_quant.graph.trees import pack_tree, unpack_tree

__all__ = [
    "ArgumentSpec",
    "ConstantSpec",
    "LEAF",
    "ObjectSpec",
    "TreeOfSpecs",
    "WrittenSpec",
    "flatten_output",
    "leaf_names",
    "unflatten_output",
]

_SYMBOLS = (SymInt, SymFloat, SymBool)


@dataclass(frozen=True)
class ConstantSpec:
    """An output, or a part of one, that is the same at each call."""

    value: Any


@dataclass(frozen=True)
class ObjectSpec:
    """An object that pytree does not know: its class and the specs of what it holds."""

    cls: type
    parts: tuple[tuple[str, Any], ...]
    specs: tuple[Any, ...]


@dataclass(frozen=True)
class TreeOfSpecs:
    """A nest of containers.

    Args:
        tree: what pytree knows of it.
        leaves: what stands at each of its leaves.
        reordered: path and keys of each dictionary that unflattening gives another order.
    """

    tree: pytree.TreeSpec
    leaves: tuple[Any, ...]
    reordered: tuple[tuple[tuple[Any, ...], tuple[str, ...]], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without PyTorch's class for leaves, which warns that it goes away."""
        return _packed_tree, (pack_tree(self.tree), self.leaves, self.reordered)


def _packed_tree(packed: Any, leaves: tuple[Any, ...], reordered: Any = ()) -> TreeOfSpecs:
    return TreeOfSpecs(unpack_tree(packed), leaves, reordered)


def _reordered(value: Any, path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Dictionaries made from their fields whose keys came in another order than the fields.

    (The outputs of ``transformers``: the model may have set one later; items are read by number.)
    """
    made = isinstance(value, OrderedDict) and is_dataclass(value)
    if made and list(value) != [field.name for field in fields(value) if field.name in value]:
        yield path, tuple(value)
    if isinstance(value, Mapping):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, (tuple, list)) else []
    for key, item in items:
        yield from _reordered(item, (*path, key))


@dataclass(frozen=True)
class ArgumentSpec:
    """Stands in an output for an argument that the module has changed and hands back."""

    key: int | str


@dataclass(frozen=True)
class WrittenSpec:
    """An output, and what a module has made of the arguments that it changes."""

    output: TreeOfSpecs
    arguments: dict[int | str, TreeOfSpecs]


LEAF = "leaf"
"""The spec of a tensor or number."""
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def flatten_output(
    output: Any, arguments: Mapping[int | str, Any] | None = None
) -> tuple[list[Any], Any]:
    """(tensor and number leaves, spec). Other leaves are constants of the spec.

    A leaf that is an object with a ``__dict__`` (a cache, say) is taken apart into its attributes,
    and made again by :func:`unflatten_output`.

    Args:
        output: of a module.
        arguments: position or name -> an argument that the module has changed; its leaves follow.
    """
    leaves: list[Any] = []
    if not arguments:
        return leaves, _flatten(output, leaves, depth=0)
    known = {id(value): key for key, value in arguments.items()}
    spec = _flatten(output, leaves, depth=0, known=known)
    written = {key: _flatten(value, leaves, depth=0) for key, value in arguments.items()}
    return leaves, WrittenSpec(spec, written)


def _flatten(
    value: Any, leaves: list[Any], depth: int, known: Mapping[int, int | str] | None = None
) -> Any:
    known = known or {}
    items, tree = pytree.tree_flatten(value, is_leaf=lambda x: id(x) in known)
    specs: list[Any] = []
    for item in items:
        if id(item) in known:
            specs.append(ArgumentSpec(known[id(item)]))
            continue
        # Any number may be a size of this call, so none is taken for a constant.
        if isinstance(item, (Tensor, int, float, *_SYMBOLS)) and not isinstance(item, bool):
            leaves.append(item)
            specs.append(LEAF)
        else:
            specs.append(_flatten_object(item, leaves, depth))
    return TreeOfSpecs(tree, tuple(specs), tuple(_reordered(value)))


def _flatten_object(item: Any, leaves: list[Any], depth: int) -> Any:
    """An object that holds leaves, taken apart; anything else is a constant."""
    if isinstance(item, (type, Enum, nn.Module, *_FUNCTIONS)):
        return ConstantSpec(item)
    if depth > 8:
        raise CaptureFailed(f"an output nests objects more than 8 deep, down to {type(item)}")
    inner: list[Any] = []
    parts = _parts(item)
    specs = tuple(_flatten(value, inner, depth + 1) for _, _, value in parts)
    if not any(isinstance(leaf, (Tensor, *_SYMBOLS)) for leaf in inner):
        return ConstantSpec(item)
    leaves.extend(inner)
    return ObjectSpec(type(item), tuple((how, key) for how, key, _ in parts), specs)


def _parts(item: Any) -> list[tuple[str, Any, Any]]:
    """What an object holds: items of a container, attributes, slots; (how, key, value)."""
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(item, dict):
        parts += [("item", key, value) for key, value in item.items()]
    elif isinstance(item, list):
        parts += [("append", None, value) for value in item]
    parts += [("attribute", name, value) for name, value in getattr(item, "__dict__", {}).items()]
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name) and name not in ("__dict__", "__weakref__"):
                parts.append(("attribute", name, getattr(item, name)))
    return parts


def unflatten_output(leaves: Any, spec: Any, source: Any = None) -> Any:
    """Undo :func:`flatten_output`; the arguments that the module changes are changed likewise.

    Args:
        leaves: what a graph gives.
        spec: how they nest.
        source: the caller's ``(args, kwargs)``.
    """
    if not isinstance(spec, WrittenSpec):
        return _unflatten(iter(leaves), spec, {})
    leaves = list(leaves)
    rest = iter(leaves[_count(spec.output) :])
    arguments = {key: _unflatten(rest, each, {}) for key, each in spec.arguments.items()}
    if source is not None:
        args, kwargs = source
        given = {key: args[key] if isinstance(key, int) else kwargs[key] for key in arguments}
        arguments = {key: assign(given[key], new) for key, new in arguments.items()}
    return _unflatten(iter(leaves), spec.output, arguments)


def _count(spec: TreeOfSpecs) -> int:
    """How many leaves a spec takes."""
    inner = [each for item in spec.leaves if isinstance(item, ObjectSpec) for each in item.specs]
    return sum(isinstance(item, str) for item in spec.leaves) + sum(map(_count, inner))


def _unflatten(leaves: Any, spec: TreeOfSpecs, arguments: Mapping[int | str, Any]) -> Any:
    items = []
    for item in spec.leaves:
        if isinstance(item, str):
            items.append(next(leaves))
        elif isinstance(item, ConstantSpec):
            items.append(item.value)
        elif isinstance(item, ArgumentSpec):
            items.append(arguments[item.key])
        else:
            new = item.cls.__new__(item.cls)
            for (how, key), inner in zip(item.parts, item.specs, strict=True):
                value = _unflatten(leaves, inner, arguments)
                if how == "item":
                    new[key] = value
                elif how == "append":
                    new.append(value)
                else:
                    object.__setattr__(new, key, value)
            items.append(new)
    value = pytree.tree_unflatten(items, spec.tree)
    for path, keys in spec.reordered:
        for key in keys:
            reduce(operator.getitem, path, value).move_to_end(key)
    return value


def leaf_names(spec: Any) -> list[str]:
    """A name for each leaf: ``logits``, ``past_key_values.0``, ``output``, ``output_1``."""
    if isinstance(spec, WrittenSpec):
        written = [name for k, each in spec.arguments.items() for name in _names(each, str(k))]
        return [*leaf_names(spec.output), *written]
    return [name or "output" for name in _names(spec, "")]


def _names(spec: TreeOfSpecs, prefix: str) -> Iterator[str]:
    marked = pytree.tree_unflatten(list(range(len(spec.leaves))), spec.tree)
    paths = dict(_paths(marked, prefix))
    for i, item in enumerate(spec.leaves):
        if isinstance(item, str):
            yield paths[i]
        elif isinstance(item, ObjectSpec):
            for (_, key), inner in zip(item.parts, item.specs, strict=True):
                step = "" if key is None else str(key)
                yield from _names(inner, ".".join(part for part in (paths[i], step) if part))


def _paths(value: Any, path: str) -> Iterator[tuple[int, str]]:
    """(number, path) of every number in nested containers."""
    if isinstance(value, int):
        yield value, path
        return
    if isinstance(value, Mapping):
        items = [(str(key), each) for key, each in value.items()]
    elif hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(i) if path else f"output_{i}", each) for i, each in enumerate(value)]
    else:
        items = [(name, each) for name, each in vars(value).items()]
    for name, each in items:
        yield from _paths(each, f"{path}.{name}" if path else name)
