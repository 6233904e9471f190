"""Element types: which values one element of a quantized tensor can have, in units of its scale.

A new one is an instance (or a subclass of :class:`ElementType`) and a call of
:func:`register_element_type`; nothing else knows any of them by name.
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig

__all__ = [
    "ELEMENT_TYPES",
    "ElementType",
    "FloatType",
    "IntegerType",
    "element_type",
    "register_element_type",
]

ELEMENT_TYPES: dict[str, ElementType] = {}
"""Every element type by its name; filled by :func:`register_element_type`."""


class ElementType(ABC):
    """A finite set of values and a code for each; immutable, compared by value.

    Every tensor here is in units of the scale: it was divided by the scale before.

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


@dataclass(frozen=True)
class IntegerType(ElementType):
    """Integers from ``quant_min`` to ``quant_max``, of the 2 to 16 bits that these need.

    Signed if there are negative ones. A range may be narrower than its bits, as -127 to 127 is.

    Raises:
        InvalidConfig: the range is empty, has no 0 between signed ends, or needs other numbers of
            bits.

    >>> IntegerType(-8, 7).name, IntegerType(-127, 127).name
    ('int4', 'int8[-127, 127]')
    """

    quant_min: int = 0
    quant_max: int = 255

    def __post_init__(self) -> None:
        low, high = self.quant_min, self.quant_max
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high)):
            raise InvalidConfig(f"integers from {low!r} to {high!r}: expected two integers")
        if not low < high or (low < 0 and high < 0):
            raise InvalidConfig(
                f"integers from {low} to {high}: expected quant_min < quant_max, and "
                "quant_max >= 0 if quant_min is negative; QuantSpec.of(bits=..., signed=...) "
                "gives a valid range"
            )
        if self.bits > 16:
            raise InvalidConfig(
                f"integers from {low} to {high} need {self.bits} bits; expected 2 to 16 bits"
            )

    @classmethod
    def of(cls, bits: int, signed: bool) -> IntegerType:
        """All integers of so many bits, 2 to 16.

        >>> IntegerType.of(4, signed=True).quant_min
        -8
        """
        if not isinstance(bits, int) or not 2 <= bits <= 16:
            raise InvalidConfig(f"integers of {bits} bits: expected 2 to 16 bits")
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else cls(0, 2**bits - 1)

    @property
    def signed(self) -> bool:
        return self.quant_min < 0

    @property
    def bits(self) -> int:
        sign = int(self.signed)
        return max(2, *(n.bit_length() + sign for n in (self.quant_max, ~self.quant_min * sign)))

    @property
    def base(self) -> str:
        """The name without limits."""
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def name(self) -> str:
        whole = self == IntegerType.of(self.bits, self.signed)
        return self.base if whole else f"{self.base}[{self.quant_min}, {self.quant_max}]"

    @property
    def dtype(self) -> torch.dtype:
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed or self.bits < 16 else torch.int32

    @property
    def integer(self) -> bool:
        return True

    @property
    def casts(self) -> bool:
        return True

    def round(self, x: Tensor) -> Tensor:
        return x.round().clamp_(self.quant_min, self.quant_max)

    def encode(self, x: Tensor) -> Tensor:
        return self.round(x).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def codes(self) -> Tensor:
        return torch.arange(self.quant_min, self.quant_max + 1, dtype=self.dtype)


