"""Several linear layers with integer weights in one call: of one input, or one after the other.

Each gives what ``weight_only_linear`` gives. A decoder has two hundred of them in a token, and what
it takes to call one is as long as a small kernel. Rows are rounded once for all weights of a
format. What stands between two layers is computed in float to 4e-6 of it.
"""

from __future__ import annotations

import struct
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.native.ops import (
    WEIGHT_ONLY_LINEAR,
    Layout,
    check_bias,
    check_rows,
    layout_of,
    plain,
)
from torch_quant.ops.library import define_operator, plain_function
from torch_quant.ops.rows import register_row_operator

__all__ = ["FUNCTIONS", "GATED_LINEAR", "WEIGHT_ONLY_LINEARS"]

_Optional = Sequence[Tensor | None]

FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "none": (0, lambda x: x),
    "relu": (1, torch.relu),
    "gelu": (3, torch.nn.functional.gelu),
    "gelu_tanh": (4, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "silu": (5, torch.nn.functional.silu),
}
"""What may stand between two layers: the kernels' number of it, and its operator."""
_BIAS_AT = 32
"""Bytes of ``Weight`` of ``csrc/weights.cpp`` before the address of its bias."""
_TABLES: dict[int, _Table] = {}
"""By the identity of the first weight."""


class _Table:
    """Weights as the kernels read them, and what they were checked for.

    Args:
        flat: weights, scales, zero points and biases, one after the other.
        given: what they have to be alike in beside that.
        layouts: of the weights.
        data: the weights.
        forget: called when the first weight is gone.
    """

    __slots__ = (
        "addresses", "copies", "data", "first", "given", "layouts", "numbers", "outputs", "rest",
    )  # fmt: skip

    def __init__(
        self, flat: list[Tensor], given: Any, layouts: list[Layout], data: bytes, forget: Any
    ) -> None:
        self.first, self.rest = weakref.ref(flat[0], forget), list(map(weakref.ref, flat[1:]))
        self.copies: list[Tensor] = []
        self.given, self.layouts, self.data = given, layouts, data
        self.addresses, self.numbers = list(map(_ADDRESS, flat)), list(map(_NUMBER, flat))
        self.outputs = [layout.outputs for layout in layouts]

    def serves(self, flat: list[Tensor], given: Any) -> bool:
        """Whether these are the very tensors, where they were."""
        return (
            self.first() is flat[0]
            and all(ref() is x for ref, x in zip(self.rest, flat[1:], strict=True))
            and self.given == given
            and self.addresses == list(map(_ADDRESS, flat))
            and self.numbers == list(map(_NUMBER, flat))
        )


_ADDRESS, _NUMBER = Tensor.data_ptr, Tensor.numel


def _known(flat: list[Tensor], given: Any) -> _Table | None:
    """The table that was made of these very tensors."""
    known = _TABLES.get(id(flat[0])) if flat else None
    return known if known is not None and known.serves(flat, given) else None


def _made(
    name: str,
    lists: tuple[Sequence[Tensor], Sequence[Tensor], _Optional, _Optional],
    widths: Sequence[int],
    bits: Sequence[int],
    zeros: Sequence[int],
) -> _Table:
    """The table of these weights; raises :class:`InvalidConfig` where they do not fit.

    Args:
        name: of the operator.
        lists: weights, scales, zero points and biases; they live until the kernels are through.
        widths: the inputs of each.
        bits: of each.
        zeros: likewise.
    """
    weights, scales, zero_points, biases = lists
    given = zip(weights, scales, zero_points, widths, bits, zeros, strict=True)
    layouts = [layout_of(*of_one) for of_one in given]
    entries = [layout.entry for layout in layouts]
    copied = []
    for i, bias in enumerate(biases):
        if bias is not None:
            check_bias(name, bias, layouts[i].outputs)
            copied.append(plain(bias, torch.float32))
            address = copied[-1].data_ptr().to_bytes(8, sys.byteorder)
            entries[i] = entries[i][:_BIAS_AT] + address + entries[i][_BIAS_AT + 8 :]
    flat = [x for each in lists for x in each if x is not None]
    held = [*copied, *(x for layout in layouts for x in layout.held)]
    key = id(flat[0])
    made = _Table(
        flat, _given(widths, bits, zeros, zero_points), layouts, b"".join(entries),
        lambda _, tables=_TABLES: tables.pop(key, None),
    )  # fmt: skip
    if all(x is None or any(x is y for y in flat) for x in held):
        _TABLES[key] = made  # no copies: what is written to the tensors later is read
    else:
        made.copies = [x for x in held if x is not None]  # as long as this call
    return made


def _given(
    widths: Sequence[int], bits: Sequence[int], zeros: Sequence[int], zero_points: _Optional
) -> Any:
    have_zeros = bool(zero_points) and zero_points[0] is not None
    return [*widths], [*bits], [*zeros], have_zeros


def _check_counts(
    name: str, weights: Sequence[Tensor], *others: Sequence[Any], optional: Sequence[Any]
) -> None:
    count = len(weights)
    if (
        not count
        or [1 for each in others if len(each) != count]
        or [1 for each in optional if each and len(each) != count]
    ):
        counts = [count, *map(len, others), *map(len, optional)]
        raise InvalidConfig(
            f"torch_quant::{name}: expected lists of one length, those of zero points and biases "
            f"may be empty; got {counts}"
        )


