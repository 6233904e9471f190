"""Weights of a few bits in an exported ONNX model, for kernels that read them as they are.

The exporter knows no integers of four bits and no blocks, so it writes a weight ``[out, in]`` as
``DequantizeLinear`` of int8 with a matrix of scales. On the file, that becomes one of two forms:

    DequantizeLinear(int4 [in, out], axis=0, block_size)  ->  MatMul          ONNX, opset 21
    com.microsoft::MatMulNBits(uint8 [out, blocks, bytes])                    onnxruntime
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from torch_quant.backends.onnx.forms.blocked_weights import LEAST, ONNX_WEIGHT
from torch_quant.core.elements import element_type
from torch_quant.errors import InvalidConfig
from torch_quant.ops.arguments import argument

__all__ = ["blocked_forms", "needed_opset", "write_blocked"]

OPSET = 21
"""The first in which ``DequantizeLinear`` takes blocks, and integers of four bits."""
_ACCURACY_LEVEL = 4
"""Activations are rounded to int8, block by block, for products of integers."""
_CONTRIB = "com.microsoft"
_BODY = "body."
"""Where the exported module has its graph."""


def blocked_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By operator: an ``onnxscript`` function that writes the form for :func:`write_blocked`."""
    return {ONNX_WEIGHT: _weight}


def _weight(q: Any, scale: Any, zero_point: Any, element: str) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18
    return op.DequantizeLinear(q, scale)


def needed_opset(body: fx.GraphModule, opset: int | None, matmul_nbits: bool) -> int | None:
    """The operator set to export a graph to.

    Raises:
        InvalidConfig: ``opset`` is given and cannot hold its weights.
    """
    if matmul_nbits or not any(node.target is ONNX_WEIGHT for node in body.graph.nodes):
        return opset
    if opset is not None and opset < OPSET:
        raise InvalidConfig(
            f"export_onnx(opset={opset}): weights in blocks need {OPSET} or more; leave opset out, "
            "or give matmul_nbits=True"
        )
    return opset or OPSET


def write_blocked(model: Any, body: fx.GraphModule, matmul_nbits: bool) -> None:
    """Put weights under float activations in their final form.

    Args:
        model: ``onnx_ir``, as the exporter gives it; changed in place.
        body: the graph that was exported.
        matmul_nbits: whether to write onnxruntime's own operator.
    """
    bits = {
        f"{_BODY}{argument(node, 'q').target}": element_type(argument(node, "element")).bits
        for node in body.graph.nodes
        if node.target is ONNX_WEIGHT
    }
    known: dict[int, tuple[Any, Any]] = {}
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.name in bits:
            _rewrite(model.graph, node, bits[codes.name], matmul_nbits, known)
    for old, new in known.values():
        name = old.name
        del model.graph.initializers[name]
        if (short := name.removesuffix("_blocks")) not in model.graph.initializers:
            name = short
        new.name = new.const_value.name = name
        model.graph.register_initializer(new)
    if matmul_nbits and bits:
        model.opset_imports[_CONTRIB] = 1


def _rewrite(
    graph: Any, node: Any, bits: int, matmul_nbits: bool, known: dict[int, tuple[Any, Any]]
) -> None:
    """One weight; ``known`` has what was made of an initializer, since calls may share one."""
    import onnx_ir as ir

    codes, scale = node.inputs[:2]
    (turn,) = node.outputs[0].consumers()
    outputs, inputs = (int(size) for size in codes.shape)
    size = inputs // int(scale.shape[1])

    def initializer(old: Any, make: Callable[[Any], Any]) -> Any:
        if id(old) not in known:
            array = np.ascontiguousarray(make(old.const_value.numpy()))
            tensor = ir.tensor(array)
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            made = ir.Value(type=kind, shape=shape, const_value=tensor)
            known[id(old)] = old, made
        return known[id(old)][1]

    if matmul_nbits:
        name = codes.name.removeprefix(_BODY)
        if size < LEAST or size & (size - 1):
            raise InvalidConfig(
                f"export_onnx(matmul_nbits=True): {name} has a scale for each {size} inputs; "
                f"MatMulNBits wants a power of two from {LEAST} on"
            )
        packed = initializer(codes, lambda x: _packed(x, bits, size))
        grid = initializer(scale, lambda x: x.reshape(-1))
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": size}
        attributes["accuracy_level"] = _ACCURACY_LEVEL
        for product in list(turn.outputs[0].consumers()):
            product.op_type, product.domain = "MatMulNBits", _CONTRIB
            product.resize_inputs(3)
            for i, value in enumerate((packed, grid), start=1):
                product.replace_input_with(i, value)
            for key, number in attributes.items():
                product.attributes[key] = ir.AttrInt64(key, number)
    else:
        packed = initializer(codes, lambda x: _turned(x, bits))
        grid = initializer(scale, lambda x: x.T)
        tape = ir.tape.Tape()
        real = tape.op("DequantizeLinear", [packed, grid], {"axis": 0, "block_size": size})
        graph.insert_before(node, tape.nodes)
        turn.outputs[0].replace_all_uses_with(real)
        for product in list(real.consumers()):
            _kept_apart(graph, product, outputs)
    graph.remove([turn, node], safe=True)


def _kept_apart(graph: Any, product: Any, width: int) -> None:
    """Keep onnxruntime from joining a product to what reads it, which then has no such kernel.

    It makes ``Gemm`` of a product of matrices and a sum, but none of ``Sum``, the same operator; a
    rectifier right behind a product is taken for a part of it, and a sum with zeros is none.
    """
    import onnx_ir as ir

    shape, readers = product.outputs[0].shape, list(product.outputs[0].consumers())
    matrix = shape is None or len(shape) == 2
    if any(each.op_type in ("Relu", "Clip") for each in readers):
        zeros = ir.Value(
            name=f"{product.outputs[0].name}_zeros",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([width]),
            const_value=ir.tensor(np.zeros(width, np.float32)),
        )
        graph.register_initializer(zeros)
        tape = ir.tape.Tape()
        total = tape.op("Sum" if matrix else "Add", [product.outputs[0], zeros])
        total.shape, total.type = shape, product.outputs[0].type
        graph.insert_after(product, tape.nodes)
        for each in readers:
            for i, value in enumerate(each.inputs):
                if value is product.outputs[0]:
                    each.replace_input_with(i, total)
    elif matrix and len(readers) == 1 and readers[0].op_type == "Add":
        readers[0].op_type = "Sum"


def _turned(codes: Any, bits: int) -> Any:
    """``[in, out]``, of a type that has ``bits``."""
    import ml_dtypes

    return codes.T if bits == 8 else codes.T.astype(ml_dtypes.int4)


def _packed(codes: Any, bits: int, size: int) -> Any:
    """uint8 ``[out, blocks, bytes]``: codes with half their range added, the first lowest."""
    found = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    found = found.reshape(len(codes), -1, size)
    return found if bits == 8 else found[..., ::2] | (found[..., 1::2] << 4)
