"""Floats of few bits, whose values lie closer together near zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_quant.core.element_type import ElementType
from torch_quant.errors import InvalidConfig

__all__ = ["FloatType"]


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
