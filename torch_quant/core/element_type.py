"""What an element type says: the values that one element can have, in units of its scale."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

__all__ = ["ElementType"]


class ElementType(ABC):
    """A finite set of values and a code for each; immutable, compared by value.

    Every tensor here is in units of the scale: it was divided by the scale before.

    >>> from torch_quant.core.elements import element_type
    >>> int4 = element_type("int4")
    >>> int4.decode(int4.encode(torch.tensor([1.4, 100.0])))
    tensor([1., 7.])
    """

    if TYPE_CHECKING:  # at run time a field of a dataclass may be it, which a property here bars

        @property
        def name(self) -> str:
            """The name it is registered and saved by."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type that codes are kept in."""

    @property
    @abstractmethod
    def quant_min(self) -> float:
        """The smallest value."""

    @property
    @abstractmethod
    def quant_max(self) -> float:
        """The largest value."""

    @property
    @abstractmethod
    def integer(self) -> bool:
        """Whether the values are consecutive integers; only these can have a zero point."""

    @property
    @abstractmethod
    def casts(self) -> bool:
        """Whether a cast of the codes to float32 gives their values."""

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """The nearest value, of two equally near that with the even code; ends saturate.

        Args:
            x: float32, any shape; infinities become the ends, NaN no value of meaning.

        Returns:
            A new float32 tensor of the same shape.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The codes of ``round(x)``, same shape, in :attr:`dtype`."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, float32, same shape."""

    @abstractmethod
    def codes(self) -> Tensor:
        """Every code once, one dimension, in :attr:`dtype`."""

    @property
    def values(self) -> Tensor:
        """Every value once, ascending, float32. Do not write to it."""
        return _values(self)

    @property
    def borders(self) -> Tensor:
        """Where rounding goes over from one value to the next, ascending, ``[values + 1]``.

        The first and the last lie half a step outside of the values; what is beyond saturates.
        """
        return _borders(self)

    @property
    def levels(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def largest_exponent(self) -> int:
        """``floor(log2(quant_max))``: "emax" of the OCP MX specification."""
        return math.frexp(self.quant_max)[1] - 1

    def __str__(self) -> str:
        return self.name


@functools.lru_cache(maxsize=64)
def _values(element: ElementType) -> Tensor:
    values = element.decode(element.codes())
    values = values[torch.isfinite(values)].sort().values
    return values[torch.cat([values.new_ones(1), values.diff()]) > 0]  # 0 and -0 are one value


@functools.lru_cache(maxsize=64)
def _borders(element: ElementType) -> Tensor:
    values = element.values
    steps = values.diff()
    middle = values[:-1] + steps / 2
    return torch.cat([values[:1] - steps[:1] / 2, middle, values[-1:] + steps[-1:] / 2])
