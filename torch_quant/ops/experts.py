"""Linear layers of a mixture of experts, all of whose weights are one tensor.

``grouped_linear(x, weight, ends)`` multiplies the rows of ``x``, sorted by expert, each by the
matrix of its expert. The matrices are one below the other, ``[experts * out, in]``, so that a scale
per output channel or per group is what it is for any linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_quant.ops.library import define_operator, library
from torch_quant.ops.table import OpPattern, call_sizes, numel, register_operator

__all__ = ["GROUPED_LINEAR"]


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Products of sorted rows with the matrix of their expert.

    Args:
        x: ``[rows, in]``, sorted by expert.
        weight: ``[experts * out, in]``.
        ends: ``[experts]``, integers: where the rows of each expert end.

    Returns:
        ``[rows, out]``; rows behind the last end are 0.
    """
    out = weight.shape[0] // ends.shape[0]
    result, start = x.new_zeros(x.shape[0], out), 0
    for matrix, end in zip(weight.split(out), ends.tolist(), strict=True):
        if end > start:
            result[start:end] = functional.linear(x[start:end], matrix)
        start = end
    return result


def _fake_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // ends.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Of each expert's rows: ``grad W`` for the input, ``grad' x`` for the matrix."""
    x, weight, ends = ctx.saved_tensors
    out = weight.shape[0] // ends.shape[0]
    of_x, of_weight, start = torch.zeros_like(x), torch.zeros_like(weight), 0
    for i, end in enumerate(ends.tolist()):
        if end > start:
            matrix, rows = slice(i * out, (i + 1) * out), slice(start, end)
            of_x[rows] = grad[rows] @ weight[matrix]
            of_weight[matrix] = grad[rows].T @ x[rows]
        start = end
    return of_x, of_weight, None


GROUPED_LINEAR = define_operator(
    "grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    _grouped_linear,
    _fake_grouped_linear,
)
torch.library.register_autograd(
    "torch_quant::grouped_linear", _backward, setup_context=_keep, lib=library
)


def _macs(args: Any, out: Any) -> int:
    return numel(out) * call_sizes(args[0])[-1]


register_operator(
    OpPattern("grouped_linear", (GROUPED_LINEAR,), (0,), 1, 0, _macs, smoothable=True)
)
