"""Rows of embeddings that are rounded when they are looked up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from torch_quant import (
    GPTQ,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    QuantSpec,
    recipes,
)
from torch_quant.algorithms import DEFAULT_METHOD
from torch_quant.core.functional import dequantize
from torch_quant.core.granularity import Granularity
from torch_quant.rounding.modules import RoundedTable


@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(16)]
    + [PerBlock(size) for size in ((16, 16), (1, 16), (256, 16), (128, 64))],
)
def test_rows_are_those_of_the_whole_table(granularity: Granularity) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.logspace(-2, 2, 256)[:, None]  # so that a wrong scale shows
    weight = nn.Parameter(torch.randn(256, 64, generator=generator) * rows)
    spec = QuantSpec.of("int8", granularity=granularity)
    table = RoundedTable(weight, spec, DEFAULT_METHOD)
    whole = dequantize(*table.rounded())
    for shape in ((32,), (7,), (2, 3), (1,), (16, 1)):
        ids = torch.randint(0, 256, shape, generator=generator)
        assert torch.equal(table.look_up(ids), whole[ids])


class ByName(nn.Module):
    """An embedding that is called by the name of its argument, and equal blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(input=ids)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


@pytest.mark.parametrize("granularity", [PerChannel(0), PerBlock((16, 16))])
def test_an_embedding_that_is_called_by_name(granularity: Granularity) -> None:
    torch.manual_seed(0)
    model = ByName().eval()
    data = [torch.randint(0, 48, (2, 12)) for _ in range(3)]
    weight = QuantSpec.of("int8", granularity=granularity)
    int8 = replace(recipes.int8_weight_only(), weight=weight)
    qconfig = replace(recipes.int4_weight_only(group_size=16), method=GPTQ(match_float=True))
    quantizer = Quantizer("reference", qconfig=qconfig, overrides={"op:embedding": int8})
    for _ in range(2):
        report = quantizer.round_weights(model, data, progress=False)
        assert len(report.blocks) == 2
    quant_model = quantizer.quantize(model)
    assert "tokens" in quantizer.plan.quantized
    assert quant_model(data[0]).shape == (2, 12, 32)
    assert model(data[0]).shape == (2, 12, 32)
