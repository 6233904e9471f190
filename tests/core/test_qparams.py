from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from torch_quant import FLOAT, PerChannel, PerGroup, QConfig, Quantizer, recipes
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


def test_float_zero_points_cover_a_range_beside_zero_and_find_its_grid() -> None:
    """4 bits with a minimum, as GGUF's Q4_1 has them: code for code, wherever 0 lies."""
    spec = QuantSpec.of("uint4", granularity=PerChannel(0), float_zero_points=True)
    codes = torch.arange(16).repeat(3, 1).to(torch.uint8)
    minimum, scale = torch.tensor([[0.7], [-3.2], [-0.1]]), torch.tensor([[0.1], [0.02], [0.3]])
    x = codes * scale + minimum
    qparams = choose_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), spec)
    assert torch.equal(quantize(x, qparams), codes)
    torch.testing.assert_close(dequantize(codes, qparams), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fake_quantize(x, qparams), x, rtol=1e-5, atol=1e-6)


def test_float_zero_points_of_a_constant() -> None:
    spec = QuantSpec.of("uint4", float_zero_points=True)
    ends = torch.tensor(-12.75)
    assert float(fake_quantize(ends, choose_qparams(ends, ends, spec))) == -12.75


def test_zero_points_of_another_type() -> None:
    one, spec = torch.tensor(1.0), QuantSpec.of("uint4", float_zero_points=True)
    with pytest.raises(InvalidConfig, match=r"zero points of torch\.float32, got torch\.int32"):
        QParams(spec, one, torch.tensor(1, dtype=torch.int32))
    with pytest.raises(InvalidConfig, match=r"zero points of torch\.int32, got torch\.float32"):
        QParams(QuantSpec.of("uint4"), one, one)


@pytest.mark.parametrize("options", [{"symmetric": True}, {"dynamic": True}])
def test_formats_without_float_zero_points(options: dict[str, bool]) -> None:
    with pytest.raises(InvalidConfig, match="expected symmetric=False and dynamic=False"):
        QuantSpec.of("uint4", float_zero_points=True, **options)
    with pytest.raises(InvalidConfig, match="weights alone"):
        QConfig(QuantSpec.of("uint8", float_zero_points=True))


def test_qat_trains_no_float_zero_points() -> None:
    config = recipes.int4_weight_only(group_size=4, symmetric=False, float_zero_points=True)
    quantizer = Quantizer("reference", qconfig=config)
    with pytest.raises(InvalidConfig, match="zero points that are codes, not u4 affine"):
        quantizer.qat(nn.Linear(8, 2), example_inputs=torch.ones(1, 8))


def test_float_zero_points_as_data() -> None:
    spec = QuantSpec.of("uint4", granularity=PerGroup(32), float_zero_points=True)
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert spec.bits_per_weight([8, 64]) == 4 + 64 / 32
    assert str(spec) == "u4 affine per-group(32), float zero points"
    config = QConfig(FLOAT, spec)
    assert QConfig.from_dict(config.to_dict()) == config
    assert "float_zero_points" not in QuantSpec.of("uint4").to_dict()  # files of before are read
