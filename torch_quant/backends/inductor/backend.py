"""Graphs that PyTorch's compiler fuses into C++: no Python between their operators."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, fx

from torch_quant.backends.base import Backend, register_backend
from torch_quant.backends.convolutions import right_convolutions
from torch_quant.backends.in_process import InProcess, Made, fixed_sizes
from torch_quant.backends.inductor.convolutions import plain_convolutions, wants_one_size
from torch_quant.backends.inductor.packages import (
    PackagedSession,
    compile_package,
    planned_products,
)
from torch_quant.backends.inductor.products import PRODUCTS
from torch_quant.backends.inductor.shared import scales_apart
from torch_quant.backends.inductor.sizes import (
    agrees,
    has_one_within,
    is_empty_within,
    nothing_is_empty,
    widened,
)
from torch_quant.backends.inductor.sums import sums_apart
from torch_quant.backends.inductor.windows import narrow_windows
from torch_quant.backends.onednn.backend import accepted_weight, missing_kernels, pad_codes
from torch_quant.convert.exporting import exported_at_once, input_shapes
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.packages import missing_compiler
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, UnsupportedOp
from torch_quant.passes.base import PassContext, run_passes
from torch_quant.passes.decomposed import to_decomposed
from torch_quant.passes.embeddings import embedding_forms
from torch_quant.passes.fold_scales import fold_scales
from torch_quant.passes.unsigned import unsigned_activations

__all__ = ["InductorBackend"]

logger = logging.getLogger("torch_quant")


@register_backend
class InductorBackend(Backend):
    """Graphs compiled ahead of time by AOTInductor, with oneDNN's int8 products in them.

    A graph is compiled at its first call, which takes 5 to 60 seconds, and needs a C++ compiler.
    What stands between the products is fused; attention is PyTorch's own, in float.
    ``torch_quant.export_inductor`` writes what runs here as a file that needs no Python.

    Args:
        dynamic: True: sizes stay free that the model leaves free, and one code serves all; False:
            each size is compiled for itself, 8 at most; None: each size where a convolution wants
            its weight packed for one, as the kernel would pack it again at each call.
        settings: of Inductor, by its own names, ``{"max_autotune": True}``; they go before those
            chosen here.

    >>> InductorBackend(settings={"max_autotune": True}).has_options
    True
    """

    name = "inductor"
    priority = -5  # compiling takes its time: for those who ask for it
    one_graph = True
    compiles = True
    fixes_numbers = False
    meant: ClassVar[str] = "ReferenceBackend(Backend.INDUCTOR)"
    not_in_torchscript = (
        "a process that loads the file does not know its operators: export_inductor(...) writes a "
        "package that needs none"
    )

    def __init__(
        self, *, dynamic: bool | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        if dynamic is not None and not isinstance(dynamic, bool):
            raise InvalidConfig(
                f"InductorBackend(dynamic={dynamic!r}): expected True, False or None"
            )
        if settings is not None and not isinstance(settings, Mapping):
            raise InvalidConfig(
                f"InductorBackend(settings={settings!r}): expected Inductor's settings by name, "
                '{"max_autotune": True}'
            )
        self.dynamic, self.settings = dynamic, dict(settings or {})

    def unavailable(self) -> str | None:
        return missing_kernels() or missing_compiler()

    def _kernels(self) -> KernelTable:
        activation, weight = Accepts(QuantSpec()), accepted_weight()
        products = [Kernel(each, activation, weight) for each in PRODUCTS]
        return KernelTable(self.name, (*products, Kernel("embedding", None, weight)))

    def lower(self, context: PassContext) -> fx.GraphModule:
        run_passes(
            context,
            (
                fold_scales,
                unsigned_activations,
                pad_codes,
                right_convolutions,
                plain_convolutions,
                scales_apart,
                embedding_forms,
                to_decomposed,
                sums_apart,
            ),
        )
        return context.gm

    def compile(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        return InProcess(self, graph)

    def session(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Made:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph.pt2"
            exported = self.package(graph, tensors, file)
            fixed = fixed_sizes(graph, input_shapes(exported))
            return Made(PackagedSession(file), fixed, nothing_is_empty(exported))

    def fixes_sizes(self, graph: QuantizedGraph) -> bool:
        """Whether a lowered graph is compiled for the sizes of one call."""
        return wants_one_size(graph.body) if self.dynamic is None else not self.dynamic

    def package(
        self,
        graph: QuantizedGraph,
        tensors: tuple[Tensor, ...],
        file: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> Any:
        """Compile a graph into a file.

        Args:
            graph: that :meth:`lower` made.
            tensors: an example of its inputs.
            file: where to write.
            metadata: kept in the file.

        Returns:
            The program that was compiled.

        Raises:
            UnsupportedOp: the graph cannot be exported or compiled; says why.
        """
        if not self.fixes_sizes(graph):
            exported = self._with_free_sizes(graph, tensors, file, metadata)
            if exported is not None:
                return exported
        try:
            exported = exported_at_once(graph, tensors, "static")
        except Exception as error:  # torch.export raises errors of many unrelated classes
            raise UnsupportedOp(f"torch.export does not take it: {error}") from error
        if is_empty_within(exported):
            raise UnsupportedOp("a tensor within it has no element at these sizes")
        self._compile(graph, exported, file, metadata)
        return exported

    def _with_free_sizes(
        self,
        graph: QuantizedGraph,
        tensors: tuple[Tensor, ...],
        file: Path,
        metadata: Mapping[str, str] | None,
    ) -> Any:
        """The program, compiled; None if it cannot be with all sizes free that the graph leaves."""
        for wide in widened(graph, tensors):
            exported = _exported_with_free_sizes(graph, wide)
            if exported is None:
                return None
            if has_one_within(exported):
                continue
            try:
                self._compile(graph, exported, file, metadata)
            except UnsupportedOp:  # said of a size, if that cannot be compiled either
                return None
            session = PackagedSession(file)
            right = all(agrees(session, graph, each) for each in (wide, tensors))
            return exported if right else None
        return None

    def _compile(
        self, graph: QuantizedGraph, exported: Any, file: Path, metadata: Mapping[str, str] | None
    ) -> None:
        narrow_windows(exported)
        what = f"a graph of {graph.contract.describe()}"
        settings = {**self.settings, "aot_inductor.metadata": dict(metadata or {})}
        fused = compile_package(exported, file, settings, what)
        planned = planned_products(graph.body)
        if fused < planned:
            logger.warning(
                "%r: %d of %d products of %s run in float, since Inductor found no int8 form",
                self,
                planned - fused,
                planned,
                what,
            )

    @property
    def has_options(self) -> bool:
        return bool(self.settings) or self.dynamic is not None

    def __repr__(self) -> str:
        given = {"dynamic": self.dynamic, "settings": self.settings or None}
        told = ", ".join(f"{name}={x!r}" for name, x in given.items() if x is not None)
        return f"{super().__repr__()} with {told}" if told else super().__repr__()


def _exported_with_free_sizes(graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Any:
    """The program of a graph, None if it has not all sizes free that the graph leaves."""
    for mode in ("oblivious", "dynamic"):
        try:
            exported = exported_at_once(graph, tensors, mode)
        except Exception:  # torch.export's own; each size is exported for itself then
            continue
        if not fixed_sizes(graph, input_shapes(exported)):
            return exported
    return None
