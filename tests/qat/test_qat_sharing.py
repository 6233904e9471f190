"""What was trained is deployed where several sites read one weight, and where scales are met."""

from __future__ import annotations

import pytest
import torch
from models import normal, tokens
from qat_training import calibrated, quiet, steps
from torch import Tensor, nn

from torch_quant import PerToken, QConfig, QuantSpec, recipes

pytestmark = pytest.mark.usefixtures("grad")

METHODS = ("lsq", "fixed")


class Repeated(nn.Module):
    """One block runs three times, a convolution twice, one layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.again = self.block[0]
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.block(x)
        image = self.conv(self.again(x).reshape(-1, 1, 4, 4)).relu()
        return self.head(self.conv(image).flatten(1))


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_that_run_several_times(method: str, backend: str) -> None:
    """GPTQ would choose other scales for each call; trained ones serve them all."""
    quantizer, model, inputs = calibrated(
        Repeated(), normal(32, 6), qconfig=recipes.int8_static(method="gptq"), backend=backend
    )
    qat_model = quantizer.qat(model, method)
    for _ in range(2):
        expected = quiet(qat_model, inputs)
        deployed = quantizer.quantize(qat_model, backend="reference")
        assert torch.equal(quiet(deployed, inputs), expected)
        scale = qat_model.block[0].weight_scale
        assert torch.equal(deployed.block[0].weight_scale, scale.detach())
        steps(quantizer, qat_model, inputs, 3)


class Tied(nn.Module):
    """A table that is read as a head, too; each layer is a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)).relu())


def test_a_weight_that_graphs_share() -> None:
    config = QConfig(weight=QuantSpec.of("int4", symmetric=True, per_channel=True))
    quantizer, model, inputs = calibrated(
        Tied(), tokens(4, 6, 40), qconfig=config, capture=["table", "body", "head"]
    )
    qat_model = quantizer.qat(model, edge_bits=None)
    assert {"table", "head"} <= set(qat_model.plan.quantized)
    steps(quantizer, qat_model, inputs, 5)
    deployed = quantizer.quantize(qat_model)
    assert torch.equal(quiet(deployed, inputs), quiet(qat_model, inputs))


@pytest.mark.parametrize("method", METHODS)
def test_activations_with_a_scale_for_each_token(method: str) -> None:
    """There is nothing to learn of those; beside them are some with scales that are learned."""
    met = QuantSpec.of("uint8", granularity=PerToken(), dynamic=True)
    weight = QuantSpec.of("int4", symmetric=True, per_channel=True)
    quantizer, model, inputs = calibrated(
        nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)),
        normal(32, 6),
        qconfig=QConfig(weight=weight),
        overrides={"2": QConfig(input=met, weight=weight)},
    )
    qat_model = quantizer.qat(model, method)
    steps(quantizer, qat_model, inputs, 3)
    deployed = quantizer.quantize(qat_model)
    assert torch.equal(quiet(deployed, inputs), quiet(qat_model, inputs))
    assert deployed.plan["2"].activation == met
