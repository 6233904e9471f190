"""onnxruntime's kernels against the reference, operator by operator, on the same integers.

Every tensor that the file quantizes is read out of onnxruntime while it runs the fused graph. The
reference then computes the model and, at each of these tensors, first compares what it would have
quantized with what onnxruntime has, and then goes on from onnxruntime's: an error of one operator
is not carried to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flows import Inputs
from onnx_files import feeds, session
from torch import Tensor, fx
from torch.nn.functional import pad

from torch_quant import Backend
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.elements import element_type
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import flatten_call
from torch_quant.ops.qdq import FAKE_QUANTIZE

__all__ = ["Steps", "compare_steps"]

aten = torch.ops.aten
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


@dataclass(frozen=True)
class Steps:
    """How far onnxruntime is from the reference.

    Args:
        apart: by quantized tensor, the largest difference of two codes.
        error: by quantized tensor, how far at most the reference's real value lies outside of the
            interval that rounds to onnxruntime's code, in steps.
        outputs: of the reference, computed from onnxruntime's integers, and of the file.
    """

    apart: dict[str, int]
    error: dict[str, float]
    outputs: tuple[list[Tensor], list[Tensor]]


@dataclass
class _Codes:
    """A quantized tensor as onnxruntime has it."""

    name: str
    values: Tensor
    scale: float
    zero_point: int
    blocks: bool = False
    used: bool = False

    def shaped(self, shape: torch.Size) -> Tensor | None:
        """The values in that shape, None if they are others.

        A linear layer's rows are two-dimensional in the file; an image may lie in blocks of 2 x 2
        pixels, the last of which are filled up.
        """
        values = self.values
        if self.blocks and len(shape) == 4:
            batch, _, high, wide = values.shape
            split = values.reshape(batch, 2, 2, -1, high, wide).permute(0, 3, 4, 1, 5, 2)
            image = split.reshape(batch, -1, 2 * high, 2 * wide)
            values = image[:, :, : shape[2], : shape[3]]
        return values.reshape(shape) if values.numel() == shape.numel() else None


def compare_steps(
    file: Path, quant_model: QuantizedModule, simulation: QuantizedModule, inputs: Inputs
) -> Steps:
    """Run ``inputs`` in onnxruntime and, from its integers, in the reference.

    Args:
        file: exported of ``quant_model``.
        quant_model: for ONNX.
        simulation: the same model on the reference backend with the kernels of ONNX.
        inputs: of any sizes that both serve.
    """
    feed = feeds(quant_model, inputs)
    outputs, codes = _read_out(file, feed)
    call = flatten_call(*bind(simulation.signature, *inputs))
    (graph,) = simulation.graphs
    assert isinstance(graph, QuantizedGraph)
    graph.contract.check(call)
    reference = _FromCodes(graph.body, codes)
    with torch.no_grad():
        leaves = reference.run(*call.tensors)
    assert all(each.used for each in codes)
    expected = [x for x in leaves if isinstance(x, Tensor)]
    return Steps(reference.apart, reference.error, (expected, outputs))


def _read_out(file: Path, feed: dict[str, Any]) -> tuple[list[Tensor], list[_Codes]]:
    """Outputs and all quantized tensors; that they are read changes neither kernels nor outputs."""
    import onnx

    model = onnx.load(file)
    known = {each.name for each in model.graph.input}
    feed = {name: x for name, x in feed.items() if name in known}
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    described = {value.name: value for value in model.graph.value_info}
    types = {x.name: x.data_type for x in model.graph.initializer}
    for node in quantizers:
        name, dtype = node.output[0], types[node.input[2]]
        unknown = onnx.helper.make_tensor_value_info(name, dtype, [None] * 4)
        model.graph.output.append(described.get(name, unknown))
    probed = file.with_suffix(".probed.onnx")
    onnx.save(model, probed)
    kernels = [
        [(site.name, site.kernel) for site in Backend.ONNX.verify(each).sites]
        for each in (file, probed)
    ]
    assert kernels[0] == kernels[1]
    plain = session(file).run(None, feed)
    found = session(probed).run(None, feed)
    outputs = [torch.from_numpy(x) for x in found[: len(plain)]]
    for x, y in zip(plain, outputs, strict=True):
        assert torch.equal(torch.from_numpy(x).nan_to_num(), y.nan_to_num())
    blocks = {x for node in model.graph.node if node.op_type == "SpaceToDepth" for x in node.output}
    codes = [
        _Codes(
            node.output[0],
            torch.from_numpy(x),
            *(constants[i].item() for i in node.input[1:3]),
            blocks=node.input[0] in blocks,
        )
        for node, x in zip(quantizers, found[len(plain) :], strict=True)
    ]
    return outputs, codes


class _FromCodes(fx.Interpreter):
    """The reference's graph, with ``codes`` in place of what it quantizes."""

    def __init__(self, body: fx.GraphModule, codes: list[_Codes]) -> None:
        super().__init__(body)
        self.codes = codes
        self.apart: dict[str, int] = {}
        self.error: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not FAKE_QUANTIZE:
            return result
        (x, scale_of_x, zero_point_of_x, element), _ = self.fetch_args_kwargs_from_env(n)
        scale, zero_point = float(scale_of_x), int(zero_point_of_x)
        kind = element_type(element)
        source: Any = n.args[0]
        if source.target in _PADS and not self._fitting(scale, zero_point, x.shape):
            # The convolution behind it pads, in the file.
            sides = source.args[1]
            sizes = list(x.shape)
            for i in range(0, len(sides), 2):
                sizes[-1 - i // 2] -= sides[i] + sides[i + 1]
            found, values = self._find(scale, zero_point, torch.Size(sizes))
            values = pad(values, sides, value=zero_point)
        else:
            found, values = self._find(scale, zero_point, x.shape)
        if source.target is aten._safe_softmax.default:
            # Of queries without any key the file computes something, and multiplies it by 0.
            dead = (x == 0).all(-1, keepdim=True)
            values = torch.where(dead, zero_point, values)
        exact = (x.double() / scale + zero_point).clamp(kind.quant_min, kind.quant_max)
        distance = (exact - values).abs()
        codes = (result / scale).round().to(torch.int32) + zero_point
        self.apart[found.name] = int((codes - values).abs().max())
        self.error[found.name] = float((distance - 0.5).clamp(min=0).max())
        return (values - zero_point).to(torch.float32) * scale

    def _fitting(
        self, scale: float, zero_point: int, shape: torch.Size
    ) -> list[tuple[_Codes, Tensor]]:
        """All tensors of that grid and shape."""
        return [
            (each, values.to(torch.int32))
            for each in self.codes
            if each.zero_point == zero_point
            and abs(each.scale / scale - 1) < 1e-6
            and (values := each.shaped(shape)) is not None
        ]

    def _find(self, scale: float, zero_point: int, shape: torch.Size) -> tuple[_Codes, Tensor]:
        """The next tensor of that grid and its values; equal tensors may be one in the file."""
        fitting = self._fitting(scale, zero_point, shape)
        found = next((pair for pair in fitting if not pair[0].used), fitting[-1])
        found[0].used = True
        return found
