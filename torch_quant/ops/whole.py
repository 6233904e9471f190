"""Recurrent layers are captured as one operator each, for any length.

Traced inside, PyTorch's own fixes the length.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.errors import InvalidConfig
from torch_quant.ops.capturing import Capturing, register_capturing
from torch_quant.ops.library import define_operator

__all__ = ["PACKED", "check_packed"]

_WHOLE = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""What ``torch.nn`` calls."""
_OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)


@contextlib.contextmanager
def _exported_whole() -> Iterator[None]:
    """Export an LSTM, GRU or RNN as one operator of ours, whose sizes are free.

    :func:`_restore` puts PyTorch's operator in the place of those without packed sequences. Of
    packed ones the checks of states are left out, since they ask for numbers of a tensor, and the
    states that are zero come from an operator of ours, since a trace would fix how many there are.
    """

    def whole(kind: str) -> Any:
        ours = getattr(torch.ops.torch_quant, f"whole_{kind}")
        packed = getattr(torch.ops.torch_quant, f"packed_{kind}")

        def call(*args: Any) -> Any:
            if isinstance(args[3], bool):
                return ours(*args)
            x, batch_sizes, *rest = args
            return packed(x, *rest, False, batch_sizes)

        return call

    def unchecked(check: Any) -> Any:
        def call(self: nn.RNNBase, x: Tensor, hx: Any, batch_sizes: Any) -> None:
            if batch_sizes is None:
                check(self, x, hx, batch_sizes)

        return call

    def with_states(forward: Any) -> Any:
        def call(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
            if hx is None and isinstance(input, nn.utils.rnn.PackedSequence):
                hx = _zero_states(self, input)
            return forward(self, input, hx)

        return call

    with contextlib.ExitStack() as undo:
        for kind in _WHOLE:
            undo.enter_context(_put(torch._VF, kind, whole(kind)))
        for layer in (nn.LSTM, nn.GRU, nn.RNN):
            undo.enter_context(_put(layer, "forward", with_states(layer.forward)))
        for cls in (nn.RNNBase, nn.LSTM):
            check = unchecked(cls.check_forward_args)
            undo.enter_context(_put(cls, "check_forward_args", check))
        yield


def _zero_states(layer: nn.RNNBase, x: nn.utils.rnn.PackedSequence) -> Any:
    cells = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    found = [_ZEROS(x.data, x.batch_sizes, cells, size) for size in sizes]
    return tuple(found) if isinstance(layer, nn.LSTM) else found[0]


@contextlib.contextmanager
def _put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have an attribute be another."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Have PyTorch's layers refuse packed sequences whose parts do not belong together.

    Captured models are tried on inputs of other sizes; PyTorch would read beyond them.
    """

    def checked(kind: str) -> Any:
        own = getattr(torch._VF, kind)

        def call(*args: Any) -> Any:
            if not isinstance(args[3], bool):
                _check_call(*args)
            return own(*args)

        return call

    with contextlib.ExitStack() as undo:
        for kind in _WHOLE:
            undo.enter_context(_put(torch._VF, kind, checked(kind)))
        yield


def check_packed(
    x: Tensor, batch_sizes: Tensor, wanted: list[tuple[int, int]], hx: Any
) -> list[int]:
    """The batch sizes of packed sequences.

    Args:
        x: ``[rows, features]``, those of a step one after the other.
        batch_sizes: ``[steps]``, how many sequences have each step.
        wanted: first and last size of each state.
        hx: states, ``[layers, batch, size]``.

    Raises:
        InvalidConfig: they do not belong together.
    """
    sizes: list[int] = batch_sizes.tolist()
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    shapes = [tuple(each.shape) for each in states]
    expected = [(layers, *sizes[:1], size) for layers, size in wanted]
    falling = all(a >= b for a, b in itertools.pairwise([*sizes, 1]))
    if x.dim() != 2 or sum(sizes) != x.shape[0] or not (sizes and falling) or shapes != expected:
        raise InvalidConfig(
            f"a packed sequence of {tuple(x.shape)} and states of {shapes}: expected rows for all "
            f"batch sizes, which never grow, and states for the first of them, got {sizes}"
        )
    return sizes


def _check_call(x: Tensor, batch_sizes: Tensor, hx: Any, params: Any, *options: Any) -> None:
    """Of ``torch.lstm`` and the others."""
    cells = options[1] * (2 if options[4] else 1)
    w_ih, w_hh = params[:2]
    gates = w_ih.shape[0]
    wanted = [(cells, w_hh.shape[1])]
    if isinstance(hx, (list, tuple)):
        wanted.append((cells, gates // 4))
    check_packed(x, batch_sizes, wanted, hx)
    if x.shape[1] != w_ih.shape[1]:
        raise InvalidConfig(f"a packed sequence of {x.shape[1]} features; expected {w_ih.shape[1]}")


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


def _packed(kind: str) -> Any:
    own = getattr(torch.ops.aten, kind).data

    def compute(x: Tensor, hx: Any, *rest: Any) -> Any:
        *options, _, batch_sizes = rest
        _check_call(x, batch_sizes, hx, *options)
        return own(x, batch_sizes, hx, *options)

    return compute


def _zeros(x: Tensor, batch_sizes: Tensor, cells: int, size: int) -> Tensor:
    return x.new_zeros((cells, int(batch_sizes[0]) if len(batch_sizes) else 0, size))


def _fake_zeros(x: Tensor, batch_sizes: Tensor, cells: int, size: int) -> Tensor:
    batch = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((cells, batch, size))


_ZEROS = define_operator(
    "packed_zeros(Tensor x, Tensor batch_sizes, int cells, int size) -> Tensor", _zeros, _fake_zeros
)
"""States for the sequences of the first step."""


def _fake_packed(x: Tensor, hx: Any, *options: Any) -> tuple[Tensor, ...]:
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    features = (2 if options[5] else 1) * states[0].shape[-1]
    return x.new_empty((x.shape[0], features)), *(torch.empty_like(each) for each in states)


PACKED: dict[str, Any] = {}
"""Kind of layer -> what runs it on packed sequences, with the arguments of ``aten.lstm.input``."""

for _kind in _WHOLE:
    _two = _kind == "lstm"  # hidden and cell state
    _hx, _results = ("Tensor[]", "Tensor, Tensor, Tensor") if _two else ("Tensor", "Tensor, Tensor")
    define_operator(
        f"whole_{_kind}(Tensor x, {_hx} hx, {_OPTIONS}) -> ({_results})",
        getattr(torch.ops.aten, _kind).input,
        _fake_whole_lstm if _two else _fake_whole_rnn,
    )
    PACKED[_kind] = define_operator(
        f"packed_{_kind}(Tensor input, {_hx} hx, {_OPTIONS}, Tensor batch_sizes) -> ({_results})",
        _packed(_kind),
        _fake_packed,
    )

register_capturing(Capturing(running=_checked, exporting=_exported_whole, restore=_restore))
