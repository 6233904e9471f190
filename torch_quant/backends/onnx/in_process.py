"""Runtimes in this process that compute the program that ``export_onnx`` writes."""

from __future__ import annotations

import importlib.metadata
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_quant.backends.in_process import InProcess, Made, Session, fixed_sizes
from torch_quant.backends.onnx.backend import OnnxBackend
from torch_quant.backends.onnx.program.translate import program_of
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.packages import missing_packages
from torch_quant.errors import InvalidConfig

__all__ = ["InProcessBackend"]

_LARGEST = 2**31 - 2**20
"""Bytes of weights above which a program does not go through protobuf in one piece."""


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
    meant: ClassVar[str] = "backend='onnx'"
    package: ClassVar[str]
    """The name of the runtime's package."""

    not_recorded = (
        "its graphs run outside of PyTorch, so they cannot be traced, compiled or exported. "
        "quantizer.quantize(model, backend=...) for a backend of PyTorch's own can, with the same "
        "calibration; export_onnx writes the file that runs here"
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

    def session(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Made:
        program = program_of(graph, tensors)
        shapes = [value.shape for value in program.model.graph.inputs]
        return Made(_loaded(self, program), fixed_sizes(graph, shapes))

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
