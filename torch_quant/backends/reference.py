"""The quantized graph in float arithmetic: on any device, the yardstick of every kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from torch_quant.backends.base import Backend, register_backend
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.ops import OPERATORS
from torch_quant.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, FAKE_QUANTIZE, QUANTIZE
from torch_quant.passes.base import PassContext

__all__ = ["ReferenceBackend", "symmetric_weight"]

aten = torch.ops.aten


def symmetric_weight(bits: int = 8) -> QuantSpec:
    """Signed, per-channel, zero point 0: the weight format of every int8 kernel."""
    return QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)


@register_backend
class ReferenceBackend(Backend):
    """Quantize/dequantize in float; weights are kept as integers.

    Args:
        simulates: another backend, whose very graphs are computed; by default, every op of the
            table is quantized.
    """

    name = "reference"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})

    def __init__(self, simulates: Backend | None = None) -> None:
        self._simulates = simulates

    def unavailable(self) -> str | None:
        return None

    def kernels(self) -> KernelTable:
        return super().kernels() if self._simulates is None else self._simulates.kernels()

    def _kernels(self) -> KernelTable:
        activation, weight = Accepts(QuantSpec()), Accepts(symmetric_weight())
        return KernelTable(self.name, tuple(Kernel(op, activation, weight) for op in OPERATORS))

    def lower(self, context: PassContext) -> fx.GraphModule:
        if self._simulates is None:
            self.emit(context)
        graph = context.graph
        for node in list(graph.nodes):
            if node.target is QUANTIZE:
                _fake_quantize(node)
            elif node.target in (DEQUANTIZE, DEQUANTIZE_CHANNEL):
                if node.args[0].op == "get_attr":
                    _plain_dequantize(node)  # integers in a buffer
                else:
                    node.replace_all_uses_with(node.args[0])  # float already, see _fake_quantize
                    graph.erase_node(node)
        return context.gm


def _fake_quantize(node: fx.Node) -> None:
    x, scale, zero_point, low, high, _ = node.args
    node.target = FAKE_QUANTIZE
    node.args = (x, scale, zero_point, low, high)


def _plain_dequantize(node: fx.Node) -> None:
    """A weight's dequantization in standard operators, which any compiler can fold."""
    graph = node.graph
    codes, scale, zero_point, *axis = node.args
    assert isinstance(codes, fx.Node)
    with graph.inserting_before(node):
        if axis:
            rank = _rank(codes)
            shape = [1] * rank
            shape[int(axis[0])] = -1  # type: ignore[arg-type]
            scale = graph.call_function(aten.reshape.default, (scale, shape))
            zero_point = graph.call_function(aten.reshape.default, (zero_point, shape))
        wide = graph.call_function(aten.to.dtype, (codes, torch.float32))
        centred = graph.call_function(aten.sub.Tensor, (wide, zero_point))
        real = graph.call_function(aten.mul.Tensor, (centred, scale))
    node.replace_all_uses_with(real)
    graph.erase_node(node)


def _rank(node: fx.Node) -> int:
    module = node.graph.owning_module
    assert module is not None
    return int(module.get_buffer(str(node.target)).dim())
