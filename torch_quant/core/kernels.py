"""What a backend can run: a table of kernels, the preferred ones first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch_quant.core.granularity import PerChannel, PerTensor
from torch_quant.core.spec import FloatFormat, QuantSpec

__all__ = ["Accepts", "Format", "Kernel", "KernelTable"]


Format = QuantSpec | FloatFormat
"""What a tensor is asked to be: quantized so, or left in float."""


def _anything(spec: QuantSpec) -> bool:
    return True


@dataclass(frozen=True)
class Accepts:
    """The formats that a kernel takes for one tensor.

    Args:
        default: the one it gets unless the user asks for another.
        fits: whether it takes a format.
        wants: what it takes, in words that a refusal begins with: ``"oneDNN wants a signed
            weight"``.
        any_format: also what is beyond integers of up to 8 bits per tensor or output channel.
        floats: whether the tensor may stay in float beside the other, which is quantized.
        dynamic: whether it chooses scales at each call.
    """

    default: QuantSpec
    fits: Callable[[QuantSpec], bool] = _anything
    wants: str = ""
    any_format: bool = False
    floats: bool = False
    dynamic: bool = False

    def refusal(self, spec: QuantSpec) -> str:
        """Why it does not take ``spec``, or an empty text."""
        if spec.dynamic and not self.dynamic:
            return f"scales are chosen while calibrating, not at each call: {spec}"
        if not self.any_format and not (spec.integer and spec.bits <= 8):
            return f"the kernels take integers of up to 8 bits, not {spec}"
        if not self.any_format and spec.granularity not in (PerTensor(), PerChannel()):
            return f"the kernels take a scale per tensor or per output channel, not {spec}"
        return "" if self.fits(spec) else f"{self.wants}, not {spec}"


@dataclass(frozen=True)
class Kernel:
    """One way to run an operator quantized.

    Args:
        op: the op type, as in the op table.
        input: formats of its activations, None if they are float, or there are none.
        weight: formats of its weight, None if it is float, or there is none.
        output: formats of its result where the kernel gives nothing but integers, else None.
            Inputs and output of a site have one format.
        own_result: whether ``output`` is the operator's own result, and not that of the function
            behind it that the kernel does as well.
        emit: puts the kernel in the place of the operator, given the pass context and the node of
            a graph with quantize/dequantize pairs; None where the backend lowers whole graphs.
        note: what a reader of reports should know of it.
        row_scales: whether tensors inside of it may have a scale for each row, chosen at each call.
    """

    op: str
    input: Accepts | None = None
    weight: Accepts | None = None
    output: Accepts | None = None
    own_result: bool = False
    emit: Callable[[Any, Any], None] | None = None
    note: str = ""
    row_scales: bool = False

    @property
    def activation(self) -> Accepts | None:
        """The formats of what is not the weight."""
        return self.input or self.output

    def refusal(self, activation: Format | None, weight: Format | None) -> str:
        """Why it does not run a site with these formats, or an empty text.

        None stands for what the site does not have.
        """
        return self.wrong_input(activation) or self.wrong_weight(weight)

    def wrong_input(self, activation: Format | None) -> str:
        """Why it does not take activations of this format, or an empty text."""
        return _refusal("activations", self.activation, activation)

    def wrong_weight(self, weight: Format | None) -> str:
        """Why it does not take weights of this format, or an empty text."""
        return _refusal("weights", self.weight, weight)


def _refusal(what: str, accepts: Accepts | None, spec: Format | None) -> str:
    if isinstance(spec, QuantSpec):
        return (
            f"the kernels take float {what}, not {spec}"
            if accepts is None
            else (accepts.refusal(spec))
        )
    if spec is None or accepts is None or accepts.floats:
        return ""
    return f"the kernels take quantized {what}, not float ones"


@dataclass(frozen=True)
class KernelTable:
    """All that a backend can run quantized, and what it wants of a graph.

    Args:
        backend: its name, for messages.
        rows: of several for one op type, the first that takes the wanted formats is used.
        share_precision: what forces sites that share it into int8 or float as one, ``"weight"`` or
            ``"input"`` (a kernel that computes Q, K and V at once would want the latter). By
            default weights: in both forms one takes more memory than in float alone.
        passes: what it does to the graph with quantize/dequantize pairs before lowering it, and
            what therefore belongs to a simulation of it: passes over a ``PassContext``.
    """

    backend: str
    rows: tuple[Kernel, ...]
    share_precision: frozenset[str] = frozenset({"weight"})
    passes: tuple[Callable[[Any], int], ...] = ()
    _by_op: dict[str, tuple[Kernel, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: dict[str, tuple[Kernel, ...]] = {}
        for row in self.rows:
            found[row.op] = (*found.get(row.op, ()), row)
        object.__setattr__(self, "_by_op", found)

    @property
    def ops(self) -> frozenset[str]:
        """The op types that it has any kernel for."""
        return frozenset(self._by_op)

    def of(self, op: str) -> tuple[Kernel, ...]:
        """The kernels of one op type, the preferred one first."""
        return self._by_op.get(op, ())

    def hypothetical(self, op: str) -> Kernel:
        """The formats that an op type without a kernel would have: those of the first rows."""
        activation = next((row.input for row in self.rows if row.input), None)
        weight = next((row.weight for row in self.rows if row.weight), None)
        return Kernel(op, activation, weight)

    def choose(
        self, op: str, activation: Format | None, weight: Format | None
    ) -> tuple[Kernel | None, str]:
        """The first kernel that takes these formats, or None and why there is none.

        Args:
            op: the op type.
            activation: of the inputs, None if the site has none to quantize.
            weight: None if it has none.
        """
        reasons: dict[bool, list[str]] = {True: [], False: []}
        for row in self.of(op):
            wrong = row.wrong_input(activation)
            reason = wrong or row.wrong_weight(weight)
            if not reason:
                return row, ""
            reasons[not wrong].append(reason)
        if not self.of(op):
            return None, f"{self.backend} has no int8 kernel for {op}"
        if isinstance(activation, FloatFormat) and reasons[True]:
            reasons[False].clear()  # who takes no float activations is beside the point
        return None, "; ".join(dict.fromkeys([*reasons[True], *reasons[False]]))
