"""Forms for what OpenVINO 2026.4 or onnxruntime 1.31 computes wrong; see ``docs/onnx.md``."""

from __future__ import annotations

from typing import Any

import numpy as np

from torch_quant.backends.onnx.program.nodes import constant, producer

__all__ = ["hidden_size", "whole_windows"]

_PASSED = {"QuantizeLinear", "DequantizeLinear", "Relu", "Sigmoid", "Identity", "Dropout"}
"""Operators behind a pool that keep its sizes."""
_LEAST = 1.1754943508222875e-38
"""A padding that both runtimes do not take for 0, which they would make the pool's own again."""
_PRODUCTS = ("Conv", "MatMul", "Gemm", "QuantizeLinear")
"""How operators begin whose results have no grid, or another one."""


def hidden_size(graph: Any, shape: Any) -> None:
    """Read one size of a tensor as a sum over all of its sizes, of which the others count 0.

    OpenVINO follows a size that is picked out, and reads it from any tensor that has it. That may
    be a convolution before its bias is added, which then has two readers, and so the bias is not
    added there but by the quantizer behind it: of the first channel to all of them. It does not
    follow sums. Sizes that are computed with stay, since it would divide them as floats.

    Args:
        graph: of ``onnx_ir``.
        shape: a ``Shape`` node in it.
    """
    import onnx_ir as ir

    x, (size,) = shape.inputs[0], shape.outputs
    if x is None or x.shape is None:
        return
    begin, end = (
        shape.attributes[key].value if key in shape.attributes else usual
        for key, usual in (("start", 0), ("end", len(x.shape)))
    )
    if end - begin != 1 or begin < 0:
        return
    reads = [(node, i) for node, i in size.uses() if node.op_type == "Concat"]
    biased = any(node.op_type.startswith("Conv") and len(node.inputs) > 2 for node in graph)
    if not reads or not biased:
        return
    chosen = np.zeros(len(x.shape), np.int64)
    chosen[begin] = 1
    tape = ir.tape.Tape()
    picked = constant(graph, tape, f"{size.name}_of_all", chosen)
    product = tape.op("Mul", [tape.op("Shape", [x]), picked])
    found = tape.op("ReduceSum", [product], {"keepdims": 1})
    graph.insert_before(shape, tape.nodes)
    for node, i in reads:
        node.replace_input_with(i, found)
    if not size.uses() and not size.is_graph_output():
        graph.remove(shape, safe=True)


def whole_windows(graph: Any, pool: Any) -> None:
    """Write a mean over windows that reach over the image's end so that both runtimes know it.

    PyTorch counts the pixels that a window has, and padding, but nothing behind that. onnxruntime's
    kernel on integers counts all, unless it is told not to count padding; so that is written apart.
    OpenVINO pools codes, and takes padding that is counted for code 0, whatever the zero point is.
    It refuses windows larger than an image of known size, as EfficientNet's, and of free sizes
    gives no value at all. Where no second one fits, they are the image's mean: the sizes of the
    result are 1, or what follows takes them so.
    """
    import onnx_ir as ir

    given = {key: pool.attributes[key].value for key in pool.attributes}
    if given.get("auto_pad", "NOTSET") != "NOTSET":
        return
    if any(given.get("pads", ())) and not _padded_before(graph, pool, given):
        return
    pool.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    result = pool.outputs[0]
    if not given.get("ceil_mode") or result.shape is None:
        return
    if _all_one(result) or _flattened(result):
        pool.op_type = "GlobalAveragePool"
        pool.attributes.clear()
        result.shape = ir.Shape([*result.shape[:2], *(1 for _ in result.shape[2:])])


def _padded_before(graph: Any, pool: Any, given: dict[str, Any]) -> bool:
    """Write the padding that is counted as pixels, as codes where the pool reads codes.

    That keeps OpenVINO's pool on integers. In ``ceil_mode`` both runtimes are as fast, or faster,
    with floats (64 x 56 x 56, onnxruntime: 1209 -> 314 us). Returns whether it was written.
    """
    import onnx_ir as ir

    pads, kernel, over = given["pads"], given["kernel_shape"], given.get("ceil_mode")
    strides = given.get("strides", [1] * len(kernel))
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    inside = all(e + s <= k for e, s, k in zip(ends, strides, kernel, strict=True))
    if not given.get("count_include_pad") or (over and not inside):
        return False  # a window behind all pixels is one that PyTorch leaves out
    real = None if over else _dequantized(pool.inputs[0])
    if not over and not _off_zero(pool.inputs[0]):
        return False
    tape, name = ir.tape.Tape(), f"{pool.outputs[0].name}_padding"
    sizes = constant(graph, tape, name, np.array([0, 0, *begins, 0, 0, *ends]))
    if real is None:
        kind = (pool.inputs[0].dtype or ir.DataType.FLOAT).numpy()
        least = constant(graph, tape, f"{name}_value", np.array(_LEAST).astype(kind))
        padded = tape.op("Pad", [pool.inputs[0], sizes, least])
    else:
        codes, scale, zero_point = real.inputs
        codes = tape.op("Pad", [codes, sizes, zero_point])
        padded = tape.op("DequantizeLinear", [codes, scale, zero_point])
    graph.insert_before(pool, tape.nodes)
    pool.replace_input_with(0, padded)
    pool.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    if real is not None and not real.outputs[0].uses() and not real.outputs[0].is_graph_output():
        graph.remove(real, safe=True)
    return True


def _off_zero(value: Any) -> bool:
    """Whether ``value`` comes of codes whose zero point is not 0.

    OpenVINO moves what dequantizes them behind pools, slices and more.
    """
    values, seen = [value], set()
    while values:
        node = values.pop().producer()
        if node is None or id(node) in seen or node.op_type.startswith(_PRODUCTS):
            continue
        seen.add(id(node))
        if node.op_type != "DequantizeLinear":
            values += [each for each in node.inputs if each is not None]
        elif len(node.inputs) > 2:
            zero_point = node.inputs[2].const_value
            if zero_point is None or zero_point.numpy().any():
                return True
    return False


def _dequantized(value: Any) -> Any | None:
    """What makes ``value`` of codes with 8 bits and one known zero point."""
    node = producer(value, "DequantizeLinear")
    if node is None or len(node.inputs) < 3 or node.inputs[2].const_value is None:
        return None
    zero_point = node.inputs[2].const_value.numpy()
    return node if zero_point.ndim == 0 and zero_point.dtype.name in ("uint8", "int8") else None


def _all_one(result: Any) -> bool:
    return all(size == 1 for size in result.shape[2:])


def _flattened(result: Any) -> bool:
    """Whether all that reads it makes ``(batch, channels)`` of it, which fits sizes of 1 only."""
    values = [result]
    while values:
        value = values.pop()
        if value.is_graph_output() or not value.uses():
            return False
        for node, _ in value.uses():
            if node.op_type in _PASSED:
                values.append(node.outputs[0])
            elif node.op_type != "Reshape" or not _is(node.outputs[0], result.shape[:2]):
                return False
    return True


def _is(value: Any, shape: Any) -> bool:
    return value.shape is not None and list(value.shape) == list(shape)
