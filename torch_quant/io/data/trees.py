"""How inputs and outputs nest, as JSON."""

from __future__ import annotations

import collections
import sys
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from torch_quant.errors import InvalidConfig
from torch_quant.graph.kinds import Kind, Number, Unread
from torch_quant.graph.outputs import (
    LEAF,
    ArgumentSpec,
    ConstantSpec,
    GivenSpec,
    ObjectSpec,
    TreeOfSpecs,
    WrittenSpec,
)
from torch_quant.graph.trees import Packed, pack_tree, unpack_tree
from torch_quant.io.data.values import class_at, decode, encode, entries, wrong
from torch_quant.ops.functions import path_of

__all__ = ["read_kind", "read_output", "write_kind", "write_output"]

_CONTAINERS = {
    path_of(each): each
    for each in (
        dict, list, tuple, collections.OrderedDict, collections.defaultdict, collections.deque,
        collections.namedtuple,
    )
}  # fmt: skip
_PLAIN = {each.__name__: each for each in (type(None), bool, int, float, complex, str, bytes)}


def _class(value: Any) -> Any:
    return {"node": path_of(value)} if isinstance(value, type) else None


def _written_tree(packed: Packed) -> Any:
    if packed is None:
        return None
    kind, context, children = packed
    return [path_of(kind), encode(context, _class), [_written_tree(each) for each in children]]


def _read_tree(data: Any, what: str) -> Packed:
    if data is None:
        return None
    if not isinstance(data, list) or len(data) != 3 or not isinstance(data[2], list):
        raise wrong(f"a nest of {what}", data, "a container, its keys and what is in it")
    kind = _CONTAINERS.get(data[0]) or class_at(data[0], f"a container of {what}")
    children = [_read_tree(each, what) for each in data[2]]
    if kind is collections.namedtuple:
        return kind, _named_tuple(data[1], len(children), what), children
    if kind is collections.defaultdict:
        return kind, _defaults(data[1], what), children
    if kind not in pytree.SUPPORTED_NODES:
        raise InvalidConfig(
            f"a container of {what} is {data[0]}, which is not registered as a pytree here: import "
            "the library that registers it, then load again"
        )
    return kind, decode(data[1], what), children


def _named_tuple(data: Any, size: int, what: str) -> type:
    """The class of a named tuple; no other class may stand there, since it is called."""
    path = data.get("node") if isinstance(data, dict) and set(data) == {"node"} else None
    found = class_at(path, f"a named tuple of {what}")
    fields = getattr(found, "_fields", ())
    plain = issubclass(found, tuple) and found.__new__ is not tuple.__new__
    own = found.__bases__ == (tuple,) or found is PackedSequence
    if not (plain and own) or len(fields) != size:
        raise wrong(f"a named tuple of {what}", path, f"a class with {size} fields")
    return found


_FACTORIES: dict[str, Any] = {path_of(each): each for each in (dict, float, int, list, set, str)}


def _defaults(data: Any, what: str) -> list[Any]:
    """What makes the values that a dictionary lacks, and the keys that it has."""
    if not isinstance(data, list) or len(data) != 2:
        raise wrong(f"a dictionary of {what}", data, "what makes its values, and its keys")
    factory = data[0]
    if factory is not None:
        name = factory.get("node") if isinstance(factory, dict) else None
        if name not in _FACTORIES:
            raise wrong(f"a dictionary of {what}", factory, "a plain type that makes its values")
        factory = _FACTORIES[name]
    return [factory, decode(data[1], what)]


def _object_class(path: Any, what: str) -> type:
    """The class of an object that is made anew without a call, which has to be a plain one."""
    found = class_at(path, f"an output of {what}")
    plain = (object.__new__, dict.__new__, list.__new__, collections.OrderedDict.__new__)
    strange = found.__new__ not in plain or hasattr(found, "__del__")
    if strange or found.__module__.partition(".")[0] in sys.stdlib_module_names:
        raise InvalidConfig(
            f"an output of {what} is of the class {path}, of which no saved model may make objects"
        )
    return found


def write_kind(kind: Kind) -> dict[str, Any]:
    """A kind of calls as JSON; raises :class:`InvalidConfig` for a constant that is no data."""
    leaves: list[Any] = []
    for first, second in kind.leaves:
        if isinstance(first, torch.dtype):
            leaves.append(["tensor", encode(first), second])
        elif first is Number or first is Unread:
            leaves.append([first.__name__.lower(), second.__name__])
        else:
            leaves.append(["constant", encode(second)])
    assert kind.spec is not None
    return {
        "nest": _written_tree(pack_tree(kind.spec)), "leaves": leaves, "names": list(kind.names)
    }  # fmt: skip


