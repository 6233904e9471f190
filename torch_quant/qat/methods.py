"""What a training method is: which scales it learns, and by what gradients.

A method is one class under :func:`register_qat_method`. It says how a gradient passes the rounding;
the forward pass is the same for all of them, since it has to be what is deployed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from torch_quant.core.element_type import ElementType
from torch_quant.core.naming import did_you_mean
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.native.rounding import round_gradient

__all__ = [
    "INPUT",
    "QAT_METHODS",
    "WEIGHT",
    "QatMethod",
    "Rounding",
    "qat_method",
    "register_qat_method",
]

INPUT, WEIGHT = "input", "weight"
"""What is rounded: an activation, or a weight."""


@dataclass(frozen=True)
class Rounding:
    """One tensor and what it was rounded to, for a backward pass. All float32.

    Tensors are cut into the blocks that share a scale: ``scale`` and ``zero_point`` broadcast
    against the others.

    Args:
        grad: of the loss, with respect to ``rounded``.
        x: what was rounded.
        rounded: the result, real values.
        scale: the steps.
        zero_point: the codes of 0.
        element: the values that a code can have.
        role: ``"input"`` or ``"weight"``.
        samples: the size of the first dimension of an input; 1 for a weight.
        native: whether the package's own kernels compute what is asked for here.
    """

    grad: Tensor
    x: Tensor
    rounded: Tensor
    scale: Tensor
    zero_point: Tensor
    element: ElementType
    role: str
    samples: int
    native: bool = False

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, element: ElementType, role: str = INPUT) -> Rounding:
        """A tensor with one scale, zero point 0 and a gradient of ones: to try a method on.

        >>> int4 = QuantSpec.of("int4").element
        >>> Rounding.of(torch.tensor([0.4, 9.0]), torch.tensor(1.0), int4).rounded
        tensor([0., 7.])
        """
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        rounded = element.round(x / scale) * scale
        return cls(torch.ones_like(x), x, rounded, scale, zero_point, element, role, 1)

    @functools.cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        low, high = (
            (end - self.zero_point) * self.scale
            for end in (self.element.quant_min, self.element.quant_max)
        )
        if self.role == WEIGHT:  # a scale may be negative
            return torch.minimum(low, high), torch.maximum(low, high)
        return low, high

    @functools.cached_property
    def inside(self) -> Tensor:
        """Which elements lie in the range that the codes reach, ends included; bool.

        >>> x, int4 = torch.tensor([0.4, 9.0]), QuantSpec.of("int4").element
        >>> Rounding.of(x, torch.tensor(1.0), int4).inside
        tensor([ True, False])
        """
        low, high = self._ends
        return (self.x >= low) & (self.x <= high)

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the kernels compute in one pass: ``grad_inside``, and the three sums below."""
        return round_gradient(
            self.grad, self.x, self.rounded, self.scale, self.zero_point, self.element
        )

    @functools.cached_property
    def grad_inside(self) -> Tensor:
        """``grad``, and 0 outside of the range.

        >>> x, int4 = torch.tensor([0.4, 9.0]), QuantSpec.of("int4").element
        >>> Rounding.of(x, torch.tensor(1.0), int4).grad_inside
        tensor([1., 0.])
        """
        if self.native:
            return self._parts[0]
        if type(self.scale) is Tensor and not self.scale.dim() and self.x.device.type == "cpu":
            # One pass over memory in the place of five. It leaves the ends out, so they are moved.
            low, high = self._ends
            ends = torch.nextafter(low, low - 1.0), torch.nextafter(high, high + 1.0)
            found: Tensor = torch.ops.aten.hardtanh_backward(self.grad, self.x, *map(float, ends))
            return found
        return torch.where(self.inside, self.grad, 0.0)

    @functools.cached_property
    def grad_outside(self) -> Tensor:
        """``grad``, and 0 inside of the range.

        >>> x, int4 = torch.tensor([0.4, 9.0]), QuantSpec.of("int4").element
        >>> Rounding.of(x, torch.tensor(1.0), int4).grad_outside
        tensor([0., 1.])
        """
        return self.grad - self.grad_inside

    def summed(self, one: Tensor, two: Tensor) -> Tensor:
        """The products of two tensors, summed over each block; in the shape of ``scale``.

        >>> x, int4 = torch.tensor([0.4, 9.0]), QuantSpec.of("int4").element
        >>> (rounding := Rounding.of(x, torch.tensor(1.0), int4)).summed(x, rounding.grad)
        tensor(9.4000)
        """
        if not self.scale.dim():
            return torch.dot(one.reshape(-1), two.reshape(-1))
        return (one * two).sum_to_size(self.scale.shape)

    @functools.cached_property
    def error_inside(self) -> Tensor:
        """``grad * (rounded - x)`` inside of the range, summed over each block.

        >>> x, int4 = torch.tensor([0.25, 9.0]), QuantSpec.of("int4").element
        >>> Rounding.of(x, torch.tensor(1.0), int4).error_inside
        tensor(-0.2500)
        """
        if self.native:
            return self._parts[1]
        return self.summed(self.grad_inside, self.rounded - self.x)

    @functools.cached_property
    def ends_outside(self) -> Tensor:
        """``grad * rounded`` outside of the range, summed over each block.

        >>> x, int4 = torch.tensor([0.25, 9.0]), QuantSpec.of("int4").element
        >>> Rounding.of(x, torch.tensor(1.0), int4).ends_outside
        tensor(7.)
        """
        if self.native:
            return self._parts[2]
        return self.summed(self.grad_outside, self.rounded)

    @functools.cached_property
    def sum_outside(self) -> Tensor:
        """``grad`` outside of the range, summed over each block.

        >>> x, int4 = torch.tensor([0.25, 9.0]), QuantSpec.of("int4").element
        >>> Rounding.of(x, torch.tensor(1.0), int4).sum_outside
        tensor(1.)
        """
        return self._parts[3] if self.native else self.grad_outside.sum_to_size(self.scale.shape)

    @property
    def elements(self) -> int:
        """How many elements of one sample share a scale."""
        return max(self.x.numel() // max(self.scale.numel() * self.samples, 1), 1)


class QatMethod:
    """Base of the methods; this one is straight-through with nothing learned.

    Every gradient below is exact for the rounded function where its rounding to the grid is taken
    for the identity, the straight-through estimator of Bengio et al. 2013, "Estimating or
    Propagating Gradients Through Stochastic Neurons for Conditional Computation".
    """

    name: ClassVar[str]
    """What users call it."""

    @property
    def is_straight(self) -> bool:
        """Whether the gradients of what is rounded and of its scales are those of this class.

        The kernels then compute both in one pass.

        >>> qat_method("lsq").is_straight, qat_method("pact").is_straight
        (True, False)
        """
        cls = type(self)
        return (
            cls.input_gradient is QatMethod.input_gradient
            and cls.scale_gradient is QatMethod.scale_gradient
        )

    def learns_scale(self, role: str, spec: QuantSpec) -> bool:
        """Whether the scales of an ``"input"`` or a ``"weight"`` are parameters.

        >>> qat_method("pact").learns_scale("weight", QuantSpec())
        False
        """
        return False

    def learns_zero_point(self, role: str, spec: QuantSpec) -> bool:
        """Whether its zero points are; they are rounded to integers in the forward pass.

        >>> qat_method("lsq_plus").learns_zero_point("input", QuantSpec())
        True
        """
        return False

    def input_gradient(self, rounding: Rounding) -> Tensor:
        """Of the loss with respect to ``x``: passed on inside of the range, 0 outside.

        >>> x, scale = torch.tensor([0.4, 9.0]), torch.tensor(1.0)
        >>> int4 = QuantSpec.of("int4").element
        >>> qat_method("lsq").input_gradient(Rounding.of(x, scale, int4))
        tensor([1., 0.])
        """
        return rounding.grad_inside

    def scale_gradient(self, rounding: Rounding) -> Tensor:
        """Of the loss with respect to ``scale``.

        Inside of the range, ``scale * round(x / scale)`` has the slope ``(rounded - x) / scale``,
        and outside ``rounded / scale``, a constant.

        >>> x, scale = torch.tensor([0.25, 9.0]), torch.tensor(1.0)
        >>> int4 = QuantSpec.of("int4").element
        >>> QatMethod().scale_gradient(Rounding.of(x, scale, int4))  # -0.25 + 7
        tensor(6.7500)
        """
        return (rounding.error_inside + rounding.ends_outside) / rounding.scale

    def zero_point_gradient(self, rounding: Rounding) -> Tensor:
        """Of the loss with respect to ``zero_point``: the ends move with it, what is inside not.

        >>> x, scale = torch.tensor([0.25, 9.0]), torch.tensor(1.0)
        >>> int4 = QuantSpec.of("int4").element
        >>> QatMethod().zero_point_gradient(Rounding.of(x, scale, int4))
        tensor(-1.)
        """
        return -rounding.scale * rounding.sum_outside

    def gradient_scale(self, rounding: Rounding) -> float:
        """By what the gradients of scales and zero points are multiplied.

        >>> int4 = QuantSpec.of("int4").element
        >>> rounding = Rounding.of(torch.ones(7), torch.tensor(1.0), int4)
        >>> round(qat_method("lsq").gradient_scale(rounding), 3)  # 1 / sqrt(7 * 7)
        0.143
        """
        return 1.0


QAT_METHODS: dict[str, QatMethod] = {}
"""Every method by its name; filled at import by :func:`register_qat_method`."""

M = TypeVar("M", bound=type[QatMethod])


def register_qat_method(cls: M) -> M:
    """Class decorator: make a method known, as ``quantizer.qat(model, method="name")``.

    Raises:
        InvalidConfig: it has no name, or another class has that name.

    >>> @register_qat_method
    ... class StraightThrough(QatMethod):
    ...     name = "straight_through"
    >>> qat_method("straight_through").learns_scale("weight", QuantSpec())
    False
    """
    if not getattr(cls, "name", ""):
        raise InvalidConfig(f"{cls.__qualname__} has no name: give it name = '...'")
    known = QAT_METHODS.get(cls.name)
    if known is not None and type(known).__qualname__ != cls.__qualname__:
        raise InvalidConfig(
            f"{cls.__qualname__}: {cls.name!r} is taken by {type(known).__qualname__}"
        )
    QAT_METHODS[cls.name] = cls()
    return cls


def qat_method(name: str) -> QatMethod:
    """The method of that name; raises :class:`InvalidConfig` listing all there are.

    >>> qat_method("lsk")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: unknown QAT method 'lsk'; expected fixed, lsq, ...
    """
    if name not in QAT_METHODS:
        known = ", ".join(sorted(QAT_METHODS))
        hint = did_you_mean(str(name), QAT_METHODS)
        raise InvalidConfig(f"unknown QAT method {name!r}; expected {known}{hint}")
    return QAT_METHODS[name]
