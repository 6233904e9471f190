"""ONNX forms of operators that PyTorch's exporter has none for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_quant.backends.onnx.program.recurrent import recurrent_forms
from torch_quant.backends.onnx.program.weights import blocked_forms
from torch_quant.ops.experts import GROUPED_LINEAR

__all__ = ["own_forms"]


def own_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By operator, of those that are registered: an ``onnxscript`` function that writes the form.

    It is what ``torch.onnx.export(custom_translation_table=...)`` takes.
    """
    found = recurrent_forms() | blocked_forms()
    found[GROUPED_LINEAR] = _grouped_linear
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
