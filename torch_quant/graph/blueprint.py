"""Modules of one make have one graph: it is exported once, and its copies read other tensors.

A decoder has dozens of equal layers; exporting one takes a hundred times as long as copying it.
"""

from __future__ import annotations

import operator
import types
from collections import OrderedDict, deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.kinds import Kind
from torch_quant.graph.macs import note_sizes
from torch_quant.graph.outputs import flatten_output, with_given
from torch_quant.graph.running import copied, frozen, seed, written
from torch_quant.ops.capturing import running

__all__ = ["Blueprints"]

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.memory_format, torch.layout,
)  # fmt: skip
_SKIPPED = frozenset({"_parameters", "_buffers", "_modules", "training"})


class Blueprints:
    """The graphs of a model's modules, by all that they depend on but for values of tensors."""

    def __init__(self) -> None:
        self._known: dict[Any, list[tuple[Kind, CapturedGraph]]] = {}

    def find(self, module: nn.Module, call: Call) -> tuple[Kind, Call, CapturedGraph] | None:
        """A graph for ``call``, made of that of another module; it was compared with the module."""
        for kind, graph in self._known.get(_make(module), ()):
            accepted = kind.accept(call)
            if accepted is None or graph.contract.mismatch(accepted) is not None:
                continue
            made = _copy(graph, module)
            if made is not None and _computes(made, module, accepted):
                return kind, accepted, made
        return None

    def add(self, module: nn.Module, kind: Kind, graph: CapturedGraph) -> None:
        """Keep a graph that was exported of ``module``, if it can be that of another."""
        make = _make(module)
        if make is not None and graph.exact and not graph.leaves_behind:
            self._known.setdefault(make, []).append((kind, graph))


def _copy(graph: CapturedGraph, module: nn.Module) -> CapturedGraph | None:
    """The graph over the tensors of ``module``; None if it holds more than those."""
    attributes: dict[str, Any] = {}
    for node in graph.gm.graph.find_nodes(op="get_attr"):
        try:
            attributes[str(node.target)] = operator.attrgetter(str(node.target))(module)
        except AttributeError:
            return None  # a constant of its code, or a graph inside
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.gm.graph, {}))
    return replace(graph, gm=fx.GraphModule(attributes, nodes))


def _computes(graph: CapturedGraph, module: nn.Module, call: Call) -> bool:
    """Whether a copied graph gives what the module gives, bit for bit."""
    try:
        with frozen(module), running():
            args, kwargs = call.rebuild(copied(call).tensors)
            output = module(*args, **kwargs)
            expected, _ = flatten_output(output, written(args, kwargs, graph.writes))
            seed()
            tensors = copied(call).tensors
            note_sizes(graph.gm, tensors)
            actual = with_given(graph.gm(*tensors), graph.out_spec, call.constant)
    except (CaptureFailed, RuntimeError, ValueError, IndexError):
        return False  # exporting the module itself tells why
    pairs = zip(actual, expected, strict=False)
    return len(actual) == len(expected) and all(x is y or _same(x, y) for x, y in pairs)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.equal(x.nan_to_num(), y.nan_to_num())
    return type(x) is type(y) and bool(x == y)


def _make(module: nn.Module) -> tuple[Any, ...] | None:
    """What two modules of one make agree on; None for a module that is like no other."""
    tensors: dict[int, int] = {}
    facts: list[Any] = []
    for path, each in module.named_modules():
        if isinstance(each, torch.jit.ScriptModule):
            return None
        facts.append((path, type(each)))
        for name, value in vars(each).items():
            if name in _SKIPPED:
                continue
            if isinstance(value, types.MethodType):
                return None
            facts.append((name, _fact(value)))
        for name, x in (*each._parameters.items(), *each._buffers.items()):
            if x is None:
                facts.append((name, None))
            else:
                place = tensors.setdefault(id(x), len(tensors))
                facts.append((name, place, x.shape, x.dtype, x.stride(), x.device, x.requires_grad))
    return tuple(facts)


class _Identity:
    """Equal to itself only; keeps the object, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _fact(value: Any, around: frozenset[int] = frozenset()) -> Any:
    """What compares equal for equal values; ``around`` has the containers that it is in."""
    if isinstance(value, _CONSTANTS):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if id(value) in around:  # a container that leads to itself is like no other
        return _Identity(value)
    inside = around | {id(value)}
    if type(value) in (list, tuple, set, frozenset, deque):
        return type(value), tuple(_fact(item, inside) for item in value)
    if type(value) in (dict, OrderedDict):
        items = ((_fact(key, inside), _fact(item, inside)) for key, item in value.items())
        return type(value), tuple(items)
    if isinstance(value, Tensor):
        return _Identity(value), value._version if not value.is_inference() else 0
    return _Identity(value)
