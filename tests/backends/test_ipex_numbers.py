"""A compiler that takes numbers for fixed compiles anew for others."""

from __future__ import annotations

import pytest
from flows import BACKENDS, calibrated
from models import normal
from torch import Tensor, nn

from torch_quant import sqnr
from torch_quant.convert.quantized import quantized_graphs


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor, temperature: float) -> Tensor:
        return self.linear(x) / temperature


@pytest.mark.skipif("ipex" not in BACKENDS, reason="Backend.IPEX: make test-ipex has it")
def test_other_numbers_are_other_kernels() -> None:
    model, x = Tempered(), normal(4, 64)
    quant_model = calibrated(model, [((x, 0.5), {})], backend="ipex").quantize(model)
    for value in (0.5, 2.0, 0.5, *range(3, 12), 0.5):
        expected = model(x, float(value))
        assert sqnr(expected, quant_model(x, float(value))) > 30
    ((_, graph),) = quantized_graphs(quant_model)
    assert len(graph.variants) == 8
