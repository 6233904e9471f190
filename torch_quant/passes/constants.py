"""Values of constant expressions, and buffers that take their place under the model's own names."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.core.naming import numbered
from torch_quant.graph.sites import source
from torch_quant.passes.base import Draft

__all__ = [
    "constant_beside", "evaluate", "expression", "name_of", "new_constant", "new_constants",
    "place", "settle_names",
]  # fmt: skip

_NAME = "torch_quant_name"
"""Entry of ``node.meta`` of a new constant: the path it is meant for, and the one it has so far."""


@torch.no_grad()
def evaluate(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a constant node: a parameter, or an expression over parameters and buffers.

    Returns:
        The very parameter for a plain reference, else a new tensor.
    """
    if node.op == "get_attr":
        value: Tensor = operator.attrgetter(str(node.target))(gm)
        return value
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: evaluate(gm, n))
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def expression(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a constant node computes, as text: the same for the same operators on the same tensors.

    It holds no tensor, so it can be remembered where the value would take memory. It is valid as
    long as ``gm`` holds the tensors.
    """
    if node.op == "get_attr":
        return f"tensor {id(operator.attrgetter(str(node.target))(gm))}"
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: expression(gm, n))
    return f"{node.target!r} {args!r} {kwargs!r}"


# Names


def name_of(constant: fx.Node, otherwise: str) -> str:
    """What the model calls a constant, transposed or not; ``otherwise`` where it is computed."""
    origin = source(constant)
    if origin.op != "get_attr":
        return otherwise
    name, _ = origin.meta.get(_NAME, (str(origin.target), ""))
    return str(name)


def new_constant(gm: fx.GraphModule, name: str, value: Any, before: fx.Node) -> fx.Node:
    """Register one buffer; see :func:`new_constants`."""
    (node,) = new_constants(gm, name, {"": value}, before)
    return node


def new_constants(
    gm: fx.GraphModule, name: str, values: Mapping[str, Any], before: fx.Node
) -> list[fx.Node]:
    """Register buffers and return the nodes that read them, placed before ``before``.

    As long as the graph holds the float tensor of that name, theirs has a number:
    :func:`settle_names` takes it away.

    Args:
        name: a dotted path inside of the captured module.
        values: ending of the name -> tensor: ``{"": weight, "_scale": scale}``.
    """
    path = place(gm, name, values)
    nodes = []
    with before.graph.inserting_before(before):
        for ending in values:
            nodes.append(before.graph.get_attr(f"{path}{ending}"))
            nodes[-1].meta[_NAME] = (name, path)
    return nodes


def constant_beside(
    gm: fx.GraphModule, constant: fx.Node, ending: str, value: Any, before: fx.Node
) -> fx.Node:
    """Register a buffer that goes with a new constant: called like it, and ``ending`` behind."""
    name, path = constant.meta[_NAME]
    found = place(gm, f"{path}{ending}", {"": value})
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(found)
    node.meta[_NAME] = (name, path)
    return node


def place(root: nn.Module, path: str, values: Mapping[str, Any]) -> str:
    """Put tensors under a dotted path of ``root``, in plain modules that are made on the way.

    Where a part of the path is the name of something else, such as another tensor or ``graph`` of
    an ``fx.GraphModule``, it gets a number. A tensor that is there already stays.

    Args:
        root: what gets them, as buffers.
        path: any characters may stand between the dots.
        values: ending of the name -> tensor; all get the same number.

    Returns:
        The path in fact, without the endings.

    >>> root = nn.Module()
    >>> place(root, "encoder.0.weight", {"": torch.ones(2), "_scale": torch.ones(1)})
    'encoder.0.weight'
    >>> place(root, "encoder.0.weight", {"": torch.zeros(2), "_scale": torch.ones(1)})
    'encoder.0.weight_1'
    >>> list(root.state_dict())[2:]
    ['encoder.0.weight_1', 'encoder.0.weight_1_scale']
    """
    *parts, last = [part for part in path.split(".") if part]
    owner, found = root, []
    for part in parts:
        found.append(next(name for name in numbered(part) if _leads_on(owner, name)))
        if not hasattr(owner, found[-1]):
            owner.add_module(found[-1], nn.Module())
        owner = owner.get_submodule(found[-1])

    def fits(name: str) -> bool:
        missing = object()
        held = {ending: getattr(owner, f"{name}{ending}", missing) for ending in values}
        return all(x is missing or x is values[ending] for ending, x in held.items())

    found.append(next(filter(fits, numbered(last))))
    for ending, value in values.items():
        name = f"{found[-1]}{ending}"
        if not isinstance(value, Tensor):
            setattr(owner, name, value)
        elif not hasattr(owner, name):
            owner.register_buffer(name, value)
    return ".".join(found)


def _leads_on(owner: nn.Module, name: str) -> bool:
    """Whether ``name`` is a module inside ``owner``, or may become one."""
    return name in owner._modules or not hasattr(owner, name)


def settle_names(gm: fx.GraphModule) -> Draft:
    """A draft with the graph of ``gm`` and what that reads alone, under the model's own names.

    Float tensors that are still read keep theirs; new constants get those that have become free.
    Parameters become buffers over the same storage. One tensor under two names gets one, since no
    graph with both can be traced. The graph moves to what is returned.
    """
    root = Draft(nn.Module(), fx.Graph())  # it knows what the names mean that it has
    values = {
        node: operator.attrgetter(str(node.target))(gm)
        for node in gm.graph.find_nodes(op="get_attr")
    }
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for node, value in values.items():
        name, path = node.meta.pop(_NAME, (str(node.target), str(node.target)))
        groups.setdefault((name, path), {})[str(node.target).removeprefix(path)] = value
    names: dict[int, str] = {}
    for name, path in sorted(groups, key=lambda group: group[0] != group[1]):  # kept names first
        new = {ending: x for ending, x in groups[name, path].items() if id(x) not in names}
        if new:
            placed = place(root, name, {ending: _buffer(x) for ending, x in new.items()})
            names |= {id(x): f"{placed}{ending}" for ending, x in new.items()}
    for node, value in values.items():
        node.target = names[id(value)]
    made = Draft(root, gm.graph)
    root.graph.owning_module = None  # else all its tensors live on until cycles are looked for
    return made


def _buffer(value: Any) -> Any:
    return value.detach() if isinstance(value, nn.Parameter) else value
