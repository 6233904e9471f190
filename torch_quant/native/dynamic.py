"""Linear layers whose input is rounded at each call: int8, a scale and zero point for each row.

They take weights as these are saved, and keep nothing. A function may stand behind the products,
and several layers of one input may be one call, which rounds its rows once. Where the library of
kernels is missing, the same codes are multiplied in float.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.native.functions import ends_of, function_of
from torch_quant.native.ops import address_of, check_bias, check_rows, check_weight, plain
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import CHOOSE_QPARAMS, QUANTIZE
from torch_quant.ops.rows import register_row_operator

__all__ = ["DYNAMIC_LINEAR", "DYNAMIC_LINEARS", "MOST_INPUTS"]

MOST_INPUTS = 65536
"""Sums of so many products of 8 bits fit in 32."""
_LAYER = struct.Struct("@6q2d")
"""``DynamicLayer`` of ``csrc/kernels.h``."""
_Layer = tuple[Tensor, Tensor, Tensor | None]
"""Weight, scale and bias."""


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
    name, found = "dynamic_linear", function_of(post_op, algorithm)
    if found is None or len(post_args) != {"hardtanh": 2, "leaky_relu": 1}.get(post_op, 0):
        raise InvalidConfig(
            f"torch_quant::{name}: expected one of none, relu, hardtanh, leaky_relu, gelu, swish, "
            f"tanh, hardswish and its arguments, got {post_op!r} {algorithm!r} {list(post_args)}"
        )
    number, operator = found
    layers: list[_Layer] = [(weight, scale, bias)]
    made = _multiplied(name, x, layers, signed, number, ends_of(post_op, post_args))
    return operator(_in_float(x, *layers[0], signed), *post_args) if made is None else made[0]


def _dynamic_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    signed: bool,
) -> list[Tensor]:
    name, count = "dynamic_linears", len(weights)
    if len(scales) != count or len(biases) not in (0, count):
        counts = [count, len(scales), len(biases)]
        raise InvalidConfig(
            f"torch_quant::{name}: expected lists of one length, that of biases may be empty; "
            f"got {counts}"
        )
    optional: Sequence[Tensor | None] = biases or [None] * count
    layers = list(zip(weights, scales, optional, strict=True))
    made = _multiplied(name, x, layers, signed)
    return [_in_float(x, *layer, signed) for layer in layers] if made is None else made


def _multiplied(
    name: str,
    x: Tensor,
    layers: Sequence[_Layer],
    signed: bool,
    function: int = 0,
    ends: tuple[float, float] = (0.0, 0.0),
) -> list[Tensor] | None:
    """Results of layers of one input by one call of the kernels; None where they cannot be used."""
    check_rows(name, x)
    inputs = x.shape[-1]
    outputs = [_check_layer(name, inputs, *layer) for layer in layers]
    kernels = native.kernels()
    if kernels is None or not inputs:
        return None
    rows = plain(x, torch.float32)
    results, held, calls = [], [], []
    for (weight, scale, bias), size in zip(layers, outputs, strict=True):
        y, real = rows.new_empty((*x.shape[:-1], size)), plain(scale, torch.float32)
        more = None if bias is None else plain(bias, torch.float32)
        held.append((weight.contiguous(), real, more))  # copies live until the kernels are through
        results.append(y)
        addresses = [address_of(tensor) or 0 for tensor in (*held[-1], y)]
        calls.append(_LAYER.pack(*addresses, size, function, *ends))
    failed = kernels.torch_quant_dynamic(
        torch.get_num_threads(), rows.data_ptr(), b"".join(calls), rows.numel() // inputs, inputs,
        len(calls), signed,
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
    sums = torch.nn.functional.linear(centred, weight.to(torch.float32))
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
