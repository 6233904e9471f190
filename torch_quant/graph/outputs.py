"""Model outputs as flat leaves and back, plain objects such as key-value caches included."""

from __future__ import annotations

import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import partial, reduce
from itertools import islice
from types import MappingProxyType
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed
from torch_quant.graph.effects import assign
from torch_quant.graph.sealed import sealed_position
from torch_quant.graph.trees import pack_tree, unpack_tree

__all__ = [
    "ArgumentSpec",
    "ConstantSpec",
    "GivenSpec",
    "LEAF",
    "ObjectSpec",
    "TreeOfSpecs",
    "WrittenSpec",
    "flatten_output",
    "leaf_names",
    "unflatten_output",
    "with_given",
]

_SYMBOLS = (SymInt, SymFloat, SymBool)


@dataclass(frozen=True)
class ConstantSpec:
    """An output, or a part of one, that is the same at each call."""

    value: Any


@dataclass(frozen=True)
class GivenSpec:
    """Stands in an output for a number or string of the call that goes there as it is.

    Args:
        position: of it among the leaves of the call.
    """

    position: int


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
    flat: Callable[[list[Any]], Any] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    """Makes the container of its leaves as pytree does, in one step; None for other nests."""

    def __post_init__(self) -> None:
        packed = pack_tree(self.tree)
        plain = not self.reordered and all(isinstance(each, str) for each in self.leaves)
        if not plain or packed is None or any(packed[2]):
            return
        kind, context, _ = packed
        if kind in pytree.SUPPORTED_NODES:  # its package may not be imported yet
            unflatten = pytree.SUPPORTED_NODES[kind].unflatten_fn
            object.__setattr__(self, "flat", partial(_made, unflatten, context))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without PyTorch's class for leaves, which warns that it goes away."""
        return _packed_tree, (pack_tree(self.tree), self.leaves, self.reordered)


def _made(unflatten: Callable[[Any, Any], Any], context: Any, leaves: list[Any]) -> Any:
    return unflatten(leaves, context)


def _packed_tree(packed: Any, leaves: tuple[Any, ...], reordered: Any = ()) -> TreeOfSpecs:
    return TreeOfSpecs(unpack_tree(packed), leaves, reordered)


