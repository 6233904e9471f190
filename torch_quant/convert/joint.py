"""Layers in a row that read one tensor, as query, key and value do: the first call computes all.

Which they are is seen in a first call of the model. What the others give waits until they are
called with that very tensor, unchanged; of any other tensor they compute it themselves. Who writes
to its memory behind PyTorch's back (``x.data``, NumPy) between two of these calls is not seen.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.convert.direct import Direct
from torch_quant.convert.quick import give_quick_calls
from torch_quant.convert.reading import held_in
from torch_quant.native.joint import WEIGHT_ONLY_LINEARS
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR
from torch_quant.nn.stand_in import StandIn
from torch_quant.ops.arguments import positional
from torch_quant.ops.library import plain_function, unwatched

__all__ = ["Begun", "Member", "first_call", "note", "prepare"]

_State = list[tuple[Tensor, int]]

_MOST_UNREAD = 3
"""Times in a row that results were made in vain, after which nobody makes them for a while."""
_REST = (16, 1024)
"""Calls that this takes at first, and at most: twice as many each time that it was in vain again.
A few calls may have been interrupted, or have met those of another thread."""
_BODY = operator.itemgetter("body")
_found = plain_function(WEIGHT_ONLY_LINEARS)
assert _found is not None
_linears: Callable[..., list[Tensor]] = _found


def _nothing() -> None:
    """What a copy has of what is not copied."""


class _NotCopied:
    """Of a model that is copied or pickled, the copy finds it out anew."""

    def __reduce__(self) -> Any:
        return _nothing, ()


class Begun(_NotCopied):
    """Says that a first call of some Python code was seen."""


class _Layer:
    """One layer of a group.

    Args:
        graph: it, of a single operator.
        places: of weight, scale, zero point and bias.
        numbers: its bits, and the code of 0.
    """

    __slots__ = ("body", "graph", "held", "numbers", "places")

    def __init__(
        self, graph: Any, places: list[tuple[dict[str, Any], str] | None], numbers: tuple[int, int]
    ) -> None:
        self.graph, self.body, self.places, self.numbers = graph, graph.body, places, numbers
        self.held = [place for place in places if place is not None]

    def state(self) -> _State | None:
        """The tensors it computes with, and how often each was written to; None if not known."""
        tensors = [entries[name] for entries, name in self.held]
        if any(x.is_inference() for x in tensors):
            return None
        return [(x, x._version) for x in tensors]

    def is_in(self, state: _State) -> bool:
        """Whether its tensors are still those, unchanged."""
        held = zip(self.held, state, strict=True)
        return all(
            entries[name] is x and x._version == version for (entries, name), (x, version) in held
        )


class _Group:
    """Layers of one input.

    Args:
        layers: in the order of their calls.
        way: whether the first takes a tensor; so do the others.
    """

    def __init__(self, layers: list[_Layer], way: Direct) -> None:
        self.layers, self.way = layers, way
        self.bits, self.zeros = ([each.numbers[i] for each in layers] for i in (0, 1))
        self.held: list[tuple[dict[str, Any], str]] = []
        self.slices: list[tuple[int, int]] = []
        for i in range(4):
            places = [place for each in layers if (place := each.places[i]) is not None]
            self.slices.append((len(self.held), len(self.held) + len(places)))
            self.held += places
        self.modules = [each.graph._modules for each in layers]
        self.bodies = list(map(_BODY, self.modules))
        self.hooks = [
            hooks
            for each in layers
            for hooks in (each.graph._forward_hooks, each.graph._forward_pre_hooks)
        ]
        self.waiting: tuple[Tensor, int, dict[int, tuple[Tensor, _State]]] | None = None
        """An input, its version, and what is to be read, with the weights it was made of. Another
        thread may put its own there."""
        self.unread = self.resting = 0
        self.rest = _REST[0]

    def all(self, x: Tensor) -> Tensor | None:
        """The result of the first; those of the others wait. None where each is to compute it."""
        if self.resting:
            self.resting -= 1
            return None
        if not self.way.takes(x) or x.is_inference():
            return None
        if self.waiting is not None:
            self.waiting, self.unread = None, self.unread + 1
            if self.unread > _MOST_UNREAD:
                self.unread, self.resting = _MOST_UNREAD, self.rest
                self.rest = min(2 * self.rest, _REST[1])
                return None
        tensors = [entries[name] for entries, name in self.held]
        if any(self.hooks) or self.bodies != list(map(_BODY, self.modules)):
            return None
        if not unwatched([x, *tensors]):
            return None
        lists = [tensors[begin:end] for begin, end in self.slices]
        states = [each.state() for each in self.layers]
        if None in states:
            return None
        version = x._version
        results = _linears(x, *lists, self.bits, self.zeros)
        made = enumerate(zip(results, states, strict=True))
        self.waiting = x, version, {i: (y, state) for i, (y, state) in made if i and state}
        return results[0]

    def gives(self, place: int, x: Tensor, y: Tensor, state: _State) -> bool:
        """Whether ``y`` is what the layer would give now: of these weights, in this mode."""
        if any(self.hooks) or self.bodies != list(map(_BODY, self.modules)):
            return False
        if y.is_inference() != torch.is_inference_mode_enabled():
            return False
        return self.layers[place].is_in(state) and unwatched([x, *(held for held, _ in state)])


class Member(_NotCopied):
    """The part that one layer has in a group.

    Args:
        group: of layers.
        place: of this one.
    """

    __slots__ = ("group", "place")

    def __init__(self, group: _Group, place: int) -> None:
        self.group, self.place = group, place

    def __call__(self, x: Any) -> Tensor | None:
        """The layer's result; None where it has to compute it itself."""
        if type(x) is not Tensor or torch._C._get_tracing_state() is not None:
            return None
        group, place = self.group, self.place
        waiting = group.waiting
        if waiting is not None and waiting[0] is x and waiting[1] == x._version:
            found = waiting[2].pop(place, None)
            if not waiting[2]:
                group.waiting, group.unread, group.rest = None, 0, _REST[0]
            if found is not None and group.gives(place, x, *found):
                return found[0]
        return None if place else group.all(x)


