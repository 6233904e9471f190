"""Recurrent layers: their rows in the table, what they count, and how they are quantized.

On grids that are chosen at each step all of them are (``ops/stepping.py``); on observed ones LSTMs:

i, f, g, o = W_ih x + W_hh h + b        sums of int8 products
c = sigmoid(f) c + sigmoid(i) tanh(g)   float
h = round_to_grid(sigmoid(o) tanh(c))   read by the next step and the next layer
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from torch_quant.core.plan import SitePlan
from torch_quant.core.spec import QuantSpec
from torch_quant.ops.arguments import argument, arguments, retarget, set_arguments
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import FAKE_QUANTIZE
from torch_quant.ops.stepping import RECURRENT, RECURRENT_CELL, cells_of
from torch_quant.ops.table import (
    Inserter,
    Known,
    OpPattern,
    call_sizes,
    numel,
    register_float,
    register_operator,
)
from torch_quant.ops.whole import PACKED

__all__ = ["LEAST_SQNR", "LSTM", "hidden_states", "projected"]

aten = torch.ops.aten


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
    batch_sizes: Tensor | None = None,
) -> Tensor:
    """Every hidden state of ``aten.lstm``, the given ones and those of inner layers included."""
    h0, c0 = (list(each.split(2 if bidirectional else 1)) for each in hx)
    count = len(params) // num_layers
    found = [hx[0].flatten()]
    for layer in range(num_layers):
        cell = params[layer * count : (layer + 1) * count]
        flags, states = (has_biases, 1, 0.0, False, bidirectional), (h0[layer], c0[layer])
        if batch_sizes is None:
            x = torch.lstm(x, states, cell, *flags, batch_first)[0]
        else:
            x = torch.lstm(x, batch_sizes, states, cell, *flags)[0]
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
    units of a step of ``x`` and of ``h``. Inner layers read ``h``. With float activations, and
    with scales that are chosen at each step, each matrix has scales of its own.
    """
    spec, hidden, given = entry.activation, entry.inputs[-1], arguments(node)
    if spec is None or spec.dynamic:
        _quantize_steps(inserter, node, entry)
        return
    if given.get("batch_sizes") is not None:
        inserter.decline(node, _NO_PACKED)
        return
    x, layers = given["input"], given["num_layers"]
    ratio = inserter.scale(inserter.source(x), spec) / inserter.scale(hidden, spec)
    cells = cells_of(given["params"], given["has_biases"])
    new: list[Any] = []
    for i, (w_ih, w_hh, *biases) in enumerate(cells):
        if entry.weight is None:
            new += [w_ih, w_hh, *biases]
            continue
        factor = torch.ones(()) if i >= len(cells) // layers else ratio
        values = [inserter.value(each) for each in (w_ih, w_hh)]
        joined = torch.cat([values[0] * factor, values[1]], 1)
        both, qparams = inserter.rounded(entry, joined)
        codes = both.split([each.shape[1] for each in values], 1)
        grids = [replace(qparams, scale=qparams.scale / factor), qparams]
        for old, role, part, grid in zip((w_ih, w_hh), _ROLES, codes, grids, strict=True):
            name = f"weight_{role}_{i}"
            new.append(inserter.weight(node, old, name, part.contiguous(), grid))
        new += biases
    inserter.activations(node, [x], entry)
    grid_of_h = inserter.grid(node, hidden, spec, "hidden")
    given = arguments(node)
    options = (given[name] for name in ("has_biases", "num_layers", "bidirectional", "batch_first"))
    args = (given["input"], given["hx"], new, *options, *grid_of_h, spec.element.name)
    retarget(node, LSTM, args)


