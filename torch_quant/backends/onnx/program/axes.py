"""Forms in which OpenVINO 2026.4 takes the axes of an operator right; see ``docs/onnx.md``."""

from __future__ import annotations

from typing import Any

import numpy as np

from torch_quant.backends.onnx.program.nodes import constant

__all__ = ["kept_axes", "second_axis", "split_rows"]

_LEAST = 1e-30
"""It changes no number, and OpenVINO does not take it for 0, which it drops."""
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")


def kept_axes(graph: Any, reduction: Any) -> None:
    """Reduce to sizes of 1, and take these out in a step of their own.

    OpenVINO puts a factor or a sum of each channel, and rounding, into the reduction before them.
    Where that takes its axes out, it counts channels by another one: a mean over tokens, a batch
    norm and a quantizer are off by half of their range.

    Args:
        graph: of ``onnx_ir``.
        reduction: a node in it.
    """
    import onnx_ir as ir

    keeps = reduction.attributes.get("keepdims")
    result = reduction.outputs[0]
    if keeps is None or keeps.value or len(reduction.inputs) < 2 or reduction.inputs[1] is None:
        return
    if result.is_graph_output() or getattr(result.dtype, "name", "") not in _FLOATS:
        return
    tape = ir.tape.Tape()
    _put_behind(graph, tape, result, tape.op("Squeeze", [result, reduction.inputs[1]]))
    reduction.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
    result.shape = None


def second_axis(graph: Any, transform: Any) -> None:
    """Transform along axis 1, which the axis in question changes places with.

    From opset 20 on, the axis of ``DFT`` is an input. OpenVINO does not read it and takes 1, which
    was usual before.

    Args:
        graph: of ``onnx_ir``.
        transform: a ``DFT`` node in it.
    """
    import onnx_ir as ir

    x = transform.inputs[0]
    axis = transform.inputs[2] if len(transform.inputs) > 2 else None
    if x is None or x.shape is None or axis is None or axis.const_value is None:
        return
    rank = len(x.shape)
    place = int(axis.const_value.numpy()) % rank
    if place == 1:
        return
    order = list(range(rank))
    order[1], order[place] = place, 1
    tape, result = ir.tape.Tape(), transform.outputs[0]
    before = tape.op("Transpose", [x], {"perm": order})
    one = constant(graph, tape, f"{result.name}_axis", np.array(1, np.int64))
    kept = {key: transform.attributes[key].value for key in transform.attributes}
    found = tape.op("DFT", [before, transform.inputs[1], one], kept)
    after = tape.op("Transpose", [found], {"perm": order})
    after.shape, after.type, after.name = result.shape, result.type, result.name
    graph.insert_before(transform, tape.nodes)
    ir.convenience.replace_all_uses_with(result, after, replace_graph_outputs=True)
    graph.remove(transform, safe=True)


def split_rows(graph: Any, product: Any) -> None:
    """Add next to nothing to a product whose rows are split into as many as it has outputs.

    OpenVINO takes the scales of the outputs behind the reshaping: ``(rows, 16)`` becomes ``(-1, 16,
    2, 8)``, and as its axis 1 has 16 again, they scale that. A bias between keeps them before.

    Args:
        graph: of ``onnx_ir``.
        product: a ``Gemm`` node in it.
    """
    import onnx_ir as ir

    result = product.outputs[0]
    if len(product.inputs) > 2 or result.shape is None or len(result.shape) != 2:
        return
    outputs = result.shape[1]
    readers = [node for node, _ in result.uses() if node.op_type == "Reshape"]
    shapes = [node.inputs[1].const_value for node in readers if node.inputs[1] is not None]
    split = [shape.numpy().tolist() for shape in shapes if shape is not None]
    if not any(len(shape) > 2 and shape[1] == outputs for shape in split):
        return
    tape = ir.tape.Tape()
    least = np.full(outputs, _LEAST, result.dtype.numpy())
    added = tape.op("Add", [result, constant(graph, tape, f"{result.name}_least", least)])
    _put_behind(graph, tape, result, added)


def _put_behind(graph: Any, tape: Any, value: Any, made: Any) -> None:
    """Have all that reads a value read what was made of it on ``tape``, of the same form."""
    made.shape, made.type = value.shape, value.type
    for node, place in list(value.uses()):
        if node is not made.producer():
            node.replace_input_with(place, made)
    graph.insert_after(value.producer(), tape.nodes)
