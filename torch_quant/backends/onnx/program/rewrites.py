"""The last touches on an exported ONNX model: the same numbers by operators that run faster.

Or that both readers run right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from torch_quant.backends.onnx.program.axes import kept_axes, second_axis, split_rows
from torch_quant.backends.onnx.program.nodes import producer
from torch_quant.backends.onnx.program.pads import take_padding
from torch_quant.backends.onnx.program.sizes import hidden_size, whole_windows

__all__ = ["rewrite"]

_FEW = 4
"""Channels of an image, at most. With more, what a kernel reads of a row is long enough."""


def rewrite(model: Any) -> None:
    """Change an ``onnx_ir`` model in place."""
    _own_constants(model.graph)
    for node in list(model.graph):
        if node.op_type == "LayerNormalization":
            _sum_before(node)
        elif node.op_type == "Conv":
            take_padding(model.graph, node)
            _space_to_depth(model.graph, node)
        elif node.op_type == "AveragePool":
            whole_windows(model.graph, node)
        elif node.op_type == "Shape":
            hidden_size(model.graph, node)
        elif node.op_type.startswith("Reduce"):
            kept_axes(model.graph, node)
        elif node.op_type == "Gemm":
            split_rows(model.graph, node)
        elif node.op_type == "DFT":
            second_axis(model.graph, node)
    _drop_unread(model.graph)


def _own_constants(graph: Any) -> None:
    """Give the graph constants that nodes read and it has not.

    onnxscript's optimizer makes one operator of a maximum and a minimum behind it, and names its
    bounds by what is clipped. Where that is clipped twice, it forgets the first bounds.
    """
    for node in graph:
        for value in node.inputs:
            known = value is None or value.producer() is not None or value.is_graph_input()
            if known or value.const_value is None or graph.initializers.get(value.name) is value:
                continue
            name, count = value.name, 0
            while value.name in graph.initializers:
                count += 1
                value.name = f"{name}_{count}"
            graph.initializers[value.name] = value


def _drop_unread(graph: Any) -> None:
    """Take out constants that nothing reads any more."""
    for value in list(graph.initializers.values()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[value.name]


def _sum_before(norm: Any) -> None:
    """Write the residual sum before a layer norm as ``Sum``, which computes what ``Add`` does.

    onnxruntime puts ``Add`` and the norm together into one operator whose CPU kernel takes eight
    times as long as both (MiniLM, 8 x 128: 1.6 ms against 0.2, twelve times).
    """
    before = producer(norm.inputs[0], "Add")
    if before is not None:
        before.op_type = "Sum"


@dataclass
class _Stem:
    """A convolution with stride 2 over a quantized image.

    Args:
        image: before it is quantized.
        quantize: makes integers of it.
        weight: dequantizes its weight, of shape ``(outputs, channels, height, width)``.
        begins, ends: padding, in pixels, of height and width.
        even: whether the image sizes are known to be even.
    """

    image: Any
    quantize: Any
    weight: Any
    begins: list[int]
    ends: list[int]
    even: bool

    @classmethod
    def of(cls, conv: Any) -> _Stem | None:
        """None for any other convolution."""
        x, weight = (producer(value, "DequantizeLinear") for value in conv.inputs[:2])
        quantize = None if x is None else producer(x.inputs[0], "QuantizeLinear")
        if quantize is None or weight is None or len(weight.inputs) < 3:
            return None
        if any(value is None or value.const_value is None for value in weight.inputs):
            return None
        image, taps, attributes = quantize.inputs[0], weight.inputs[0].shape, conv.attributes
        if image.shape is None or len(taps) != 4 or taps[1] > _FEW:
            return None
        wanted = {"strides": (2, 2), "dilations": (1, 1), "group": 1, "auto_pad": "NOTSET"}
        usual = wanted | {"strides": (1, 1)}
        if any(_value(attributes, key, usual[key]) != wanted[key] for key in wanted):
            return None
        pads = list(_value(attributes, "pads", (0, 0, 0, 0)))
        even = all(isinstance(size, int) and size % 2 == 0 for size in image.shape[2:])
        stem = cls(image, quantize, weight, pads[:2], pads[2:], even)
        return stem if min(stem.ends_in_blocks) >= 0 and (even or stem.any_size) else None

    @property
    def kernel(self) -> tuple[int, int]:
        height, width = self.weight.inputs[0].shape[2:]
        return int(height), int(width)

    @property
    def blocks(self) -> list[int]:
        """Height and width of the kernel in blocks, the first of which may hold padding only."""
        both = zip(self.kernel, self.begins, strict=True)
        return [(size + begin % 2 + 1) // 2 for size, begin in both]

    @property
    def begins_in_blocks(self) -> list[int]:
        return [(begin + 1) // 2 for begin in self.begins]

    @property
    def _missing(self) -> list[int]:
        """How much shorter than the padded image the kernel's way over it is."""
        sides = zip(self.begins, self.ends, self.kernel, strict=True)
        return [begin + end - size for begin, end, size in sides]

    @property
    def ends_in_blocks(self) -> list[int]:
        """What gives as many positions as before over an even size; none if negative."""
        sides = zip(self._missing, self.blocks, self.begins_in_blocks, strict=True)
        return [missing // 2 + size - begin for missing, size, begin in sides]

    @property
    def any_size(self) -> bool:
        """Whether an odd size has as many positions as the even one above it."""
        return all(missing % 2 for missing in self._missing)

    def weight_in_blocks(self) -> Any:
        """Shape ``(outputs, 4 channels, height, width)``, in the order of ``SpaceToDepth``."""
        taps = self.weight.inputs[0].const_value.numpy()
        (outputs, channels), (high, wide) = taps.shape[:2], self.blocks
        zero = self.weight.inputs[2].const_value.numpy().reshape(-1, 1, 1, 1).astype(taps.dtype)
        filled = np.broadcast_to(zero, (outputs, channels, 2 * high, 2 * wide)).copy()
        (top, left), (height, width) = (begin % 2 for begin in self.begins), self.kernel
        filled[:, :, top : top + height, left : left + width] = taps
        split = filled.reshape(outputs, channels, high, 2, wide, 2)
        return split.transpose(0, 3, 5, 1, 2, 4).reshape(outputs, 4 * channels, high, wide)


def _value(attributes: Any, key: str, usual: Any) -> Any:
    if key not in attributes:
        return usual
    value = attributes[key].value
    return tuple(value) if isinstance(usual, tuple) else value


def _space_to_depth(graph: Any, conv: Any) -> None:
    """Let a convolution with stride 2 over an image read blocks of 2 x 2 pixels, with stride 1.

    onnxruntime gathers what a position of the kernel reads row by row, a few bytes each, and that
    takes longer than the products. Blocks make half as many rows, twice as long (224 x 224 pixels,
    one thread: ResNet-50's 7 x 7 kernel 953 -> 504 us, MobileNetV2's 3 x 3 289 -> 124; forming the
    blocks: 50). The kernel is laid out in blocks too, with zeros where they hold more taps than it.
    The integers that come out are the same. Sizes that may be odd are filled up to even ones.
    Blocks are formed before the image is quantized: onnxruntime before 1.28 forms none of integers.
    """
    import onnx_ir as ir

    stem = _Stem.of(conv)
    if stem is None:
        return
    tape, image, old = ir.tape.Tape(), stem.image, conv.inputs[0].producer()
    names = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    names |= {value.name for node in graph for value in node.outputs}

    def constant(role: str, value: Any) -> Any:
        name = f"{conv.outputs[0].name}_{role}"
        while name in names:
            name += "_"
        return tape.initializer(ir.tensor(value), name)

    if not stem.even:
        sizes = tape.op("Shape", [image], {"start": 2})
        odd = tape.op("Mod", [sizes, constant("block_size", np.array([2]))])
        before = constant("before", np.zeros(6, np.int64))
        image = tape.op("Pad", [image, tape.op("Concat", [before, odd], {"axis": 0})])
    blocks = tape.op("SpaceToDepth", [image], {"blocksize": 2})
    codes = tape.op("QuantizeLinear", [blocks, *stem.quantize.inputs[1:]])
    real = tape.op("DequantizeLinear", [codes, *old.inputs[1:]])
    weight = constant("weight_in_blocks", stem.weight_in_blocks())
    attributes = {key: each.value for key, each in stem.weight.attributes.items()}
    kernel = tape.op("DequantizeLinear", [weight, *stem.weight.inputs[1:]], attributes)
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    graph.insert_before(conv, tape.nodes)
    conv.replace_input_with(0, real)
    conv.replace_input_with(1, kernel)
    pads = [*stem.begins_in_blocks, *stem.ends_in_blocks]
    for key, value in {"kernel_shape": stem.blocks, "strides": [1, 1], "pads": pads}.items():
        conv.attributes[key] = ir.AttrInt64s(key, value)
    for node in (old, stem.quantize, stem.weight):
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
