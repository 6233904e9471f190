"""Graphs that a runtime beside PyTorch computes in this process.

A backend says how its runtime opens a graph; what calls need besides is here: a session for each
graph, made at its first call, and outputs as the graph gives them.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx
from torch._C import _functorch

from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.metrics import sqnr
from torch_quant.errors import InvalidConfig, UnsupportedOp
from torch_quant.graph.running import CAPTURING
from torch_quant.passes.base import copy_graph
from torch_quant.passes.functionalize import written_tensors

__all__ = [
    "Fixed",
    "InProcess",
    "Made",
    "Opener",
    "Session",
    "fixed_sizes",
    "refuse_writes",
    "told_sizes",
]

Fixed = tuple[tuple[int, int, int], ...]
"""Input, axis and size of each dimension that a graph leaves free and a session does not."""

_MOST = 8
"""Sessions of one graph, where each serves one size."""
_LEAST = 10.0
"""SQNR in dB, below which a runtime is said to compute something else."""

logger = logging.getLogger("torch_quant")


class Session(Protocol):
    """A program that a runtime has opened. Any number of threads may call it at once."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, which stay valid; ``tensors`` are contiguous, on the CPU, not empty."""


@dataclass(frozen=True)
class Made:
    """A session, and what it does not serve.

    Args:
        session: gives the tensors.
        fixed: input, axis and size of each dimension that the graph leaves free and it does not.
        takes: whether it serves the sizes of a call; None for all.
    """

    session: Session
    fixed: Fixed = ()
    takes: Callable[[Sequence[Tensor]], bool] | None = None


