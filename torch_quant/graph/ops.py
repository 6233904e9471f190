"""THE table of operators: what can be quantized, what only moves data, what a kernel can fuse.

A new operator is one more row: here, or from outside by :func:`register_operator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from torch_quant.errors import InvalidConfig
from torch_quant.graph.lstm import hidden_states, projected

__all__ = [
    "ACTIVATIONS",
    "DATA_MOVEMENT",
    "IDENTITY",
    "INT8_NEVER",
    "OPERATORS",
    "RECTIFIERS",
    "ROW_MOVEMENT",
    "SIZES",
    "OpPattern",
    "padding_sizes",
    "call_sizes",
    "contiguous_as_captured",
    "pattern_of",
    "register_operator",
    "rnn_macs",
    "size_hints",
    "spread",
]

aten = torch.ops.aten

SIZES = "torch_quant_sizes"
"""Entry of ``node.meta``: sizes of its tensor where those of the example are others."""


@dataclass(frozen=True)
class OpPattern:
    """One quantizable operator.

    Args:
        name: the op type that users filter and override by.
        targets: the ATen overloads it stands for.
        activations: argument positions quantized per tensor by observed ranges.
        weight: argument position of the weight, or of the list that holds several matrices and
            their biases; None if both sides are activations.
        weight_axis: the weight's output-channel axis.
        macs: multiply-accumulates of one call, of its arguments and its result (nodes or tensors).
        bias: argument position of the bias, None without one.
        smoothable: whether the last dimension of its input is that of its weight, so that factors
            can move from one to the other.
        output: the functions behind it that a kernel which gives nothing but integers does as well;
            None if its result is never quantized.
        internals: tensors that exist only inside the operator, each computed from its arguments so
            that calibration can observe it.
        obstacle: why a call of it cannot run in int8 anywhere, empty if it can.
    """

    name: str
    targets: tuple[Any, ...]
    activations: tuple[int, ...]
    weight: int | None
    weight_axis: int
    macs: Callable[[Any, Any], int]
    bias: int | None = None
    smoothable: bool = False
    output: frozenset[Any] | None = None
    internals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    obstacle: Callable[[fx.Node], str] = lambda node: ""


def size_hints(value: Any) -> tuple[int, ...]:
    """Sizes of a node's or fake tensor's value, symbolic ones as they were in the example.

    A size that depends on data has none; it counts as 1.
    """
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(map(_hint, value.shape))


def contiguous_as_captured(node: fx.Node) -> bool:
    """Whether the value, if it is a tensor, lay in the order of its dimensions in the example."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return True
    expected = 1
    for size, step in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if _hint(size) != 1:
            if _hint(step) != expected:
                return False
            expected *= _hint(size)
    return True


def spread(value: Any, dims: int) -> list[int]:
    """An argument by spatial dimension: ``2`` and ``[2]`` are short for ``[2, 2]``."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values


def padding_sizes(
    padding: Any, kernel: Sequence[int], dilation: Any
) -> tuple[list[int], list[int]]:
    """A convolution's padding in numbers, also where it is given as ``"same"`` or ``"valid"``.

    Args:
        padding: the argument, by name or number.
        kernel: the weight's spatial sizes.
        dilation: the argument.

    Returns:
        What both sides get, by spatial dimension; and what is to be added before by
        ``constant_pad_nd`` where ``"same"`` gives the far side one more, empty if it does not.
    """
    dims = len(kernel)
    if not isinstance(padding, str):
        return spread(padding, dims), []
    total = [d * (k - 1) for d, k in zip(spread(dilation, dims), kernel, strict=True)]
    if padding == "valid":
        total = [0] * dims
    far = [side for each in reversed(total) for side in (0, each % 2)]
    return [each // 2 for each in total], far if any(far) else []


def _hint(size: int | SymInt) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def call_sizes(value: Any) -> tuple[int, ...]:
    """Sizes in the call that a graph was captured for, which may have been repeated to do so."""
    hints = size_hints(value)
    noted = value.meta.get(SIZES, ()) if isinstance(value, fx.Node) else ()
    return noted if len(noted) == len(hints) else hints


def _numel(value: Any) -> int:
    return math.prod(call_sizes(value))


def _gemm_macs(args: Any, out: Any) -> int:
    return _numel(out) * call_sizes(args[0])[-1]


def _conv_macs(args: Any, out: Any) -> int:
    return _numel(out) * math.prod(call_sizes(args[1])[1:])


def _transposed_macs(args: Any, out: Any) -> int:
    return _numel(args[0]) * math.prod(call_sizes(args[1])[1:])


def _sdpa_macs(args: Any, out: Any) -> int:
    query, key, value = map(call_sizes, args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def rnn_macs(args: Any, out: Any) -> int:
    """Of ``lstm``, ``gru`` and ``rnn``: each row of the input meets every matrix once.

    Args:
        args: of the operator: the input, then states, batch sizes and the list of parameters.
        out: its result.
    """
    params: Any = next(each for each in args[2:] if isinstance(each, (list, tuple)))
    weights = sum(_numel(each) for each in params if len(call_sizes(each)) == 2)
    return _numel(args[0]) // max(call_sizes(args[0])[-1], 1) * weights


def sdpa_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Masked, scaled scores of attention, shape ``[..., queries, keys]``, before the softmax."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    factor = scale if scale is not None else 1.0 / math.sqrt(query.size(-1))
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores.masked_fill(~keep, -torch.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf)
    return scores + attn_mask


def sdpa_probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The left operand of attention's second product; a fully masked row gives zeros, not NaN."""
    scores = sdpa_scores(query, key, attn_mask, is_causal, scale, enable_gqa)
    return torch.softmax(scores, -1).nan_to_num(0.0)


