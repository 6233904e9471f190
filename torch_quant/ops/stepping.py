"""Recurrent layers whose inputs and hidden states are rounded at each step, on grids chosen there.

gates = W_ih round(x) + b_ih           of the whole sequence at once
state = W_hh round(h) + b_hh           a step at a time
lstm    i, f, g, o = gates + state;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
gru     r, z = sigmoid of their gates + state;  n = tanh(gates_n + r state_n);  h = n + z (h - n)
rnn     h = tanh(gates + state), or relu of it

Weights are rounded beforehand; what is not a product is float. Every row of ``x`` and ``h`` has a
grid of its own, so no sequence depends on others, nor on how long they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import CHOOSE_QPARAMS, FAKE_QUANTIZE
from torch_quant.ops.whole import check_packed

__all__ = [
    "GATES", "RECURRENT", "RECURRENT_CELL", "cells_of", "fake_cell", "fake_recurrent",
    "first_rows", "rows_of_steps", "run_layers",
]  # fmt: skip

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Kind of cell -> how many blocks of rows its matrices have."""


def cells_of(params: Any, has_biases: bool) -> list[Any]:
    """The parameters of each layer and direction, in order: W_ih, W_hh and the biases."""
    count = 4 if has_biases else 2
    return [params[i : i + count] for i in range(0, len(params), count)]


def first_rows(x: Tensor, hx: list[Tensor], batch_sizes: Tensor | None) -> list[int]:
    """At which row each step begins, and where the last ends.

    Args:
        x: ``[steps, batch, features]``, or ``[rows, features]`` of packed sequences.
        hx: states.
        batch_sizes: of packed sequences, how many have each step.

    Raises:
        InvalidConfig: these do not belong together.
    """
    if batch_sizes is None:
        steps, batch = x.shape[:2]
        return list(range(0, steps * batch + 1, batch)) if batch else [0] * (steps + 1)
    wanted = [(each.shape[0], each.shape[-1]) for each in hx]
    return [0, *itertools.accumulate(check_packed(x, batch_sizes, wanted, hx))]


def rows_of_steps(x: Tensor, batch_first: bool, batch_sizes: Tensor | None) -> Tensor:
    """``x`` with the steps first."""
    return x.transpose(0, 1) if batch_first and batch_sizes is None else x


def run_layers(
    x: Tensor,
    hx: list[Tensor],
    cells: list[Any],
    directions: int,
    layer: Any,
) -> list[Tensor]:
    """Each layer on the results of the one before.

    Args:
        x: with the steps first.
        hx: hidden states, and cell states of an LSTM: ``[layers * directions, batch, size]``.
        cells: what each layer and direction computes with.
        directions: 1 or 2.
        layer: from input, copies of the states of its directions, and their cells to the result;
            it writes the states that are behind the last step into the copies.

    Returns:
        The results of the last layer, and all states.
    """
    states = [each.clone(memory_format=torch.contiguous_format) for each in hx]
    for first in range(0, len(cells), directions):
        some = slice(first, first + directions)
        x = layer(x, [each[some] for each in states], cells[some])
    return [x, *states]


