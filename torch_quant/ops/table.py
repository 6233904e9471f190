"""THE table of operators: what can be quantized, what only moves data, what a kernel can fuse.

A new operator is one more row: in a file of this room, or from outside, by
:func:`register_operator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import SymInt, Tensor, fx

from torch_quant.core.plan import SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.core.window import Window
from torch_quant.errors import InvalidConfig

__all__ = [
    "ACTIVATIONS",
    "DATA_MOVEMENT",
    "IDENTITY",
    "FLOAT_MACS",
    "INT8_NEVER",
    "KEY",
    "OPERATORS",
    "Inserter",
    "RECTIFIERS",
    "ROW_MOVEMENT",
    "SIZES",
    "OpPattern",
    "call_sizes",
    "contiguous_as_captured",
    "numel",
    "padding_sizes",
    "pattern_of",
    "register_float",
    "register_operator",
    "size_hints",
    "spread",
]

aten = torch.ops.aten

KEY = "torch_quant_key"
"""Entry of ``node.meta``: the key of the tensor that the node computes."""
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
        channels: the axis of its input's channels, which are those of its weight, counted from the
            end; None where it has none.
        output: the functions behind it that a kernel which gives nothing but integers does as well;
            None if its result is never quantized.
        internals: tensors that exist only inside the operator, each computed from its arguments so
            that calibration can observe it.
        obstacle: why a call of it cannot run in int8 anywhere, empty if it can.
        quantize: puts pairs around a call of it, where that is more than quantizing what it reads
            and its weight. It gets the call and what is done with the site.
        any_format: whether its weight may be cut into blocks of any shape.
        more_weights: argument positions of further matrices, where no list holds them.
        steps: whether it is computed a step at a time and rounds what it reads at each: dynamic
            activations then have a scale for each row, or one for all of a step.
        static: whether grids that calibration found serve its activations.
        unfit: why ranges that calibration found do not serve a call, though there are some; empty
            if they do. It gets the call, what is done with the site, and where values come from.
        untrainable: why no gradient passes its quantized form, empty if it does.
        window: what a call reads for each of its results, where that is a part of an image.
        columns: of a product of activations, those that it sums over the columns of, as positions;
            None for other operators. A dynamic scale per token is one for each vector that is
            summed over, so these have one for each column.
    """

    name: str
    targets: tuple[Any, ...]
    activations: tuple[int, ...]
    weight: int | None
    weight_axis: int
    macs: Callable[[Any, Any], int]
    bias: int | None = None
    smoothable: bool = False
    channels: int | None = None
    output: frozenset[Any] | None = None
    internals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    obstacle: Callable[[fx.Node], str] = lambda node: ""
    quantize: Callable[[Inserter, fx.Node, SitePlan], None] | None = None
    any_format: bool = True
    more_weights: tuple[int, ...] = ()
    steps: bool = False
    static: bool = True
    unfit: Callable[[fx.Node, SitePlan, Known], str] | None = None
    untrainable: str = ""
    window: Callable[[fx.Node], Window] | None = None
    columns: tuple[int, ...] | None = None


class Known(Protocol):
    """Where a row finds the numbers of a call."""

    def scale(self, key: str, spec: QuantSpec) -> Tensor:
        """The scale of a tensor, as it is observed."""

    def is_zero(self, key: str) -> bool:
        """Whether nothing but 0 was observed of a tensor."""

    def value(self, constant: fx.Node) -> Tensor:
        """What a constant expression of the graph is."""


class Inserter(Protocol):
    """What puts quantize/dequantize pairs into a graph, for a row with a way of its own."""

    def activations(self, user: fx.Node, args: list[fx.Node], entry: SitePlan) -> None:
        """Make ``user`` read ``args`` quantized."""

    def activation(self, user: fx.Node, arg: fx.Node, key: str, spec: QuantSpec, role: str) -> None:
        """Make ``user`` read ``arg``, the tensor ``key``, quantized to ``spec``.

        Its scale is called after the site and ``role``.
        """

    def decline(self, node: fx.Node, why: str) -> None:
        """Leave a site in float, for a reason that reports give."""

    def scale(self, key: str, spec: QuantSpec) -> Tensor:
        """The scale of a tensor, as it is observed."""

    def grid(self, user: fx.Node, key: str, spec: QuantSpec, role: str) -> list[fx.Node]:
        """Nodes of scale and zero point of a tensor."""

    def source(self, arg: fx.Node) -> str:
        """The key of the tensor whose values ``arg`` holds."""

    def value(self, constant: fx.Node) -> Tensor:
        """What a constant expression of the graph is."""

    def rounded(self, entry: SitePlan, weight: Tensor) -> tuple[Tensor, QParams]:
        """Codes of a weight of the site, whose output channels come first."""

    def weight(
        self, user: fx.Node, old: fx.Node, role: str, codes: Tensor, qparams: QParams
    ) -> fx.Node:
        """A dequantized weight in the place of ``old``, under its name or that of ``role``."""


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


def numel(value: Any) -> int:
    """How many elements it has in the call that a graph was captured for."""
    return math.prod(call_sizes(value))


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

INT8_NEVER: dict[Any, str] = {
    aten.einsum.default: "write the contraction as matmul to have it quantized",
    aten.bilinear.default: "no int8 form",
    aten.baddbmm.default: "write it as bmm and add to have it quantized",
}
"""Operators that compute products and stay float, each with the reason that reports give."""

FLOAT_MACS: dict[Any, Callable[[Any, Any], int]] = {}
"""Operator without a row -> its multiply-accumulates, of arguments and result."""


def register_float(
    reasons: Mapping[Any, str], macs: Mapping[Any, Callable[[Any, Any], int]]
) -> None:
    """Make operators known that multiply and are no sites: reports count them and say why.

    Args:
        reasons: overload -> why it stays in float.
        macs: operator -> its multiply-accumulates, of its arguments and its result.
    """
    INT8_NEVER.update(reasons)
    FLOAT_MACS.update(macs)
