"""Operators over this package's own kernels, which can be traced, copied, exported and saved.

They take weights as these are saved; nothing is packed for a machine and nothing is kept. Where the
library of kernels is missing, they compute the same with dequantized weights.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.packing import row_bytes, unpack
from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.ops.library import define_operator
from torch_quant.ops.rows import register_row_operator

__all__ = [
    "PACKED_EMBEDDING", "WEIGHT_ONLY_EXPERTS",
    "WEIGHT_ONLY_LINEAR",
]  # fmt: skip


def _check(fits: bool, operator: str, what: str, got: object) -> None:
    if not fits:
        raise InvalidConfig(f"torch_quant::{operator}: expected {what}, got {got}")


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    ready = x.dtype is dtype and x.is_contiguous() and not x.is_neg()
    return x if ready else x.detach().to(dtype).resolve_neg().contiguous()


def address_of(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def check_weight(name: str, weight: Tensor, scale: Tensor) -> None:
    if weight.dim() != 2:
        _check(False, name, "a weight of two dimensions", tuple(weight.shape))
    outputs, scales = weight.shape[0], scale.numel()
    if outputs and (not scales or scales % outputs):
        _check(False, name, f"scales for {outputs} outputs", tuple(scale.shape))


def check_rows(name: str, x: Tensor) -> None:
    if not (x.is_floating_point() and x.dim()):
        _check(False, name, "a floating-point x with a dimension of inputs", (x.dtype, x.shape))


def check_bias(name: str, bias: Tensor | None, outputs: int) -> None:
    if bias is not None and bias.shape != (outputs,):
        _check(False, name, f"a bias of {outputs}", tuple(bias.shape))


@dataclass(frozen=True)
class Layout:
    """What is known of a weight and its scales once they were checked.

    Args:
        weight: the tensor, as long as it lives.
        given: where the tensors lay, and what they were checked for.
        held: weight, scales and zero points as the kernel reads them, where they are copies.
        pointers: of weight, scales, zero points that are bytes, zero points that are floats.
        outputs: rows of the weight.
        options: of the kernel, from the bytes of a row on.
        entry: all that as ``Weight`` of ``csrc/weights.cpp``, without a bias.
    """

    weight: weakref.ref[Tensor]
    given: tuple[Any, ...]
    held: tuple[Tensor | None, ...]
    pointers: tuple[int, int, int | None, int | None]
    outputs: int
    options: tuple[int, int, int, bool, int]
    entry: bytes


_WEIGHT = struct.Struct("@11q")
_LAYOUTS: dict[int, Layout] = {}
"""By the identity of the weight. Checks at each call would take as long as a token's kernel."""


