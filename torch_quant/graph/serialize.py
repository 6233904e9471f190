"""A graph as plain picklable data, and back, without tracing anything again.

``fx.GraphModule`` pickles its source code and traces it when loaded, which fails as soon as a size
is passed to a factory function.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from torch_quant.ops.functions import find_operator, operator_name

__all__ = ["pack", "unpack"]


@dataclass(frozen=True)
class _Ref:
    """Stands for another node."""

    name: str


@dataclass(frozen=True)
class _Op:
    """Stands for an operator overload, ``aten.add.Tensor``."""

    name: str

    def resolve(self) -> Any:
        return find_operator(self.name)


def _named(target: Any) -> Any:
    name = operator_name(target)
    return target if name is None else _Op(name)


def _refer(value: Any) -> Any:
    return _Ref(value.name) if isinstance(value, fx.Node) else value


def pack(gm: fx.GraphModule) -> dict[str, Any]:
    """``gm``'s nodes and the tensors they read."""
    nodes = []
    attributes = {}
    for node in gm.graph.nodes:
        target = _named(node.target)
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _refer)
        nodes.append((node.op, node.name, target, args, kwargs))
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            attributes[node.target] = pack(value) if isinstance(value, fx.GraphModule) else value
    return {"nodes": nodes, "attributes": attributes}


def unpack(payload: dict[str, Any]) -> fx.GraphModule:
    """Undo :func:`pack`."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs in payload["nodes"]:
        target = target.resolve() if isinstance(target, _Op) else target
        args, kwargs = fx.node.map_aggregate((args, kwargs), resolve)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    attributes = {
        name: unpack(value) if isinstance(value, dict) else value
        for name, value in payload["attributes"].items()
    }
    return fx.GraphModule(attributes, graph)
