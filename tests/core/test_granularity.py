"""Blocks against loops over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from torch_quant.core.functional import dequantize, fake_quantize, quantize
from torch_quant.core.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    block_extremes,
    block_rows,
    split_blocks,
)
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.errors import InvalidConfig

SHAPE = (4, 6, 8)
CASES: list[tuple[Granularity, tuple[int, ...]]] = [
    (PerTensor(), ()),
    (PerChannel(0), (4, 1, 1)),
    (PerChannel(1), (1, 6, 1)),
    (PerChannel(-1), (1, 1, 8)),
    (PerGroup(4), (4, 6, 2)),
    (PerGroup(1), (4, 6, 8)),
    (PerGroup(8), (4, 6, 1)),
    (PerGroup(3, 1), (4, 2, 8)),
    (PerToken(), (4, 6, 1)),
    (PerBlock((2, 4)), (4, 3, 2)),
    (PerBlock((2, 3, 8)), (2, 2, 1)),
]
every_granularity = pytest.mark.parametrize(("granularity", "grid"), CASES, ids=lambda x: str(x))
SPECS = [
    QuantSpec.of("uint8"), QuantSpec.of("int4"), QuantSpec.of("float4_e2m1"),
    QuantSpec.of("float8_e4m3fn", scale_type="bfloat16"), QuantSpec.of("int16"),
    QuantSpec.of("uint4", scale_type="float16"),
    QuantSpec.of("float4_e2m1", scale_type="e8m0"),
]  # fmt: skip


def data() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def blocks(
    x: torch.Tensor, grid: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Index in the grid, and the part of the tensor, of every block."""
    counts = grid or (1,) * x.dim()
    sizes = [s // n for s, n in zip(x.shape, counts, strict=True)]
    for index in itertools.product(*map(range, counts)):
        part = tuple(slice(i * s, i * s + s) for i, s in zip(index, sizes, strict=True))
        yield (index if grid else ()), part


@every_granularity
def test_extremes_of_every_block(granularity: Granularity, grid: tuple[int, ...]) -> None:
    x = data()
    low, high = block_extremes(x, granularity)
    rows = block_rows(x, granularity)
    assert granularity.grid(SHAPE) == low.shape == high.shape == grid
    for number, (index, part) in enumerate(blocks(x, grid)):
        assert low[index] == x[part].min()
        assert high[index] == x[part].max()
        assert torch.equal(rows[number].sort().values, x[part].flatten().sort().values)


@every_granularity
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_blocks_are_tensors_by_themselves(
    granularity: Granularity, grid: tuple[int, ...], spec: QuantSpec
) -> None:
    x = data()
    cut = QuantSpec(spec.element, spec.symmetric, granularity, spec.scale_type)
    qparams = choose_qparams(*block_extremes(x, granularity), cut)
    codes = quantize(x, qparams)
    real = fake_quantize(x, qparams)
    assert qparams.scale.shape == grid
    assert codes.dtype == spec.dtype
    assert torch.equal(dequantize(codes, qparams), real)
    for _, part in blocks(x, grid):
        alone = choose_qparams(x[part].min(), x[part].max(), spec)
        assert torch.equal(fake_quantize(x[part], alone), real[part])


@every_granularity
def test_text_and_back(granularity: Granularity, grid: tuple[int, ...]) -> None:
    assert Granularity.parse(str(granularity)) == granularity
    assert granularity.serves(granularity)
    assert granularity.serves(granularity.unbound())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "per_row",
        "per_group",
        "per_group(x)",
        "per_tensor(3)",
        "per_block",
        "per_group(1, 2, 3)",
    ],
)
def test_text_of_none(text: str) -> None:
    with pytest.raises(InvalidConfig, match="expected per_tensor, per_channel"):
        Granularity.parse(text)


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerGroup(3), (4, 8), "dimension 1 of a tensor of shape (4, 8) has 8 elements"),
        (PerGroup(2, 2), (4, 8), "no such dimension"),
        (PerBlock((3, 4)), (4, 8), "dimension 0"),
        (PerBlock((2, 2, 2)), (4, 8), "fewer dimensions"),
        (PerChannel(), (4, 8), "PerChannel(axis=0)"),
        (PerChannel(2), (4, 8), "one of its dimensions"),
        (PerToken(), (), "no tokens"),
    ],
)
def test_what_cannot_be_cut(granularity: Granularity, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidConfig) as info:
        block_extremes(torch.zeros(shape), granularity)
    assert message in str(info.value)


