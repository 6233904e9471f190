"""LSTMs: what an int8 kernel computes, and what calibration has to know of the float one.

i, f, g, o = W_ih x + W_hh h + b        sums of int8 products
c = sigmoid(f) c + sigmoid(i) tanh(g)   float
h = round_to_grid(sigmoid(o) tanh(c))   read by the next step and the next layer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from torch_quant.graph.qdq import FAKE_QUANTIZE, library

__all__ = ["LSTM", "cells_of", "hidden_states", "projected"]

library.define(
    "lstm(Tensor x, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, "
    "bool bidirectional, bool batch_first, Tensor scale, Tensor zero_point, str element) -> "
    "(Tensor, Tensor, Tensor)"
)


def cells_of(params: Any, has_biases: bool) -> list[Any]:
    """The parameters of each layer and direction, in order: W_ih, W_hh and the biases."""
    count = 4 if has_biases else 2
    return [params[i : i + count] for i in range(0, len(params), count)]


def projected(node: fx.Node) -> str:
    """Why an LSTM with ``proj_size`` stays in float."""
    _, _, params, has_biases, layers, _, _, bidirectional, _ = node.args
    cells = layers * (2 if bidirectional else 1)  # type: ignore[operator]
    plain = len(params) == cells * (4 if has_biases else 2)  # type: ignore[arg-type]
    return "" if plain else "an LSTM with projections (proj_size) has no int8 kernel"


def hidden_states(
    x: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Tensor:
    """Every hidden state of ``aten.lstm``, the given ones and those of inner layers included."""
    h0, c0 = (list(each.split(2 if bidirectional else 1)) for each in hx)
    count = len(params) // num_layers
    found = [hx[0].flatten()]
    for layer in range(num_layers):
        cell = params[layer * count : (layer + 1) * count]
        flags = (has_biases, 1, 0.0, False, bidirectional, batch_first)
        x = torch.lstm(x, (h0[layer], c0[layer]), cell, *flags)[0]
        found.append(x.flatten())
    return torch.cat(found)


def _lstm(
    x: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    *grid: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    directions = 2 if bidirectional else 1
    x = x.transpose(0, 1) if batch_first else x
    cells = cells_of(params, has_biases)
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            steps, c = _run(x, hx[0][k], hx[1][k], cells[k], direction == 1, grid)
            outputs.append(torch.stack(steps))
            last.append((steps[0 if direction else -1], c))
        x = torch.cat(outputs, -1)
    h_n, c_n = (torch.stack(states) for states in zip(*last, strict=True))
    return x.transpose(0, 1).contiguous() if batch_first else x, h_n, c_n


def _run(
    x: Tensor, h: Tensor, c: Tensor, cell: list[Tensor], backwards: bool, grid: tuple[Any, ...]
) -> tuple[list[Tensor], Tensor]:
    """The hidden states of one layer in one direction, in the order of ``x``, and the last cell."""
    w_ih, w_hh, *biases = cell
    gates_of_x = functional.linear(x, w_ih, sum(biases) if biases else None)  # type: ignore[arg-type]
    order = range(len(x))
    steps: dict[int, Tensor] = {}
    h = FAKE_QUANTIZE(h, *grid)
    for t in reversed(order) if backwards else order:
        i, f, g, o = (gates_of_x[t] + functional.linear(h, w_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = steps[t] = FAKE_QUANTIZE(o.sigmoid() * c.tanh(), *grid)
    return [steps[t] for t in order], c


def _fake_lstm(x: Tensor, hx: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    bidirectional = options[3]
    shape = (*x.shape[:2], (2 if bidirectional else 1) * hx[0].shape[-1])
    return x.new_empty(shape), torch.empty_like(hx[0]), torch.empty_like(hx[1])


library.impl("lstm", _lstm, "CompositeExplicitAutograd")
torch.library.register_fake("torch_quant::lstm", _fake_lstm, lib=library)

LSTM = torch.ops.torch_quant.lstm.default
"""``aten.lstm`` with hidden states on a grid; ``x`` and the matrices come dequantized."""
