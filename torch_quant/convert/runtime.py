"""What building a quantized model asks of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, fx

from torch_quant.core.kernels import KernelTable
from torch_quant.passes.base import PassContext

if TYPE_CHECKING:
    from torch_quant.convert.quantized_graph import QuantizedGraph

__all__ = ["Runtime"]


class Runtime(Protocol):
    """Where lowered graphs run: every :class:`~torch_quant.backends.Backend` is one."""

    name: ClassVar[str]
    compiles: ClassVar[bool]
    fixes_numbers: ClassVar[bool]
    not_recorded: ClassVar[str]

    def kernels(self) -> KernelTable:
        """What it can run quantized on this machine."""

    def lower(self, context: PassContext) -> fx.GraphModule:
        """Put a graph with quantize/dequantize pairs on its kernels."""

    def compile(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """What to call in the place of a lowered graph, if it ``compiles``."""

    def record(self, body: fx.GraphModule, tensors: tuple[Tensor, ...]) -> Any:
        """Run a lowered graph while ``torch.jit.trace`` records it."""