class Opener(Protocol):
    """A backend whose runtime computes graphs in this process."""

    meant: ClassVar[str]
    """How to ask for what computes in PyTorch, in float, what the runtime is to compute."""

    def session(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Made:
        """A session of a graph.

        It gives those outputs of the graph that are tensors, each as memory of its own.

        Raises:
            UnsupportedOp: the runtime does not take the graph; says why.
        """


@dataclass(frozen=True)
class Opened:
    """A session, and how the graph's outputs come of it.

    Args:
        made: gives the tensors.
        outputs: for each output: a function of the inputs, the session's results and ``rest``'s.
        rest: gives the outputs that are no tensors; None if there are none.
    """

    made: Made
    outputs: tuple[tuple[str, Any], ...]
    rest: fx.GraphModule | None

    def serves(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was made for sizes as those of ``tensors``."""
        return all(tensors[i].shape[axis] == size for i, axis, size in self.made.fixed)

    @property
    def session(self) -> Session:
        """What computes it."""
        return self.made.session

    def __call__(self, given: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        found = {"input": given, "session": self.session(tensors), "rest": (), "constant": ()}
        if self.rest is not None:
            found["rest"] = self.rest(*given)
        return tuple(
            place if kind == "constant" else found[kind][place] for kind, place in self.outputs
        )


class InProcess:
    """A lowered graph in a runtime; called like the graph.

    A size that the exporter fixes though the graph leaves it free gets a session of its own. Inputs
    without an element are computed in PyTorch: there is nothing to gain, and runtimes refuse some.

    Args:
        backend: opens sessions.
        graph: that it lowered.
    """

    def __init__(self, backend: Opener, graph: QuantizedGraph) -> None:
        self.backend = backend
        self._graph = weakref.ref(graph)  # which holds this object
        self.opened: list[Opened] = []
        """One, or some where sizes are fixed; the last used is the last."""
        self._order = threading.Lock()
        """Of ``opened``: a call does not wait for the export of another graph."""
        self._refused: set[tuple[torch.Size, ...]] = set()
        """Sizes for which there can be no session, where there are some for others."""
        self.in_pytorch = ""
        """Why the graph runs in PyTorch, in float arithmetic, if it does."""

    @property
    def graph(self) -> QuantizedGraph:
        """What is computed."""
        graph = self._graph()
        assert graph is not None
        return graph

    def __call__(self, *tensors: Tensor) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run(tensors)
        return self._run(tensors)

    def _run(self, tensors: tuple[Tensor, ...]) -> Any:
        empty = any(not x.numel() for x in tensors)
        if self.in_pytorch or empty or _functorch.peek_interpreter_stack() is not None:
            return self.graph.body(*tensors)
        ready = [self._ready(x, i) for i, x in enumerate(tensors)]
        found = self.opened
        opened = next((each for each in found if each.serves(ready)), None)
        if opened is None:
            opened = self._open(tensors, ready)
        elif opened is not found[-1]:
            with self._order:
                self.opened = sorted(self.opened, key=lambda each: each is opened)
        if opened is None or (opened.made.takes is not None and not opened.made.takes(ready)):
            return self.graph.body(*tensors)
        return opened(tensors, ready)

    def _ready(self, x: Tensor, place: int) -> Tensor:
        if x.device.type != "cpu":
            raise InvalidConfig(
                f"{self.backend!r} takes tensors on the CPU: {self.graph.contract.names[place]} is "
                f"on {x.device}; give .cpu() of it"
            )
        if type(x) is not Tensor or x.requires_grad:
            x = x.detach()
        if x.is_contiguous() and not x.is_conj() and not x.is_neg():
            return x
        return x.resolve_conj().resolve_neg().contiguous()

    def _open(self, tensors: tuple[Tensor, ...], ready: Sequence[Tensor]) -> Opened | None:
        """A session for these sizes; None if there can be none, which is then known."""
        with CAPTURING:
            for each in self.opened:  # another thread was first
                if each.serves(ready):
                    return each
            sizes = tuple(x.shape for x in ready)
            if self.in_pytorch or sizes in self._refused:
                return None
            try:
                with torch.autocast("cpu", enabled=False):  # which later calls may not be under
                    opened = _opened(self.backend, self.graph, tensors, ready)
            except UnsupportedOp as error:
                if self.opened:
                    self._refused.add(sizes)
                else:
                    self.in_pytorch = str(error)
                logger.warning(
                    "%r: a graph of %s runs in PyTorch, in float arithmetic: %s",
                    self.backend,
                    self.graph.contract.describe(),
                    error,
                )
                return None
            if opened.made.fixed and not self.opened:
                logger.warning(
                    "%r makes a session for each size, %d at most; this one serves %s",
                    self.backend,
                    _MOST,
                    told_sizes(self.graph, opened.made.fixed),
                )
            with self._order:
                self.opened = [*self.opened, opened][-_MOST:]
            return opened


def _opened(
    backend: Opener,
    graph: QuantizedGraph,
    tensors: tuple[Tensor, ...],
    ready: Sequence[Tensor],
) -> Opened:
    """The graph, opened; raises :class:`UnsupportedOp` if it cannot be."""
    refuse_writes(graph)
    made = backend.session(graph, tuple(ready))
    expected = graph.body(*tensors)
    outputs, rest = _outputs(graph.body, expected)
    opened = Opened(made, outputs, rest)
    _compare(backend, graph, expected, opened(tensors, ready))
    return opened


def refuse_writes(graph: QuantizedGraph) -> None:
    """Raise :class:`UnsupportedOp` where a graph writes to its inputs or to a model's tensors."""
    kept = [x for x in written_tensors(graph.body.graph) if x.op in ("placeholder", "get_attr")]
    if kept:
        names = ", ".join(str(x.target) for x in kept)
        raise UnsupportedOp(f"it writes to {names}, and what runs beside PyTorch cannot")


def fixed_sizes(graph: QuantizedGraph, shapes: Sequence[Sequence[Any]]) -> Fixed:
    """Which dimensions of inputs have a number in ``shapes`` that the graph leaves free."""
    return tuple(
        (i, axis, size)
        for i, (found, sizes) in enumerate(zip(shapes, graph.contract.shapes, strict=True))
        for axis, (size, own) in enumerate(zip(found, sizes, strict=True))
        if isinstance(size, int) and isinstance(own, str)
    )


def told_sizes(graph: QuantizedGraph, fixed: Fixed) -> str:
    """Fixed sizes for messages: ``x.shape[0] = 4``."""
    names = graph.contract.names
    return ", ".join(f"{names[i]}.shape[{axis}] = {size}" for i, axis, size in fixed)


def _compare(
    backend: Opener, graph: QuantizedGraph, expected: Sequence[Any], found: Sequence[Any]
) -> None:
    """Warn where a runtime computes something else than the graph says, as bugs of theirs do.

    Values at the border of two codes are rounded otherwise, and what follows of it may be 20 dB.
    """
    floats = [
        (x, y)
        for x, y in zip(expected, found, strict=True)
        if isinstance(x, Tensor) and x.is_floating_point() and bool(x.isfinite().all())
    ]
    if floats and (agreement := sqnr(*map(list, zip(*floats, strict=True)))) < _LEAST:
        logger.warning(
            "%r gives another result than the quantized graph of %s in PyTorch: they agree to "
            "%.1f dB on the first inputs. It may be a bug of the runtime; %s computes what "
            "is meant",
            backend,
            graph.contract.describe(),
            agreement,
            backend.meant,
        )


def _outputs(
    body: fx.GraphModule, results: Sequence[Any]
) -> tuple[tuple[tuple[str, Any], ...], fx.GraphModule | None]:
    """Where each output of a graph comes from, and a graph of those that are no tensors.

    Args:
        body: the graph.
        results: what it gives for an example.
    """
    inputs = list(body.graph.find_nodes(op="placeholder"))
    nodes: list[Any] = list(body.graph.output_node().args[0])  # type: ignore[arg-type]
    found: list[tuple[str, Any]] = []
    first: dict[fx.Node, tuple[str, int]] = {}
    count = 0
    others: list[int] = []
    for i, (node, result) in enumerate(zip(nodes, results, strict=True)):
        place = first.get(node) if isinstance(node, fx.Node) else ("constant", result)
        if place is None and node in inputs:
            place = ("input", inputs.index(node))
        elif place is None and isinstance(result, Tensor):
            place = ("session", count)
        elif place is None:
            place = ("rest", len(others))
            others.append(i)
        count += isinstance(result, Tensor)
        if isinstance(node, fx.Node):
            first.setdefault(node, place)
        found.append(place)
    if not others:
        return tuple(found), None
    rest = copy_graph(body)
    output = rest.graph.output_node()
    output.args = (tuple(output.args[0][i] for i in others),)  # type: ignore[index]
    rest.graph.eliminate_dead_code()
    rest.recompile()
    return tuple(found), rest
