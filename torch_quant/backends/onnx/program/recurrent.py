"""LSTMs, GRUs and plain RNNs as ONNX's own operators, which serve every length and batch.

PyTorch's exporter unrolls them over the steps of the example. Here each layer is one operator that
it does not look into, whose ONNX form is below.

    PyTorch: W_ih, W_hh, b_ih, b_hh of each direction; gates i f g o, or r z n
    ONNX:    W, R, B of both directions;               gates i o f g, or z r n
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.ops.arguments import arguments, part_of
from torch_quant.ops.library import define_operator
from torch_quant.ops.stepping import cells_of
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import place

__all__ = ["recurrent_forms", "recurrent_layers", "unrolled"]

aten = torch.ops.aten

_KINDS: dict[Any, str] = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "Tanh",
    aten.rnn_relu.input: "Relu",
}
_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "Tanh": (0,), "Relu": (0,)}
"""Where ONNX's gates are among PyTorch's."""

_COMMON = "Tensor x, Tensor w, Tensor r, Tensor b, Tensor h"


def recurrent_layers(context: PassContext) -> int:
    """Put one operator for each layer in the place of PyTorch's; returns how many were rewritten.

    Those whose weights are computed, and LSTMs with projections, stay: ONNX has none.
    """
    changed = 0
    for node in list(context.graph.nodes):
        kind = _KINDS.get(node.target)
        if kind is None:
            continue
        x, hx, params, has_biases, layers, _, train, both, batch_first = arguments(node).values()
        count = layers * (2 if both else 1) * (4 if has_biases else 2)
        if train or len(params) != count or any(each.op != "get_attr" for each in params):
            continue
        states = list(hx) if kind == "LSTM" else [hx]
        with context.graph.inserting_before(node):
            parts = _Writer(context, node, kind).layers(
                x, states, cells_of(params, has_biases), layers, both, batch_first
            )
        for user in list(node.users):
            user.replace_all_uses_with(parts[part_of(user)[1]])
            context.graph.erase_node(user)
        context.graph.erase_node(node)
        changed += 1
    return changed


def unrolled(gm: fx.GraphModule) -> list[fx.Node]:
    """What is left of PyTorch's operators: the exporter unrolls it over the example's steps."""
    return [node for node in gm.graph.nodes if node.target in _KINDS]


class _Writer:
    """Writes the layers of one node before it."""

    def __init__(self, context: PassContext, node: fx.Node, kind: str) -> None:
        self.gm, self.node, self.kind = context.gm, node, kind

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.node.graph.call_function(target, args)

    def layers(
        self,
        x: fx.Node,
        states: list[fx.Node],
        cells: list[list[fx.Node]],
        layers: int,
        both: bool,
        batch_first: bool,
    ) -> list[fx.Node]:
        """The results of the node: the output and the last states."""
        count = 2 if both else 1
        last: list[list[fx.Node]] = [[] for _ in states]
        x = self._call(aten.transpose.int, x, 0, 1) if batch_first else x
        for i in range(layers):
            mine = cells[i * count : (i + 1) * count]
            given = [
                self._call(aten.slice.Tensor, each, 0, i * count, (i + 1) * count)
                for each in states
            ]
            if self.kind == "LSTM":
                target = _ONNX_LSTM
                results = self._call(target, x, *self._weights(mine, i), *given, both)
            else:
                target = _ONNX_RECURRENT
                results = self._call(target, x, *self._weights(mine, i), *given, self.kind, both)
            x, *ends = (self._call(operator.getitem, results, j) for j in range(1 + len(states)))
            for found, end in zip(last, ends, strict=True):
                found.append(end)
        x = self._call(aten.transpose.int, x, 0, 1) if batch_first else x
        return [x, *(self._call(aten.cat.default, each) for each in last)]

    def _weights(self, cells: list[list[fx.Node]], layer: int) -> list[fx.Node]:
        """W, R and B of one layer as buffers of the graph."""
        found = [[_attribute(self.gm, each) for each in cell] for cell in cells]
        zeros = torch.zeros(found[0][1].shape[0], dtype=found[0][1].dtype)
        w, r = (torch.stack([self._ordered(cell[k]) for cell in found]) for k in (0, 1))
        biases = [cell[2:] or [zeros, zeros] for cell in found]
        b = torch.stack([torch.cat([self._ordered(x) for x in each]) for each in biases])
        module = str(cells[0][0].target).rpartition(".")[0]
        targets = [
            place(self.gm, f"{module}.{name}_l{layer}", {"": value})
            for name, value in (("w", w), ("r", r), ("b", b))
        ]
        return [self.node.graph.get_attr(target) for target in targets]

    def _ordered(self, x: Tensor) -> Tensor:
        order = _ORDER[self.kind]
        gates = x.detach().chunk(len(order))
        return torch.cat([gates[k] for k in order])


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    path, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(gm.get_submodule(path), name)
    return value


def _fake_lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, c: Tensor, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _output(x, r, both), torch.empty_like(h), torch.empty_like(c)


def _fake_recurrent(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, kind: str, both: bool
) -> tuple[Tensor, Tensor]:
    return _output(x, r, both), torch.empty_like(h)


def _output(x: Tensor, r: Tensor, both: bool) -> Tensor:
    return x.new_empty((*x.shape[:2], (2 if both else 1) * r.shape[-1]))


_ONNX_LSTM = define_operator(
    f"onnx_lstm({_COMMON}, Tensor c, bool both) -> (Tensor, Tensor, Tensor)", None, _fake_lstm
)
_ONNX_RECURRENT = define_operator(
    f"onnx_recurrent({_COMMON}, str kind, bool both) -> (Tensor, Tensor)", None, _fake_recurrent
)


# The ONNX forms, which onnxscript traces


def recurrent_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By operator: an ``onnxscript`` function that writes the form."""
    return {_ONNX_LSTM: _lstm, _ONNX_RECURRENT: _recurrent}


def _options(r: Any, both: bool) -> dict[str, Any]:
    return {
        "hidden_size": int(r.shape[2]),
        "direction": "bidirectional" if both else "forward",
    }


def _flat(op: Any, y: Any) -> Any:
    """``(steps, directions, batch, hidden)`` as ``(steps, batch, directions * hidden)``."""
    y = op.Transpose(y, perm=[0, 2, 1, 3])
    return op.Reshape(y, op.Constant(value_ints=[0, 0, -1]))


def _lstm(x: Any, w: Any, r: Any, b: Any, h: Any, c: Any, both: bool) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18
    y, h_n, c_n = op.LSTM(x, w, r, b, None, h, c, None, **_options(r, both))
    return _flat(op, y), h_n, c_n


def _recurrent(x: Any, w: Any, r: Any, b: Any, h: Any, kind: str, both: bool) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18
    options = _options(r, both)
    if kind == "GRU":
        y, h_n = op.GRU(x, w, r, b, None, h, linear_before_reset=1, **options)
    else:
        y, h_n = op.RNN(x, w, r, b, None, h, activations=[kind] * (2 if both else 1), **options)
    return _flat(op, y), h_n
