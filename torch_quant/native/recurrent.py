"""Recurrent layers with int8 weights: a whole sequence in one call of a kernel for each layer.

It computes what ``ops/stepping.py`` defines, with integers. Where the library of kernels is
missing, that runs with dequantized weights.
"""

from __future__ import annotations

import struct
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.native import library as native
from torch_quant.native.dynamic import MOST_INPUTS
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import CHOOSE_QPARAMS, FAKE_QUANTIZE
from torch_quant.ops.stepping import (
    GATES,
    RECURRENT,
    RECURRENT_CELL,
    fake_cell,
    fake_recurrent,
    first_rows,
    rows_of_steps,
    run_layers,
)

__all__ = ["DYNAMIC_CELL", "DYNAMIC_RECURRENT"]

_NAME, _CELL = "dynamic_recurrent", "dynamic_cell"
_DIRECTION = "8q"
_CALL = struct.Struct(f"@3q{_DIRECTION}{_DIRECTION}7q")
_CELLS = {kind: i for i, kind in enumerate(GATES)}
_NOTHING = (0,) * 8


def _check(fits: bool, what: str, got: object) -> None:
    if not fits:
        raise InvalidConfig(f"torch_quant::{_NAME}: expected {what}, got {got}")


def _plain(x: Tensor) -> Tensor:
    ready = x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg()
    return x if ready else x.detach().to(torch.float32).resolve_neg().contiguous()


class _Cell:
    """The parameters of one direction of one layer, as the kernel reads them."""

    def __init__(self, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Any) -> None:
        self.weights = [each.contiguous() for each in weights]
        self.scales = [_plain(each) for each in scales]
        self.biases = [_plain(each) for each in biases]
        self.size = self.weights[1].shape[-1]

    def check(self, inputs: int, gates: int) -> None:
        """Raise :class:`InvalidConfig` unless the tensors fit an input of this width."""
        outputs = gates * self.size
        for weight, scale, width in zip(
            self.weights, self.scales, (inputs, self.size), strict=True
        ):
            fits = weight.dtype is torch.int8 and weight.shape == (outputs, width)
            _check(fits, f"an int8 matrix of {outputs} x {width}", (weight.dtype, weight.shape))
            _check(scale.numel() == outputs, f"{outputs} scales", tuple(scale.shape))
        for bias in self.biases:
            _check(bias.shape == (outputs,), f"a bias of {outputs}", tuple(bias.shape))
        most = max(inputs, self.size)
        _check(most <= MOST_INPUTS, f"at most {MOST_INPUTS} inputs", most)

    def addresses(self, states: Sequence[Tensor]) -> tuple[int, ...]:
        tensors = (*self.weights, *self.scales, *self.biases)
        found = [each.data_ptr() for each in tensors]
        found += [0] * (6 - len(found))
        found += [each.data_ptr() for each in states]
        return (*found, *(0,) * (8 - len(found)))

    def real(self) -> list[Tensor]:
        """The parameters with dequantized matrices."""
        pairs = zip(self.weights, self.scales, strict=True)
        matrices = [w.to(torch.float32) * s.reshape(-1, 1) for w, s in pairs]
        return [*matrices, *self.biases]


def _dynamic_recurrent(
    x: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    kind: str,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    scales: list[Tensor],
    biases: list[Tensor],
    signed: bool,
) -> list[Tensor]:
    _check(kind in GATES, f"one of {', '.join(GATES)}", kind)
    _check(len(hx) == (2 if kind == "lstm" else 1), "the states of the cell", len(hx))
    _check(x.is_floating_point(), "a floating-point x", x.dtype)
    rank = 3 if batch_sizes is None else 2
    _check(x.dim() == rank, f"an x of {rank} dimensions", tuple(x.shape))
    _check(len(scales) == len(weights), "a scale for each matrix", len(scales))
    directions = 2 if bidirectional else 1
    pairs = [slice(i, i + 2) for i in range(0, len(weights), 2)]
    cells = [_Cell(weights[i], scales[i], biases[i]) for i in pairs]
    steps = rows_of_steps(x, batch_first, batch_sizes)
    first = first_rows(steps, hx, batch_sizes)
    batch = first[1] - first[0] if len(first) > 1 else steps.shape[1]
    size = cells[0].size
    for i, cell in enumerate(cells):
        width = x.shape[-1] if i < directions else directions * size
        cell.check(width, GATES[kind])
        _check(cell.size == size, f"a state of {size}", cell.size)
    wanted = (len(cells), batch, size)
    for each in hx:
        _check(each.shape == wanted, f"states of {wanted}", tuple(each.shape))
    if native.kernels() is None or not steps.numel() or not size:
        return _in_float(x, hx, cells, batch_sizes, kind, bidirectional, batch_first, signed)
    table = array("q", first)
    options = (len(first) - 1, batch)
    last = (size, directions, _CELLS[kind], signed)

    def layer(x: Tensor, states: list[Tensor], cells: list[_Cell]) -> Tensor:
        y = x.new_empty((*x.shape[:-1], directions * size))
        of = [cell.addresses([s[i] for s in states]) for i, cell in enumerate(cells)]
        back = of[1] if of[1:] else _NOTHING
        call = _CALL.pack(
            x.data_ptr(), table.buffer_info()[0], y.data_ptr(), *of[0], *back,
            *options, x.shape[-1], *last,
        )  # fmt: skip
        memory = f"torch_quant::{_NAME}: no memory for {y.numel()} results"
        native.run_call("torch_quant_recurrent", call, memory)
        return y

    given = [_plain(each) for each in hx]
    y, *states = run_layers(_plain(steps), given, cells, directions, layer)
    y = rows_of_steps(y, batch_first, batch_sizes).contiguous()
    if x.dtype is torch.float32:
        return [y, *states]
    return [y.to(x.dtype), *(new.to(old.dtype) for new, old in zip(states, hx, strict=True))]


