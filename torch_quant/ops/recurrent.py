"""LSTMs: what an int8 kernel computes, and what calibration has to know of the float one.

Of every recurrent layer: how it is captured, what it counts, why it stays in float.

i, f, g, o = W_ih x + W_hh h + b        sums of int8 products
c = sigmoid(f) c + sigmoid(i) tanh(g)   float
h = round_to_grid(sigmoid(o) tanh(c))   read by the next step and the next layer
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from torch_quant.core.plan import SitePlan
from torch_quant.ops.arguments import arguments, retarget, set_arguments
from torch_quant.ops.capturing import Capturing, register_capturing
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import FAKE_QUANTIZE
from torch_quant.ops.table import (
    Inserter,
    OpPattern,
    call_sizes,
    numel,
    register_float,
    register_operator,
)

__all__ = ["LSTM", "cells_of", "hidden_states", "projected"]

aten = torch.ops.aten


def cells_of(params: Any, has_biases: bool) -> list[Any]:
    """The parameters of each layer and direction, in order: W_ih, W_hh and the biases."""
    count = 4 if has_biases else 2
    return [params[i : i + count] for i in range(0, len(params), count)]


def projected(node: fx.Node) -> str:
    """Why an LSTM with ``proj_size`` stays in float."""
    given = arguments(node)
    cells = given["num_layers"] * (2 if given["bidirectional"] else 1)
    plain = len(given["params"]) == cells * (4 if given["has_biases"] else 2)
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


LSTM = define_operator(
    "lstm(Tensor x, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, "
    "bool bidirectional, bool batch_first, Tensor scale, Tensor zero_point, str element) -> "
    "(Tensor, Tensor, Tensor)",
    _lstm,
    _fake_lstm,
)
"""``aten.lstm`` with hidden states on a grid; ``x`` and the matrices come dequantized."""


def _macs(args: Any, out: Any) -> int:
    """Of ``lstm``, ``gru`` and ``rnn``: each row of the input meets every matrix once.

    Args:
        args: of the operator: the input, then states, batch sizes and the list of parameters.
        out: its result.
    """
    params: Any = next(each for each in args[2:] if isinstance(each, (list, tuple)))
    weights = sum(numel(each) for each in params if len(call_sizes(each)) == 2)
    return _rows(args[0]) * weights


def _cell_macs(args: Any, out: Any) -> int:
    x, w_ih, w_hh = args[0], args[2], args[3]
    return _rows(x) * (numel(w_ih) + numel(w_hh))


def _mkldnn_macs(args: Any, out: Any) -> int:
    return _rows(args[0]) * (numel(args[1]) + numel(args[2]))


def _rows(x: Any) -> int:
    """How many vectors a tensor has along its last dimension."""
    return numel(x) // max(call_sizes(x)[-1], 1)


def _quantize(inserter: Inserter, node: fx.Node, entry: SitePlan) -> None:
    """Quantize an LSTM: input, matrices, and the hidden state at every step.

    Kernels sum ``W_ih x + W_hh h`` as integers, so a row of both matrices shares one scale, in
    units of a step of ``x`` and of ``h``. Inner layers read ``h``. With float activations each
    matrix has scales of its own.
    """
    spec, hidden, given = entry.activation, entry.inputs[-1], arguments(node)
    x, layers = given["input"], given["num_layers"]
    ratio = torch.ones(())
    if spec is not None:
        ratio = inserter.scale(inserter.source(x), spec) / inserter.scale(hidden, spec)
    cells = cells_of(given["params"], given["has_biases"])
    new: list[Any] = []
    for i, (w_ih, w_hh, *biases) in enumerate(cells):
        if entry.weight is None:
            new += [w_ih, w_hh, *biases]
            continue
        factor = torch.ones(()) if i >= len(cells) // layers else ratio
        values = [inserter.value(each) for each in (w_ih, w_hh)]
        if spec is None:
            parts = [inserter.rounded(entry, each) for each in values]
        else:
            joined = torch.cat([values[0] * factor, values[1]], 1)
            both, qparams = inserter.rounded(entry, joined)
            codes = both.split([each.shape[1] for each in values], 1)
            grids = [replace(qparams, scale=qparams.scale / factor), qparams]
            parts = list(zip(codes, grids, strict=True))
        for old, role, (part, grid) in zip((w_ih, w_hh), ("ih", "hh"), parts, strict=True):
            name = f"weight_{role}_{i}"
            new.append(inserter.weight(node, old, name, part.contiguous(), grid))
        new += biases
    if spec is None:  # the float operator, on dequantized matrices
        set_arguments(node, {"params": new})
        return
    inserter.activations(node, [x], entry)
    grid_of_h = inserter.grid(node, hidden, spec, "hidden")
    given = arguments(node)
    options = (given[name] for name in ("has_biases", "num_layers", "bidirectional", "batch_first"))
    args = (given["input"], given["hx"], new, *options, *grid_of_h, spec.element.name)
    retarget(node, LSTM, args)


register_operator(
    OpPattern(
        "lstm",
        (aten.lstm.input,),
        (0,),
        2,
        0,
        _macs,
        internals={"hidden": hidden_states},
        obstacle=projected,
        quantize=_quantize,
        untrainable="the quantized form of an LSTM has no gradient",
        any_format=False,  # what it multiplies by has to follow the rows of two matrices
    )
)

_NO_FORM = "of the recurrent layers, only LSTMs have an int8 form here"
register_float(
    {
        aten.lstm.data: "packed sequences have no int8 form here",
        aten.gru.input: _NO_FORM, aten.rnn_tanh.input: _NO_FORM, aten.rnn_relu.input: _NO_FORM,
    },
    {
        aten.lstm: _macs, aten.gru: _macs, aten.rnn_tanh: _macs, aten.rnn_relu: _macs,
        aten.lstm_cell: _cell_macs, aten.gru_cell: _cell_macs, aten.rnn_tanh_cell: _cell_macs,
        aten.rnn_relu_cell: _cell_macs, aten.mkldnn_rnn_layer: _mkldnn_macs,
    },
)  # fmt: skip


# While exporting, each is one operator, for any length: traced inside, the length is fixed

_WHOLE = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""What ``torch.nn`` calls."""
_OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)