def _recurrent(
    x: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    batch_sizes: Tensor | None,
    kind: str,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    *how: Any,
) -> list[Tensor]:
    first = first_rows(rows_of_steps(x, batch_first, batch_sizes), hx, batch_sizes)
    seen: list[None] = []

    def layer(x: Tensor, states: list[Tensor], cells: list[Any]) -> Tensor:
        rows = x.reshape(first[-1], x.shape[-1])
        rows = _rounded(rows, how) if seen else rows  # the first layer's come rounded
        seen.append(None)
        found = [
            _direction(rows, [each[i] for each in states], cell, first, kind, i == 1, how)
            for i, cell in enumerate(cells)
        ]
        y = torch.cat(found, -1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    given = rows_of_steps(x, batch_first, batch_sizes)
    cells = cells_of(params, has_biases)
    y, *states = run_layers(given, hx, cells, 2 if bidirectional else 1, layer)
    return [_as_given(y, batch_first, batch_sizes), *states]


def _as_given(y: Tensor, batch_first: bool, batch_sizes: Tensor | None) -> Tensor:
    return rows_of_steps(y, batch_first, batch_sizes).contiguous()


def _rounded(x: Tensor, how: tuple[Any, ...]) -> Tensor:
    grid = CHOOSE_QPARAMS(x, *how)
    return FAKE_QUANTIZE(x, *grid, how[0])  # type: ignore[no-any-return]


def _steps(first: list[int], backwards: bool) -> Iterator[tuple[int, int]]:
    pairs = list(itertools.pairwise(first))
    return iter(reversed(pairs) if backwards else pairs)


def _direction(
    rows: Tensor,
    states: list[Tensor],
    cell: Any,
    first: list[int],
    kind: str,
    backwards: bool,
    how: tuple[Any, ...],
) -> Tensor:
    """One direction of one layer, a step at a time; ``states`` become those behind the last."""
    w_ih, w_hh, *biases = cell
    b_ih, b_hh = biases or (None, None)
    gates = functional.linear(rows, w_ih, b_ih)
    y = rows.new_empty((rows.shape[0], w_hh.shape[-1]))
    for begin, end in _steps(first, backwards):
        now = [each[: end - begin] for each in states]
        state = functional.linear(_rounded(now[0], how), w_hh, b_hh)
        for each, new in zip(now, _cell(kind, gates[begin:end], state, now), strict=True):
            each.copy_(new)
        y[begin:end] = now[0]
    return y


def _cell(kind: str, gates: Tensor, state: Tensor, now: list[Tensor]) -> tuple[Tensor, ...]:
    """The states behind a step."""
    if kind == "lstm":
        i, f, g, o = (gates + state).chunk(4, -1)
        c = f.sigmoid() * now[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "gru":
        of_x, of_h = gates.chunk(3, -1), state.chunk(3, -1)
        reset, update = ((of_x[i] + of_h[i]).sigmoid() for i in (0, 1))
        made = (of_x[2] + reset * of_h[2]).tanh()
        return (made + update * (now[0] - made),)
    total = gates + state
    return (total.tanh() if kind == "rnn_tanh" else total.relu(),)


def fake_recurrent(x: Tensor, hx: list[Tensor], *rest: Any) -> list[Tensor]:
    """The results without values, of the operator here and of a kernel that begins alike."""
    bidirectional = rest[4]
    features = (2 if bidirectional else 1) * hx[0].shape[-1]
    return [x.new_empty((*x.shape[:-1], features)), *(torch.empty_like(each) for each in hx)]


RECURRENT = define_operator(
    "recurrent(Tensor x, Tensor[] hx, Tensor[] params, Tensor? batch_sizes, str kind, "
    "bool has_biases, bool bidirectional, bool batch_first, str element, bool symmetric, "
    "str granularity, str scale_type) -> Tensor[]",
    _recurrent,
    fake_recurrent,
)
"""Layers of ``aten.lstm``, ``gru`` or ``rnn``; ``x`` and the matrices come rounded."""


def _recurrent_cell(
    x: Tensor, hx: list[Tensor], params: list[Tensor], kind: str, has_biases: bool, *how: Any
) -> list[Tensor]:
    states = [each.clone(memory_format=torch.contiguous_format) for each in hx]
    _direction(x, states, params, [0, x.shape[0]], kind, False, how)
    return states


def fake_cell(x: Tensor, hx: list[Tensor], *rest: Any) -> list[Tensor]:
    """The states without values."""
    return [torch.empty_like(each) for each in hx]


RECURRENT_CELL = define_operator(
    "recurrent_cell(Tensor x, Tensor[] hx, Tensor[] params, str kind, bool has_biases, "
    "str element, bool symmetric, str granularity, str scale_type) -> Tensor[]",
    _recurrent_cell,
    fake_cell,
)
"""One step of ``aten.lstm_cell``, ``gru_cell`` or ``rnn_cell``: the states behind it."""
