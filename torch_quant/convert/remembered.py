"""Which graph served a call, so that the next one like it goes there without being looked at.

A call of several tensors is bound, flattened and compared with what graphs take; behind a network
that empties the caches that takes a tenth of a millisecond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.graph.calls import Call
from torch_quant.graph.kinds import Number, Unread
from torch_quant.graph.outputs import WrittenSpec

__all__ = ["Key", "Remembered", "key_of"]

_CONSTANTS = frozenset({type(None), bool, str, torch.dtype})
"""Of which no two are equal and yet different calls, as 0.0 and -0.0 are."""
_TAKEN = frozenset({Tensor, *_CONSTANTS})
_MOST = 256
"""Calls that are remembered of a module: each has sizes of its own."""

Key = tuple[Any, ...]
"""What :func:`key_of` says of a call."""


class Remembered:
    """The graphs that calls of one module went to.

    A graph that was added later never serves a call that an earlier one serves, so that what is
    remembered stays right. Copies and pickles begin without.
    """

    def __init__(self) -> None:
        self.known: dict[Key, tuple[QuantizedGraph, tuple[int, ...]]] = {}
        """For each call its graph, and the places of that graph's tensors among what is given."""

    def __reduce__(self) -> Any:
        return Remembered, ()

    def keep(self, key: Key, given: tuple[Any, ...], graph: QuantizedGraph, call: Call) -> None:
        """Remember which graph serves a call, where that graph needs nothing else of the call.

        Args:
            key: what :func:`key_of` says of the call.
            given: its arguments, as they stand in it.
            graph: that serves it.
            call: it as the graph takes it.
        """
        if isinstance(graph.out_spec, WrittenSpec):
            return  # arguments are to be changed
        if any(first in (Number, Unread) for first, _ in graph.kind.leaves):
            return  # outputs may be numbers and strings of the call
        places = {id(x): i for i, x in enumerate(given) if type(x) is Tensor}
        if len(places) < sum(type(x) is Tensor for x in given):
            return  # one tensor is given twice, and another call may give two
        if not all(id(x) in places for x in call.tensors):
            return
        if len(self.known) >= _MOST:
            self.known.clear()
        self.known[key] = graph, tuple([places[id(x)] for x in call.tensors])


def key_of(given: tuple[Any, ...], names: tuple[str, ...]) -> Key | None:
    """All that decides which graph serves a call; None where it is not to be had so fast.

    Args:
        given: positional arguments, then those by name.
        names: of these.
    """
    if not _TAKEN.issuperset(map(type, given)):
        return None
    facts = [(x.dtype, x.shape) if type(x) is Tensor else (type(x), x) for x in given]
    return (names, *facts)