@contextlib.contextmanager
def _exported_whole() -> Iterator[None]:
    """Export an LSTM, GRU or RNN as one operator of ours, whose sizes are free.

    :func:`_restore` puts PyTorch's operator in its place. Packed sequences are left alone.
    """

    def whole(kind: str) -> Any:
        ours, own = getattr(torch.ops.torch_quant, f"whole_{kind}"), getattr(torch._VF, kind)

        def call(*args: Any) -> Any:
            return ours(*args) if isinstance(args[3], bool) else own(*args)

        return call

    for kind in _WHOLE:
        setattr(torch._VF, kind, whole(kind))
    try:
        yield
    finally:
        for kind in _WHOLE:
            delattr(torch._VF, kind)


def _restore(graph: fx.Graph) -> None:
    """Undo what :func:`_exported_whole` did to an exported graph."""
    for kind in _WHOLE:
        ours = getattr(torch.ops.torch_quant, f"whole_{kind}").default
        for node in graph.find_nodes(op="call_function", target=ours):
            node.target = getattr(torch.ops.aten, kind).input


def _fake_output(x: Tensor, h: Tensor, options: tuple[Any, ...]) -> Tensor:
    features = (2 if options[5] else 1) * h.shape[-1]
    if options[6]:  # batch first: computed with the steps first
        return x.new_empty((x.shape[1], x.shape[0], features)).transpose(0, 1)
    return x.new_empty((*x.shape[:2], features))


def _fake_whole_lstm(x: Tensor, hx: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_output(x, hx[0], options), torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _fake_whole_rnn(x: Tensor, hx: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_output(x, hx, options), torch.empty_like(hx)


for _kind in _WHOLE:
    _two = _kind == "lstm"  # hidden and cell state
    _hx, _results = ("Tensor[]", "Tensor, Tensor, Tensor") if _two else ("Tensor", "Tensor, Tensor")
    define_operator(
        f"whole_{_kind}(Tensor x, {_hx} hx, {_OPTIONS}) -> ({_results})",
        getattr(torch.ops.aten, _kind).input,
        _fake_whole_lstm if _two else _fake_whole_rnn,
    )

register_capturing(Capturing(exporting=_exported_whole, restore=_restore))
