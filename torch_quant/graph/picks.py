"""Which products decide what is picked: the largest of their numbers say where data goes.

In a graph that is read off its edges. Where layers are graphs of their own, it is the Python code
between them that picks, and the first call is followed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from torch_quant.ops.table import pattern_of

__all__ = ["Follower", "Picks", "decisive", "last_products"]

aten = torch.ops.aten

_PICKS = {
    aten.topk.default, aten.argmax.default, aten.max.dim, aten.multinomial.default,
    aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable,
}  # fmt: skip
"""Operators that tell which numbers are the largest, or choose by them."""


class Picks(Protocol):
    """What may decide what is picked, and is told so."""

    picks: bool


def decisive(graph: fx.Graph) -> set[fx.Node]:
    """The products of a canonical graph by whose results something is picked.

    >>> graph = fx.Graph()
    >>> x, weight = graph.placeholder("x"), graph.get_attr("weight")
    >>> logits = graph.call_function(aten.linear.default, (x, weight))
    >>> shares = graph.call_function(aten.softmax.int, (logits, -1))
    >>> _ = graph.call_function(aten.topk.default, (shares, 2))
    >>> decisive(graph)
    {linear_default}
    """
    return _products(node for node in graph.nodes if node.target in _PICKS)


def last_products(graph: fx.Graph) -> set[fx.Node]:
    """The products that outputs are made of, with no other between."""
    return _products(graph.find_nodes(op="output"))


def _products(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """The products in front of some nodes."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = [node for end in ends for node in end.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if pattern_of(node) is not None:
            found.add(node)
        else:
            waiting += node.all_input_nodes
    return found


class Follower:
    """Knows of the tensors that Python code computes which layers' results they are made of."""

    def __init__(self) -> None:
        self._makers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def begin(self, results: Any, maker: Picks) -> None:
        """A layer has given these results."""
        for x in _tensors(results):
            self._makers[x] = {maker}

    def step(self, target: Any, inputs: Any, outputs: Any) -> None:
        """An operator that is no product has run."""
        makers = {each for x in _tensors(inputs) for each in self._makers.get(x, ())}
        if target in _PICKS:
            for maker in makers:
                maker.picks = True
        elif makers:
            for x in _tensors(outputs):
                self._makers[x] = makers


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
