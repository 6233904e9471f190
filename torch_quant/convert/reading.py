"""A graph as a function of its tensors, which are read from the dictionaries that hold them.

A graph that is a module looks up each tensor by its path, a module at a time: for a transformer of
six layers a thousand look-ups a call, which take as long as some of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from torch_quant.ops.arguments import arguments
from torch_quant.ops.library import plain_function, unwatched

__all__ = ["held_in", "of_tensors", "reading"]


def held_in(body: fx.GraphModule, target: Any) -> tuple[dict[str, Any], str] | None:
    """The dictionary that holds a tensor of a graph's modules, and its name there.

    Args:
        body: the graph.
        target: of a node that reads the tensor, a dotted path.

    Returns:
        None if it is neither a parameter nor a buffer.
    """
    path, _, name = str(target).rpartition(".")
    owner = body.get_submodule(path)
    entries = next((d for d in (owner._parameters, owner._buffers) if name in d), None)
    return None if entries is None else (entries, name)


def reading(body: fx.GraphModule) -> Callable[..., Any] | None:
    """What gives the outputs of ``body``; None if it reads more than parameters and buffers.

    What moves the model, or gives it other tensors, changes these dictionaries, so it is seen.
    Operators that are one function on a CPU are called as such, unless somebody follows them.

    Args:
        body: a graph whose modules are those of the model.

    >>> import torch
    >>> body = fx.symbolic_trace(torch.nn.Linear(4, 2))
    >>> function, x = reading(body), torch.ones(3, 4)
    >>> torch.equal(function(x), body(x))
    True
    """
    if type(body.graph._codegen) is not fx.graph.CodeGen:
        return None  # its arguments are not the placeholders
    held: dict[str, tuple[dict[str, Any], str]] = {}
    for node in body.graph.find_nodes(op="get_attr"):
        place = held_in(body, node.target)
        if place is None:
            return None
        held[str(node.target)] = place
    if any(node.op == "call_module" for node in body.graph.nodes):
        return None
    function, places = of_tensors(body.graph, held, plain=False), tuple(held.values())
    if all(plain_function(node.target) is None for node in body.graph.nodes):
        return lambda *tensors: function(*[entries[name] for entries, name in places], *tensors)
    quick = of_tensors(body.graph, held, plain=True)

    def call(*tensors: Any) -> Any:
        given = [*[entries[name] for entries, name in places], *tensors]
        return quick(*given) if unwatched(given) else function(*given)

    return call


def of_tensors(source: fx.Graph, held: Iterable[str], *, plain: bool) -> Callable[..., Any]:
    """The graph as a function of tensors that it holds, and then of its inputs.

    Args:
        source: the graph.
        held: the targets of what reads those.
        plain: call the functions in place of operators.
    """
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    given = {target: graph.placeholder(f"held_{i}") for i, target in enumerate(held)}
    for node in source.nodes:
        if node.op == "get_attr":
            made[node] = given[str(node.target)]
            continue
        made[node] = new = graph.node_copy(node, made.__getitem__)
        function = plain_function(node.target) if plain else None
        if function is not None:
            new.args, new.kwargs = tuple(arguments(new).values()), {}
            new.target = function
    return fx.GraphModule({}, graph).forward
