"""What a quantized tensor looks like: element type, granularity, symmetry, type of the scale."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import IntegerType, element_type
from torch_quant.core.granularity import Granularity, PerChannel, PerTensor
from torch_quant.errors import InvalidConfig

__all__ = ["BFLOAT16", "FLOAT", "FloatFormat", "QuantSpec", "ScaleType"]


class FloatFormat(enum.Enum):
    """In the place of a format: the tensor stays in float, :data:`FLOAT` or :data:`BFLOAT16`.

    >>> FLOAT, str(FLOAT), str(BFLOAT16)
    (FLOAT, 'float', 'bfloat16')
    """

    FLOAT = "float"
    BFLOAT16 = "bfloat16"

    def __repr__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.value


FLOAT: Final = FloatFormat.FLOAT
"""``QConfig(input=FLOAT)`` quantizes weights alone, ``QConfig(weight=FLOAT)`` activations alone."""
BFLOAT16: Final = FloatFormat.BFLOAT16
"""``QConfig(BFLOAT16, BFLOAT16)`` multiplies in bfloat16: 8 bits of exponent, 8 of precision."""


class ScaleType(enum.Enum):
    """The numbers that a scale can be; scales are computed in float32 whatever holds them.

    ``E8M0`` are the powers of two from 2^-127 to 2^127, the scales of the "OCP Microscaling Formats
    (MX) Specification", version 1.0.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    E8M0 = "e8m0"

    @property
    def bits(self) -> int:
        return {"float32": 32, "e8m0": 8}.get(self.value, 16)

    def round(self, scale: Tensor) -> Tensor:
        """``scale``, positive, as near as this type comes to it (for ``E8M0`` from below), float32.

        What is too small or too large becomes the smallest or largest number there is.

        >>> ScaleType.E8M0.round(torch.tensor(3.0))
        tensor(2.)
        """
        if self is ScaleType.E8M0:
            power = (torch.frexp(scale).exponent - 1).clamp(-126, 127)
            return ((power.to(torch.int32) + 127) << 23).view(torch.float32)
        if self is ScaleType.FLOAT16:
            return scale.clamp(2.0**-24, 65504.0).to(torch.float16).to(torch.float32)
        return scale.to(torch.bfloat16).to(torch.float32) if self is ScaleType.BFLOAT16 else scale


