"""Floats that are added, normalized and rounded in one pass, against the single operators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_quant import InvalidConfig, native
from torch_quant.native.rows import NORM_ROWS, ROUND_ROWS

SHAPES = {
    "one of all": (1, 1),
    "less than a vector": (3, 5),
    "a vector": (2, 3, 16),
    "rest of a vector": (4, 37),
    "one dimension": (50,),
    "more rows than a thread takes": (300, 129),
}
GRIDS = {"uint8": (0.03, 120, torch.uint8), "int8": (0.05, -7, torch.int8)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rounded(x: Tensor, grid: tuple[Any, ...]) -> Tensor:
    """In float64, so that no border between two codes moves."""
    scale, zero, dtype = grid
    info = torch.iinfo(dtype)
    return ((x.double() / scale).round() + zero).clamp(info.min, info.max)


def check(codes: Tensor, x: Tensor, grid: tuple[Any, ...]) -> None:
    """Float32 puts a number on the other side of a border now and then: that is one step."""
    assert codes.dtype is grid[2]
    assert codes.is_contiguous()
    difference = (codes.double() - rounded(x, grid)).abs()
    assert difference.max() <= 1
    assert difference.mean() <= (1 / 20 if x.numel() < 1000 else 1e-3)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("way", GRIDS)
def test_rounding(name: str, way: str, instructions: str) -> None:
    grid = GRIDS[way]
    x = 3 * normal(*SHAPES[name])
    factor = normal(x.shape[-1]).abs() + 0.5
    for given in (None, factor):
        by = 1.0 if given is None else given.double()
        check(ROUND_ROWS(x, given, "none", *grid), x.double() * by, grid)
        check(ROUND_ROWS(x, given, "gelu", *grid), F.gelu(x.double()) * by, grid)


def test_gelu_is_that_of_float_far_below_a_step(instructions: str) -> None:
    """A fine grid shows its error: 4e-6 of the value, and 4e-7."""
    x = torch.linspace(-12, 12, 100_001)
    scale = 1e-6
    steps = F.gelu(x.double()) / scale
    for start in (-0.16, -1e-4, 0.0, 0.5, 4.0):
        zero = 128 - round(start / scale)
        near = (steps + zero - 128).abs() < 100
        assert near.any()
        codes = ROUND_ROWS(x[near], None, "gelu", scale, zero, torch.uint8)
        assert ((codes - (steps[near] + zero)).abs() <= 1 + 4 * abs(start)).all()
    assert (ROUND_ROWS(x[x < -9], None, "gelu", 1e-6, 128, torch.uint8) == 128).all()
    ends = torch.tensor([math.inf, -math.inf, 3e38])
    assert ROUND_ROWS(ends, None, "gelu", 0.1, 7, torch.uint8).tolist() == [255, 7, 255]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("keep", [False, True])
def test_norms(name: str, keep: bool, instructions: str) -> None:
    grid = GRIDS["uint8"]
    x, more = 3 * normal(*SHAPES[name]) + 5, normal(*SHAPES[name], seed=1)
    size = x.shape[-1]
    weight, bias, factor = (normal(size, seed=i) for i in range(3))
    for others in ((None, None, None), (weight, None, factor), (weight, bias, None)):
        scale, shift, by = others
        for added in (None, more):
            kept, y, codes = NORM_ROWS(x, added, scale, shift, 1e-5, by, *grid, keep, True)
            whole = x if added is None else x + added
            assert torch.equal(kept, whole if keep and added is not None else torch.empty(0))
            alone = NORM_ROWS(x, added, scale, shift, 1e-5, by, *grid, False, False)
            assert [each.numel() for each in alone] == [0, 0, codes.numel()]
            assert torch.equal(alone[2], codes)
            wide = [None if v is None else v.double() for v in others]
            expected = F.layer_norm(whole.double(), (size,), wide[0], wide[1], 1e-5)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            check(codes, y.double() * (1.0 if by is None else by), grid)


def test_a_row_of_large_or_equal_numbers(instructions: str) -> None:
    """The deviation is that of differences: a mean of a million leaves it as it is."""
    x = 2.0**20 + torch.arange(64.0)[None]
    _, y, _ = NORM_ROWS(x, None, None, None, 1e-5, None, 0.02, 128, torch.uint8, False, True)
    torch.testing.assert_close(y, F.layer_norm(torch.arange(64.0)[None], (64,)))
    _, y, codes = NORM_ROWS(
        torch.full((2, 64), 3.5), None, None, None, 1e-5, None, 0.02, 128, torch.uint8, False, True
    )
    assert not y.any()
    assert (codes == 128).all()


def test_strides_types_and_nothing(instructions: str) -> None:
    grid = GRIDS["uint8"]
    x = normal(4, 6, 5)
    turned = x.transpose(0, 1)
    same = ROUND_ROWS(turned.contiguous(), None, "gelu", *grid)
    assert torch.equal(ROUND_ROWS(turned, None, "gelu", *grid), same)
    apart = torch.stack([x, x], -1)[..., 0]
    for found, expected in zip(
        NORM_ROWS(apart, apart, None, None, 0.1, None, *grid, True, True),
        NORM_ROWS(x, x, None, None, 0.1, None, *grid, True, True),
        strict=True,
    ):
        assert torch.equal(found, expected)
    half = x.to(torch.bfloat16)
    codes = ROUND_ROWS(half, None, "none", *grid)  # which rounds products to bfloat16 too
    assert (codes - rounded(half, grid)).abs().max() <= 1
    kept, y, _ = NORM_ROWS(half, half, None, None, 0.1, None, *grid, True, True)
    assert kept.dtype is y.dtype is torch.bfloat16
    assert ROUND_ROWS(x[:0], None, "none", *grid).shape == (0, 6, 5)
    assert NORM_ROWS(x[..., :0], None, None, None, 0.1, None, *grid, False, True)[1].shape == (
        4,
        6,
        0,
    )


@pytest.mark.skipif(not native.instruction_sets(), reason=f"{native.unavailable()}")
def test_threads_give_the_same(instructions: str) -> None:
    x, weight = normal(500, 333), normal(333)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made = NORM_ROWS(x, x, weight, None, 1e-5, weight, 0.03, 120, torch.uint8, False, True)
            found.append((*made, ROUND_ROWS(x, weight, "gelu", 0.03, 9, torch.uint8)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    x = normal(2, 6)
    with pytest.raises(InvalidConfig, match=r"round_rows: expected factor of \(6,\), got \(5,\)"):
        ROUND_ROWS(x, x[0, :5], "none", *GRIDS["uint8"])
    with pytest.raises(InvalidConfig, match="expected none or gelu, got 'relu'"):
        ROUND_ROWS(x, None, "relu", *GRIDS["uint8"])
    with pytest.raises(InvalidConfig, match=r"expected codes of 8 bits, got torch\.int16"):
        ROUND_ROWS(x, None, "none", 0.1, 0, torch.int16)
    with pytest.raises(InvalidConfig, match="expected x and more of one shape"):
        NORM_ROWS(x, x[:1], None, None, 0.1, None, *GRIDS["uint8"], False, True)
    with pytest.raises(InvalidConfig, match=r"norm_rows: expected weight of \(6,\)"):
        NORM_ROWS(x, None, x, None, 0.1, None, *GRIDS["uint8"], False, True)


WITHOUT = """
import test_row_kernels as tests
from torch_quant import native
assert native.unavailable()
for name in tests.SHAPES:
    tests.test_rounding(name, "uint8", "none")
    tests.test_norms(name, True, "none")
tests.test_strides_types_and_nothing("none")
"""
"""For ``test_library``."""