def _in_float(
    x: Tensor,
    hx: list[Tensor],
    cells: list[_Cell],
    batch_sizes: Tensor | None,
    kind: str,
    bidirectional: bool,
    batch_first: bool,
    signed: bool,
) -> list[Tensor]:
    how = ("int8" if signed else "uint8", signed, "per_token", "float32")
    params = [each for cell in cells for each in cell.real()]
    flags = (kind, bool(cells[0].biases), bidirectional, batch_first)
    given = [_plain(each) for each in hx]
    y, *states = RECURRENT(_rounded(x, how), given, params, batch_sizes, *flags, *how)
    return [y.to(x.dtype), *(new.to(old.dtype) for new, old in zip(states, hx, strict=True))]


def _rounded(x: Tensor, how: tuple[Any, ...]) -> Tensor:
    rows = _plain(x)
    return FAKE_QUANTIZE(rows, *CHOOSE_QPARAMS(rows, *how), how[0])  # type: ignore[no-any-return]


def _dynamic_cell(
    x: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    kind: str,
    has_biases: bool,
    scales: list[Tensor],
    biases: list[Tensor],
    signed: bool,
) -> list[Tensor]:
    _check(x.dim() == 2 and x.is_floating_point(), "floats of two dimensions", x.shape)
    batch, inputs = x.shape
    held = _checked_cell(weights, scales, biases, inputs, kind)
    size = weights[1].shape[-1]
    if len(hx) != (2 if kind == "lstm" else 1):
        _check(False, "the states of the cell", len(hx))
    for each in hx:
        if each.shape != (batch, size):
            _check(False, f"states of {(batch, size)}", tuple(each.shape))
    if native.kernels() is None or not x.numel() or not size:
        how = ("int8" if signed else "uint8", signed, "per_token", "float32")
        given, cell = [_plain(each) for each in hx], _Cell(weights, scales, biases)
        found = RECURRENT_CELL(_rounded(x, how), given, cell.real(), kind, bool(biases), *how)
        return [new.to(old.dtype) for new, old in zip(found, hx, strict=True)]
    rows, table = _plain(x), array("q", (0, batch))
    states = [each.clone() if (new := _plain(each)) is each else new for each in hx]
    behind = [each.data_ptr() for each in states]
    call = _CALL.pack(  # the state is the result
        rows.data_ptr(), table.buffer_info()[0], behind[0], *held[0], *behind,
        *_NOTHING[: 2 - len(behind)], *_NOTHING,
        1, batch, inputs, size, 1, _CELLS[kind], signed,
    )  # fmt: skip
    native.run_call("torch_quant_recurrent", call, f"torch_quant::{_CELL}: no memory")
    pairs = zip(states, hx, strict=True)
    return [new if new.dtype is old.dtype else new.to(old.dtype) for new, old in pairs]


_CHECKED: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], tuple[int, ...]]] = {}
"""By the identity of W_hh: what was checked, and where it lies. Checks at each call would take as
long as the step of a small cell."""


def _checked_cell(
    weights: list[Tensor], scales: list[Tensor], biases: list[Tensor], inputs: int, kind: str
) -> tuple[tuple[int, ...], Any]:
    """Addresses of a cell's parameters, and what keeps those that are copies.

    Raises:
        InvalidConfig: they do not fit.
    """
    tensors = (*weights, *scales, *biases)
    given = (inputs, kind, *[(x.data_ptr(), x.shape, x.dtype, x.stride()) for x in tensors])
    key = id(weights[-1]) if weights else 0
    known = _CHECKED.get(key)
    if known is not None and known[1] == given and known[0]() is weights[-1]:
        return known[2], None
    _check(kind in GATES, f"one of {', '.join(GATES)}", kind)
    _check(len(weights) == len(scales) == 2, "two matrices and their scales", len(weights))
    _check(len(biases) in (0, 2), "two biases or none", len(biases))
    cell = _Cell(weights, scales, biases)
    cell.check(inputs, GATES[kind])
    addresses = cell.addresses(())[:6]
    if addresses[: len(tensors)] == tuple(x.data_ptr() for x in tensors):
        watch = weakref.ref(weights[-1], lambda _: _CHECKED.pop(key, None))
        _CHECKED[key] = watch, given, addresses  # what is written to the tensors later is read
    return addresses, cell


DYNAMIC_RECURRENT = define_operator(
    f"{_NAME}(Tensor x, Tensor[] hx, Tensor[] weights, Tensor? batch_sizes, str kind, "
    "bool has_biases, bool bidirectional, bool batch_first, Tensor[] scales, Tensor[] biases, "
    "bool signed) -> Tensor[]",
    _dynamic_recurrent,
    fake_recurrent,
    keys=("CPU",),
)
"""``recurrent`` with int8 matrices and scales of their rows: W_ih, W_hh of each cell in turn."""
DYNAMIC_CELL = define_operator(
    f"{_CELL}(Tensor x, Tensor[] hx, Tensor[] weights, str kind, bool has_biases, "
    "Tensor[] scales, Tensor[] biases, bool signed) -> Tensor[]",
    _dynamic_cell,
    fake_cell,
    keys=("CPU",),
)
"""``recurrent_cell`` likewise."""
