from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from torch_quant.core.spec import Granularity, QuantSpec
from torch_quant.errors import InvalidConfig


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_of_bits(bits: int, signed: bool) -> None:
    spec = QuantSpec.of(bits=bits, signed=signed)
    assert spec.bits == bits
    assert spec.signed is signed
    assert spec.quant_max - spec.quant_min + 1 == 2**bits
    assert spec.quant_min == (-(2 ** (bits - 1)) if signed else 0)
    assert spec.full_range is (bits == 8)
    assert spec.dtype == (torch.int8 if signed else torch.uint8)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_of_other_bits(bits: int) -> None:
    with pytest.raises(InvalidConfig, match="2 to 8 bits"):
        QuantSpec.of(bits=bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dtype": torch.int16}, "int16"),
        ({"granularity": "per_tensor"}, "Granularity.PER_CHANNEL"),
        ({"quant_min": 5, "quant_max": 5}, "non-empty"),
        ({"quant_min": 6, "quant_max": 5}, "non-empty"),
        ({"quant_min": -1}, "lie inside uint8"),
        ({"quant_max": 256}, "lie inside uint8"),
        ({"dtype": torch.int8}, "lie inside int8"),
        ({"dtype": torch.int8, "quant_min": 0, "quant_max": 7}, "quant_min < 0"),
        ({"dtype": torch.int8, "quant_min": -8, "quant_max": -1}, "quant_min < 0"),
    ],
)
def test_validation(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        QuantSpec(**options)  # type: ignore[arg-type]


SPECS = {
    str(spec): spec
    for spec in (
        QuantSpec(),
        QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True),
        QuantSpec(torch.int8, True, quant_min=-127, quant_max=127),
        QuantSpec(torch.int32, True, quant_min=-(2**31), quant_max=2**31 - 1),
    )
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dict_round_trip(spec: QuantSpec) -> None:
    data = json.loads(json.dumps(spec.to_dict()))
    assert QuantSpec.from_dict(data) == spec
    assert hash(QuantSpec.from_dict(data)) == hash(spec)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"dtype": None},
        {"granularity": "per_row"},
        {"quant_min": "low"},
        {"quant_min": None},
        {"quant_max": 999},
    ],
    ids=str,
)
def test_from_dict_of_anything_else(change: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig):
        QuantSpec.from_dict(QuantSpec().to_dict() | change)


@pytest.mark.parametrize("key", sorted(QuantSpec().to_dict()))
def test_from_dict_needs_every_key(key: str) -> None:
    data = QuantSpec().to_dict()
    del data[key]
    with pytest.raises(InvalidConfig, match=key):
        QuantSpec.from_dict(data)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().symmetric = True  # type: ignore[misc]


def test_it_reads_well() -> None:
    assert str(QuantSpec()) == "u8 affine per-tensor"
    assert str(QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)) == (
        "s4 symmetric per-channel"
    )
    assert QuantSpec.of(per_channel=True).granularity is Granularity.PER_CHANNEL
