"""Floats between two products: added, normalized, put through GELU and rounded, in one pass.

They give what the single operators give: floats to the last bits, codes as these floats round.
Where the library of kernels is missing, and for floats of other types, those operators run.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.native.ops import plain
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import QUANTIZE_PER_TENSOR
from torch_quant.ops.rows import register_row_operator

__all__ = ["NORM_ROWS", "ROUND_ROWS"]

_CALL = struct.Struct("@" + 8 * "q" + 3 * "q" + "dd" + 3 * "q")
_NONE, _LAYER_NORM, _GELU = 0, 1, 2
_FUNCTIONS = {"none": _NONE, "gelu": _GELU}
_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check(name: str, x: Tensor, dtype: torch.dtype, **vectors: Tensor | None) -> None:
    if dtype not in _RANGES:
        raise InvalidConfig(f"torch_quant::{name}: expected codes of 8 bits, got {dtype}")
    size = x.shape[-1:]
    for which, vector in vectors.items():
        if vector is not None and vector.shape != size:
            wanted, got = tuple(size), tuple(vector.shape)
            raise InvalidConfig(f"torch_quant::{name}: expected {which} of {wanted}, got {got}")


def _served(*tensors: Tensor | None) -> bool:
    for x in tensors:
        if x is not None and x.dtype is not torch.float32:
            return False
    return native.kernels() is not None


def _run(
    name: str,
    function: int,
    tensors: tuple[Tensor | None, ...],
    eps: float,
    scale: float,
    zero_point: int,
) -> None:
    x, codes = tensors[0], tensors[-1]
    assert x is not None
    assert codes is not None
    size = x.shape[-1]
    call = _CALL.pack(
        *map(_address, tensors), x.numel() // size, size, function, eps,
        1.0 / scale, zero_point, *_RANGES[codes.dtype],
    )  # fmt: skip
    memory = f"torch_quant::{name}: no memory for a row of {size} numbers"
    native.run_call("torch_quant_rows", call, memory)


def _codes(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    low, high = _RANGES[dtype]
    return QUANTIZE_PER_TENSOR(x, scale, zero_point, low, high, dtype)  # type: ignore[no-any-return]


def _round_rows(
    x: Tensor,
    factor: Tensor | None,
    function: str,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
) -> Tensor:
    name = "round_rows"
    _check(name, x, dtype, factor=factor)
    if function not in _FUNCTIONS:
        raise InvalidConfig(f"torch_quant::{name}: expected none or gelu, got {function!r}")
    codes = _fake_round_rows(x, factor, function, scale, zero_point, dtype)
    if not codes.numel():
        return codes
    if not _served(x, factor):
        real = torch.nn.functional.gelu(x) if function == "gelu" else x
        real = real if factor is None else real * factor
        return codes.copy_(_codes(real, scale, zero_point, dtype))
    vectors = None if factor is None else plain(factor, torch.float32)
    tensors = (plain(x, torch.float32), None, None, None, vectors, None, None, codes)
    _run(name, _FUNCTIONS[function], tensors, 0.0, scale, zero_point)
    return codes


def _norm_rows(
    x: Tensor,
    more: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    factor: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    keep_sum: bool,
    keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "norm_rows"
    _check(name, x, dtype, weight=weight, bias=bias, factor=factor)
    if more is not None and more.shape != x.shape:
        shapes = tuple(x.shape), tuple(more.shape)
        raise InvalidConfig(f"torch_quant::{name}: expected x and more of one shape, got {shapes}")
    made = _fake_norm_rows(
        x, more, weight, bias, eps, factor, scale, zero_point, dtype, keep_sum, keep_norm
    )
    total, y, codes = made
    if not codes.numel():
        return made
    if not _served(x, more, weight, bias, factor):
        real = x if more is None else x + more
        if total.numel():
            total.copy_(real)
        real = torch.nn.functional.layer_norm(real, real.shape[-1:], weight, bias, eps)
        if y.numel():
            y.copy_(real)
        real = real if factor is None else real * factor
        codes.copy_(_codes(real, scale, zero_point, dtype))
        return made
    given = [
        None if each is None else plain(each, torch.float32)
        for each in (x, more, weight, bias, factor)
    ]
    kept = [each if each.numel() else None for each in (total, y)]
    tensors = (*given, *kept, codes)
    _run(name, _LAYER_NORM, tensors, eps, scale, zero_point)
    return made


def _fake_round_rows(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=args[-1])


def _fake_norm_rows(x: Tensor, more: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, keep_sum, keep_norm = args[-3:]
    shape = x.shape
    total = x.new_empty(shape if keep_sum and more is not None else 0)
    y = x.new_empty(shape if keep_norm else 0)
    return total, y, x.new_empty(shape, dtype=dtype)


ROUND_ROWS = define_operator(
    "round_rows(Tensor x, Tensor? factor, str function, float scale, int zero_point, "
    "ScalarType dtype) -> Tensor",
    _round_rows,
    _fake_round_rows,
    keys=("CPU",),
)
"""``quantize(function(x) * factor)``, with a factor for each number of the last dimension."""

NORM_ROWS = define_operator(
    "norm_rows(Tensor x, Tensor? more, Tensor? weight, Tensor? bias, float eps, Tensor? factor, "
    "float scale, int zero_point, ScalarType dtype, bool keep_sum, bool keep_norm) "
    "-> (Tensor, Tensor, Tensor)",
    _norm_rows,
    _fake_norm_rows,
    keys=("CPU",),
)
"""``x + more`` and its layer norm, empty unless kept, and the codes of that times ``factor``."""

register_row_operator(ROUND_ROWS, 0)
