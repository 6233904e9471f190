"""Graphs that a runtime computes in this process, from the program that ``export_onnx`` writes.

A backend says how its runtime opens a program; what calls need besides is here: a session for each
graph, made at its first call, and outputs as the graph gives them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from torch_quant.backends.onnx.backend import OnnxBackend
from torch_quant.backends.onnx.program.translate import program_of
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.metrics import sqnr
from torch_quant.core.packages import missing_packages
from torch_quant.errors import InvalidConfig, UnsupportedOp
from torch_quant.graph.running import CAPTURING
from torch_quant.passes.base import copy_graph
from torch_quant.passes.functionalize import written_tensors

__all__ = ["InProcess", "InProcessBackend", "Session"]

_MOST = 8
"""Sessions of one graph, where each serves one size."""
_LEAST = 10.0
"""SQNR in dB, below which a runtime is said to compute something else."""
_LARGEST = 2**31 - 2**20
"""Bytes of weights above which a program does not go through protobuf in one piece."""

logger = logging.getLogger("torch_quant")


class Session(Protocol):
    """A program that a runtime has opened. Any number of threads may call it at once."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, which stay valid; ``tensors`` are contiguous, on the CPU, not empty."""


class InProcessBackend(OnnxBackend):
    """A runtime that computes the graphs of ``Backend.ONNX`` in this process.

    Args:
        threads: of the runtime for one call; None for as many as PyTorch has when a graph is first
            called.
        settings: further options of the runtime, by its own names; they go before those chosen
            here.
    """

    compiles = True
    has_kernels = True
    fixes_numbers = False
    package: ClassVar[str]
    """The name of the runtime's package."""

    not_recorded = (
        "its graphs run outside of PyTorch, so they cannot be traced, compiled or exported. "
        "quantizer.quantize(model, backend=...) for a backend of PyTorch's own can, with the same "
        "calibration; export_onnx, of the model for Backend.ONNX, writes the file that runs here"
    )
    not_in_torchscript = not_recorded

    def __init__(
        self, *, threads: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or not _positive(threads)):
            raise InvalidConfig(
                f"{type(self).__name__}(threads={threads!r}): expected an int from 1 on, or None"
            )
        self.threads, self.settings = threads, dict(settings or {})

    def unavailable(self) -> str | None:
        return missing_packages("onnx", "onnxscript", self.package)

    def threads_now(self) -> int:
        """How many threads a session that is made now has."""
        return self.threads or torch.get_num_threads()

    @property
    def version(self) -> str:
        """Of the runtime that is installed, empty if none is."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    @abstractmethod
    def open(self, program: bytes | Path, inputs: Sequence[str]) -> Session:
        """A session of an ONNX program.

        Args:
            program: what the file holds, or the file where it is too large for that.
            inputs: the names of its inputs, in the order in which tensors come.

        Raises:
            UnsupportedOp: the runtime does not take it; says why.
        """

    def compile(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        return InProcess(self, graph)

    @property
    def has_options(self) -> bool:
        return bool(self.settings)

    def options(self) -> dict[str, Any]:
        """What it was made with, by name."""
        chosen = {"threads": self.threads, "settings": self.settings or None}
        return {name: value for name, value in chosen.items() if value is not None}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return " ".join(
            part for part in (super().__repr__(), self.version, given and f"with {given}") if part
        )


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


@dataclass(frozen=True)
class _Opened:
    """A session, and how the graph's outputs come of it.

    Args:
        session: gives the tensors.
        fixed: input, axis and size of each dimension that the graph leaves free and it does not.
        outputs: for each output: a function of the inputs, the session's results and ``rest``'s.
        rest: gives the outputs that are no tensors; None if there are none.
    """

    session: Session
    fixed: tuple[tuple[int, int, int], ...]
    outputs: tuple[tuple[str, Any], ...]
    rest: fx.GraphModule | None

    def serves(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was made for sizes as those of ``tensors``."""
        return all(tensors[i].shape[axis] == size for i, axis, size in self.fixed)

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
        backend: opens programs.
        graph: that :class:`OnnxBackend` lowered.
    """

    def __init__(self, backend: InProcessBackend, graph: QuantizedGraph) -> None:
        self.backend = backend
        self._graph = weakref.ref(graph)  # which holds this object
        self.opened: list[_Opened] = []
        """One, or some where sizes are fixed; the last used is the last."""
        self._order = threading.Lock()
        """Of ``opened``: a call does not wait for the export of another graph."""
        self.in_pytorch = ""
        """Why the graph runs in PyTorch, in float arithmetic, if it does."""

    @property
    def graph(self) -> QuantizedGraph:
        """What is computed."""
        graph = self._graph()
        assert graph is not None
        return graph

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Any:
        if self.in_pytorch or any(not x.numel() for x in tensors):
            return self.graph.body(*tensors)
        ready = [self._ready(x, i) for i, x in enumerate(tensors)]
        found = self.opened
        opened = next((each for each in found if each.serves(ready)), None)
        if opened is None:
            opened = self._open(tensors, ready)
        elif opened is not found[-1]:
            with self._order:
                self.opened = sorted(self.opened, key=lambda each: each is opened)
        return self.graph.body(*tensors) if opened is None else opened(tensors, ready)

    def _ready(self, x: Tensor, place: int) -> Tensor:
        if x.device.type != "cpu":
            raise InvalidConfig(
                f"{self.backend!r} takes tensors on the CPU: {self.graph.contract.names[place]} is "
                f"on {x.device}; give .cpu() of it"
            )
        if type(x) is not Tensor or x.requires_grad:
            x = x.detach()
        return x.resolve_conj().resolve_neg().contiguous()

    def _open(self, tensors: tuple[Tensor, ...], ready: Sequence[Tensor]) -> _Opened | None:
        """A session for these sizes; None if there can be none, which is then known."""
        with CAPTURING:
            for each in self.opened:  # another thread was first
                if each.serves(ready):
                    return each
            if self.in_pytorch:
                return None
            try:
                opened = _opened(self.backend, self.graph, tensors, ready)
            except UnsupportedOp as error:
                self.in_pytorch = str(error)
                logger.warning(
                    "%r: a graph of %s runs in PyTorch, in float arithmetic: %s",
                    self.backend,
                    self.graph.contract.describe(),
                    error,
                )
                return None
            if opened.fixed and not self.opened:
                logger.warning(
                    "%r makes a session for each size, %d at most: the exporter fixes %s",
                    self.backend,
                    _MOST,
                    ", ".join(
                        f"{self.graph.contract.names[i]}.shape[{axis}] = {size}"
                        for i, axis, size in opened.fixed
                    ),
                )
            with self._order:
                self.opened = [*self.opened, opened][-_MOST:]
            return opened


def _opened(
    backend: InProcessBackend,
    graph: QuantizedGraph,
    tensors: tuple[Tensor, ...],
    ready: Sequence[Tensor],
) -> _Opened:
    """The graph as a program, opened; raises :class:`UnsupportedOp` if it cannot be."""
    kept = [x for x in written_tensors(graph.body.graph) if x.op in ("placeholder", "get_attr")]
    if kept:
        raise UnsupportedOp(
            f"it writes to {', '.join(str(x.target) for x in kept)}: ONNX has no form of that"
        )
    program = program_of(graph, tuple(ready))
    expected = graph.body(*tensors)
    outputs, rest = _outputs(graph.body, expected)
    opened = _Opened(_loaded(backend, program), _fixed(graph, program), outputs, rest)
    _compare(backend, graph, expected, opened(tensors, ready))
    return opened


def _compare(
    backend: InProcessBackend, graph: QuantizedGraph, expected: Sequence[Any], found: Sequence[Any]
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
            "%.1f dB on the first inputs. It may be a bug of the runtime; backend='onnx' computes "
            "what is meant",
            backend,
            graph.contract.describe(),
            agreement,
        )


def _loaded(backend: InProcessBackend, program: Any) -> Session:
    import onnx_ir as ir

    inputs = [str(value.name) for value in program.model.graph.inputs]
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size <= _LARGEST:
        return backend.open(ir.serde.serialize_model(program.model).SerializeToString(), inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        ir.save(program.model, file, external_data="model.data")
        return backend.open(file, inputs)


def _fixed(graph: QuantizedGraph, program: Any) -> tuple[tuple[int, int, int], ...]:
    """Input, axis and size where the program has a number and the graph does not."""
    return tuple(
        (i, axis, size)
        for i, (value, sizes) in enumerate(
            zip(program.model.graph.inputs, graph.contract.shapes, strict=True)
        )
        for axis, (size, own) in enumerate(zip(value.shape, sizes, strict=True))
        if isinstance(size, int) and isinstance(own, str)
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