def _reordered(value: Any, path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Dictionaries made from their fields whose keys came in another order than the fields.

    (The outputs of ``transformers``: the model may have set one later; items are read by number.)
    """
    made = isinstance(value, OrderedDict) and is_dataclass(value)
    if made and list(value) != [each.name for each in fields(value) if each.name in value]:
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
    output: Any,
    arguments: Mapping[int | str, Any] | None = None,
    symbols: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[Any], Any]:
    """(tensor and number leaves, spec). Other leaves are constants of the spec.

    A constant of the call that was sealed is whatever a call will have in its place. A leaf that is
    an object with a ``__dict__`` (a cache, say) is taken apart into its attributes, and made again
    by :func:`unflatten_output`.

    Args:
        output: of a module.
        arguments: position or name -> an argument that the module has changed; its leaves follow.
        symbols: while a module is exported, the symbol of each number of its call -> position.
    """
    leaves: list[Any] = []
    flat = _Flattener(symbols)
    if not arguments:
        return leaves, flat.nest(output, leaves)
    known = {id(value): key for key, value in arguments.items()}
    spec = flat.nest(output, leaves, known=known)
    written = {key: flat.nest(value, leaves) for key, value in arguments.items()}
    return leaves, WrittenSpec(spec, written)


@dataclass
class _Flattener:
    symbols: Mapping[str, int]
    passed: int = 0
    """How many of the call's own numbers and strings were met."""

    def nest(
        self,
        value: Any,
        leaves: list[Any],
        depth: int = 0,
        known: Mapping[int, int | str] = MappingProxyType({}),
    ) -> TreeOfSpecs:
        items, tree = pytree.tree_flatten(value, is_leaf=lambda x: id(x) in known)
        specs: list[Any] = []
        for item in items:
            if id(item) in known:
                specs.append(ArgumentSpec(known[id(item)]))
            elif (position := self._given(item)) is not None:
                specs.append(GivenSpec(position))
                self.passed += 1
            # Any number may be a size of this call, so none is taken for a constant.
            elif isinstance(item, (Tensor, int, float, *_SYMBOLS)) and not isinstance(item, bool):
                leaves.append(item)
                specs.append(LEAF)
            else:
                specs.append(self._object(item, leaves, depth))
        return TreeOfSpecs(tree, tuple(specs), tuple(_reordered(value)))

    def _given(self, item: Any) -> int | None:
        if type(item) in (SymInt, SymFloat):
            return self.symbols.get(str(item.node.expr))
        return sealed_position(item)

    def _object(self, item: Any, leaves: list[Any], depth: int) -> Any:
        """An object that holds leaves, taken apart; anything else is a constant."""
        if isinstance(item, (type, Enum, nn.Module, *_FUNCTIONS)):
            return ConstantSpec(item)
        if depth > 8:
            raise CaptureFailed(f"an output nests objects more than 8 deep, down to {type(item)}")
        inner: list[Any] = []
        parts, passed = _parts(item), self.passed
        specs = tuple(self.nest(value, inner, depth + 1) for _, _, value in parts)
        varies = any(isinstance(leaf, (Tensor, *_SYMBOLS)) for leaf in inner)
        if not varies and self.passed == passed:
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


def unflatten_output(
    leaves: Any, spec: Any, source: Any = None, given: Callable[[int], Any] | None = None
) -> Any:
    """Undo :func:`flatten_output`; the arguments that the module changes are changed likewise.

    Args:
        leaves: what a graph gives.
        spec: how they nest.
        source: the caller's ``(args, kwargs)``.
        given: the number or string at a position of the call; by default those of ``source``.
    """
    if not isinstance(spec, WrittenSpec):
        at = given or (lambda i: pytree.tree_leaves(source)[i])
        return _unflatten(iter(leaves), spec, {}, at)
    leaves = list(leaves)
    rest = iter(leaves[_count(spec.output) :])
    at = given or pytree.tree_leaves(source).__getitem__  # before arguments are changed
    arguments = {key: _unflatten(rest, each, {}, at) for key, each in spec.arguments.items()}
    if source is not None:
        args, kwargs = source
        old = {key: args[key] if isinstance(key, int) else kwargs[key] for key in arguments}
        arguments = {key: assign(old[key], new) for key, new in arguments.items()}
    return _unflatten(iter(leaves), spec.output, arguments, at)


def _count(spec: TreeOfSpecs) -> int:
    """How many leaves a spec takes."""
    inner = [each for item in spec.leaves if isinstance(item, ObjectSpec) for each in item.specs]
    return sum(isinstance(item, str) for item in spec.leaves) + sum(map(_count, inner))


def _unflatten(
    leaves: Any,
    spec: TreeOfSpecs,
    arguments: Mapping[int | str, Any],
    at: Callable[[int], Any],
) -> Any:
    if spec.flat is not None and not is_compiling():
        return spec.flat(list(islice(leaves, len(spec.leaves))))
    items = []
    for item in spec.leaves:
        if isinstance(item, str):
            items.append(next(leaves))
        elif isinstance(item, ConstantSpec):
            items.append(item.value)
        elif isinstance(item, ArgumentSpec):
            items.append(arguments[item.key])
        elif isinstance(item, GivenSpec):
            items.append(at(item.position))
        else:
            new = item.cls.__new__(item.cls)
            for (how, key), inner in zip(item.parts, item.specs, strict=True):
                value = _unflatten(leaves, inner, arguments, at)
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


def with_given(leaves: Iterable[Any], spec: Any, given: Callable[[int], Any]) -> list[Any]:
    """The leaves that :func:`flatten_output` gives for the output, the call's own numbers too.

    Args:
        leaves: what a graph gives.
        spec: how they nest.
        given: the number or string at a position of the call.
    """
    rest, found = iter(leaves), []

    def walk(nest: TreeOfSpecs) -> None:
        for item in nest.leaves:
            if isinstance(item, str):
                found.append(next(rest))
            elif isinstance(item, GivenSpec):
                if isinstance(value := given(item.position), (int, float)):
                    found.append(value)
            # An object of numbers and strings alone is a constant to flatten_output.
            elif isinstance(item, ObjectSpec) and any(map(_count, item.specs)):
                for each in item.specs:
                    walk(each)

    written = isinstance(spec, WrittenSpec)
    for nest in (spec.output, *spec.arguments.values()) if written else (spec,):
        walk(nest)
    return found


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
