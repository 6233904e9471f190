"""Linear layers whose input is rounded at each call: int8, a scale and zero point for each row.

They take weights as these are saved, and keep nothing. A function may stand behind the products,
and several layers of one input may be one call, which rounds its rows once. Where the library of
kernels is missing, the same codes are multiplied in float.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.native.ops import address_of, check_bias, check_rows, check_weight, plain
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import CHOOSE_QPARAMS, QUANTIZE
from torch_quant.ops.rows import register_row_operator

__all__ = ["DYNAMIC_LINEAR", "DYNAMIC_LINEARS", "MOST_INPUTS"]

MOST_INPUTS = 65536
"""Sums of so many products of 8 bits fit in 32."""
_LAYER = struct.Struct("@6q2d")
"""``DynamicLayer`` of ``csrc/kernels.h``."""
_functional = torch.nn.functional
_POST_OPS: dict[tuple[str, str], tuple[int, Callable[..., Tensor]]] = {
    ("none", ""): (0, lambda x: x),
    ("relu", ""): (1, torch.relu),
    ("hardtanh", ""): (1, _functional.hardtanh),
    ("leaky_relu", ""): (2, _functional.leaky_relu),
    ("gelu", "none"): (3, _functional.gelu),
    ("gelu", "tanh"): (4, lambda x: _functional.gelu(x, approximate="tanh")),
    ("swish", ""): (5, _functional.silu),
    ("tanh", ""): (6, torch.tanh),
    ("hardswish", ""): (7, _functional.hardswish),
}
"""oneDNN's name of a function and its algorithm -> ``Between`` of ``csrc/static.h``, operator."""
_INFINITE = float("inf")


def _check_layer(name: str, inputs: int, weight: Tensor, scale: Tensor, bias: Tensor | None) -> int:
    """The outputs of a layer whose tensors fit together."""
    outputs = weight.shape[0] if weight.dim() == 2 else 0
    if weight.dtype is torch.int8 and scale.numel() == outputs and inputs <= MOST_INPUTS:
        check_bias(name, bias, outputs)
        if weight.shape[1] == inputs:
            return outputs
    check_weight(name, weight, scale)
    if weight.dtype is not torch.int8:
        expected, got = "an int8 weight", str(weight.dtype)
    elif weight.shape[1] != inputs:
        expected, got = f"a weight of {inputs} inputs", str(tuple(weight.shape))
    elif inputs > MOST_INPUTS:
        expected, got = f"at most {MOST_INPUTS} inputs", str(inputs)
    else:
        expected, got = "one scale for each output", str(tuple(scale.shape))
    raise InvalidConfig(f"torch_quant::{name}: expected {expected}, got {got}")


def _function(
    name: str, post_op: str, post_args: Sequence[float], algorithm: str
) -> tuple[int, Callable[..., Tensor], tuple[float, float]]:
    """A function behind the products: the kernels' number of it, its operator, its arguments."""
    found = _POST_OPS.get((post_op, algorithm if post_op == "gelu" else ""))
    wanted = {"hardtanh": 2, "leaky_relu": 1}.get(post_op, 0)
    if found is None or len(post_args) != wanted:
        known = ", ".join(dict.fromkeys(each for each, _ in _POST_OPS))
        raise InvalidConfig(
            f"torch_quant::{name}: expected one of {known} and its arguments, "
            f"got {post_op!r} {algorithm!r} {list(post_args)}"
        )
    low, high = (0.0, _INFINITE) if post_op == "relu" else (*post_args, 0.0, 0.0)[:2]
    return *found, (low, high)


