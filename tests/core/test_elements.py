"""Element types against their definition, torch's own types, and brute force."""

from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import (
    ELEMENT_TYPES,
    IntegerType,
    element_type,
    register_element_type,
)
from torch_quant.core.float_type import FloatType
from torch_quant.errors import InvalidConfig

SMALL = ("float8_e4m3fn", "float8_e5m2", "float6_e3m2", "float6_e2m3", "float4_e2m1")
OWN = {name: FloatType(name, *bits) for name, bits in {
    "float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2),
}.items()}  # fmt: skip
"""The same formats without the help of torch, and with numbers for the largest exponent."""
TYPES: dict[str, ElementType] = {
    **{name: element_type(name) for name in SMALL},
    **{name: element_type(name) for name in ("int2", "uint3", "int8", "uint8", "int12", "uint16")},
    "int8[-127, 127]": IntegerType(-127, 127),
    "float5_e2m2": FloatType("float5_e2m2", 2, 2),
    "float8_e6m1": FloatType("float8_e6m1", 6, 1),
}
every_type = pytest.mark.parametrize("element", TYPES.values(), ids=TYPES)


def by_definition(element: FloatType, code: int) -> Fraction:
    """The value of a code that is a number, from the formula of the specification."""
    e, m = element.exponent_bits, element.mantissa_bits
    exponent, mantissa = code >> m & (1 << e) - 1, code & (1 << m) - 1
    bias = (1 << e - 1) - 1
    whole = Fraction(mantissa, 1 << m) + (exponent > 0)
    value = whole * Fraction(2) ** (max(exponent, 1) - bias)
    return -value if code >> e + m else value


@pytest.mark.parametrize("name", SMALL)
def test_every_code_stands_for_what_the_specification_says(name: str) -> None:
    element = element_type(name)
    assert isinstance(element, FloatType)
    codes = torch.arange(2**element.bits).to(torch.uint8).view(element.dtype)
    for code, value in enumerate(element.decode(codes).tolist()):
        if math.isfinite(value):
            assert Fraction(value) == by_definition(element, code), code


def test_the_sizes_that_the_specifications_name() -> None:
    """Micikevicius et al. 2022, table 1; OCP MX specification 1.0, tables 3 to 5."""
    found = {
        name: (each.levels, each.quant_max, float(each.values[each.values > 0][0]))
        for name, each in ((name, element_type(name)) for name in SMALL)
    }
    assert found == {
        "float8_e4m3fn": (253, 448.0, 2.0**-9),
        "float8_e5m2": (247, 57344.0, 2.0**-16),
        "float6_e3m2": (63, 28.0, 0.0625),
        "float6_e2m3": (63, 7.5, 0.125),
        "float4_e2m1": (15, 6.0, 0.5),
    }
    assert [element_type(name).largest_exponent for name in SMALL] == [8, 15, 4, 2, 2]
    assert element_type("int8").largest_exponent == 6


@pytest.mark.parametrize("name", sorted(OWN))
def test_torch_has_the_same_float8(name: str) -> None:
    """All 256 codes, and rounding on both sides of every border between two values."""
    theirs, ours = element_type(name), OWN[name]
    codes = torch.arange(256).to(torch.uint8)
    values = codes.view(theirs.dtype).to(torch.float32)
    numbers = values.isfinite()
    decoded = theirs.decode(codes.view(theirs.dtype))
    assert torch.equal(decoded[numbers], ours.decode(codes)[numbers])
    assert torch.equal(ours.encode(values[numbers]), codes[numbers])
    middle = theirs.borders[1:-1]
    near = [torch.nextafter(middle, middle + side) for side in (-1.0, 1.0)]
    x = torch.cat([middle, *near, theirs.values])
    assert torch.equal(theirs.round(x), ours.round(x))
    assert torch.equal(theirs.encode(x).view(torch.uint8), ours.encode(x))
    assert torch.equal(theirs.round(x), x.to(theirs.dtype).to(torch.float32))


@every_type
def test_codes_and_values_go_there_and_back(element: ElementType) -> None:
    codes = element.codes()
    values = element.decode(codes)
    finite = values.isfinite()
    again = element.encode(values[finite])
    assert again.dtype == element.dtype
    assert torch.equal(element.decode(again), values[finite])
    bits = torch.uint8 if again.element_size() == 1 else again.dtype
    assert torch.equal(again.view(bits), codes.view(bits)[finite])
    assert torch.equal(element.round(element.values), element.values)
    assert torch.equal(element.values, element.values.sort().values)
    assert element.levels == len(set(element.values.tolist()))
    ends = (float(element.values[0]), float(element.values[-1]))
    assert ends == (element.quant_min, element.quant_max)