@dataclass(frozen=True)
class QuantSpec:
    """A format: ``real = scale * (value of the code - zero_point)``.

    Args:
        element: the values that a code stands for: integers, or small floats.
        symmetric: the zero point is fixed: 0 if signed, the middle of the range if unsigned.
        granularity: which elements share a scale (and a zero point).
        scale_type: the numbers that a scale can be.
        dynamic: scales are chosen anew at each call, from the values met there.
        float_zero_points: zero points are float32, so that a block is covered from its smallest to
            its largest value, whether or not 0 lies between; 0 itself need not be a code. Weights
            alone can have them.
        clip: the share of the recorded range that codes stand for, 0 (excluded) to 1; what lies
            beyond becomes the largest or smallest value. For static activations alone.

    Raises:
        InvalidConfig: zero points with floats or with scales that are powers of two; float zero
            points in a format that is symmetric or dynamic; ``clip`` in a dynamic one, or out of
            range; something that is none of these types.

    >>> QuantSpec.of(bits=4, signed=False, symmetric=False).quant_max
    15
    >>> print(QuantSpec.of("float8_e4m3fn", per_channel=True))
    float8_e4m3fn per-channel
    """

    element: ElementType = field(default_factory=IntegerType)
    symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    scale_type: ScaleType = ScaleType.FLOAT32
    dynamic: bool = False
    float_zero_points: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.element, ElementType):
            raise InvalidConfig(
                f"QuantSpec element is {self.element!r}; expected an element type: "
                'QuantSpec.of("int4"), QuantSpec.of("float8_e4m3fn"), QuantSpec.of(bits=8)'
            )
        if not isinstance(self.granularity, Granularity):
            raise InvalidConfig(
                f"QuantSpec granularity is {self.granularity!r}; expected a Granularity, "
                "such as PerChannel() or PerGroup(32)"
            )
        if not isinstance(self.scale_type, ScaleType):
            raise InvalidConfig(
                f"QuantSpec scale_type is {self.scale_type!r}; expected a ScaleType, "
                "such as ScaleType.E8M0"
            )
        if not self.symmetric and not self.element.integer:
            raise InvalidConfig(f"{self.element} has no zero point; use symmetric=True")
        if not self.symmetric and self.scale_type is ScaleType.E8M0:
            raise InvalidConfig("scales of powers of two have no zero point; use symmetric=True")
        if self.float_zero_points and (self.symmetric or self.dynamic):
            raise InvalidConfig(
                "float_zero_points=True: expected symmetric=False and dynamic=False, got "
                f"symmetric={self.symmetric}, dynamic={self.dynamic}"
            )
        share = isinstance(self.clip, (int, float)) and not isinstance(self.clip, bool)
        if not share or not 0.0 < self.clip <= 1.0:
            raise InvalidConfig(
                f"QuantSpec clip={self.clip!r}: expected a share of the recorded range, above 0 "
                "and up to 1"
            )
        if self.dynamic and self.clip != 1.0:
            raise InvalidConfig(
                f"clip={self.clip} is of a recorded range, and dynamic scales have none: leave it "
                "out, or use dynamic=False"
            )

    @classmethod
    def of(
        cls,
        element: str | ElementType | None = None,
        *,
        bits: int = 8,
        signed: bool = False,
        symmetric: bool | None = None,
        per_channel: bool = False,
        granularity: Granularity | None = None,
        scale_type: ScaleType | str = ScaleType.FLOAT32,
        dynamic: bool = False,
        float_zero_points: bool = False,
        clip: float = 1.0,
    ) -> QuantSpec:
        """A format by the name of its element type, or the integers of ``bits`` (2 to 16) bits.

        Args:
            element: ``"int4"``, ``"uint8"``, ``"float8_e4m3fn"``, ``"float4_e2m1"``; see
                ``torch_quant.core.elements.ELEMENT_TYPES``.
            bits: of an integer, where no ``element`` is given.
            signed: whether that integer has a sign.
            symmetric: None: no for ``bits``; with ``element``, yes unless it is unsigned or has
                float zero points.
            per_channel: short for ``granularity=PerChannel()``.
            granularity: per tensor by default.
            scale_type: or its name.
            dynamic: scales are chosen at each call.
            float_zero_points: zero points are float32, of weights.
            clip: the share of the recorded range that codes stand for.

        Raises:
            InvalidConfig: an unknown name, other numbers of bits, what contradicts itself.

        >>> QuantSpec.of("int4", per_channel=True).quant_min
        -8
        """
        if element is None:
            chosen: ElementType = IntegerType.of(bits, signed)
            symmetric = bool(symmetric)
        else:
            chosen = element_type(element) if isinstance(element, str) else element
            if symmetric is None and isinstance(chosen, ElementType):
                signed = not chosen.integer or chosen.quant_min < 0
                symmetric = signed and not float_zero_points
        if per_channel and granularity is not None:
            raise InvalidConfig("QuantSpec.of: give per_channel=True or granularity=..., not both")
        if granularity is None:
            granularity = PerChannel() if per_channel else PerTensor()
        if isinstance(scale_type, str):
            scale_type = _scale_type(scale_type)
        kinds = (granularity, scale_type, dynamic, float_zero_points, clip)
        return cls(chosen, bool(symmetric), *kinds)

    @property
    def dtype(self) -> torch.dtype:
        """The type that codes are kept in."""
        return self.element.dtype

    @property
    def bits(self) -> int:
        """Bits that a code needs, whatever its storage type holds."""
        return self.element.bits

    @property
    def quant_min(self) -> float:
        """The smallest value, in units of the scale; an int for integers."""
        return self.element.quant_min

    @property
    def quant_max(self) -> float:
        """The largest value, in units of the scale; an int for integers."""
        return self.element.quant_max

    @property
    def signed(self) -> bool:
        return self.quant_min < 0

    @property
    def integer(self) -> bool:
        """Whether the values are consecutive integers."""
        return self.element.integer

    @property
    def levels(self) -> int:
        """How many different values there are."""
        return self.element.levels

    @property
    def values(self) -> Tensor:
        """Every value in units of the scale, ascending, float32, ``[levels]``."""
        return self.element.values

    @property
    def borders(self) -> Tensor:
        """Where rounding goes over from one value to the next, float32, ``[levels + 1]``."""
        return self.element.borders

    @property
    def zero_point_dtype(self) -> torch.dtype:
        """The type that zero points are kept in, int32 or float32."""
        return torch.float32 if self.float_zero_points else torch.int32

    @property
    def per_channel(self) -> bool:
        return isinstance(self.granularity, PerChannel)

    @property
    def per_tensor(self) -> bool:
        return isinstance(self.granularity, PerTensor)

    @property
    def full_range(self) -> bool:
        """Whether every value of an integer storage type is a code: a saturating cast clips."""
        if not self.integer:
            return False
        info = torch.iinfo(self.dtype)
        return (self.quant_min, self.quant_max) == (info.min, info.max)

    def on(self, channel_axis: int) -> QuantSpec:
        """The same for an operator's weight, whose output channels lie along ``channel_axis``.

        >>> QuantSpec.of("int4", per_channel=True).on(0).granularity
        PerChannel(axis=0)
        """
        return replace(self, granularity=self.granularity.on(channel_axis))

    def round(self, x: Tensor) -> Tensor:
        """The values nearest to ``x``, which is in units of the scale; float32, same shape.

        >>> QuantSpec.of("int4").round(torch.tensor([1.4, 100.0]))
        tensor([1., 7.])
        """
        return self.element.round(x)

    def encode(self, x: Tensor) -> Tensor:
        """The codes of the values nearest to ``x``, same shape, in :attr:`dtype`.

        >>> QuantSpec.of("int4").encode(torch.tensor([1.4, 100.0]))
        tensor([1, 7], dtype=torch.int8)
        """
        return self.element.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, in units of the scale; float32, same shape.

        >>> QuantSpec.of("int4").decode(torch.tensor([1, 7], dtype=torch.int8))
        tensor([1., 7.])
        """
        return self.element.decode(codes)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Bits for each element of a tensor of this shape, its scales and zero points included.

        >>> from torch_quant.core.granularity import PerGroup
        >>> spec = QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0")
        >>> spec.bits_per_weight([64, 64])
        4.25
        """
        blocks = math.prod(self.granularity.on(0).grid(shape))
        zero_point = 0 if self.symmetric else 32 if self.float_zero_points else self.bits
        return self.bits + blocks * (self.scale_type.bits + zero_point) / max(math.prod(shape), 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; :meth:`from_dict` reads it back.

        >>> QuantSpec().to_dict()["element"]
        'uint8'
        """
        element: dict[str, Any] = {"element": self.element.name}
        if isinstance(self.element, IntegerType):
            limits = {"quant_min": self.quant_min, "quant_max": self.quant_max}
            element = {"element": self.element.base, **limits}
        return element | {
            "symmetric": self.symmetric,
            "granularity": str(self.granularity),
            "scale_type": self.scale_type.value,
            "dynamic": self.dynamic,
            **({"float_zero_points": True} if self.float_zero_points else {}),
            **({"clip": self.clip} if self.clip != 1.0 else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Read :meth:`to_dict`'s form, or that of version 0.1, which has a ``dtype``.

        Raises:
            InvalidConfig: it is something else; says which entry is wrong.

        >>> spec = QuantSpec.of("float8_e4m3fn")
        >>> QuantSpec.from_dict(spec.to_dict()) == spec
        True
        """
        try:
            old = "dtype" in data
            name = str(data["dtype" if old else "element"])
            if name.startswith(("int", "uint")):
                low, high = data["quant_min"], data["quant_max"]
                name = f"{name}[{int(low)}, {int(high)}]"
            return cls(
                element_type(name),
                bool(data["symmetric"]),
                Granularity.parse(str(data["granularity"])),
                ScaleType.FLOAT32 if old else _scale_type(data["scale_type"]),
                False if old else bool(data["dynamic"]),
                bool(data.get("float_zero_points", False)),
                data.get("clip", 1.0),
            )
        except (KeyError, ValueError, TypeError, InvalidConfig) as error:
            raise InvalidConfig(f"not a QuantSpec: {dict(data)!r} ({error})") from error

    def __str__(self) -> str:
        if self.integer:
            element = f"{'s' if self.signed else 'u'}{self.bits}"
            element += " symmetric" if self.symmetric else " affine"
        else:
            element = self.element.name
        scale = "" if self.scale_type is ScaleType.FLOAT32 else f", {self.scale_type.value} scales"
        granularity = str(self.granularity).replace("_", "-")
        zeros = ", float zero points" if self.float_zero_points else ""
        clip = "" if self.clip == 1.0 else f", {self.clip:.0%} of the range"
        return f"{element} {granularity}{scale}{zeros}{', dynamic' if self.dynamic else ''}{clip}"


def _scale_type(name: Any) -> ScaleType:
    try:
        return ScaleType(name)
    except ValueError as error:
        known = ", ".join(each.value for each in ScaleType)
        raise InvalidConfig(f"scale_type {name!r}; expected one of {known}") from error