def _bag_obstacle(node: fx.Node) -> str:
    others = any(user.args[1] != 0 for user in node.users)
    return "more of its results than the bags are read" if others else ""


OPERATORS: dict[str, OpPattern] = {}
"""The rows by op type."""
_BY_TARGET: dict[Any, OpPattern] = {}


def register_operator(row: OpPattern) -> OpPattern:
    """Add a row: the operator is then a site wherever it has a constant weight and float inputs.

    Args:
        row: what is known of it; ``register_kernel`` says which backend runs it quantized.

    Raises:
        InvalidConfig: its name or one of its overloads has a row already.
    """
    if row.name in OPERATORS:
        raise InvalidConfig(f"the op type {row.name!r} is in the op table already")
    for target in row.targets:
        if target in _BY_TARGET:
            raise InvalidConfig(
                f"{target} is in the op table already, as {_BY_TARGET[target].name}"
            )
    OPERATORS[row.name] = row
    _BY_TARGET.update(dict.fromkeys(row.targets, row))
    return row


def pattern_of(node: fx.Node) -> OpPattern | None:
    """The row of ``node``'s operator, or None."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None


DATA_MOVEMENT = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.expand_as.default, aten.contiguous.default, aten.clone.default,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.swapaxes.default,
    aten.movedim.int, aten.alias.default, aten.detach.default, aten.numpy_T.default,
    aten.flip.default, aten.roll.default, aten.channel_shuffle.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
})  # fmt: skip
"""Operators whose output holds the values of their first argument and no others: a grid chosen for
the input serves the output, so quantization passes through. Slices and splits are left out on
purpose: parts (Q, K and V of one projection) deserve grids of their own. Max pooling is, because
ATen's integer kernel takes small images only."""

ROW_MOVEMENT = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default,
})  # fmt: skip
"""Data movement that keeps the order of elements: a last dimension that has the same size before
and after is the same dimension."""

IDENTITY = frozenset({
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default, aten.dropout_.default, aten.feature_dropout_.default,
    aten.alpha_dropout_.default, aten.feature_alpha_dropout_.default,
})  # fmt: skip
"""Operators that return their first argument if their third, ``train``, is false."""

ACTIVATIONS = {
    aten.relu.default: "relu", aten.relu6.default: "relu6", aten.gelu.default: "gelu",
    aten.silu.default: "silu", aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid",
    aten.hardswish.default: "hardswish", aten.hardsigmoid.default: "hardsigmoid",
    aten.hardtanh.default: "hardtanh", aten.leaky_relu.default: "leaky_relu",
    aten.clamp.default: "clamp", aten.elu.default: "elu", aten.mish.default: "mish",
}  # fmt: skip
"""Element-wise functions that kernels fuse into the product before them, by their common name."""

RECTIFIERS = frozenset({
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default,
})  # fmt: skip
"""Activation functions that only cut the range: a grid behind them does their work."""

INT8_NEVER = {
    aten.lstm.data: "packed sequences have no int8 form here",
    aten.gru.input: "of the recurrent layers, only LSTMs have an int8 form here",
    aten.rnn_tanh.input: "of the recurrent layers, only LSTMs have an int8 form here",
    aten.rnn_relu.input: "of the recurrent layers, only LSTMs have an int8 form here",
    aten.einsum.default: "write the contraction as matmul to have it quantized",
    aten.bilinear.default: "no int8 form",
    aten.baddbmm.default: "write it as bmm and add to have it quantized",
}
"""Operators that compute products and stay float, each with the reason that reports give."""


def _rows() -> Iterator[OpPattern]:
    convs: dict[str, tuple[Any, ...]] = {
        "conv1d": (aten.conv1d.default, aten.conv1d.padding),
        "conv2d": (aten.conv2d.default, aten.conv2d.padding),
        "conv3d": (aten.conv3d.default, aten.conv3d.padding),
    }
    transposed: dict[str, Any] = {
        "conv_transpose1d": aten.conv_transpose1d.default,
        "conv_transpose2d": aten.conv_transpose2d.input,
        "conv_transpose3d": aten.conv_transpose3d.input,
    }
    products = (aten.matmul.default, aten.bmm.default, aten.mm.default)
    bags = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
    yield OpPattern(
        "linear", (aten.linear.default,), (0,), 1, 0, _gemm_macs, bias=2, smoothable=True
    )
    for name, targets in convs.items():
        yield OpPattern(name, targets, (0,), 1, 0, _conv_macs, bias=2, output=RECTIFIERS)
    for name, target in transposed.items():
        yield OpPattern(name, (target,), (0,), 1, 1, _transposed_macs, bias=2)
    yield OpPattern("matmul", products, (0, 1), None, 0, _gemm_macs)
    yield OpPattern(
        "scaled_dot_product_attention",
        (aten.scaled_dot_product_attention.default,),
        (0, 1, 2),
        None,
        0,
        _sdpa_macs,
        internals={"probabilities": sdpa_probabilities},
    )
    yield OpPattern("embedding", (aten.embedding.default,), (), 0, 0, lambda args, out: 0)
    yield OpPattern(
        "embedding_bag",
        bags,
        (),
        0,
        0,
        lambda args, out: 0,
        output=frozenset(),
        obstacle=_bag_obstacle,
    )
    yield OpPattern(
        "lstm",
        (aten.lstm.input,),
        (0,),
        2,
        0,
        rnn_macs,
        internals={"hidden": hidden_states},
        obstacle=projected,
    )


for _row in _rows():
    register_operator(_row)
