"""Sizes for which a graph is compiled, and those that its code does not serve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import SymInt, Tensor
from torch.utils import _pytree as pytree

from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.metrics import difference

__all__ = ["agrees", "has_one_within", "is_empty_within", "nothing_is_empty", "widened"]

_LEAST = 4
"""Elements along a free dimension of an example. Where there is 1, Inductor takes strides for fixed
that depend on the size, and computes other sizes wrong; likewise within, where some are cut off."""
_DOUBLINGS = 2
"""Of the example, so that nothing within has size 1."""


def widened(graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Examples with 4 or more along each free dimension, repeated, and then larger ones.

    Args:
        graph: says which dimensions are free, and which sizes it serves: there is no other example.
        tensors: an example.
    """
    graph.contract.prepare()
    for doubling in range(1 + _DOUBLINGS):
        found = []
        for x, sizes in zip(tensors, graph.contract.shapes, strict=True):
            times = [
                -(-_LEAST // n) * 2**doubling
                if isinstance(size, str) and n and not graph.contract.fixes(size, n)
                else 1
                for size, n in zip(sizes, x.shape, strict=True)
            ]
            found.append(x.repeat(times) if any(n > 1 for n in times) else x)
        if graph.contract.admits([n for x in found for n in x.shape]):
            yield tuple(found)


def has_one_within(exported: Any) -> bool:
    """Whether a size that a program computes of free ones is 1 for its example."""
    return any(
        isinstance(n, SymInt) and not n.node.expr.is_symbol and n.node.hint == 1
        for n in _sizes(exported)
    )


def agrees(run: Callable[..., Any], graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> bool:
    """Whether compiled code gives what its graph gives, as far as that can be computed."""
    try:
        expected = graph.body(*tensors)
    except Exception:  # of the model's own, at sizes that nobody asked for
        return True
    wanted = [x for x in expected if isinstance(x, Tensor)]
    return not any(difference(x, y) for x, y in zip(wanted, run(tensors), strict=True))


def nothing_is_empty(exported: Any) -> Callable[[Sequence[Tensor]], bool] | None:
    """Whether no tensor within a program is empty, for inputs that are not.

    PyTorch's attention for CPUs, called from compiled code, divides by such a size.

    Args:
        exported: the program.

    Returns:
        A function of the inputs; None where none can be.
    """
    values = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
    places: dict[Any, tuple[int, int]] = {}
    size: Any
    for i, name in enumerate(exported.graph_signature.user_inputs):
        for axis, size in enumerate(values[name].shape):
            if isinstance(size, SymInt) and size.node.expr.is_symbol:
                places.setdefault(size.node.expr, (i, axis))
    sizes = [n for n in _sizes(exported) if isinstance(n, SymInt)]
    within = {n.node.expr for n in sizes if not n.node.expr.is_symbol}
    asked = [each for each in within if each.free_symbols <= places.keys()]
    if not asked:
        return None

    @functools.lru_cache(maxsize=512)
    def checked(sizes: tuple[int, ...]) -> bool:
        known = dict(zip(places, sizes, strict=True))
        return all(int(each.xreplace(known)) > 0 for each in asked)

    def takes(tensors: Sequence[Tensor]) -> bool:
        return checked(tuple(tensors[i].shape[axis] for i, axis in places.values()))

    return takes


def is_empty_within(exported: Any) -> bool:
    """Whether a program for one size has a tensor without elements."""
    return any(isinstance(n, int) and n == 0 for n in _sizes(exported))


def _sizes(exported: Any) -> Iterator[Any]:
    """Of all tensors of a program."""
    for node in exported.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor):
                yield from value.shape
