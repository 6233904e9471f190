"""The kernels of ``csrc`` against plain arithmetic on the same integers, by instruction set."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from models import normal
from torch import Tensor, nn

from torch_quant import InvalidConfig, native, sqnr
from torch_quant.core.packing import pack, unpack
from torch_quant.native.dynamic import DYNAMIC_LINEAR
from torch_quant.native.ops import PACKED_EMBEDDING, WEIGHT_ONLY_LINEAR
from torch_quant.ops.qdq import CHOOSE_QPARAMS, QUANTIZE

SETS = native.instruction_sets()
needs_kernels = pytest.mark.skipif(not SETS, reason=f"{native.unavailable()}")
SIZES = {
    "one row": (1, 5, 64, 32),
    "odd rows and outputs": (7, 9, 416, 32),
    "groups that no chunk is made of": (3, 10, 1344, 96),
    "groups of 64": (5, 13, 1024, 64),
    "groups of 128": (9, 4, 512, 128),
    "groups of 160": (2, 6, 640, 160),
    "groups of 192": (2, 5, 576, 192),
    "groups of 256, tile rests": (6, 33, 512, 256),
    "per channel, odd inputs": (4, 7, 77, None),
    "per channel, longer": (13, 17, 301, None),
    "one input": (8, 3, 1, None),
}
"""Rows, outputs, inputs, group."""


class Weight:
    """Random codes with their scales, as kernels take them, and the numbers that they stand for."""

    def __init__(
        self, outputs: int, inputs: int, bits: int, group: int | None = None, affine: bool = False,
        floats: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(outputs * inputs + bits)

        def integers(shape: tuple[int, ...]) -> Tensor:
            return torch.randint(0, 2**bits, shape, generator=generator)

        size = group or inputs
        grid = (outputs, inputs // size)
        codes = integers((outputs, inputs))
        self.scale = torch.rand(grid, generator=generator) + 0.1
        self.zero_point = integers(grid).to(torch.uint8) if affine else None
        if floats:  # up to a range beside the codes
            self.zero_point = (torch.rand(grid, generator=generator) * 3 - 1) * 2**bits
        self.bits, self.zero = bits, 2 ** (bits - 1)
        middle = self.zero if self.zero_point is None else self.zero_point.double().unsqueeze(-1)
        blocks = codes.double().reshape(*grid, size) - middle
        self.real = (blocks * self.scale.double().unsqueeze(-1)).reshape(outputs, inputs)
        if bits < 8:
            self.codes = pack(codes, bits)
        elif self.zero_point is not None:
            self.codes = codes.to(torch.uint8)
        else:
            self.codes = (codes - 128).to(torch.int8)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        tensors = (x, self.codes, self.scale, self.zero_point, bias)
        return WEIGHT_ONLY_LINEAR(*tensors, self.bits, self.zero)  # type: ignore[no-any-return]


def dynamic(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return DYNAMIC_LINEAR(x, weight, scale, None, False)  # type: ignore[no-any-return]


def rounded(x: Tensor, weight: Weight) -> Tensor:
    """What the kernels make of activations, float64: 8 or 15 bits for each block of inputs."""
    inputs = x.shape[-1]
    group = inputs // weight.scale.shape[1]
    coarse = weight.bits == 8 and (weight.scale.shape[1] == 1 or group % 128 == 0)
    block, limit = (128 if coarse else 32), (127.0 if weight.bits < 8 else 16256.0)
    blocks = nn.functional.pad(x, (0, -inputs % block)).reshape(*x.shape[:-1], -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (limit / largest)).nan_to_num(0.0, 0.0, 0.0).round()
    real = codes.double() * (largest / limit).double()
    return real.flatten(-2)[..., :inputs]


def assert_product(y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None) -> None:
    """``y`` is the product of the rounded activations, up to what sums in float32 round.

    A lane adds up at most 11 chunks here, and 16 lanes are added in 4 steps; all terms may have
    been rounded 20 times by half of 2^-23.
    """
    if not SETS:  # dequantized weights: nothing is rounded
        torch.testing.assert_close(
            y.double(), x.double() @ weight.real.T + (0 if bias is None else bias.double()),
            rtol=1e-4, atol=1e-4 * float(weight.real.abs().sum(1).max() * x.abs().max()),
        )  # fmt: skip
        return
    real = rounded(x, weight)
    expected = real @ weight.real.T + (0 if bias is None else bias.double())
    terms = real.abs() @ unsigned_reach(weight).T + (0 if bias is None else bias.double().abs())
    assert ((y.double() - expected).abs() <= 20 * 2.0**-24 * terms).all()


def unsigned_reach(weight: Weight) -> Tensor:
    """Bounds of what a kernel adds up for each weight: code and zero point are apart if affine."""
    size = weight.real.shape[1] // weight.scale.shape[1]
    # Float zero points lie up to two ranges away from a code.
    return weight.scale.double().repeat_interleave(size, 1) * 2.0 ** (weight.bits + 2)


@pytest.mark.parametrize("zero_points", ["one", "integers", "floats"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_weights_alone(instructions: str, size: str, bits: int, zero_points: str) -> None:
    rows, outputs, inputs, group = SIZES[size]
    x, bias = normal(rows, inputs), normal(outputs)
    x[:, :1] *= 20.0
    of_zeros = {"affine": zero_points == "integers", "floats": zero_points == "floats"}
    weight = Weight(outputs, inputs, bits, group, **of_zeros)
    assert_product(weight.times(x, bias), x, weight, bias)


@needs_kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_vectors_of_any_width_give_the_same_floats(bits: int) -> None:
    x, found = normal(6, 416), []
    weight = Weight(11, 416, bits, 32)
    for name in SETS[1:]:
        with native.using(name):
            found.append(weight.times(x))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
@pytest.mark.parametrize("sizes", [(1, 5, 64), (7, 9, 100), (9, 300, 777), (4, 4, 1), (3, 2, 4100)])
def test_dynamic(instructions: str, sizes: tuple[int, int, int], signed: bool) -> None:
    """The integers of the reference, and one multiplication of floats behind them."""
    rows, outputs, inputs = sizes
    x, bias = normal(rows, inputs), normal(outputs)
    x[:, -1] *= 9.0
    if rows > 2:
        x[1], x[2] = x[1].abs(), 0.0  # one side of zero alone; nothing
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scale = torch.rand(outputs) + 0.1
    y = DYNAMIC_LINEAR(x, weight, scale, bias, signed)
    element = "int8" if signed else "uint8"
    x_scale, x_zero = CHOOSE_QPARAMS(x, element, signed, "per_token", "float32")
    codes = QUANTIZE(x, x_scale, x_zero, element).long() - x_zero
    sums = codes @ weight.long().T
    expected = sums.float() * (x_scale * scale) + bias
    if native.unavailable() is None:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-2)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_alone_and_among_others(instructions: str, bits: int) -> None:
    x, weight = normal(13, 320), Weight(37, 320, bits, 64)
    together = weight.times(x)
    assert torch.equal(torch.cat([weight.times(row) for row in x.split(1)]), together)


@needs_kernels
def test_more_rows_than_are_rounded_at_once(instructions: str) -> None:
    """Half a megabyte of activations at a time, one of dynamic ones: 113 and 455 rows here."""
    x, weight = normal(1000, 256).repeat(1, 9), Weight(3, 2304, 4, 128)
    int8, scale = torch.randint(-128, 128, (3, 2304), dtype=torch.int8), torch.rand(3)
    for y, times in (
        (weight.times(x), weight.times),
        (dynamic(x, int8, scale), lambda rows: dynamic(rows, int8, scale)),
    ):
        assert torch.equal(y, torch.cat([times(rows) for rows in x.split(100)]))


@needs_kernels
@pytest.mark.parametrize("sizes", [(70, 37), (64, 300), (1, 1), (2047, 18)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_many_rows_pack_the_weight_and_few_do_not(
    instructions: str, sizes: tuple[int, int], signed: bool
) -> None:
    """The same floats to the last bit, and more rows than are rounded at once."""
    inputs, outputs = sizes
    x = normal(1100, inputs)
    x[3, 0], x[700, -1], x[5] = math.inf, math.nan, 0.0
    int8 = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    for bias in (None, normal(outputs)):
        rest = int8, normal(outputs).abs() + 0.1, bias, signed
        parts = torch.cat([DYNAMIC_LINEAR(rows, *rest) for rows in x.split(7)])
        torch.testing.assert_close(
            DYNAMIC_LINEAR(x, *rest), parts, rtol=0.0, atol=0.0, equal_nan=True
        )
        assert parts[3].isnan().all()
        assert parts[6].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_threads(instructions: str, rows: int) -> None:
    """Enough work for several: they give the same numbers as one."""
    x, weight = normal(rows, 1024), Weight(515, 1024, 4, 128)
    int8, scale = torch.randint(-128, 128, (515, 1024), dtype=torch.int8), torch.rand(515)

    def products() -> list[Tensor]:
        return [weight.times(x), DYNAMIC_LINEAR(x, int8, scale, None, False)]

    expected = products()
    try:
        for threads in (2, 4):
            torch.set_num_threads(threads)
            for found, one in zip(products(), expected, strict=True):
                assert torch.equal(found, one)
    finally:
        torch.set_num_threads(1)


@needs_kernels
def test_python_threads_at_once() -> None:
    inputs = [normal(3, 1024) * (i + 1) for i in range(2)]
    weight = Weight(515, 1024, 4, 128)
    expected = [weight.times(x) for x in inputs]
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(50):
            if not torch.equal(weight.times(inputs[i]), expected[i]):
                wrong.append(i)

    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        torch.set_num_threads(1)
    assert not wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_makes_its_row_so(instructions: str, bits: int, value: float) -> None:
    x, weight = normal(5, 96), Weight(6, 96, bits)
    clean = weight.times(x)
    x[1, 40] = value
    y = weight.times(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])
    int8, scale = torch.full((6, 96), 3, dtype=torch.int8), torch.rand(6)
    found = DYNAMIC_LINEAR(x, int8, scale, None, False)
    assert not found[1].isfinite().any()
    assert found[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-29, 1e30, 3e34])
@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_numbers(instructions: str, bits: int, size: float) -> None:
    """Below 2^-100 (8e-31) activations count as zero."""
    x, weight = normal(2, 128) * size, Weight(3, 128, bits)
    y = weight.times(x)
    expected = x.double() @ weight.real.T
    if size < 2.0**-100:
        assert (y.double() - expected).abs().max() <= 2.0**-100 * weight.real.abs().sum(1).max()
    else:
        assert sqnr(expected, y.double()) > 35.0  # 8-bit activations give 40 dB and more


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_shape_and_layout_of_inputs(bits: int) -> None:
    weight, bias = Weight(6, 64, bits, 32), normal(6)
    matrix = normal(10, 64)
    y = weight.times(matrix, bias)
    assert torch.equal(weight.times(matrix.view(2, 5, 64), bias), y.view(2, 5, 6))
    assert torch.equal(weight.times(matrix[3], bias), y[3])
    assert torch.equal(weight.times(matrix.t().contiguous().t(), bias), y)
    assert weight.times(matrix[:0]).shape == (0, 6)
    assert weight.times(matrix.view(10, 1, 64)[:, :0]).shape == (10, 0, 6)
    double = weight.times(matrix.double())
    assert (double.dtype, weight.times(matrix.bfloat16()).dtype) == (torch.float64, torch.bfloat16)


def test_wrong_arguments_are_refused() -> None:
    """A kernel would read beyond the end of what it is given."""
    x, weight = normal(2, 64), Weight(6, 64, 4, 32)
    with pytest.raises(InvalidConfig, match="expected rows of 60 codes, got 32 bytes"):
        weight.times(x[:, :60])
    with pytest.raises(InvalidConfig, match="expected a bias of 6"):
        weight.times(x, normal(5))
    with pytest.raises(InvalidConfig, match="groups of a multiple of 32 inputs, got 4 groups of"):
        WEIGHT_ONLY_LINEAR(x, weight.codes, torch.ones(6, 4), None, None, 4, 8)
    with pytest.raises(InvalidConfig, match="expected bits=2, 4 or 8, got 3"):
        WEIGHT_ONLY_LINEAR(x, weight.codes, weight.scale, None, None, 3, 8)
    zeros = torch.zeros(6, dtype=torch.uint8)
    with pytest.raises(InvalidConfig, match="expected a zero point for each scale"):
        WEIGHT_ONLY_LINEAR(x, weight.codes, weight.scale, zeros, None, 4, 8)
    int8 = torch.ones(6, 60, dtype=torch.int8)
    with pytest.raises(InvalidConfig, match="expected a weight of 64 inputs"):
        DYNAMIC_LINEAR(x, int8, torch.ones(6), None, False)
    with pytest.raises(InvalidConfig, match="expected an int8 weight"):
        DYNAMIC_LINEAR(x, weight.codes, torch.ones(6), None, False)


def test_embeddings() -> None:
    indices = torch.tensor([[3, 0], [5, 3]])
    for bits, group, affine in ((4, 32, False), (4, None, True), (8, 32, False), (2, 64, True)):
        weight = Weight(6, 64, bits, group, affine)
        tensors = (weight.codes, weight.scale, weight.zero_point, indices)
        rows = PACKED_EMBEDDING(*tensors, bits, weight.zero, 64)
        torch.testing.assert_close(rows, weight.real[indices].float())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_packing(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["weights alone", "dynamic"])
def test_operators_are_well_behaved(dynamic: bool) -> None:
    x, weight = normal(3, 64), Weight(6, 64, 4, 32, affine=True)
    if dynamic:
        int8 = torch.ones(6, 64, dtype=torch.int8)
        torch.library.opcheck(DYNAMIC_LINEAR, (x, int8, torch.ones(6), None, True))
    else:
        tensors = (x, weight.codes, weight.scale, weight.zero_point, normal(6))
        torch.library.opcheck(WEIGHT_ONLY_LINEAR, (*tensors, 4, 8))
        indices = torch.tensor([1, 2])
        table = (weight.codes, weight.scale, weight.zero_point, indices)
        torch.library.opcheck(PACKED_EMBEDDING, (*table, 4, 8, 64))