def _layer(graph: Any) -> _Layer | None:
    """A graph that is one linear layer of one input."""
    calls = [node for node in graph.body.graph.nodes if node.op == "call_function"]
    if len(calls) != 1 or calls[0].target is not WEIGHT_ONLY_LINEAR:
        return None
    x, *tensors, bits, zero = positional(calls[0])
    if x.op != "placeholder" or list(graph.body.graph.output_node().args[0]) != calls:
        return None
    places = [None if each is None else held_in(graph.body, each.target) for each in tensors]
    missing = [1 for each, place in zip(tensors, places, strict=True) if each and place is None]
    return None if missing else _Layer(graph, places, (bits, zero))


class _Watch:
    """A call of a model: which layers are called in a row with one tensor.

    Args:
        native: whether layers run on this package's kernels.
    """

    def __init__(self, native: bool) -> None:
        self.native = native
        self.x: Tensor | None = None
        self.version = 0
        self.row: list[tuple[Any, Any, Direct]] = []
        self.rows = [self.row]
        self.calls: dict[int, int] = {}

    def note(self, how: Any, graph: Any, way: Direct, x: Tensor) -> None:
        self.calls[id(how)] = self.calls.get(id(how), 0) + 1
        known = not x.is_inference()
        if not (known and x is self.x and x._version == self.version):
            self.x, self.version = (x, x._version) if known else (None, 0)
            self.row = []
            self.rows.append(self.row)
        self.row.append((how, graph, way))

    def finish(self) -> None:
        """Make groups of what was seen."""
        self.x = None
        for row in self.rows:
            layers = [_layer(graph) for _, graph, _ in row]
            known = [each for each in layers if each is not None]
            fixed: set[Any] = {(way.rank, way.dtype, way.fixed) for _, _, way in row}
            having = {tuple(place is None for place in each.places) for each in known}
            alone = all(self.calls[id(how)] == 1 and len(how.graphs) == 1 for how, _, _ in row)
            if len(row) < 2 or len(known) < len(row) or len(fixed) + len(having) > 2 or not alone:
                continue
            group = _Group(known, row[0][2])
            for place, (how, _, _) in enumerate(row):
                how.joint = Member(group, place)


_WATCH: ContextVar[_Watch | None] = ContextVar("torch_quant_watch", default=None)


def note(how: Any, graph: Any, way: Direct, x: Tensor) -> None:
    """Tell whoever watches a first call that a layer was called.

    Args:
        how: the layer runs, a ``Quantization``.
        graph: of the layer.
        way: to it.
        x: the input.
    """
    watch = _WATCH.get()
    if watch is not None and unwatched([x]):
        watch.note(how, graph, way, x)


@contextlib.contextmanager
def first_call(glue: nn.Module) -> Iterator[None]:
    """While Python code runs for the first time: find out what may be called together.

    Args:
        glue: the code's module.
    """
    outer = _WATCH.get()
    watch = outer or _Watch(_runs_here(glue))
    if watch.native:
        give_quick_calls(glue)
    if outer is not None:
        yield
        return
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)
    if watch.native:
        watch.finish()


def prepare(model: nn.Module) -> None:
    """Have code around layers on this package's kernels try whether it is one of them, too.

    Args:
        model: with quantized layers in it, and none itself.
    """
    if _runs_here(model):
        give_quick_calls(model)


def _runs_here(glue: nn.Module) -> bool:
    """Whether layers inside run on kernels of this package."""
    graphs = (
        graph.body.graph
        for module in glue.modules()
        if isinstance(module, StandIn)
        for graph in vars(module)["quantization"].graphs
    )
    return any(plain_function(node.target) for graph in graphs for node in graph.nodes)
