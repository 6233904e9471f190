from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from torch_quant import QConfig
from torch_quant.core.elements import IntegerType, element_type
from torch_quant.core.granularity import PerBlock, PerChannel, PerGroup, PerToken
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import MinMaxObserver


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_of_bits(bits: int, signed: bool) -> None:
    spec = QuantSpec.of(bits=bits, signed=signed)
    assert spec.bits == bits
    assert spec.signed is signed
    assert spec.quant_max - spec.quant_min + 1 == 2**bits
    assert spec.quant_min == (-(2 ** (bits - 1)) if signed else 0)
    assert spec.full_range is (bits == 8 or (bits == 16 and signed))
    assert torch.iinfo(spec.dtype).min <= spec.quant_min
    assert torch.iinfo(spec.dtype).max >= spec.quant_max
    assert spec.levels == len(spec.values) == 2**bits
    assert QuantSpec.of(f"{'int' if signed else 'uint'}{bits}", symmetric=False) == spec


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_of_other_bits(bits: int) -> None:
    with pytest.raises(InvalidConfig, match="2 to 16 bits"):
        QuantSpec.of(bits=bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"element": torch.uint8}, "torch.uint8.*expected an element type"),
        ({"granularity": "per_tensor"}, r"PerChannel\(\)"),
        ({"scale_type": "float32"}, "ScaleType.E8M0"),
        ({"element": element_type("float8_e5m2")}, "float8_e5m2 has no zero point"),
        ({"scale_type": ScaleType.E8M0}, "powers of two have no zero point"),
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
        QuantSpec(IntegerType(-127, 127), True),
        QuantSpec.of("uint16", granularity=PerToken(), dynamic=True),
        QuantSpec.of("int4", granularity=PerGroup(32), scale_type="bfloat16"),
        QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0"),
        QuantSpec.of("float8_e4m3fn", granularity=PerBlock((128, 128))),
        QuantSpec.of("float6_e3m2", granularity=PerChannel(-1)),
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
        {"element": "float32"},
        {"element": None},
        {"element": "uint4"},
        {"scale_type": "float64"},
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
    mx = QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0")
    assert str(mx) == "float4_e2m1 per-group(32), e8m0 scales"
    assert str(QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)) == (
        "s4 symmetric per-channel"
    )
    assert QuantSpec.of(per_channel=True).granularity == PerChannel()


def test_codes_for_a_share_of_the_range() -> None:
    spec = QuantSpec(clip=0.5)
    assert QuantSpec.from_dict(spec.to_dict()) == spec == QuantSpec.of(clip=0.5)
    assert "clip" not in QuantSpec().to_dict()
    assert str(spec) == "u8 affine per-tensor, 50% of the range"
    observer = MinMaxObserver()
    observer.observe(torch.tensor([-4.0, 8.0]))
    whole, half = (observer.qparams(each) for each in (QuantSpec(), spec))
    assert float(half.scale) == pytest.approx(float(whole.scale) / 2)
    assert int(half.zero_point) == int(whole.zero_point)
    assert QConfig.from_dict({"input": {"clip": 0.5}}).input == spec


@pytest.mark.parametrize("clip", [0, 0.0, -1.0, 1.5, True, "0.5", float("nan")])
def test_shares_that_are_none(clip: object) -> None:
    with pytest.raises(InvalidConfig, match=r"clip=.*expected a share of the recorded range"):
        QuantSpec(clip=clip)  # type: ignore[arg-type]


def test_what_has_no_recorded_range() -> None:
    with pytest.raises(InvalidConfig, match="dynamic scales have none"):
        QuantSpec.of(dynamic=True, clip=0.5)
    with pytest.raises(InvalidConfig, match="weights are clipped by their method"):
        QConfig(weight=QuantSpec.of("int8", clip=0.5))
