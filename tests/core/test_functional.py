from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_quant.core import functional
from torch_quant.core.functional import dequantize, fake_quantize, quantize
from torch_quant.core.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    block_extremes,
)
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec


def grid(scale: float, zero_point: int, spec: QuantSpec) -> QParams:
    return QParams(spec, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))


def test_rounding_halves_to_even_and_clamping() -> None:
    qparams = grid(0.5, 3, QuantSpec.of(bits=4))
    x = torch.tensor([0.25, 0.75, -0.25, 1.0, 100.0, -100.0])
    codes = quantize(x, qparams)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [3, 5, 3, 5, 15, 0]
    assert dequantize(codes, qparams).tolist() == [0.0, 1.0, 0.0, 1.0, 6.0, -1.5]


@pytest.mark.parametrize(
    "spec",
    [QuantSpec.of(), QuantSpec.of(signed=True, symmetric=True), QuantSpec.of(bits=4)],
    ids=str,
)
def test_agrees_with_torch(spec: QuantSpec) -> None:
    """torch multiplies with the inverse of the scale: at a tie it may go to the other neighbour."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = torch.randn(1000, generator=generator) * 10 ** float(
            torch.randn(1, generator=generator)
        )
        qparams = choose_qparams(x.min() * 0.9, x.max() * 0.9, spec)
        theirs = torch.fake_quantize_per_tensor_affine(
            x, float(qparams.scale), int(qparams.zero_point), spec.quant_min, spec.quant_max
        )
        steps = (fake_quantize(x, qparams) - theirs).abs() / qparams.scale
        assert float(steps.max()) < 1.001
        assert float((steps > 0.5).float().mean()) < 0.01


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_is_per_tensor_channel_by_channel(axis: int) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec.of(granularity=PerChannel(axis))
    together = fake_quantize(x, choose_qparams(*block_extremes(x, spec.granularity), spec))
    for channel in range(x.shape[axis]):
        part = x.select(axis, channel)
        alone = fake_quantize(part, choose_qparams(part.min(), part.max(), QuantSpec.of()))
        assert torch.equal(together.select(axis, channel), alone)


def test_fake_quantize_is_idempotent() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(x.min(), x.max(), QuantSpec.of(bits=5))
    once = fake_quantize(x, qparams)
    assert torch.equal(fake_quantize(once, qparams), once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    qparams = choose_qparams(x.min(), x.max(), QuantSpec.of())
    result = fake_quantize(x, qparams)
    assert result.dtype == torch.float32
    assert torch.equal(result, fake_quantize(x.float(), qparams))


def test_int16_codes() -> None:
    bias = torch.tensor([1.0, -2.5, 0.0])
    codes = quantize(bias, grid(1e-3, 0, QuantSpec.of("int16")))
    assert codes.dtype == torch.int16
    assert codes.tolist() == [1000, -2500, 0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(8).on(0), PerBlock((2, 8))],
    ids=str,
)  # fmt: skip
def test_a_large_tensor_has_the_codes_of_its_rows(
    granularity: Granularity, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed in parts, the last of them smaller."""
    spec = QuantSpec.of(bits=4, signed=True, symmetric=symmetric, granularity=granularity)
    x = torch.randn(22, 16, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(*block_extremes(x, granularity), spec)
    whole = quantize(x, qparams)
    values = dequantize(whole, qparams)
    monkeypatch.setattr(functional, "_PART", 100)
    codes = quantize(x, qparams)
    assert codes.dtype == whole.dtype
    assert torch.equal(codes, whole)
    assert torch.equal(dequantize(codes, qparams), values)
    assert torch.equal(quantize(x.T.contiguous().T, qparams), whole)
    assert torch.equal(quantize(nn.Parameter(x), qparams), whole)
