"""A graph as JSON, with the names of the tensors that it reads, and back."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from torch_quant.errors import InvalidConfig
from torch_quant.io.data.values import decode, encode, entries, operator_at, wrong
from torch_quant.ops.functions import function_at, is_method, operator_name, path_of

__all__ = ["read_graph", "write_graph"]

_OPS = ("placeholder", "get_attr", "call_function", "call_method", "output")
_ATTRIBUTE = re.compile(r"[^\"'\\\n\r{}]+")
"""What the name of a tensor may hold: it becomes a string of the code that fx generates."""


def write_graph(gm: fx.GraphModule, keep: Callable[[str, Tensor], None]) -> dict[str, Any]:
    """The nodes of a graph as JSON.

    Args:
        gm: a flat graph.
        keep: takes each tensor that the graph reads, by the name it has in ``gm``.

    Raises:
        InvalidConfig: an argument is no data.
    """
    nodes, inner = [], {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            if isinstance(value, fx.GraphModule):
                inner[str(node.target)] = write_graph(
                    value,
                    lambda name, x, at=str(node.target): keep(f"{at}.{name}", x),  # type: ignore[misc]
                )
            else:
                keep(str(node.target), value)
        args, kwargs = (encode(each, _refer) for each in (node.args, dict(node.kwargs)))
        nodes.append([node.op, node.name, _target(node), args["tuple"], kwargs["dict"]])
    return {"nodes": nodes, "graphs": inner}


def _refer(value: Any) -> Any:
    return {"node": value.name} if isinstance(value, fx.Node) else None


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_method" and not is_method(str(target)):
        raise InvalidConfig(f"the graph calls the method {target} of a tensor, which is not saved")
    if isinstance(target, str):
        return target
    if (known := operator_name(target)) is not None:
        return known
    name = path_of(target)
    if function_at(name) is not target:
        raise InvalidConfig(
            f"the graph calls {name}, which cannot be saved: put @graph_function over it"
        )
    return f"function {name}"


def read_graph(data: Any, what: str, tensor: Callable[[str], Tensor]) -> fx.GraphModule:
    """Undo :func:`write_graph`; nothing of the graph is run.

    Args:
        data: JSON.
        what: whose graph it is, for messages.
        tensor: gives each tensor by the name it has in the graph.

    Raises:
        InvalidConfig: it is nothing that :func:`write_graph` gives, or an operator is unknown.
    """
    found = entries(data, f"the graph of {what}", "nodes", "graphs")
    if not isinstance(found["nodes"], list) or not isinstance(found["graphs"], dict):
        raise wrong(f"the graph of {what}", data, "nodes and graphs")
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    attributes: dict[str, Any] = {}

    def refer(name: str) -> fx.Node:
        if name not in made:
            raise wrong(f"a node of {what}", name, "one that comes before")
        return made[name]

    for entry in found["nodes"]:
        if not isinstance(entry, list) or len(entry) != 5 or entry[0] not in _OPS:
            raise wrong(f"a node of {what}", entry, "op, name, target, args, kwargs")
        op, name, target, args, kwargs = entry
        at = f"the node {name!r} of {what}"
        if not isinstance(name, str) or not name.isidentifier() or name in made:
            raise wrong(f"a node's name in {what}", name, "an identifier, once")
        args = decode({"tuple": args}, at, refer)
        kwargs = decode({"dict": kwargs}, at, refer)
        if not all(isinstance(key, str) and key.isidentifier() for key in kwargs):
            raise wrong(at, kwargs, "arguments by name")
        if op == "get_attr":
            if not isinstance(target, str) or not _ATTRIBUTE.fullmatch(target):
                raise wrong(at, target, "the name of a tensor")
            if target not in attributes:
                inner = found["graphs"].get(target)
                attributes[target] = (
                    tensor(target)
                    if inner is None
                    else read_graph(inner, what, lambda n, at=target: tensor(f"{at}.{n}"))  # type: ignore[misc]
                )
        called = _resolved(op, target, at)
        if kwargs and getattr(called, "__module__", "") in ("builtins", "_operator", "math"):
            raise wrong(at, kwargs, "no arguments by name")
        made[name] = graph.create_node(op, called, args, kwargs, name)
    if [entry[0] for entry in found["nodes"]].count("output") != 1:
        raise wrong(f"the graph of {what}", len(made), "nodes with one output")
    graph.lint()
    return fx.GraphModule(attributes, graph)


def _resolved(op: str, target: Any, at: str) -> Any:
    if op == "get_attr":
        return target
    if op in ("placeholder", "output"):
        if not isinstance(target, str) or not target.isidentifier():
            raise wrong(at, target, "an identifier")
        return target
    name = str(target).removeprefix("function ")
    if op == "call_method":
        if not is_method(name):
            raise wrong(at, target, "a method of tensors that computes")
        return name
    if name != target:
        function = function_at(name)
        if function is None:
            raise wrong(at, target, "a function that computes, of a module that is imported")
        return function
    return operator_at(target, at)
