"""The one function that rounds while training: forward as deployed, backward as a method says."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_quant.core import functional
from torch_quant.core.elements import element_type
from torch_quant.core.granularity import split_blocks
from torch_quant.core.qparams import MIN_SCALE
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.native.rounding import round_to_grid, serves, straight_gradient
from torch_quant.ops.library import define_operator
from torch_quant.ops.qdq import FAKE_QUANTIZE
from torch_quant.qat.methods import INPUT, QAT_METHODS, WEIGHT, QatMethod, Rounding

__all__ = [
    "ROWS",
    "TRAINED_FAKE_QUANTIZE",
    "label",
    "read_label",
    "stored_scale",
    "stored_zero_point",
]

ROWS = 9
"""The place of the argument ``rows``; the next is ``padding``."""


def label(keys: Sequence[str], spec: QuantSpec) -> str:
    """What a call in a graph rounds, and to which format.

    Args:
        keys: the key of an activation, or the names of all sites that share a weight.
        spec: the format.
    """
    return json.dumps({"keys": list(keys), "spec": spec.to_dict()}, sort_keys=True)


@functools.cache
def read_label(text: str) -> tuple[tuple[str, ...], QuantSpec]:
    """Undo :func:`label`.

    >>> read_label(label(["head"], QuantSpec())) == (("head",), QuantSpec())
    True
    """
    data = json.loads(text)
    keys = data["keys"] if "keys" in data else [data["key"]]  # pickled when a weight had one name
    return tuple(keys), QuantSpec.from_dict(data["spec"])


def stored_scale(scale: Tensor, scale_type: ScaleType, role: str) -> Tensor:
    """A learned scale as it is deployed: of its type, not 0, and positive for an activation.

    >>> stored_scale(torch.tensor(-3.0), ScaleType.E8M0, WEIGHT)
    tensor(-2.)
    """
    size = scale.clamp(min=MIN_SCALE) if role == INPUT else scale.abs().clamp(min=MIN_SCALE)
    if scale_type is not ScaleType.FLOAT32:
        size = scale_type.round(size).clamp(min=MIN_SCALE)
    return size if role == INPUT else size.copysign(scale)


def stored_zero_point(zero_point: Tensor, element: str, role: str) -> Tensor:
    """A zero point as it is deployed: that of an activation is rounded, and stays among the codes.

    >>> stored_zero_point(torch.tensor(-0.7), "int8", INPUT)
    tensor(-1, dtype=torch.int32)
    """
    if role == WEIGHT or not zero_point.is_floating_point():
        return zero_point
    kind = element_type(element)
    return zero_point.round().clamp(kind.quant_min, kind.quant_max).to(torch.int32)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        element: str,
        scale_type: str,
        role: str,
        method: str,
    ) -> Tensor:
        kind, kept_as = element_type(element), ScaleType(scale_type)
        codes_of_zero = stored_zero_point(zero_point, element, role)
        native = serves(x, scale, codes_of_zero, kind)
        if native:
            if kept_as is not ScaleType.FLOAT32:
                scale = stored_scale(scale, kept_as, role)
            signed, whole = role == WEIGHT, role == INPUT and not scale.dim()
            rounded, used = round_to_grid(
                x, scale, codes_of_zero, kind,
                smallest=MIN_SCALE, signed_scales=signed, multiplies=whole,
            )  # fmt: skip
        else:
            used = stored_scale(scale, kept_as, role)
            if role == WEIGHT:  # the definition, by which integers are made of weights
                rounded = functional.fake_quantize_blocks(x, used, codes_of_zero, kind)
            else:
                rounded = FAKE_QUANTIZE(x, used, codes_of_zero, element)
        ctx.save_for_backward(x, rounded, used, codes_of_zero)
        ctx.how = kind, role, method, native
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded, scale, zero_point = ctx.saved_tensors
        element, role, name, native = ctx.how
        wants_x, wants_scale, wants_zero_point = ctx.needs_input_grad[:3]
        method: QatMethod = QAT_METHODS[name]
        native = native and not torch.is_grad_enabled()  # else gradients of gradients are wanted
        split, blocks = split_blocks(x, scale.shape)
        rounding = Rounding(
            _as(grad, split.shape),
            split,
            _as(rounded, split.shape),
            _as(scale, blocks),
            _as(zero_point, blocks),
            element,
            role,
            x.shape[0] if role == INPUT and x.dim() else 1,
            native,
        )
        factor = method.gradient_scale(rounding) if wants_scale or wants_zero_point else 1.0
        of_x = of_scale = of_zero_point = None
        if native and not wants_zero_point and method.is_straight:
            of_x, of_scale = straight_gradient(
                grad, x, rounded, scale, zero_point, element, factor if wants_scale else None
            )
            return of_x, of_scale, None, None, None, None, None
        if wants_x:
            of_x = _as(method.input_gradient(rounding), x.shape)
        if wants_scale:
            of_scale = _as(method.scale_gradient(rounding), scale.shape) * factor
        if wants_zero_point:
            of_zero_point = _as(method.zero_point_gradient(rounding), scale.shape) * factor
        return of_x, of_scale, of_zero_point, None, None, None, None


def _as(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` in a shape that it mostly has already."""
    return x if x.shape == shape else x.reshape(shape)


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    element: str,
    scale_type: str,
    role: str,
    method: str,
    label: str,
    ends: Tensor | None = None,
    rows: Tensor | None = None,
    padding: int = -1,
    offset: Tensor | None = None,
) -> Tensor:
    if rows is not None:
        x, scale, zero_point = (
            torch.ops.aten.embedding(each, rows, padding) for each in (x, scale, zero_point)
        )
    x = x.to(torch.float32)
    if offset is not None:
        x = x + offset
    rounded: Tensor = _FakeQuantize.apply(x, scale, zero_point, element, scale_type, role, method)
    return rounded.contiguous() if role == WEIGHT else rounded


def _shaped(x: Tensor, *args: Any) -> Tensor:
    rows = args[ROWS - 1] if len(args) >= ROWS else None
    shape = x.shape if rows is None else (*rows.shape, *x.shape[1:])
    return x.new_empty(shape, dtype=torch.float32)


TRAINED_FAKE_QUANTIZE = define_operator(
    "trained_fake_quantize(Tensor x, Tensor scale, Tensor zero_point, str element, "
    "str scale_type, str role, str method, str label, Tensor? ends=None, Tensor? rows=None, "
    "int padding=-1, Tensor? offset=None) -> Tensor",
    _forward,
    _shaped,
    keys=("Autograd", "CompositeExplicitAutograd"),  # one: compilers see through the first
)
"""``x`` with the error of its format, float32, same shape; differentiable.

Args:
    x: a float tensor.
    scale: float32, in the shape of the blocks' grid.
    zero_point: same shape: int32, or float32 where it is learned.
    element: the element type's name.
    scale_type: the value of a :class:`ScaleType`.
    role: ``"input"`` or ``"weight"``.
    method: the name of a method, which gives the gradients.
    label: for who reads the graph: what is rounded; see :func:`read_label`. Empty where the scale
        is chosen at each call.
    ends: of an activation with a scale that is kept, the range observed, float32 of shape ``[2]``;
        the scale is set by it while the model observes, and nothing here reads it.
    rows: of a table with a scale for each row or more, which rows are wanted: these alone are
        rounded, and given in the place of ``x``.
    padding: the row that gets no gradient.
    offset: of a weight, a constant of its shape that is added before it is rounded; without rows.
"""
