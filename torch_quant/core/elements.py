"""Element types: which values one element of a quantized tensor can have, in units of its scale.

A new one is an instance (or a subclass of :class:`ElementType`) and a call of
:func:`register_element_type`; nothing else knows any of them by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.core.element_type import ElementType
from torch_quant.core.float_type import FloatType
from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig

__all__ = [
    "ELEMENT_TYPES",
    "IntegerType",
    "element_type",
    "register_element_type",
]

ELEMENT_TYPES: dict[str, ElementType] = {}
"""Every element type by its name; filled by :func:`register_element_type`."""


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
        f"{', '.join(floats)}{did_you_mean(str(name), ELEMENT_TYPES)}"
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
