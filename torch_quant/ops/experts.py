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

from torch_quant.ops.qdq import library
from torch_quant.ops.table import OpPattern, call_sizes, numel, register_operator

__all__ = ["GROUPED_LINEAR"]

library.define("grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor")


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


library.impl("grouped_linear", _grouped_linear, "CompositeExplicitAutograd")
torch.library.register_fake("torch_quant::grouped_linear", _fake_grouped_linear, lib=library)

GROUPED_LINEAR = torch.ops.torch_quant.grouped_linear.default


def _macs(args: Any, out: Any) -> int:
    return numel(out) * call_sizes(args[0])[-1]


register_operator(
    OpPattern("grouped_linear", (GROUPED_LINEAR,), (0,), 1, 0, _macs, smoothable=True)
)