@dataclass(frozen=True)
class FloatType(ElementType):
    """A small float: sign, exponent, mantissa; subnormals, and 0 with either sign.

    ``(-1)^s 2^(e - bias) (1 + m / 2^mantissa_bits)``, and for ``e = 0``
    ``(-1)^s 2^(1 - bias) m / 2^mantissa_bits``. All codes are finite numbers unless ``torch_dtype``
    says otherwise. float8 is defined in Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
    the others, and rounding to the largest value, in "OCP Microscaling Formats (MX)
    Specification", version 1.0, section 5.3.

    Args:
        name: what it is called.
        exponent_bits: at least 1.
        mantissa_bits: at least 1.
        bias: of the exponent; None for ``2^(exponent_bits - 1) - 1``.
        torch_dtype: PyTorch's own type of this format, which is then used, and which has other
            codes for the largest exponent (NaN, infinity).

    Raises:
        InvalidConfig: more than 8 bits, or values that float32 cannot hold.

    >>> FloatType("float4_e2m1", 2, 1).values.tolist()[7:]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    torch_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 1 or self.bits > 8:
            raise InvalidConfig(
                f"{self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa "
                "bits; expected at least 1 of both, and at most 7 together"
            )
        smallest = self._smallest_exponent - self.mantissa_bits
        if smallest < -126 or self._smallest_exponent + 2**self.exponent_bits > 126:
            raise InvalidConfig(f"{self.name}: bias {self.bias} gives values beyond float32")

    @property
    def _smallest_exponent(self) -> int:
        bias = 2 ** (self.exponent_bits - 1) - 1 if self.bias is None else self.bias
        return 1 - bias

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def dtype(self) -> torch.dtype:
        return self.torch_dtype or torch.uint8

    @property
    def quant_min(self) -> float:
        return -self.quant_max

    @property
    def quant_max(self) -> float:
        if self.torch_dtype is not None:
            return float(torch.finfo(self.torch_dtype).max)
        exponent = self._smallest_exponent + max(2**self.exponent_bits - 2, 0)
        return float((2.0 - 2.0**-self.mantissa_bits) * 2.0**exponent)

    @property
    def integer(self) -> bool:
        return False

    @property
    def casts(self) -> bool:
        return self.torch_dtype is not None

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For each of ``x``, inside the range: its exponent, and the step between values there."""
        exponent = ((x.view(torch.int32) >> 23) & 255) - 127
        exponent = exponent.clamp(min=self._smallest_exponent)
        return exponent, ((exponent - self.mantissa_bits + 127) << 23).view(torch.float32)

    def round(self, x: Tensor) -> Tensor:
        x = x.clamp(self.quant_min, self.quant_max)  # first: nothing rounds up beyond the ends then
        if self.torch_dtype is not None:
            return x.to(self.torch_dtype).to(torch.float32)
        _, step = self._steps(x)
        return (x / step).round_().mul_(step)

    def encode(self, x: Tensor) -> Tensor:
        x = x.clamp(self.quant_min, self.quant_max)
        if self.torch_dtype is not None:
            return x.to(self.torch_dtype)
        x = self.round(x)
        exponent, step = self._steps(x)
        # Codes of positive values count up with them, through the subnormals and every exponent.
        size = 2**self.mantissa_bits
        codes: Tensor = (exponent - self._smallest_exponent) * size + (x.abs() / step).to(
            torch.int32
        )
        sign: Tensor = torch.signbit(x).to(torch.int32) << (self.bits - 1)
        return (codes | sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        if self.torch_dtype is not None:
            return codes.to(torch.float32)
        wide = codes.to(torch.int32)
        size = 2**self.mantissa_bits
        magnitude = wide & (2 ** (self.bits - 1) - 1)
        exponent = magnitude >> self.mantissa_bits
        normal = (exponent > 0).to(torch.int32)
        mantissa = (magnitude & (size - 1)) + normal * size
        step = self._smallest_exponent + exponent - normal - self.mantissa_bits
        values = mantissa.to(torch.float32) * ((step + 127) << 23).view(torch.float32)
        return torch.where(wide >> (self.bits - 1) == 1, -values, values)

    def codes(self) -> Tensor:
        codes = torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)
        return codes if self.torch_dtype is None else codes.view(self.torch_dtype)


def register_element_type(element: ElementType) -> ElementType:
    """Make an element type known by its name, for configuration files and graphs.

    Raises:
        InvalidConfig: the name stands for another type.

    >>> register_element_type(FloatType("float4_e2m1", 2, 1)).name
    'float4_e2m1'
    """
    if ELEMENT_TYPES.setdefault(element.name, element) != element:
        raise InvalidConfig(
            f"the element type {element.name!r} is registered as {ELEMENT_TYPES[element.name]!r}; "
            "choose another name"
        )
    return element


def element_type(name: str) -> ElementType:
    """The element type of that name; raises :class:`InvalidConfig` listing all there are.

    >>> element_type("int8[-127, 127]").levels
    255
    """
    if name in ELEMENT_TYPES:
        return ELEMENT_TYPES[name]
    narrow = re.fullmatch(r"(u?int\d+)\[(-?\d+), ?(-?\d+)\]", name)
    if narrow is not None:
        found = IntegerType(int(narrow[2]), int(narrow[3]))
        whole = element_type(narrow[1])
        if whole.quant_min <= found.quant_min and found.quant_max <= whole.quant_max:
            return found
    floats = sorted(name for name, each in ELEMENT_TYPES.items() if not each.integer)
    raise InvalidConfig(
        f"unknown element type {name!r}; expected int2 to int16, uint2 to uint16, "
        f"{', '.join(floats)}"
    )


for _bits in range(2, 17):
    register_element_type(IntegerType.of(_bits, signed=True))
    register_element_type(IntegerType.of(_bits, signed=False))
for _float in (
    FloatType("float8_e4m3fn", 4, 3, torch_dtype=torch.float8_e4m3fn),
    FloatType("float8_e5m2", 5, 2, torch_dtype=torch.float8_e5m2),
    FloatType("float6_e3m2", 3, 2),
    FloatType("float6_e2m3", 2, 3),
    FloatType("float4_e2m1", 2, 1),
):
    register_element_type(_float)
