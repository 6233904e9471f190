"""The shortest way to the graph of a layer: one tensor in, one tensor out.

A language model calls hundreds of such graphs for each token, and what it takes to match a call of
any kind would cost as much as their kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.convert.reading import held_in
from torch_quant.graph.binding import CallSignature, bind
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.kinds import Kind
from torch_quant.graph.outputs import flatten_output
from torch_quant.graph.shapes import ShapeContract
from torch_quant.ops.library import plain_function, unwatched
from torch_quant.ops.rows import computes_rows

__all__ = ["Direct", "direct", "fixed_width"]


@dataclass(frozen=True)
class Direct:
    """Whether a tensor is what a graph takes, and the graph.

    Args:
        function: computes it.
        dtype: of the tensor.
        rank: of the tensor; None for any, of which at most the last size is fixed.
        fixed: axis and size of what is not free.
    """

    function: Callable[[Tensor], Any]
    dtype: torch.dtype
    rank: int | None
    fixed: tuple[tuple[int, int], ...]

    def takes(self, x: Any) -> bool:
        """Whether the graph serves a call with ``x`` alone."""
        if type(x) is not Tensor or x.dtype is not self.dtype:
            return False
        shape = x.shape
        if self.rank is not None and len(shape) != self.rank:
            return False
        return not [1 for axis, size in self.fixed if not shape or shape[axis] != size]


def fixed_width(body: fx.GraphModule, kind: Kind, contract: ShapeContract) -> list[int] | None:
    """The last size of the tensors that a layer's graph takes, of any rank; None if it cannot.

    The list is empty where that size is free, as an embedding's is.
    """
    if len(kind.leaves) != 1 or not isinstance(kind.leaves[0][0], torch.dtype):
        return None
    if contract.conditions or contract.derived or not contract.shapes[0]:
        return None
    *leading, last = contract.shapes[0]
    free = [size for size in (*leading, last) if not isinstance(size, int)]
    if any(isinstance(size, int) for size in leading) or len(set(free)) < len(free):
        return None
    if not computes_rows(body):
        return None
    return [last] if isinstance(last, int) else []


def _in_one_call(body: fx.GraphModule) -> Callable[[Tensor], Any] | None:
    """The graph as a plain function, if it is one operator on its input, constants and tensors.

    It reads the tensors from the dictionaries that hold them, so that moving the model reaches it.
    """
    graph = body.graph
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if len(calls) != 1 or calls[0].op != "call_function" or calls[0].kwargs:
        return None
    (call,) = calls
    if list(graph.output_node().args[0]) != [call]:  # type: ignore[arg-type]
        return None
    arguments: list[Any] = list(call.args)
    places: list[int] = []
    held: list[tuple[int, dict[str, Any], str]] = []
    for i, each in enumerate(arguments):
        if not isinstance(each, fx.Node):
            if any(True for _ in _nodes(each)):
                return None
        elif each.op == "placeholder":
            places.append(i)
        else:
            place = held_in(body, each.target)
            if place is None:
                return None
            held.append((i, *place))
    target: Any = call.target
    plain = plain_function(target)

    def function(x: Tensor) -> tuple[Any]:
        given, read = arguments.copy(), [x]
        for i in places:
            given[i] = x
        for i, entries, name in held:
            given[i] = value = entries[name]
            read.append(value)
        if plain is not None and unwatched(read):
            return (plain(*given),)
        return (target(*given),)

    return function


def _nodes(value: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return iter(found)


def direct(
    body: fx.GraphModule,
    kind: Kind,
    contract: ShapeContract,
    out_spec: Any,
    signature: Any,
    *,
    width: list[int] | None = None,
    function: Callable[[Tensor], Any] | None = None,
) -> Direct | None:
    """The direct way to a graph, None if its calls are no single tensor, or sizes are conditional.

    Args:
        body: the graph, which gives a tuple of leaves.
        kind: of the calls that it serves.
        contract: the sizes that it serves.
        out_spec: how its outputs nest.
        signature: of the module.
        width: what :func:`fixed_width` gives, None if its rank counts.
        function: computes it in another way than the graph.
    """
    if len(kind.leaves) != 1 or not isinstance(kind.leaves[0][0], torch.dtype):
        return None
    dtype, rank = kind.leaves[0]
    if contract.conditions or contract.derived or not isinstance(signature, CallSignature):
        return None
    (sizes,) = contract.shapes
    free = [size for size in sizes if not isinstance(size, int)]
    if len(set(free)) < len(free):
        return None
    x = torch.empty([size if isinstance(size, int) else 2 for size in sizes], dtype=dtype)
    if flatten_call(*bind(signature, (x,), {})).nesting != kind.nesting:
        return None
    if out_spec != flatten_output(x)[1]:
        return None
    function = function or _in_one_call(body) or body.forward
    if width is not None:
        return Direct(function, dtype, None, tuple((-1, size) for size in width))
    fixed = tuple((axis, size) for axis, size in enumerate(sizes) if isinstance(size, int))
    return Direct(function, dtype, rank, fixed)
