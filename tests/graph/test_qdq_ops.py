from __future__ import annotations

import pytest
import torch
from models import normal
from torch import Tensor

from torch_quant.core.functional import dequantize, quantize
from torch_quant.core.granularity import PerChannel, block_extremes
from torch_quant.core.qparams import choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE

SPECS = [QuantSpec.of(), QuantSpec.of(signed=True), QuantSpec.of(bits=4, symmetric=True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_they_compute_what_the_definition_says(spec: QuantSpec) -> None:
    """Bit for bit: the same float32 arithmetic, the scale as a Python number."""
    x = normal(500) * 3
    qparams = choose_qparams(x.min() * 0.8, x.max() * 0.8, spec)
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    codes = QUANTIZE(x, scale, zero_point, spec.quant_min, spec.quant_max, spec.dtype)
    assert torch.equal(codes, quantize(x, qparams))
    assert torch.equal(DEQUANTIZE(codes, scale, zero_point), dequantize(codes, qparams))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_per_channel(axis: int, symmetric: bool) -> None:
    x = normal(3, 4, 5)
    spec = QuantSpec.of(signed=True, symmetric=symmetric, granularity=PerChannel(axis))
    qparams = choose_qparams(*block_extremes(x, spec.granularity), spec)
    codes = quantize(x, qparams)
    scale, zero_point = qparams.scale.flatten(), qparams.zero_point.flatten()
    actual = DEQUANTIZE_CHANNEL(codes, scale, zero_point, axis)
    assert torch.equal(actual, dequantize(codes, qparams))


def test_extreme_codes_do_not_wrap() -> None:
    codes = torch.tensor([0, 1, 255], dtype=torch.uint8)
    assert DEQUANTIZE(codes, 1.0, 255).tolist() == [-255.0, -254.0, 0.0]
    signed = torch.tensor([-128, 127], dtype=torch.int8)
    assert DEQUANTIZE(signed, 1.0, 127).tolist() == [-255.0, 0.0]


def test_they_can_be_traced_with_fake_tensors() -> None:
    def run(x: Tensor) -> Tensor:
        codes = QUANTIZE(x, 0.1, 3, 0, 255, torch.uint8)
        return DEQUANTIZE(codes.transpose(0, 1), 0.1, 3)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    program = torch.export.export(Module(), (normal(2, 3),))
    assert torch.equal(program.module()(normal(2, 3)), run(normal(2, 3)))
