"""Recurrent layers as one operator while exporting, for any length: traced inside, it is fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.ops.library import define_operator

__all__ = ["restore_recurrent", "whole_recurrent"]

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""What ``torch.nn`` calls."""
_OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)


@contextlib.contextmanager
def whole_recurrent() -> Iterator[None]:
    """Export an LSTM, GRU or RNN as one operator of ours, whose sizes are free.

    :func:`restore_recurrent` puts PyTorch's operator in its place. Packed sequences are left alone.
    """

    def whole(kind: str) -> Any:
        ours, own = getattr(torch.ops.torch_quant, f"whole_{kind}"), getattr(torch._VF, kind)

        def call(*args: Any) -> Any:
            return ours(*args) if isinstance(args[3], bool) else own(*args)

        return call

    for kind in _KINDS:
        setattr(torch._VF, kind, whole(kind))
    try:
        yield
    finally:
        for kind in _KINDS:
            delattr(torch._VF, kind)


def restore_recurrent(graph: fx.Graph) -> None:
    """Undo what :func:`whole_recurrent` did to an exported graph."""
    for kind in _KINDS:
        ours = getattr(torch.ops.torch_quant, f"whole_{kind}").default
        for node in graph.find_nodes(op="call_function", target=ours):
            node.target = getattr(torch.ops.aten, kind).input


def _output(x: Tensor, h: Tensor, options: tuple[Any, ...]) -> Tensor:
    features = (2 if options[5] else 1) * h.shape[-1]
    if options[6]:  # batch first: computed with the steps first
        return x.new_empty((x.shape[1], x.shape[0], features)).transpose(0, 1)
    return x.new_empty((*x.shape[:2], features))


def _fake_lstm(x: Tensor, hx: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _output(x, hx[0], options), torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _fake_rnn(x: Tensor, hx: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _output(x, hx, options), torch.empty_like(hx)


for _kind in _KINDS:
    _lstm = _kind == "lstm"
    _hx, _results = (
        ("Tensor[]", "Tensor, Tensor, Tensor") if _lstm else ("Tensor", "Tensor, Tensor")
    )
    define_operator(
        f"whole_{_kind}(Tensor x, {_hx} hx, {_OPTIONS}) -> ({_results})",
        getattr(torch.ops.aten, _kind).input,
        _fake_lstm if _lstm else _fake_rnn,
    )
