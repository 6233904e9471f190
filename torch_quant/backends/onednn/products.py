"""Rows for products of two activations: kernels of this package, as PyTorch has none.

Attention was written as two products when its tensors were quantized (``ops/attention.py``); here
the whole becomes one operator again. What is quantized for it alone it rounds while it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant import native
from torch_quant.backends.onednn.endings import ending_of, replace
from torch_quant.core.elements import element_type
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.native import products
from torch_quant.ops.arguments import argument, positional
from torch_quant.ops.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE,
    QUANTIZE_PER_TENSOR,
)
from torch_quant.ops.table import contiguous_as_captured, size_hints
from torch_quant.passes.base import PassContext

__all__ = ["product_kernels"]

aten = torch.ops.aten

_REAL = (DEQUANTIZE_PER_TENSOR, DEQUANTIZE)


def product_kernels(activation: Accepts) -> tuple[Kernel, ...]:
    """The rows; where the library of kernels is missing they refuse every format and say so."""
    missing = native.unavailable()
    if missing is not None:
        wants = f"products of two activations run on this package's kernels ({missing})"
        activation = Accepts(activation.default, lambda spec: False, wants)
    return (
        Kernel(
            "scaled_dot_product_attention",
            activation,
            emit=_lower_attention,
            row_scales=missing is None,
        ),
        Kernel("matmul", activation, emit=_lower_matmul),
    )


@dataclass(frozen=True)
class _Codes:
    """A tensor of codes, and their grid."""

    node: fx.Node
    scale: float
    zero_point: int


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _codes(real: Any) -> _Codes | None:
    return _Codes(*positional(real)) if _is(real, DEQUANTIZE_PER_TENSOR) else None


def _read(codes: _Codes) -> fx.Node:
    """What the kernel reads in the place of ``codes``: floats if they are rounded for it alone."""
    node = codes.node
    if (
        len(node.users) > 1
        or not _is(node, QUANTIZE_PER_TENSOR)
        or positional(node)[3:5] != (0, 255)
    ):
        return node
    real: Any = argument(node, "x")
    value = real.meta.get("val")
    return real if isinstance(value, Tensor) and value.dtype is torch.float32 else node


@dataclass(frozen=True)
class _Attention:
    """An attention that was written as two products."""

    query: _Codes
    key: _Codes
    value: _Codes
    p: tuple[float, int, int]
    mask: fx.Node | None
    causal: bool
    scale: Any


def _attention_of(second: fx.Node) -> _Attention | None:
    """The attention whose second product is ``second``; None if some of it is not quantized."""
    p: Any
    real_value: Any
    p, real_value = positional(second)
    quantized: Any = argument(p, "q") if isinstance(p, fx.Node) and p.target in _REAL else None
    grid = _grid_of(quantized)
    if grid is None:
        return None
    softmax: Any = argument(quantized, "x")
    assert softmax.target is aten._safe_softmax.default
    scores, mask, causal = argument(softmax, 0), None, False
    if scores.target is not aten.mul.Tensor:
        hides = scores.target is aten.masked_fill.Scalar
        scores, mask = positional(scores)[:2]
        if hides:
            mask = argument(mask, 0)  # of a mask that says what is seen, its opposite was made
            triangle = mask.target is aten.tril.default
            causal = triangle and scores in argument(mask, 0).all_input_nodes
    first, scale = positional(scores)
    real_query, transposed = positional(first)
    key, value = (
        _codes(argument(x, 0) if _is(x, aten.repeat_interleave.self_int) else x)
        for x in (argument(transposed, 0), real_value)
    )
    query = _codes(real_query)
    if query is None or key is None or value is None:
        return None
    return _Attention(query, key, value, grid, None if causal else mask, causal, scale)


def _grid_of(codes: Any) -> tuple[float, int, int] | None:
    """Scale, zero point and last code of the probabilities; a scale of 0 is one for each row."""
    if _is(codes, QUANTIZE_PER_TENSOR):
        scale, zero_point, _, most = positional(codes)[1:5]
        return scale, zero_point, most
    if _is(codes, QUANTIZE):
        return products.BY_ROW, 0, int(element_type(argument(codes, "element")).quant_max)
    return None


def _lower_attention(context: PassContext, node: fx.Node) -> None:
    found = _attention_of(node)
    if found is None:
        return
    p_scale, p_zero_point, most = found.p
    sides = (found.query, found.key, found.value)
    ending = ending_of(node, set())
    tokens_first = _tokens_first(node, ending.last)
    read = [_read(x) for x in sides]
    inner = _inside(node, {*read, found.mask})
    args: Any = (
        *read, found.mask, found.causal, found.scale,
        [x.scale for x in sides] + [p_scale], [x.zero_point for x in sides] + [p_zero_point], most,
        ending.scale, ending.zero_point, ending.dtype, tokens_first,
    )  # fmt: skip
    replace(node, ending, products.ATTENTION, args)
    for dead in inner:
        if not dead.users:
            node.graph.erase_node(dead)


def _inside(second: fx.Node, outside: set[Any]) -> list[fx.Node]:
    """What computes an attention from the tensors outside, last first."""
    found: dict[fx.Node, None] = {}
    waiting = list(second.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in outside and node.op == "call_function":
            found[node] = None
            waiting += node.all_input_nodes
    return [node for node in reversed(second.graph.nodes) if node in found]


def _tokens_first(node: fx.Node, last: fx.Node) -> bool:
    """Whether the result may lie as [batch, tokens, heads, size], which all that follows reads."""
    if len(size_hints(node)) != 4:
        return False
    swaps = (aten.transpose.int, aten.permute.default)
    return not contiguous_as_captured(node) or all(user.target in swaps for user in last.users)


def _lower_matmul(context: PassContext, node: fx.Node) -> None:
    sides = positional(node)
    x, y = map(_codes, sides)
    if x is None or y is None:
        return
    if min(len(size_hints(arg)) for arg in sides) < 2:
        return
    ending = ending_of(node, set())
    args = (
        x.node, y.node, [x.scale, y.scale], [x.zero_point, y.zero_point],
        ending.scale, ending.zero_point, ending.dtype,
    )  # fmt: skip
    replace(node, ending, products.MATMUL, args)
