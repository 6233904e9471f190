"""Arguments of a call in a graph, by the names that its operator gives them.

A call may give an argument by position or by name, or leave it out where it has a default. Whoever
reads positions sees one of these three.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import fx

__all__ = [
    "argument",
    "arguments",
    "in_order",
    "part_of",
    "positional",
    "retarget",
    "set_arguments",
]

_BY_NAME_ALONE = 2**31
"""The position of an argument that has none."""


class _Parameter(NamedTuple):
    """One argument that an operator takes."""

    name: str
    place: int
    default: Any


@functools.cache
def _parameters(target: Any) -> tuple[_Parameter, ...]:
    """What an operator, or a function that graphs call, takes."""
    if hasattr(target, "_schema"):
        found = [
            (each.name, each.kwarg_only, each.default_value if each.has_default_value() else None)
            for each in target._schema.arguments
        ]
    else:
        found = [
            (each.name, each.kind is each.KEYWORD_ONLY, each.default)
            for each in inspect.signature(target).parameters.values()
        ]
        found = [(name, alone, None if x is inspect.Parameter.empty else x)
                 for name, alone, x in found]  # fmt: skip
    return tuple(
        _Parameter(name, _BY_NAME_ALONE if alone else i, default)
        for i, (name, alone, default) in enumerate(found)
    )


@functools.cache
def _by_name(target: Any) -> dict[str | int, _Parameter]:
    found = _parameters(target)
    return {each.name: each for each in found} | dict(enumerate(found))


def _given(node: fx.Node, parameter: _Parameter) -> Any:
    name, place, default = parameter
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults included, as the operator's schema has them.

    >>> import torch
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> call = graph.call_function(torch.ops.aten.softmax.int, (x, -1))
    >>> arguments(call)
    {'self': x, 'dim': -1, 'dtype': None}
    """
    return {each.name: _given(node, each) for each in _parameters(node.target)}


def positional(node: fx.Node) -> tuple[Any, ...]:
    """The arguments that have a position, in order, defaults included."""
    found = _parameters(node.target)
    return tuple(_given(node, each) for each in found if each.place != _BY_NAME_ALONE)


def argument(node: fx.Node, which: str | int) -> Any:
    """One argument of a call, given or by default.

    Args:
        node: calls an operator.
        which: its name, or its place among all where operators of several names are meant.

    >>> import torch
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> call = graph.call_function(torch.ops.aten.add.Tensor, (x,), {"other": 2})
    >>> argument(call, "other"), argument(call, 1), argument(call, "alpha")
    (2, 2, 1)
    """
    return _given(node, _by_name(node.target)[which])


def in_order(node: fx.Node) -> None:
    """Give all arguments that have a position by it, as far as the call gives them.

    >>> import torch
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> call = graph.call_function(torch.ops.aten.sum.dim_IntList, (x,), {"keepdim": True})
    >>> in_order(call)
    >>> call.args, call.kwargs
    ((x, None, True), {})
    """
    found = [each for each in _parameters(node.target) if each.place != _BY_NAME_ALONE]
    count = max((each.place + 1 for each in found if each.name in node.kwargs), default=0)
    if count > len(node.args):
        node.args = tuple(_given(node, each) for each in found[:count])
        named = {each.name for each in found}
        node.kwargs = {name: x for name, x in node.kwargs.items() if name not in named}


def set_arguments(node: fx.Node, values: Mapping[str, Any] | Mapping[int, Any]) -> None:
    """Give a call other arguments; those that are not named stay.

    What has a position gets it, unless the call gives it by name.

    Args:
        node: calls an operator.
        values: by name or place.

    >>> import torch
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> call = graph.call_function(torch.ops.aten.softmax.int, (x,), {"dim": -1})
    >>> set_arguments(call, {"dim": 0})
    >>> call.args, call.kwargs
    ((x,), {'dim': 0})
    """
    for which, value in values.items():
        parameter = _by_name(node.target)[which]
        if parameter.place == _BY_NAME_ALONE or parameter.name in node.kwargs:
            node.update_kwarg(parameter.name, value)
            continue
        before = _parameters(node.target)[len(node.args) : parameter.place]
        args = (*node.args, *(_given(node, each) for each in before))
        node.args = (*args[: parameter.place], value, *args[parameter.place + 1 :])
        named = {each.name for each in before}
        node.kwargs = {name: x for name, x in node.kwargs.items() if name not in named}


def retarget(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Have a node call another operator, with these arguments and no others."""
    node.target, node.args, node.kwargs = target, args, {}


def part_of(node: fx.Node) -> tuple[fx.Node, Any]:
    """The tuple that ``operator.getitem`` reads a part of, and which."""
    assert node.target is operator.getitem
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    return whole, index
