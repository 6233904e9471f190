"""ONNX forms of operators that PyTorch's exporter has none for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_quant.backends.onnx.program.recurrent import recurrent_forms
from torch_quant.backends.onnx.program.weights import blocked_forms
from torch_quant.ops.experts import GROUPED_LINEAR

__all__ = ["own_forms"]

aten = torch.ops.aten


def own_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By operator, of those that are registered: an ``onnxscript`` function that writes the form.

    It is what ``torch.onnx.export(custom_translation_table=...)`` takes.
    """
    found = recurrent_forms() | blocked_forms()
    found[GROUPED_LINEAR] = _grouped_linear
    found[aten.searchsorted.Tensor] = _places
    found[aten.bucketize.Tensor] = _buckets
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found[torch.ops.transformers.grouped_mm_fallback.default] = _grouped_product
    return found


def _grouped_linear(rows: Any, weights: Any, ends: Any) -> Any:
    """The same for matrices one below the other, ``(experts * outputs, inputs)``."""
    import onnxscript

    op: Any = onnxscript.opset18
    experts, inputs = int(ends.shape[0]), int(weights.shape[1])
    matrices = op.Reshape(weights, op.Constant(value_ints=[experts, -1, inputs]))
    return _grouped_product(rows, op.Transpose(matrices, perm=[0, 2, 1]), ends, experts)


def _grouped_product(rows: Any, weights: Any, ends: Any, experts: int = 0) -> Any:
    """Products of a mixture of experts: ``rows[ends[i - 1] : ends[i]] @ weights[i]``, one by one.

    Args:
        rows: shape ``(rows, inputs)``, sorted by expert, each of one.
        weights: shape ``(experts, inputs, outputs)``.
        ends: shape ``(experts,)``, where the rows of each expert end.
        experts: how many, where ``weights`` does not say so.
    """
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18
    ends = op.Cast(ends, to=onnx.TensorProto.INT64)
    borders = op.Concat(op.Constant(value_ints=[0]), ends, axis=0)
    products = []
    for i in range(experts or int(weights.shape[0])):
        start, end = (op.Slice(borders, [k], [k + 1]) for k in (i, i + 1))
        mine = op.Slice(rows, start, end, [0])
        products.append(op.MatMul(mine, op.Gather(weights, i, axis=0)))
    return op.Concat(*products, axis=0)


def _places(
    bounds: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """Before how many sorted bounds each value belongs: as many as are smaller.

    Args:
        bounds: shape ``[n]``, or ``[..., n]`` with the values' dimensions before the last.
        values: shape ``[..., m]``.
        out_int32: whether the result is int32, else int64.
        right: count those that are equal too.
        side: ``"left"`` or ``"right"``, in place of ``right``.
        sorter: how to sort the bounds; there is no form for it.
    """
    import onnx
    import onnxscript

    if sorter is not None:
        raise NotImplementedError("searchsorted(sorter=...)")
    op: Any = onnxscript.opset18
    if len(bounds.shape) > 1:
        bounds = op.Unsqueeze(bounds, [-2])
    values = op.Unsqueeze(values, [-1])
    compare = op.LessOrEqual if right or side == "right" else op.Less
    integer = onnx.TensorProto.INT32 if out_int32 else onnx.TensorProto.INT64
    return op.ReduceSum(op.Cast(compare(bounds, values), to=integer), [-1], keepdims=0)


def _buckets(values: Any, bounds: Any, out_int32: bool = False, right: bool = False) -> Any:
    """The same with the arguments in another order."""
    return _places(bounds, values, out_int32, right)