def _weight_only_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    biases: Sequence[Tensor],
    bits: Sequence[int],
    zeros: Sequence[int],
) -> list[Tensor]:
    name, shape, kernels = "weight_only_linears", x.shape, native.kernels()
    flat = [*weights, *scales, *zero_points, *biases]
    widths = [*shape[-1:]] * len(weights)
    table = _known(flat, _given(widths, bits, zeros, zero_points))
    if table is None:
        check_rows(name, x)
        _check_counts(name, weights, scales, bits, zeros, optional=(zero_points, biases))
        nothing = [None] * len(weights)
        lists = weights, scales, zero_points or nothing, biases or nothing
        if kernels is None or not shape[-1]:
            return [_one(x, *each) for each in zip(*lists, bits, zeros, strict=True)]
        table = _made(name, lists, widths, bits, zeros)
    rows = _rows(x)
    results = [rows.new_empty((*shape[:-1], outputs)) for outputs in table.outputs]
    failed = kernels.torch_quant_linears(  # type: ignore[union-attr]
        torch.get_num_threads(), rows.data_ptr(), table.data,
        struct.pack(f"{len(results)}q", *map(_ADDRESS, results)),
        rows.numel() // shape[-1], shape[-1], len(results),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"torch_quant::{name}: no memory for {rows.numel()} activations")
    return results if x.dtype is torch.float32 else [y.to(x.dtype) for y in results]


def _rows(x: Tensor) -> Tensor:
    """``x`` as the kernels read it."""
    if x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg():
        return x
    return plain(x, torch.float32)


def _gated_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    biases: Sequence[Tensor],
    bits: Sequence[int],
    zeros: Sequence[int],
    function: str,
) -> Tensor:
    name, shape, kernels = "gated_linear", x.shape, native.kernels()
    flat, count = [*weights, *scales, *zero_points, *biases], len(weights)
    number, _ = FUNCTIONS.get(function, (None, None))
    widths = [*[*shape[-1:]] * (count - 1), weights[0].shape[0]] if count in (2, 3) else []
    table = _known(flat, _given(widths, bits, zeros, zero_points))
    if table is None or number is None:
        check_rows(name, x)
        _check_gated(name, weights, function)
        _check_counts(name, weights, scales, bits, zeros, optional=(zero_points, biases))
        nothing = [None] * count
        lists = weights, scales, zero_points or nothing, biases or nothing
        if kernels is None or not shape[-1] or not widths[-1]:
            return _one_by_one(x, list(zip(*lists, bits, zeros, strict=True)), function)
        table = _made(name, lists, widths, bits, zeros)
    rows = _rows(x)
    y = rows.new_empty((*shape[:-1], table.outputs[-1]))
    failed = kernels.torch_quant_gated(  # type: ignore[union-attr]
        torch.get_num_threads(), rows.data_ptr(), table.data, y.data_ptr(),
        rows.numel() // shape[-1], shape[-1], count, number,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"torch_quant::{name}: no memory for {rows.numel()} activations")
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _check_gated(name: str, weights: Sequence[Tensor], function: str) -> None:
    if len(weights) not in (2, 3) or function not in FUNCTIONS:
        wanted = f"2 or 3 weights and one of {', '.join(FUNCTIONS)}"
        got: tuple[Any, ...] = (len(weights), function)
        raise InvalidConfig(f"torch_quant::{name}: expected {wanted}, got {got}")
    if len(weights) == 3 and weights[1].shape[0] != weights[0].shape[0]:
        got = weights[0].shape[0], weights[1].shape[0]
        raise InvalidConfig(f"torch_quant::{name}: expected two weights of one height, got {got}")


def _one_by_one(x: Tensor, each: list[Any], function: str) -> Tensor:
    between = FUNCTIONS[function][1](_one(x, *each[0]))
    if len(each) == 3:
        between = between * _one(x, *each[1])
    return _one(between, *each[-1])


def _fake_linears(x: Tensor, weights: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_gated(x: Tensor, weights: Sequence[Tensor], *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights[-1].shape[0]))


_found = plain_function(WEIGHT_ONLY_LINEAR)
assert _found is not None
_one: Callable[..., Tensor] = _found
_LISTS = "Tensor[] weights, Tensor[] scales, Tensor[] zero_points, Tensor[] biases"

WEIGHT_ONLY_LINEARS = define_operator(
    f"weight_only_linears(Tensor x, {_LISTS}, int[] bits, int[] zeros) -> Tensor[]",
    _weight_only_linears,
    _fake_linears,
    keys=("CPU",),
)
"""``weight_only_linear`` with each weight."""

GATED_LINEAR = define_operator(
    f"gated_linear(Tensor x, {_LISTS}, int[] bits, int[] zeros, str function) -> Tensor",
    _gated_linear,
    _fake_gated,
    keys=("CPU",),
)
"""``last(function(first(x)) * second(x))``, or ``last(function(first(x)))`` with two weights."""

register_row_operator(GATED_LINEAR, 0)