def layout_of(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, inputs: int, bits: int, zero: int
) -> Layout:
    """The layout of a weight; raises :class:`InvalidConfig` if the tensors do not fit."""
    given = (
        weight.data_ptr(), scale.data_ptr(), address_of(zero_point), inputs, bits, zero,
        weight.shape, weight.dtype, scale.shape, scale.dtype, scale.stride(),
        None if zero_point is None else zero_point.dtype,
    )  # fmt: skip
    known = _LAYOUTS.get(id(weight))
    if known is not None and known.given == given and known.weight() is weight:
        return known
    name = "weight_only_linear"
    check_weight(name, weight, scale)
    _check(bits in (2, 4, 8), name, "bits=2, 4 or 8", bits)
    outputs, width = weight.shape
    bytes_ = (torch.uint8, torch.int8) if bits == 8 else (torch.uint8,)
    _check(weight.dtype in bytes_, name, f"a weight of {bytes_}", weight.dtype)
    _check(width == row_bytes(inputs, bits), name, f"rows of {inputs} codes", f"{width} bytes")
    groups = scale.numel() // max(outputs, 1)
    fine = groups == 1 or (inputs % groups == 0 and inputs // groups % 32 == 0)
    _check(fine, name, "groups of a multiple of 32 inputs", f"{groups} groups of {inputs} inputs")
    if zero_point is not None:
        _check(zero_point.numel() == scale.numel(), name, "a zero point for each scale",
               tuple(zero_point.shape))  # fmt: skip
    floats = zero_point is not None and zero_point.is_floating_point()
    kind = torch.float32 if floats else torch.uint8
    read = (
        weight.contiguous(),
        plain(scale, torch.float32),
        None if zero_point is None else plain(zero_point, kind),
    )
    addresses = tuple(map(address_of, read))
    zeros = (None, addresses[2]) if floats else (addresses[2], None)
    pointers = (read[0].data_ptr(), read[1].data_ptr(), *zeros)
    key = id(weight)
    options = (width, groups, bits, weight.dtype is torch.int8, zero)
    entry = _WEIGHT.pack(*(each or 0 for each in (*pointers, None, outputs, *options)))
    made = Layout(
        weakref.ref(weight, lambda _: _LAYOUTS.pop(key, None)),
        given,
        (scale, zero_point) if addresses == given[:3] else read,
        pointers,
        outputs,
        options,
        entry,
    )
    if addresses == given[:3]:  # no copies: what is written to the tensors later is read
        _LAYOUTS[key] = made
    return made


def _sums_of_nothing(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a layer without inputs gives."""
    y = y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    return y.to(dtype)


def _weight_only_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    zero: int,
) -> Tensor:
    name, shape = "weight_only_linear", x.shape
    check_rows(name, x)
    inputs = shape[-1]
    layout = layout_of(weight, scale, zero_point, inputs, bits, zero)
    check_bias(name, bias, layout.outputs)
    kernels = native.kernels()
    if kernels is None:
        real = _dequantized(_codes(weight, bits, inputs), scale, zero_point, zero)
        return torch.nn.functional.linear(x, real.to(x.dtype), bias)
    rows = plain(x, torch.float32)
    if bias is not None:
        bias = plain(bias, torch.float32)
    y = rows.new_empty(*shape[:-1], layout.outputs)  # faster than of a tuple
    if not inputs:
        return _sums_of_nothing(y, bias, x.dtype)
    count = rows.numel() // inputs
    failed = kernels.torch_quant_linear(
        torch.get_num_threads(), rows.data_ptr(), *layout.pointers, address_of(bias), y.data_ptr(),
        count, inputs, layout.outputs, *layout.options,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"torch_quant::{name}: no memory for {rows.numel()} activations")
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _weight_only_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    ends: Tensor,
    bits: int,
    zero: int,
) -> Tensor:
    """``grouped_linear`` with codes: each expert's rows by a kernel call of its own."""
    experts = ends.shape[0]
    _check(weight.shape[0] % experts == 0, "weight_only_experts", f"rows of {experts} experts",
           weight.shape[0])  # fmt: skip
    out = weight.shape[0] // experts
    scales = scale.reshape(experts, out, -1)
    zeros = None if zero_point is None else zero_point.reshape(experts, out, -1)
    result, start = x.new_zeros(x.shape[0], out), 0
    for i, end in enumerate(ends.tolist()):
        if end > start:
            mine = weight[i * out : (i + 1) * out]
            result[start:end] = _weight_only_linear(
                x[start:end], mine, scales[i], None if zeros is None else zeros[i], None, bits, zero
            )
        start = end
    return result


def _packed_embedding(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    indices: Tensor,
    bits: int,
    zero: int,
    features: int,
) -> Tensor:
    def read(table: Tensor) -> Tensor:
        return torch.nn.functional.embedding(indices, table.reshape(weight.shape[0], -1))

    codes = _codes(read(weight), bits, features)
    return _dequantized(codes, read(scale), None if zero_point is None else read(zero_point), zero)


def _codes(weight: Tensor, bits: int, count: int) -> Tensor:
    """Codes counted from 0."""
    if bits < 8:
        return unpack(weight, bits, count)
    if weight.dtype is torch.uint8:
        return weight
    return torch.bitwise_xor(weight.view(torch.uint8), 128)


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, zero: int) -> Tensor:
    """Real values; the last dimension of ``codes`` is cut into as many groups as have a scale."""
    shape = (*codes.shape[:-1], -1, 1)
    scale = scale.reshape(shape) if codes.numel() else scale.new_ones((1,) * len(shape))
    groups = codes.reshape(*codes.shape[:-1], scale.shape[-2], -1).to(torch.float32)
    middle: Tensor | int = zero
    if zero_point is not None:
        middle = zero_point.reshape(scale.shape).to(torch.float32)
    return ((groups - middle) * scale).reshape(codes.shape)


def _fake_linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_experts(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // args[2].shape[0]))


def _fake_embedding(weight: Tensor, scale: Tensor, zero_point: Any, *args: Any) -> Tensor:
    indices, features = args[0], args[3]
    shape: Sequence[Any] = (*indices.shape, features)
    return scale.new_empty(shape)


WEIGHT_ONLY_LINEAR = define_operator(
    "weight_only_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int bits, int zero) -> Tensor",
    _weight_only_linear,
    _fake_linear,
    keys=("CPU",),
)
WEIGHT_ONLY_EXPERTS = define_operator(
    "weight_only_experts(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor ends, "
    "int bits, int zero) -> Tensor",
    _weight_only_experts,
    _fake_experts,
    keys=("CPU",),
)
PACKED_EMBEDDING = define_operator(
    "packed_embedding(Tensor weight, Tensor scale, Tensor? zero_point, Tensor indices, int bits, "
    "int zero, int features) -> Tensor",
    _packed_embedding,
    _fake_embedding,
    keys=("CPU",),
)

register_row_operator(WEIGHT_ONLY_LINEAR, 0)
register_row_operator(PACKED_EMBEDDING, 3)
