"""What a quantized tensor looks like: integer type, range, symmetry and granularity."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torch_quant.errors import InvalidConfig

__all__ = ["Granularity", "QuantSpec"]

_DTYPES = {"uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Granularity(enum.Enum):
    """How many scales a tensor has: one, or one for each index of its channel axis."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


@dataclass(frozen=True)
class QuantSpec:
    """An integer format: ``real = scale * (q - zero_point)``, ``quant_min <= q <= quant_max``.

    Args:
        dtype: the storage type, ``torch.uint8``, ``torch.int8`` or ``torch.int32`` (bias).
        symmetric: the zero point is fixed: 0 if signed, the middle of the range if unsigned.
        granularity: one scale per tensor, or one per channel.
        quant_min: the smallest code; fewer bits than the storage type are allowed.
        quant_max: the largest code.

    Raises:
        InvalidConfig: the range does not fit the dtype, or is empty, or cannot hold a zero.

    >>> QuantSpec.of(bits=4, signed=False, symmetric=False).quant_max
    15
    """

    dtype: torch.dtype = torch.uint8
    symmetric: bool = False
    granularity: Granularity = Granularity.PER_TENSOR
    quant_min: int = 0
    quant_max: int = 255

    def __post_init__(self) -> None:
        if self.dtype not in _NAMES:
            raise InvalidConfig(
                f"QuantSpec dtype is {self.dtype}; expected one of {', '.join(_DTYPES)}"
            )
        if not isinstance(self.granularity, Granularity):
            raise InvalidConfig(
                f"QuantSpec granularity is {self.granularity!r}; expected a Granularity, "
                "such as Granularity.PER_CHANNEL"
            )
        info = torch.iinfo(self.dtype)
        if not info.min <= self.quant_min < self.quant_max <= info.max:
            raise InvalidConfig(
                f"QuantSpec range [{self.quant_min}, {self.quant_max}] must be non-empty and lie "
                f"inside {_NAMES[self.dtype]}'s [{info.min}, {info.max}]; "
                "QuantSpec.of(bits=..., signed=...) gives a valid one"
            )
        if self.signed and not self.quant_min < 0 <= self.quant_max:
            raise InvalidConfig(
                f"a signed QuantSpec needs quant_min < 0 <= quant_max, "
                f"got [{self.quant_min}, {self.quant_max}]"
            )

    @classmethod
    def of(
        cls,
        *,
        bits: int = 8,
        signed: bool = False,
        symmetric: bool = False,
        per_channel: bool = False,
    ) -> QuantSpec:
        """The full-range format of ``bits`` (2 to 8) bits."""
        if not 2 <= bits <= 8:
            raise InvalidConfig(f"QuantSpec.of(bits={bits}): expected 2 to 8 bits")
        low = -(2 ** (bits - 1)) if signed else 0
        return cls(
            torch.int8 if signed else torch.uint8,
            symmetric,
            Granularity.PER_CHANNEL if per_channel else Granularity.PER_TENSOR,
            low,
            low + 2**bits - 1,
        )

    @property
    def signed(self) -> bool:
        return self.dtype != torch.uint8

    @property
    def per_channel(self) -> bool:
        return self.granularity is Granularity.PER_CHANNEL

    @property
    def bits(self) -> int:
        """Bits that the codes need, whatever the storage type holds."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def full_range(self) -> bool:
        """Whether every value of the storage type is a code, so that a saturating cast clips."""
        info = torch.iinfo(self.dtype)
        return (self.quant_min, self.quant_max) == (info.min, info.max)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; :meth:`from_dict` reads it back."""
        return {
            "dtype": _NAMES[self.dtype],
            "symmetric": self.symmetric,
            "granularity": self.granularity.value,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Read :meth:`to_dict`'s form; raises :class:`InvalidConfig` on anything else."""
        try:
            return cls(
                _DTYPES[data["dtype"]],
                bool(data["symmetric"]),
                Granularity(data["granularity"]),
                int(data["quant_min"]),
                int(data["quant_max"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidConfig(f"not a QuantSpec: {dict(data)!r} ({error})") from error

    def __str__(self) -> str:
        sign = "s" if self.signed else "u"
        scheme = "symmetric" if self.symmetric else "affine"
        return f"{sign}{self.bits} {scheme} {self.granularity.value.replace('_', '-')}"
