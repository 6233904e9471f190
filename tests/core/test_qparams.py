from __future__ import annotations

import itertools

import pytest
import torch

from torch_quant.core.elements import IntegerType
from torch_quant.core.functional import dequantize, fake_quantize, quantize
from torch_quant.core.qparams import MIN_SCALE, QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

SPECS = {
    str(spec): spec
    for spec in (
        QuantSpec.of(bits=bits, signed=signed, symmetric=symmetric)
        for bits, signed, symmetric in itertools.product(range(2, 9), (False, True), (False, True))
    )
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_any_range_is_covered_and_holds_zero(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        magnitude = 10.0 ** (torch.rand(2, generator=generator) * 12 - 6)
        ends = (torch.randn(2, generator=generator) * magnitude).sort().values
        qparams = choose_qparams(ends[0], ends[1], spec)
        assert spec.quant_min <= int(qparams.zero_point) <= spec.quant_max
        assert float(fake_quantize(torch.zeros(1), qparams)) == 0.0
        points = torch.linspace(0.0, 1.0, 33).lerp(torch.zeros(33), 0.0)
        points = ends[0] + points * (ends[1] - ends[0])
        # Half a step of rounding, and in affine formats as much again: the zero point is rounded.
        bound = 0.501 if spec.symmetric else 1.001
        off = (fake_quantize(points, qparams) - points).abs().max()
        assert float(off) <= bound * float(qparams.scale)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dequantized_codes_quantize_to_themselves(spec: QuantSpec) -> None:
    codes = torch.arange(spec.quant_min, spec.quant_max + 1)
    qparams = choose_qparams(torch.tensor(-0.7), torch.tensor(2.9), spec)
    assert torch.equal(quantize(dequantize(codes, qparams), qparams).long(), codes)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_zero_range_has_scale_one(symmetric: bool) -> None:
    zero = torch.tensor(0.0)
    qparams = choose_qparams(zero, zero, QuantSpec.of(symmetric=symmetric))
    assert float(qparams.scale) == 1.0


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_extreme_ranges(symmetric: bool) -> None:
    spec = QuantSpec.of(symmetric=symmetric)
    tiny = choose_qparams(torch.tensor(0.0), torch.tensor(1e-30), spec)
    assert float(tiny.scale) == MIN_SCALE
    huge = choose_qparams(torch.tensor(-3.4e38), torch.tensor(3.4e38), spec)
    assert torch.isfinite(huge.scale)


def test_one_sided_ranges_use_every_code() -> None:
    spec = QuantSpec.of()
    positive = choose_qparams(torch.tensor(2.0), torch.tensor(5.1), spec)
    assert int(positive.zero_point) == 0
    assert float(positive.scale) == pytest.approx(5.1 / 255)
    negative = choose_qparams(torch.tensor(-5.1), torch.tensor(-2.0), spec)
    assert int(negative.zero_point) == 255


@pytest.mark.parametrize(
    ("spec", "zero_point", "scale"),
    [
        (QuantSpec.of(signed=True, symmetric=True), 0, 1.0 / 127),
        (QuantSpec.of(symmetric=True), 128, 1.0 / 127),
        (QuantSpec(IntegerType(-127, 127), True), 0, 1.0 / 127),
        (QuantSpec.of(bits=4, signed=True, symmetric=True), 0, 1.0 / 7),
        (QuantSpec(IntegerType(0, 127), True), 64, 1.0 / 63),
    ],
    ids=["s8", "u8", "s8_narrow", "s4", "u7"],
)
def test_symmetric_zero_points(spec: QuantSpec, zero_point: int, scale: float) -> None:
    qparams = choose_qparams(torch.tensor(-1.0), torch.tensor(0.2), spec)
    assert int(qparams.zero_point) == zero_point
    assert float(qparams.scale) == pytest.approx(scale)


def test_channels_are_independent() -> None:
    low, high = torch.tensor([[-1.0, 0.0, 3.0]]), torch.tensor([[1.0, 0.0, 9.0]])
    spec = QuantSpec.of(per_channel=True)
    qparams = choose_qparams(low, high, spec)
    assert qparams.scale.shape == (1, 3)
    for channel in range(3):
        alone = choose_qparams(low[0, channel], high[0, channel], QuantSpec.of())
        assert torch.equal(qparams.scale[0, channel], alone.scale)
        assert torch.equal(qparams.zero_point[0, channel], alone.zero_point)


@pytest.mark.parametrize(
    ("low", "high"),
    [(float("nan"), 1.0), (0.0, float("inf")), (-float("inf"), 0.0), (2.0, 1.0)],
)
def test_invalid_ranges(low: float, high: float) -> None:
    with pytest.raises(InvalidConfig):
        choose_qparams(torch.tensor(low), torch.tensor(high), QuantSpec())


def test_qparams_validate_their_shapes() -> None:
    one, two = torch.tensor(1.0), torch.ones(2)
    zero, zeros = torch.tensor(0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(InvalidConfig, match="no dimension"):
        QParams(QuantSpec(), two, zeros)
    with pytest.raises(InvalidConfig, match="one shape"):
        QParams(QuantSpec.of(per_channel=True), two, zero)
    with pytest.raises(InvalidConfig, match="as many dimensions as the tensor"):
        QParams(QuantSpec.of(per_channel=True), one, zero)
