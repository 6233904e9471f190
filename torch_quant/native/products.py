"""Integer products of two activations: scaled dot-product attention, and matrices in a batch.

They take codes of 8 bits with one scale, in any strides whose last is 1; floats are rounded to such
codes while they are read. Attention gives what the reference backend does on the same codes: scores
and softmax in float, the probabilities rounded, their product with the values summed as integers.
Where the library of kernels is missing, both compute with dequantized tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.ops.attention import sdpa_probabilities
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import (
    DEQUANTIZE_PER_TENSOR,
    FAKE_QUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
)

__all__ = ["ATTENTION", "BY_ROW", "MATMUL", "MOST_TERMS"]

BY_ROW = 0.0
"""In the place of the scale of probabilities: each row has one, from 0 to its largest."""

MOST_TERMS = 32768
"""Of one sum: so many products of 9 bits fit in 32. More are summed in float."""

_CALL = struct.Struct("@" + 4 * "qqqqqdqqq" + 5 * "q" + 9 * "q" + "dddqq")
_NOTHING = (0, 0, 0, 0, 0, 1.0, 0, 0, 0)
_NO_MASK = (0, 0, 0, 0, 0)
_ELEMENTS = {torch.uint8: (0, 0, 255), torch.int8: (1, -128, 127), torch.float32: (2, 0, 255)}
"""What the kernels call a type, and what codes it has; floats are rounded to unsigned ones."""


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of one tensor."""

    scale: float
    zero_point: int

    def real(self, x: Tensor) -> Tensor:
        """What codes stand for; floats are rounded to codes first."""
        if x.dtype is torch.float32:
            return FAKE_QUANTIZE_PER_TENSOR(x, self.scale, self.zero_point, 0, 255)  # type: ignore[no-any-return]
        return DEQUANTIZE_PER_TENSOR(x, self.scale, self.zero_point)  # type: ignore[no-any-return]

    def codes(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Real numbers as the result of an operator."""
        if dtype is torch.float32:
            return x
        _, low, high = _ELEMENTS[dtype]
        return QUANTIZE_PER_TENSOR(x, self.scale, self.zero_point, low, high, dtype)  # type: ignore[no-any-return]


def _operand(x: Tensor, scale: float, zero_point: int) -> tuple[Any, ...]:
    """A tensor of four dimensions as the kernels read it; it has to live until they are through."""
    element, low, high = _ELEMENTS[x.dtype]
    batch, head, row, _ = x.stride()
    return (x.data_ptr(), element, batch, head, row, 1.0 / scale, zero_point, low, high)


def _readable(x: Tensor) -> Tensor:
    """A tensor whose rows lie without gaps, in a type that the kernels read."""
    if x.dtype not in _ELEMENTS:
        x = x.to(torch.float32)
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(name: str, call: bytes) -> None:
    memory = f"torch_quant::{name}: no memory for the packed operands"
    native.run_call("torch_quant_product", call, memory)


def _heads(tensors: tuple[Tensor, Tensor, Tensor], leading: Sequence[int]) -> list[Tensor]:
    """Query, key and value as [batch, heads, tokens, size]; the last two may have fewer heads.

    Args:
        tensors: all three.
        leading: dimensions of the result before the last two.
    """
    if len(leading) != 2:
        count = math.prod(leading)
        return [x.expand(*leading, *x.shape[-2:]).reshape(count, 1, *x.shape[-2:]) for x in tensors]
    batch, heads = leading
    shared = tensors[1].shape[1] if tensors[1].dim() == 4 else 1
    counts = [x.shape[1] if x.dim() == 4 and x.shape[0] == batch else -1 for x in tensors]
    if counts == [heads, shared, shared] and heads % shared == 0:
        return list(tensors)
    return [_spread(x, heads).expand(batch, heads, *x.shape[-2:]) for x in tensors]


def _spread(x: Tensor, heads: int) -> Tensor:
    """Keys that several heads share, where these do not share the values too, or the reverse."""
    if x.dim() < 4 or x.shape[1] in (1, heads):
        return x
    return x.repeat_interleave(heads // x.shape[1], 1)


def _mask(mask: Tensor, leading: Sequence[int], sizes: tuple[int, ...]) -> Tensor:
    """A mask as [batch, heads, queries, keys], broadcast by strides; bool or float32."""
    if mask.dtype is not torch.bool:
        mask = mask.to(torch.float32)
    *_, queries, keys = sizes
    if mask.shape[-1] != keys or (mask.stride(-1) != 1 and keys > 1):
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    if len(leading) != 2:
        mask = mask.expand(*leading, queries, keys).reshape(-1, 1, queries, keys)
    return mask if mask.shape == sizes else mask.expand(sizes)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    scales: list[float],
    zero_points: list[int],
    most: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    tokens_first: bool,
) -> Tensor:
    y, leading = _attention_result(query, key, value, out_dtype, tokens_first)
    queries, depth = query.shape[-2:]
    keys, features = value.shape[-2:]
    if key.shape[-2] != keys or key.shape[-1] != depth:
        shapes = (*map(tuple, (query.shape, key.shape, value.shape)),)
        raise InvalidConfig(f"torch_quant::int8_attention: sizes of {shapes} do not fit together")
    if not y.numel():
        return y
    if not keys or keys > MOST_TERMS or not 0 < depth <= MOST_TERMS or native.kernels() is None:
        grids = [_Grid(*each) for each in zip(scales, zero_points, strict=True)]
        real = _in_float((query, key, value), mask, causal, scale, grids, most)
        return y.copy_(_Grid(out_scale, out_zero_point).codes(real, out_dtype))
    q, k, v = _heads((_readable(query), _readable(key), _readable(value)), leading)
    batch, heads = q.shape[:2]
    groups = 1 if k.stride(1) == 0 and v.stride(1) == 0 else k.shape[1]
    result = y if y.dim() == 4 else y.view(batch, heads, queries, features)
    masks: tuple[int, ...] = _NO_MASK
    if mask is not None and not causal:
        hidden = _mask(mask, leading, (batch, heads, queries, keys))
        element = 2 if hidden.dtype is torch.float32 else 0
        masks = (hidden.data_ptr(), element, *hidden.stride()[:3])
    of_q, of_k, of_v, of_p = scales
    call = _CALL.pack(
        *_operand(q, of_q, zero_points[0]), *_operand(k, of_k, zero_points[1]),
        *_operand(v, of_v, zero_points[2]), *_operand(result, out_scale, out_zero_point), *masks,
        batch, heads, groups, queries, keys, depth, features, 1, causal,
        scale * of_q * of_k, *_of_probabilities(of_p, of_v), zero_points[3], most,
    )  # fmt: skip
    _run("int8_attention", call)
    return y


def _of_probabilities(scale: float, of_values: float) -> tuple[float, float]:
    """What a sum of the second product stands for, and the inverse of the scale; 0 for each row."""
    return (of_values, 0.0) if scale == BY_ROW else (scale * of_values, 1.0 / scale)


def _in_float(
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    grids: Sequence[_Grid],
    most: int,
) -> Tensor:
    """Attention with dequantized tensors."""
    if not tensors[1].shape[-2]:
        return torch.zeros(())
    q, k, v = (grid.real(x) for grid, x in zip(grids, tensors, strict=False))
    shares = q.dim() > 2 and q.shape[-3] != k.shape[-3]
    p = sdpa_probabilities(q, k, v, mask, 0.0, causal, scale, shares)
    return _second_product(p, v, grids[3], most)


def _second_product(p: Tensor, value: Tensor, grid: _Grid, most: int) -> Tensor:
    if grid.scale == BY_ROW:
        scale = (p.amax(-1, keepdim=True) / most).clamp_min(torch.finfo(p.dtype).tiny)
        p = (p / scale).round() * scale
    else:
        p = FAKE_QUANTIZE_PER_TENSOR(p, grid.scale, grid.zero_point, 0, most)
    if value.dim() > 2 and value.shape[-3] != p.shape[-3]:
        value = value.repeat_interleave(p.shape[-3] // value.shape[-3], -3)
    return p @ value


def _attention_result(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, tokens_first: bool
) -> tuple[Tensor, tuple[Any, ...]]:
    """An empty result, and its dimensions before the last two."""
    queries, features = query.shape[-2], value.shape[-1]
    if not query.dim() == key.dim() == value.dim() == 4:
        leading = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
        return query.new_empty((*leading, queries, features), dtype=dtype), leading
    batch, heads = query.shape[:2]  # several heads of the query may share one of the key
    if isinstance(batch, int) and batch == 1:
        batch = key.shape[0]
    if isinstance(heads, int) and heads == 1:
        heads = key.shape[1]
    if tokens_first:
        y = query.new_empty((batch, queries, heads, features), dtype=dtype).transpose(1, 2)
        return y, (batch, heads)
    return query.new_empty((batch, heads, queries, features), dtype=dtype), (batch, heads)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return _attention_result(query, key, value, args[-2], args[-1])[0]


def _matmul(
    x: Tensor,
    y: Tensor,
    scales: list[float],
    zero_points: list[int],
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> Tensor:
    result = _fake_matmul(x, y, scales, zero_points, out_scale, out_zero_point, out_dtype)
    left, right = (_Grid(*each) for each in zip(scales, zero_points, strict=True))
    out = _Grid(out_scale, out_zero_point)
    depth = x.shape[-1]
    if not result.numel():
        return result
    if not 0 < depth <= MOST_TERMS or native.kernels() is None:
        return result.copy_(out.codes(left.real(x) @ right.real(y), out_dtype))
    by_column = y.stride(-2) == 1 and y.stride(-1) != 1
    a, b = _readable(x), _readable(y.mT if by_column else y)
    leading = result.shape[:-2]
    if len(leading) == 2:
        a, b = (t.expand(*leading, *t.shape[-2:]) for t in (a, b))
    else:
        whole = math.prod(leading)
        a, b = (t.expand(*leading, *t.shape[-2:]).reshape(whole, 1, *t.shape[-2:]) for t in (a, b))
    batch, heads = a.shape[:2]
    groups = 1 if b.stride(1) == 0 else heads
    rows, columns = result.shape[-2:]
    four = result.view(batch, heads, rows, columns)
    call = _CALL.pack(
        *_operand(a, scales[0], zero_points[0]), *_operand(b, scales[1], zero_points[1]), *_NOTHING,
        *_operand(four, out_scale, out_zero_point), *_NO_MASK,
        batch, heads, groups, rows, columns, depth, 0,
        by_column, False, 1.0, scales[0] * scales[1], 1.0, 0, 0,
    )  # fmt: skip
    _run("int8_matmul", call)
    return result


def _fake_matmul(x: Tensor, y: Tensor, *args: Any) -> Tensor:
    leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return x.new_empty((*leading, x.shape[-2], y.shape[-1]), dtype=args[-1])


ATTENTION = define_operator(
    "int8_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
    "float scale, float[] scales, int[] zero_points, int most, float out_scale, "
    "int out_zero_point, ScalarType out_dtype, bool tokens_first) -> Tensor",
    _attention,
    _fake_attention,
    keys=("CPU",),
)
MATMUL = define_operator(
    "int8_matmul(Tensor x, Tensor y, float[] scales, int[] zero_points, float out_scale, "
    "int out_zero_point, ScalarType out_dtype) -> Tensor",
    _matmul,
    _fake_matmul,
    keys=("CPU",),
)
