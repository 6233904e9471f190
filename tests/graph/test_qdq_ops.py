from __future__ import annotations

import pytest
import torch
from models import normal
from torch import Tensor

from torch_quant.core.functional import dequantize, quantize
from torch_quant.core.granularity import PerChannel, block_extremes
from torch_quant.core.qparams import choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.ops.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_PER_TENSOR,
    QUANTIZE,
    QUANTIZE_PER_TENSOR,
)

SPECS = [QuantSpec.of(), QuantSpec.of(signed=True), QuantSpec.of(bits=4, symmetric=True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_they_compute_what_the_definition_says(spec: QuantSpec) -> None:
    """Bit for bit: the same float32 arithmetic, the scale as a tensor or as a Python number."""
    x = normal(500) * 3
    qparams = choose_qparams(x.min() * 0.8, x.max() * 0.8, spec)
    codes, real = quantize(x, qparams), dequantize(quantize(x, qparams), qparams)
    grid = (qparams.scale, qparams.zero_point, spec.element.name)
    assert torch.equal(QUANTIZE(x, *grid), codes)
    assert torch.equal(DEQUANTIZE(codes, *grid), real)
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    ends = (spec.quant_min, spec.quant_max)
    assert torch.equal(QUANTIZE_PER_TENSOR(x, scale, zero_point, *ends, spec.dtype), codes)
    assert torch.equal(DEQUANTIZE_PER_TENSOR(codes, scale, zero_point), real)
    faked = FAKE_QUANTIZE(x, *grid)
    assert torch.equal(faked, FAKE_QUANTIZE_PER_TENSOR(x, scale, zero_point, *ends))
    torch.testing.assert_close(faked, real)  # ATen's kernel multiplies by the inverse of the scale


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_per_channel(axis: int, symmetric: bool) -> None:
    x = normal(3, 4, 5)
    spec = QuantSpec.of(signed=True, symmetric=symmetric, granularity=PerChannel(axis))
    qparams = choose_qparams(*block_extremes(x, spec.granularity), spec)
    codes = quantize(x, qparams)
    scale, zero_point = qparams.scale.flatten(), qparams.zero_point.flatten()
    actual = DEQUANTIZE_PER_CHANNEL(codes, scale, zero_point, axis)
    assert torch.equal(actual, dequantize(codes, qparams))


def test_extreme_codes_do_not_wrap() -> None:
    codes = torch.tensor([0, 1, 255], dtype=torch.uint8)
    assert DEQUANTIZE_PER_TENSOR(codes, 1.0, 255).tolist() == [-255.0, -254.0, 0.0]
    last = (torch.tensor(1.0), torch.tensor(255, dtype=torch.int32), "uint8")
    assert DEQUANTIZE(codes, *last).tolist() == [-255.0, -254.0, 0.0]
    signed = torch.tensor([-128, 127], dtype=torch.int8)
    assert DEQUANTIZE_PER_TENSOR(signed, 1.0, 127).tolist() == [-255.0, 0.0]


def test_they_can_be_traced_with_fake_tensors() -> None:
    def run(x: Tensor) -> Tensor:
        codes = QUANTIZE_PER_TENSOR(x, 0.1, 3, 0, 255, torch.uint8)
        x = DEQUANTIZE_PER_TENSOR(codes.transpose(0, 1), 0.1, 3)
        grid = (torch.full((), 0.1), torch.full((), 3, dtype=torch.int32), "uint8")
        return DEQUANTIZE(QUANTIZE(x, *grid), *grid)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    program = torch.export.export(Module(), (normal(2, 3),))
    assert torch.equal(program.module()(normal(2, 3)), run(normal(2, 3)))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_fake_quantize_is_what_pytorch_computes(bits: int) -> None:
    """To the bit, on values of every size, ends and borders among them."""
    spec = QuantSpec.of(bits=bits)
    x = torch.cat([torch.randn(4096) * size for size in (0.01, 1.0, 100.0)])
    for scale in (0.0173, 0.25, 3.1):
        step = torch.tensor(scale)
        x = torch.cat([x, (torch.arange(-300, 300) + 0.5) * step])
        zero_point = torch.tensor(2 ** (bits - 1) - 1, dtype=torch.int32)
        ends = (int(spec.quant_min), int(spec.quant_max))
        expected = torch.fake_quantize_per_tensor_affine(x, step, zero_point, *ends)
        assert torch.equal(FAKE_QUANTIZE(x, step, zero_point, spec.element.name), expected)