@every_type
def test_beyond_the_ends_values_saturate(element: ElementType) -> None:
    x = torch.tensor([math.inf, 3e38, -3e38, -math.inf])
    low, high = float(element.quant_min), float(element.quant_max)
    assert element.round(x).tolist() == [high, high, low, low]
    assert element.decode(element.encode(x)).tolist() == [high, high, low, low]


@every_type
def test_halves_go_to_the_even_code(element: ElementType) -> None:
    lower, upper = element.values[:-1], element.values[1:]
    middle = lower / 2 + upper / 2
    codes = [element.encode(x) for x in (lower, upper)]
    if element.dtype.is_floating_point:
        codes = [x.view(torch.uint8) for x in codes]
    even = torch.where(codes[0].to(torch.int32) % 2 == 0, lower, upper)
    assert torch.equal(element.round(middle), even)


@every_type
@settings(max_examples=200, deadline=None)
@given(x=st.floats(width=32, allow_nan=False), y=st.floats(width=32, allow_nan=False))
def test_rounding_is_that_of_brute_force(element: ElementType, x: float, y: float) -> None:
    for scale in (1.0, 2.0**-100):  # numbers of hypothesis are often far outside
        pair = torch.tensor(sorted((x * scale, y * scale)), dtype=torch.float32)
        rounded = element.round(pair)
        assert rounded[0] <= rounded[1]
        assert torch.equal(element.round(rounded), rounded)
        assert torch.equal(element.decode(element.encode(pair)), rounded)
        for given_, found in zip(pair.tolist(), rounded.tolist(), strict=True):
            inside = min(max(given_, float(element.quant_min)), float(element.quant_max))
            index = int(torch.searchsorted(element.values, torch.tensor(inside)))
            around = element.values[max(index - 1, 0) : index + 1].tolist()
            nearest = min(abs(Fraction(each) - Fraction(inside)) for each in around)
            assert abs(Fraction(found) - Fraction(inside)) == nearest


@every_type
def test_borders_lie_between_values(element: ElementType) -> None:
    borders = element.borders
    assert len(borders) == element.levels + 1
    assert (borders[:-1] < element.values).all()
    assert (borders[1:] > element.values).all()


@every_type
def test_they_are_values_themselves(element: ElementType) -> None:
    assert pickle.loads(pickle.dumps(element)) == element
    assert dataclasses.replace(element) == element  # type: ignore[type-var]
    assert hash(dataclasses.replace(element)) == hash(element)  # type: ignore[type-var]
    x = torch.randn(7, 5).t()
    before = x.clone()
    element.round(x)
    element.encode(x)
    assert torch.equal(x, before)


def test_names_find_them() -> None:
    for name, element in ELEMENT_TYPES.items():
        assert element.name == name
        assert element_type(name) is element
    assert element_type("int8[-127, 127]") == IntegerType(-127, 127)
    assert IntegerType(0, 15) == element_type("uint4")


@pytest.mark.parametrize(
    "name", ["int1", "int17", "float8", "", "int8[-128, 128]", "int8[5, 3]", "uint4[-1, 3]"]
)
def test_names_of_none(name: str) -> None:
    with pytest.raises(InvalidConfig, match=r"expected int2 to int16|quant_min < quant_max"):
        element_type(name)


def test_a_name_stands_for_one_type() -> None:
    with pytest.raises(InvalidConfig, match="choose another name"):
        register_element_type(FloatType("float4_e2m1", 1, 2))


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (5, 5, "quant_min < quant_max"),
        (6, 5, "quant_min < quant_max"),
        (-8, -1, "quant_max >= 0"),
        (0, 2**16, "need 17 bits"),
        (-(2**15) - 1, 0, "need 17 bits"),
        (0.0, 5, "two integers"),
    ],
)
def test_ranges_of_integers(low: int, high: int, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        IntegerType(low, high)


@pytest.mark.parametrize("bits", [(0, 3), (2, 0), (4, 4), (5, 5)])
def test_floats_of_other_sizes(bits: tuple[int, int]) -> None:
    with pytest.raises(InvalidConfig, match="exponent and"):
        FloatType("toy", *bits)


def test_a_bias_beyond_float32() -> None:
    with pytest.raises(InvalidConfig, match="beyond float32"):
        FloatType("toy", 3, 2, bias=140)