def test_scales_that_do_not_fit() -> None:
    spec = QuantSpec.of("int4", granularity=PerGroup(4))
    qparams = QParams(spec, torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.int32))
    for shape in ((4, 8), (12,), (4, 12, 1)):
        with pytest.raises(InvalidConfig, match="do not fit a tensor of shape"):
            quantize(torch.zeros(shape), qparams)


def test_a_tensor_without_elements_has_a_grid_without_scales() -> None:
    for shape in ((0, 8), (2, 0, 8)):
        for granularity in (PerToken(), PerGroup(4)):
            grid, x = granularity.grid(shape), torch.zeros(shape)
            spec = QuantSpec.of("int4", granularity=granularity, dynamic=True)
            qparams = QParams(spec, torch.ones(grid), torch.zeros(grid, dtype=torch.int32))
            assert quantize(x, qparams).shape == shape
    with pytest.raises(InvalidConfig, match="do not fit a tensor of shape"):
        split_blocks(torch.zeros(4, 8), (0, 1))


def test_the_axis_of_an_operator() -> None:
    assert PerChannel().on(1) == PerChannel(1)
    assert PerChannel(0).on(1) == PerChannel(0)
    assert PerGroup(4).on(0) == PerGroup(4, 1)  # linear, convolution: along the input channels
    assert PerGroup(4).on(1) == PerGroup(4, 0)  # transposed convolution
    assert PerTensor().on(1) == PerTensor()


@pytest.mark.parametrize(
    "make", [lambda: PerGroup(0), lambda: PerBlock(()), lambda: PerBlock((2, 0))]
)
def test_sizes_that_are_none(make: object) -> None:
    with pytest.raises(InvalidConfig, match="expected"):
        make()  # type: ignore[operator]


def test_scales_of_powers_of_two_follow_the_specification() -> None:
    """OCP MX 1.0, section 6.3: floor(log2 of the largest magnitude) - emax."""
    spec = QuantSpec.of("float4_e2m1", granularity=PerGroup(2), scale_type="e8m0")
    x = torch.tensor([[0.1, -6.0, 7.9, 0.0, 8.0, 1.0, 0.0, 0.0, 1e-30, 0.0]])
    scale = choose_qparams(*block_extremes(x, spec.granularity), spec).scale
    assert scale.tolist() == [[1.0, 1.0, 2.0, 1.0, 2.0**-48]]
    eight = QuantSpec.of("int8", scale_type="e8m0")  # MXINT8, whose integers are in units of 2^-6
    assert float(choose_qparams(torch.tensor(-1.0), torch.tensor(1.9), eight).scale) == 2.0**-6


@pytest.mark.parametrize("kind", list(ScaleType))
def test_scales_are_numbers_of_their_type(kind: ScaleType) -> None:
    scale = torch.logspace(-10, 4, 200)
    rounded = kind.round(scale)
    assert torch.equal(kind.round(rounded), rounded)
    if kind is ScaleType.E8M0:
        assert torch.equal(rounded, 2.0 ** scale.log2().floor())
    elif kind is not ScaleType.FLOAT32:
        dtype = getattr(torch, kind.value)
        assert torch.equal(rounded.to(dtype).float(), rounded)
    assert torch.isfinite(kind.round(torch.tensor([1e-45, 3e38]))).all()


def test_zero_points_are_those_of_the_rounded_scale() -> None:
    """Else 0 would be off by what the scale was rounded by."""
    spec = QuantSpec.of("uint8", scale_type="bfloat16")
    qparams = choose_qparams(torch.tensor(-100.3), torch.tensor(0.01), spec)
    x = torch.tensor([-100.3])
    assert (fake_quantize(x, qparams) - x).abs() <= qparams.scale
