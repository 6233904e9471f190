"""Give zeros around an image to the convolution that reads them, also more of them on one side.

PyTorch's convolutions pad both sides alike, ONNX's each by itself; so this waits for the file.
"""

from __future__ import annotations

from typing import Any

from torch_quant.backends.onnx.program.nodes import producer

__all__ = ["take_padding"]


def take_padding(graph: Any, conv: Any) -> None:
    """Let a convolution read what is before a ``Pad`` with zeros, quantized in between or not.

    A zero has a code on every grid, so padding and rounding may change places. Where what is padded
    was on the very same grid, it is not rounded again.

    Args:
        graph: of ``onnx_ir``.
        conv: a ``Conv`` node in it.
    """
    import onnx_ir as ir

    real = _alone(conv.inputs[0], "DequantizeLinear")
    codes = None if real is None else _alone(real.inputs[0], "QuantizeLinear")
    padded = conv.inputs[0] if codes is None else codes.inputs[0]
    pad = producer(padded, "Pad")
    sides = None if pad is None else _sides(pad)
    given = {key: conv.attributes[key].value for key in conv.attributes}
    if pad is None or sides is None or given.get("auto_pad", "NOTSET") != "NOTSET":
        return
    dims = len(sides) // 2 - 2
    begins, ends = sides[: dims + 2], sides[dims + 2 :]
    if any((*begins[:2], *ends[:2])) or not any(sides):
        return
    before = given.get("pads", [0] * 2 * dims)
    both = [*begins[2:], *ends[2:]]
    conv.attributes["pads"] = ir.AttrInt64s(
        "pads", [a + b for a, b in zip(before, both, strict=True)]
    )
    x = pad.inputs[0]
    origin = producer(x, "DequantizeLinear")
    if codes is None or (origin is not None and origin.inputs[1:] == codes.inputs[1:]):
        conv.replace_input_with(0, x)
    else:
        codes.replace_input_with(0, x)
        codes.outputs[0].shape = conv.inputs[0].shape = x.shape
    for node in (real, codes, pad):
        if (
            node is not None
            and not node.outputs[0].uses()
            and not node.outputs[0].is_graph_output()
        ):
            graph.remove(node, safe=True)


def _alone(value: Any, op_type: str) -> Any | None:
    """The node of that type that makes ``value``, if nothing else reads it."""
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return producer(value, op_type) if alone else None


def _sides(pad: Any) -> list[int] | None:
    """What a ``Pad`` adds: before each dimension, then behind each; None if that is no zeros."""
    mode = pad.attributes["mode"].value if "mode" in pad.attributes else "constant"
    _, amounts, value, axes = [*pad.inputs, None, None][:4]
    if mode != "constant" or axes is not None or amounts.const_value is None:
        return None
    if value is not None and (value.const_value is None or value.const_value.numpy().any()):
        return None
    sides = [int(each) for each in amounts.const_value.numpy()]
    return sides if min(sides) >= 0 else None