def read_kind(data: Any, what: str) -> Kind:
    """Undo :func:`write_kind`; raises :class:`InvalidConfig` for anything else."""
    found = entries(data, f"the calls of {what}", "nest", "leaves", "names")
    spec = unpack_tree(_read_tree(found["nest"], what))
    leaves = found["leaves"]
    if not isinstance(leaves, list) or len(leaves) != spec.num_leaves:
        raise wrong(f"the calls of {what}", leaves, f"{spec.num_leaves} leaves")
    names = found["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wrong(f"the calls of {what}", names, "names")
    return Kind(repr(spec), tuple(_read_leaf(each, what) for each in leaves), tuple(names), spec)


def _read_leaf(data: Any, what: str) -> tuple[Any, Any]:
    if isinstance(data, list) and len(data) == 3 and data[0] == "tensor":
        dtype = decode(data[1], what)
        if isinstance(dtype, torch.dtype) and type(data[2]) is int:
            return dtype, data[2]
    if isinstance(data, list) and len(data) == 2:
        if data[0] == "constant":
            value = decode(data[1], what)
            return type(value), value
        marks = {"number": Number, "unread": Unread}
        if data[0] in marks and data[1] in _PLAIN:
            return marks[data[0]], _PLAIN[data[1]]
    raise wrong(f"an input of {what}", data, "a tensor, a number or a constant")


def write_output(spec: Any) -> Any:
    """How the outputs of a graph nest, as JSON.

    Raises:
        InvalidConfig: a constant among them is no data; says of which class.
    """
    if not isinstance(spec, WrittenSpec):
        return {"output": _written_specs(spec)}
    arguments = [[key, _written_specs(each)] for key, each in spec.arguments.items()]
    return {"output": _written_specs(spec.output), "arguments": arguments}


def _written_specs(spec: TreeOfSpecs) -> dict[str, Any]:
    return {
        "nest": _written_tree(pack_tree(spec.tree)),
        "leaves": [_written_item(each) for each in spec.leaves],
        "reordered": [[encode(path), encode(keys)] for path, keys in spec.reordered],
    }


def _written_item(item: Any) -> Any:
    if item == LEAF:
        return LEAF
    if isinstance(item, ConstantSpec):
        return {"constant": encode(item.value, _class)}
    if isinstance(item, ArgumentSpec):
        return {"argument": item.key}
    if isinstance(item, GivenSpec):
        return {"given": item.position}
    parts = [
        [how, encode(key), _written_specs(each)]
        for (how, key), each in zip(item.parts, item.specs, strict=True)
    ]
    return {"object": [path_of(item.cls), parts]}


def read_output(data: Any, what: str, kind: Kind | None = None) -> Any:
    """Undo :func:`write_output`; raises :class:`InvalidConfig` for anything else.

    Args:
        data: JSON.
        what: the graph, for messages.
        kind: of the calls whose numbers and strings may be in the output.
    """
    if isinstance(data, dict) and "arguments" in data:
        found = entries(data, f"the outputs of {what}", "output", "arguments")
        if not isinstance(found["arguments"], list):
            raise wrong(f"the outputs of {what}", data, "arguments")
        written: dict[int | str, TreeOfSpecs] = {}
        for each in found["arguments"]:
            if not isinstance(each, list) or len(each) != 2 or type(each[0]) not in (int, str):
                raise wrong(f"the outputs of {what}", each, "an argument and what it holds")
            written[each[0]] = _read_specs(each[1], what, kind)
        return WrittenSpec(_read_specs(found["output"], what, kind), written)
    return _read_specs(entries(data, f"the outputs of {what}", "output")["output"], what, kind)


def _class_within(path: Any, package: str, what: str) -> type:
    """A class that an object refers to: of the library that the object is of."""
    found = class_at(path, f"an output of {what}")
    if not package or found.__module__.partition(".")[0] != package:
        raise wrong(f"an output of {what}", path, "a class of the library that its object is of")
    return found


def _read_specs(data: Any, what: str, kind: Kind | None, package: str = "") -> TreeOfSpecs:
    found = entries(data, f"the outputs of {what}", "nest", "leaves", "reordered")
    tree = unpack_tree(_read_tree(found["nest"], what))
    if not isinstance(found["leaves"], list) or not isinstance(found["reordered"], list):
        raise wrong(f"the outputs of {what}", data, "leaves")
    if len(found["leaves"]) != tree.num_leaves:
        raise wrong(f"the outputs of {what}", found["leaves"], f"{tree.num_leaves} leaves")
    reordered = tuple((decode(path, what), decode(keys, what)) for path, keys in found["reordered"])
    return TreeOfSpecs(
        tree, tuple(_read_item(each, what, kind, package) for each in found["leaves"]), reordered
    )


def _read_item(data: Any, what: str, calls: Kind | None, package: str) -> Any:
    if data == LEAF:
        return LEAF
    if not isinstance(data, dict) or len(data) != 1:
        raise wrong(f"an output of {what}", data, "a leaf, a constant or an object")
    ((kind, inner),) = data.items()
    if kind == "constant":
        return ConstantSpec(decode(inner, what, lambda path: _class_within(path, package, what)))
    if kind == "argument" and type(inner) in (int, str):
        return ArgumentSpec(inner)
    given = [] if calls is None else [first in (Number, Unread) for first, _ in calls.leaves]
    if kind == "given" and type(inner) is int and 0 <= inner < len(given) and given[inner]:
        return GivenSpec(inner)
    if kind == "object" and isinstance(inner, list) and len(inner) == 2:
        path, parts = inner
        cls, pairs, specs = _object_class(path, what), [], []
        for each in parts if isinstance(parts, list) else [None]:
            known = ("item", "append", "attribute")
            if not isinstance(each, list) or len(each) != 3 or each[0] not in known:
                raise wrong(f"an output of {what}", each, "a part of an object")
            pairs.append((each[0], decode(each[1], what)))
            specs.append(_read_specs(each[2], what, calls, cls.__module__.partition(".")[0]))
        return ObjectSpec(cls, tuple(pairs), tuple(specs))
    raise wrong(f"an output of {what}", data, "a leaf, a constant or an object")