def _one_scale(node: fx.Node, entry: SitePlan, known: Known) -> str:
    """Why a row of both matrices cannot have one scale; empty if it can.

    With ``r`` steps of ``h`` in one of ``x``, rounding ``[r W_ih, W_hh]`` to a step of ``s`` for
    each row adds ``s^2 / 12`` to each element of either. ``x`` may reach its range seldom, which is
    all that is known of it, so what is added to ``W_hh h`` is compared with that alone, and what is
    added to ``W_ih x`` with the whole sum where ``x`` and ``h`` fill their ranges: noise in a term
    that is small beside the other at its largest does not count. Below :data:`LEAST_SQNR` it does.
    """
    given, spec, weight = arguments(node), entry.activation, entry.weight
    assert spec is not None
    if weight is None or not weight.element.integer:
        return ""
    ratio = float(known.scale(entry.inputs[0], spec) / known.scale(entry.inputs[-1], spec))
    cells = cells_of(given["params"], given["has_biases"])
    for w_ih, w_hh, *_ in cells[: len(cells) // given["num_layers"]]:
        pair = [known.value(w_ih).detach() * ratio, known.value(w_hh).detach()]
        top = torch.maximum(*(each.abs().amax(1) for each in pair))
        noise = (top / (2 ** (weight.element.bits - 1) - 1)).square().mean() / 12
        of_x, of_h = (each.square().sum() for each in pair)
        terms = {"W_hh": (of_h, pair[1]), "W_ih x + W_hh h": (of_x + of_h, pair[0])}
        for name, (signal, rounded) in terms.items():
            decibels = 10.0 * float((signal / (noise * rounded.numel())).log10())
            if decibels < LEAST_SQNR and bool(of_h.any()):
                cure = _CURE_OF_ZEROS if known.is_zero(entry.inputs[0]) else _CURE
                return f"{name} would have {decibels:.0f} dB: {_ONE_SCALE} {ratio:.3g} {cure}"
    return ""


LEAST_SQNR = 15.0
"""dB of a matrix that shares its scale with another: two bits and a half."""
_ONE_SCALE = "its rows share a scale with the other matrix, and a step of the input is"
_CURE_OF_ZEROS = (
    "steps of the hidden state, as the input was 0 in every batch: calibrate with others, or have "
    "scales of each step: recipes.int8_dynamic()"
)
_CURE = (
    "steps of the hidden state: divide the input by what brings it near 1, channel by channel, and "
    "multiply W_ih by it, or have scales of each step: recipes.int8_dynamic()"
)
_ROLES = ("ih", "hh")


def _rounded(
    inserter: Inserter, node: fx.Node, entry: SitePlan, cell: Any, place: str
) -> list[Any]:
    """Parameters of a cell with rounded matrices."""
    w_ih, w_hh, *biases = cell
    if entry.weight is None:
        return [w_ih, w_hh, *biases]
    found: list[Any] = []
    for old, role in zip((w_ih, w_hh), _ROLES, strict=True):
        codes, grid = inserter.rounded(entry, inserter.value(old))
        found.append(inserter.weight(node, old, f"weight_{role}{place}", codes, grid))
    return [*found, *biases]


def _how(spec: QuantSpec) -> tuple[Any, ...]:
    """What ``choose_qparams`` takes."""
    return spec.element.name, spec.symmetric, str(spec.granularity), spec.scale_type.value


def _quantize_steps(inserter: Inserter, node: fx.Node, entry: SitePlan) -> None:
    """Quantize layers of any kind: the matrices, and where activations are, each step."""
    given = arguments(node)
    cells = cells_of(given["params"], given["has_biases"])
    new = [
        each
        for i, cell in enumerate(cells)
        for each in _rounded(inserter, node, entry, cell, f"_{i}")
    ]
    if entry.activation is None:  # the float operator, on dequantized matrices
        set_arguments(node, {"params": new})
        return
    inserter.activations(node, [given["input"]], entry)
    given = arguments(node)
    hx = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    flags = (given[name] for name in ("has_biases", "bidirectional", "batch_first"))
    args = (
        given["input"], list(hx), new, given.get("batch_sizes"), _KINDS[node.target], *flags,
        *_how(entry.activation),
    )  # fmt: skip
    retarget(node, RECURRENT, args)


def _quantize_cell(inserter: Inserter, node: fx.Node, entry: SitePlan) -> None:
    """Quantize one step of a cell."""
    given = arguments(node)
    matrices, biases = ([given[f"{name}_{role}"] for role in _ROLES] for name in ("w", "b"))
    biases = [each for each in biases if each is not None]
    params = _rounded(inserter, node, entry, [*matrices, *biases], "")
    if entry.activation is None:
        set_arguments(node, {"w_ih": params[0], "w_hh": params[1]})
        return
    inserter.activations(node, [given["input"]], entry)
    hx = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    args = (
        argument(node, "input"), list(hx), params, _KINDS[node.target], bool(biases),
        *_how(entry.activation),
    )  # fmt: skip
    one = not isinstance(given["hx"], (list, tuple))
    retarget(node, RECURRENT_CELL, args)
    if one:  # it gave a tensor
        with node.graph.inserting_after(node):
            state = node.graph.call_function(operator.getitem, (node, 0))
        state.meta = dict(node.meta)
        node.meta["val"] = [node.meta["val"]]
        node.replace_all_uses_with(state, lambda user: user is not state)


_NO_PACKED = (
    "of packed sequences, activations are quantized on grids that are chosen at each call: "
    "recipes.int8_dynamic()"
)
_NO_GRADIENT = "the quantized form of a recurrent layer has no gradient"
_KINDS = {
    aten.lstm.input: "lstm", aten.gru.input: "gru", aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu", aten.lstm_cell.default: "lstm",
    aten.gru_cell.default: "gru", aten.rnn_tanh_cell.default: "rnn_tanh",
    aten.rnn_relu_cell.default: "rnn_relu",
    **{target: kind for kind, target in PACKED.items()},
}  # fmt: skip

register_operator(
    OpPattern(
        "lstm",
        (aten.lstm.input, PACKED["lstm"]),
        (0,),
        2,
        0,
        _macs,
        internals={"hidden": hidden_states},
        obstacle=projected,
        quantize=_quantize,
        unfit=_one_scale,
        untrainable="the quantized form of an LSTM has no gradient",
        any_format=False,  # what it multiplies by has to follow the rows of two matrices
        steps=True,
    )
)


def _steps(name: str, *targets: Any, cell: bool = False) -> None:
    register_operator(
        OpPattern(
            name,
            targets,
            (0,),
            2,
            0,
            _cell_macs if cell else _macs,
            quantize=_quantize_cell if cell else _quantize_steps,
            untrainable=_NO_GRADIENT,
            any_format=False,
            more_weights=(3,) if cell else (),
            steps=True,
            static=False,
        )
    )


_steps("gru", aten.gru.input, PACKED["gru"])
_steps("rnn", aten.rnn_tanh.input, aten.rnn_relu.input, PACKED["rnn_tanh"], PACKED["rnn_relu"])
_steps("lstm_cell", aten.lstm_cell.default, cell=True)
_steps("gru_cell", aten.gru_cell.default, cell=True)
_steps("rnn_cell", aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default, cell=True)

_OUTSIDE = "packed sequences have no int8 form outside of a captured module"
register_float(
    {aten.lstm.data: _OUTSIDE, aten.gru.data: _OUTSIDE, aten.rnn_tanh.data: _OUTSIDE,
     aten.rnn_relu.data: _OUTSIDE},
    {
        aten.lstm: _macs, aten.gru: _macs, aten.rnn_tanh: _macs, aten.rnn_relu: _macs,
        aten.lstm_cell: _cell_macs, aten.gru_cell: _cell_macs, aten.rnn_tanh_cell: _cell_macs,
        aten.rnn_relu_cell: _cell_macs, aten.mkldnn_rnn_layer: _mkldnn_macs,
    },
)  # fmt: skip
