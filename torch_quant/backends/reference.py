"""The quantized graph in float arithmetic: on any device, the yardstick of every kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from torch_quant.backends.base import Backend, register_backend
from torch_quant.backends.int8 import symmetric_weight
from torch_quant.core.elements import element_type
from torch_quant.core.granularity import PerTensor, PerToken, split_blocks
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.spec import QuantSpec
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import DECODE, DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE
from torch_quant.ops.table import OPERATORS, OpPattern
from torch_quant.passes.base import PassContext

__all__ = ["ReferenceBackend"]

aten = torch.ops.aten


@register_backend
class ReferenceBackend(Backend):
    """Quantize/dequantize in float; weights are kept as integers.

    Args:
        simulates: another backend or its name, whose very graphs are computed; by default, every
            op of the table is quantized.

    Raises:
        InvalidConfig: there is no backend of that name.
    """

    name = "reference"
    has_kernels = False
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})

    def __init__(self, simulates: str | Backend | None = None) -> None:
        self._simulates = None if simulates is None else Backend.get(simulates)

    def unavailable(self) -> str | None:
        return None

    def kernels(self) -> KernelTable:
        return super().kernels() if self._simulates is None else self._simulates.kernels()

    def _kernels(self) -> KernelTable:
        rows = [row for op, pattern in OPERATORS.items() for row in _known(op, pattern)]
        return KernelTable(self.name, tuple(rows))

    def lower(self, context: PassContext) -> fx.GraphModule:
        if self._simulates is None:
            self.emit(context)
        graph = context.graph
        for node in list(graph.nodes):
            if node.target is QUANTIZE:
                node.target = FAKE_QUANTIZE
            elif node.target is DEQUANTIZE and argument(node, "q").op == "get_attr":
                _plain_dequantize(node)  # integers in a buffer
            elif node.target is DEQUANTIZE:
                node.replace_all_uses_with(argument(node, "q"))  # float already
                graph.erase_node(node)
        return context.gm


_KNOWN: dict[str, tuple[OpPattern, list[Kernel]]] = {}


def _known(op: str, pattern: OpPattern) -> list[Kernel]:
    """:func:`_rows`, which take longer than all else of a plan; registering may replace a row."""
    row, kernels = _KNOWN.get(op, (None, []))
    if row is not pattern:
        kernels = _rows(op, pattern)
        _KNOWN[op] = pattern, kernels
    return kernels


def _rows(op: str, pattern: OpPattern) -> list[Kernel]:
    """How an operator is computed."""
    weight = Accepts(symmetric_weight(), any_format=True, floats=True)
    if pattern.any_format:
        return [Kernel(op, _activations(pattern), weight, row_scales=bool(pattern.internals))]
    found = []
    if pattern.static:
        found.append(Accepts(QuantSpec(), floats=True))
    if pattern.steps:
        tokens = QuantSpec.of("uint8", granularity=PerToken(), dynamic=True)
        found.append(
            Accepts(
                tokens,
                lambda spec: spec.dynamic and spec.granularity in (PerToken(), PerTensor()),
                "activations have a scale per token, or one for all of a step, chosen at each call",
                any_format=True,
                floats=True,
                dynamic=True,
            )
        )
    return [Kernel(op, each, Accepts(symmetric_weight(), floats=True)) for each in found]


def _activations(pattern: OpPattern) -> Accepts:
    """What an operator takes: more scales than one where each is of all that is summed up together.

    That is a token, or a group, of what a weight's rows are multiplied with, and a token of a
    product of activations.
    """
    wants = "activations have one scale for the whole tensor"
    if pattern.smoothable:
        fits = _static_or_dynamic
        wants = f"{wants}, or dynamic ones for tokens or groups"
    elif pattern.columns is not None:
        fits = _static_or_tokens
        wants = f"{wants}, or dynamic ones for tokens"
    else:
        fits = _one_scale
    return Accepts(QuantSpec(), fits, wants, any_format=True, floats=True, dynamic=True)


def _one_scale(spec: QuantSpec) -> bool:
    return spec.per_tensor


def _static_or_dynamic(spec: QuantSpec) -> bool:
    return spec.per_tensor or spec.dynamic


def _static_or_tokens(spec: QuantSpec) -> bool:
    return spec.per_tensor or (spec.dynamic and isinstance(spec.granularity, PerToken))


def _plain_dequantize(node: fx.Node) -> None:
    """A weight's dequantization in standard operators, which any compiler can fold."""
    graph, call = node.graph, node.graph.call_function
    codes, scale, zero_point, name = arguments(node).values()
    element = element_type(str(name))
    whole = _buffer(codes).shape
    split, blocks = split_blocks(_buffer(codes), _buffer(scale).shape)
    with graph.inserting_before(node):
        if blocks != _buffer(scale).shape:
            scale = call(aten.reshape.default, (scale, list(blocks)))
            zero_point = call(aten.reshape.default, (zero_point, list(blocks)))
        if element.casts:
            real = call(aten.to.dtype, (codes, torch.float32))
        else:
            real = call(DECODE, (codes, element.name))
        if split.shape != whole:
            real = call(aten.reshape.default, (real, list(split.shape)))
        if element.integer:
            real = call(aten.sub.Tensor, (real, zero_point))
        real = call(aten.mul.Tensor, (real, scale))
        if split.shape != whole:
            real = call(aten.reshape.default, (real, list(whole)))
    node.replace_all_uses_with(real)
    graph.erase_node(node)


def _buffer(node: Any) -> Tensor:
    return node.graph.owning_module.get_buffer(str(node.target))  # type: ignore[no-any-return]