def _dynamic_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    signed: bool,
    post_op: str = "none",
    post_args: Sequence[float] = (),
    algorithm: str = "none",
) -> Tensor:
    name = "dynamic_linear"
    check_rows(name, x)
    inputs = x.shape[-1]
    outputs = _check_layer(name, inputs, weight, scale, bias)
    number, operator, ends = 0, None, (0.0, 0.0)
    if post_op != "none":
        number, operator, ends = _function(name, post_op, post_args, algorithm)
    kernels = native.kernels()
    if kernels is None or not inputs:
        y = _in_float(x, weight, scale, bias, signed)
        return y if operator is None else operator(y, *post_args)
    rows, weight = plain(x, torch.float32), weight.contiguous()
    scale = plain(scale, torch.float32)
    bias = None if bias is None else plain(bias, torch.float32)
    y = rows.new_empty((*x.shape[:-1], outputs))
    layer = _LAYER.pack(
        weight.data_ptr(), scale.data_ptr(), address_of(bias) or 0, y.data_ptr(), outputs, number,
        *ends,
    )  # fmt: skip
    failed = kernels.torch_quant_dynamic(
        torch.get_num_threads(), rows.data_ptr(), layer, rows.numel() // inputs, inputs, 1, signed
    )
    if failed:
        raise MemoryError(f"torch_quant::{name}: no memory for {rows.numel()} activations")
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _dynamic_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    signed: bool,
) -> list[Tensor]:
    name = "dynamic_linears"
    check_rows(name, x)
    inputs, count = x.shape[-1], len(weights)
    if len(scales) != count or len(biases) not in (0, count):
        counts = [count, len(scales), len(biases)]
        raise InvalidConfig(
            f"torch_quant::{name}: expected lists of one length, that of biases may be empty; "
            f"got {counts}"
        )
    optional: Sequence[Tensor | None] = biases or [None] * count
    each = list(zip(weights, scales, optional, strict=True))
    outputs = [_check_layer(name, inputs, *layer) for layer in each]
    kernels = native.kernels()
    if kernels is None or not inputs:
        return [_in_float(x, *layer, signed) for layer in each]
    rows = plain(x, torch.float32)
    results, held, layers = [], [], []
    for (weight, scale, bias), size in zip(each, outputs, strict=True):
        y, real = rows.new_empty((*x.shape[:-1], size)), plain(scale, torch.float32)
        more = None if bias is None else plain(bias, torch.float32)
        held.append((weight.contiguous(), real, more))
        results.append(y)
        addresses = [address_of(tensor) or 0 for tensor in (*held[-1], y)]
        layers.append(_LAYER.pack(*addresses, size, 0, 0.0, 0.0))
    failed = kernels.torch_quant_dynamic(
        torch.get_num_threads(), rows.data_ptr(), b"".join(layers), rows.numel() // inputs, inputs,
        count, signed,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"torch_quant::{name}: no memory for {rows.numel()} activations")
    return results if x.dtype is torch.float32 else [y.to(x.dtype) for y in results]


def _in_float(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, signed: bool
) -> Tensor:
    if not x.shape[-1]:  # sums of nothing
        y = x.new_zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
        return (y if bias is None else y + bias).to(x.dtype)
    element = "int8" if signed else "uint8"
    x_scale, x_zero = CHOOSE_QPARAMS(x, element, signed, "per_token", "float32")
    codes = QUANTIZE(x, x_scale, x_zero, element)
    centred = (codes.to(torch.int32) - x_zero).to(torch.float32)
    centred = torch.where(x_scale.isfinite(), centred, x_scale)  # NaN and infinity show
    sums = _functional.linear(centred, weight.to(torch.float32))
    real: Tensor = sums * (x_scale * scale.flatten())
    return (real if bias is None else real + bias).to(x.dtype)


def _fake_linear(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linears(x: Tensor, weights: Sequence[Tensor], *args: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


DYNAMIC_LINEAR = define_operator(
    "dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool signed, "
    "str post_op='none', float[] post_args=[], str algorithm='none') -> Tensor",
    _dynamic_linear,
    _fake_linear,
    keys=("CPU",),
)
"""``function(linear(x, weight * scale, bias))`` with ``x`` rounded to 8 bits, a grid for each row.

The function has oneDNN's name, arguments and algorithm, as ``torch.ops.onednn`` takes them.
"""

DYNAMIC_LINEARS = define_operator(
    "dynamic_linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, bool signed) "
    "-> Tensor[]",
    _dynamic_linears,
    _fake_linears,
    keys=("CPU",),
)
"""``dynamic_linear`` with each weight; all have a bias, or none has."""

register_row_operator(DYNAMIC_LINEAR, 0)
