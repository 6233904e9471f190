"""Root mean square norms in one pass, against float64 and the single operators."""

from __future__ import annotations

import pytest
import torch
from processor import without_kernels
from torch import Tensor

from torch_quant import InvalidConfig
from torch_quant.native.rms_norm import ADD_RMS_NORM, RMS_NORM

SHAPES = [(1, 1), (3, 5), (2, 3, 16), (4, 37), (50,), (1, 1, 576), (300, 129), (0, 8), (2, 0)]
NEAR = 4e-7
"""Of each number: the root is rounded once, and so are two products."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def exact(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    x = x.double()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight.double() + offset)


def check(y: Tensor, wanted: Tensor, near: float = NEAR) -> None:
    assert y.shape == wanted.shape
    assert y.is_contiguous()
    assert ((y.double() - wanted).abs() <= near * wanted.abs() + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(shape: tuple[int, ...], offset: float, instructions: str) -> None:
    x, weight = 3 * normal(*shape), normal(shape[-1]) + 2
    check(RMS_NORM(x, weight, 1e-6, offset), exact(x, weight, 1e-6, offset))
    check(RMS_NORM(x, None, 1e-6, 0.0), exact(x, None, 1e-6, 0.0))
    more = normal(*shape, seed=1)
    total, y = ADD_RMS_NORM(x, more, weight, 1e-6, offset)
    assert torch.equal(total, x + more)
    check(y, exact(total, weight, 1e-6, offset))


def test_any_strides(instructions: str) -> None:
    weight = normal(12)[::2]
    for x in (normal(6, 5).t(), normal(4, 12)[:, ::2], normal(1, 6).expand(3, 6)):
        check(RMS_NORM(x, weight, 1e-5, 0.0), exact(x, weight, 1e-5, 0.0))
        total, y = ADD_RMS_NORM(x, x, weight, 1e-5, 0.0)
        assert torch.equal(total, x + x)
        check(y, exact(total, weight, 1e-5, 0.0))
    negative = torch.complex(normal(3, 6), normal(3, 6)).conj().imag
    assert negative.is_neg()
    check(RMS_NORM(negative, weight, 1e-5, 0.0), exact(negative, weight, 1e-5, 0.0))


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1.0, 1e4, 1e15])
def test_large_and_small_numbers(size: float, instructions: str) -> None:
    x, weight = size * normal(5, 77), normal(77)
    check(RMS_NORM(x, weight, 1e-6, 0.0), exact(x, weight, 1e-6, 0.0))


def test_what_is_not_finite(instructions: str) -> None:
    """As the operators have it: NaN spreads over its row, and squares overflow to infinity."""
    x = normal(7, 20)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    x[3], x[4] = 0.0, 3e30
    weight = normal(20)
    wanted = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    y = RMS_NORM(x, weight, 1e-6, 0.0)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=0.0, equal_nan=True)
    assert not y[4].any()
    assert RMS_NORM(torch.zeros(1, 8), None, 0.0, 0.0).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_what_operators_make(dtype: torch.dtype) -> None:
    x = normal(3, 40).to(dtype)
    for weight in (normal(40), normal(40).to(dtype)):
        real = x.float()
        real = (real * torch.rsqrt(real.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        y = RMS_NORM(x, weight, 1e-6, 0.0)
        assert torch.equal(y, weight * real)
        total, y = ADD_RMS_NORM(x, x, weight, 1e-6, 0.0)
        assert total.dtype is dtype
        assert torch.equal(total, x + x)
        assert torch.equal(y, RMS_NORM(total, weight, 1e-6, 0.0))


WITHOUT = """
from test_rms_norm_kernels import *
x, weight = normal(3, 40), normal(40)
check(RMS_NORM(x, weight, 1e-6, 1.0), exact(x, weight, 1e-6, 1.0), 1e-6)
total, y = ADD_RMS_NORM(x, x, weight, 1e-6, 0.0)
assert torch.equal(total, x + x)
check(y, exact(total, weight, 1e-6, 0.0), 1e-6)
"""


@pytest.mark.long("tests/native/test_library.py does the same with others")
def test_without_the_library_they_give_the_same() -> None:
    without_kernels(WITHOUT, __file__)


def test_what_does_not_fit_is_said() -> None:
    x = normal(3, 8)
    with pytest.raises(InvalidConfig, match=r"rms_norm: expected a weight of \(8,\), got \(7,\)"):
        RMS_NORM(x, normal(7), 1e-6, 0.0)
    with pytest.raises(InvalidConfig, match=r"add_rms_norm: expected x and more of one shape"):
        ADD_RMS_NORM(x, normal(1, 8), None, 1e-6, 0.0)
    with pytest.raises(InvalidConfig, match="rms_norm: expected floats"):
        RMS_NORM(torch.ones(3, dtype=torch.int64), None, 1e-6, 0.0)
