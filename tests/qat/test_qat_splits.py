"""Training behind OutlierSplit: layers that are called twice, or in several kinds of calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_quant import InvalidConfig, OutlierSplit, QConfig, Quantizer

pytestmark = pytest.mark.usefixtures("grad")

SPLIT = QConfig(transforms=[OutlierSplit(0.05)])


class Twins(nn.Module):
    """One layer is called twice; behind its first call, one of 512 channels is far larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 512)
        self.down, self.other = nn.Linear(512, 32), nn.Linear(512, 32)
        with torch.no_grad():
            self.up.weight[5] *= 12

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        second = functional.layer_norm(self.up(self.norm(y)), (512,))
        found: Tensor = self.down(functional.gelu(self.up(self.norm(x)))) + self.other(second)
        return found


class Kinds(nn.Module):
    """One kind of call returns what lies between as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(32, 512), nn.Linear(512, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.up.weight[5] *= 20

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        inside = functional.gelu(self.up(x))
        y: Tensor = self.head(x + self.down(inside))
        return (y, inside) if hidden else y


def data(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, 32, generator=torch.Generator().manual_seed(seed))


def train(qat_model: nn.Module, *inputs: Tensor) -> None:
    optimizer = torch.optim.SGD(qat_model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        qat_model(*inputs).square().mean().backward()
        optimizer.step()
    qat_model.eval()


@pytest.mark.newest("IPEX warns where a layer norm is trained")
@pytest.mark.parametrize("config", [None, SPLIT], ids=["default", "asked"])
def test_a_layer_called_twice(config: QConfig | None) -> None:
    model, x = Twins().eval(), (data(32), data(32, 1))
    quantizer = Quantizer("reference", qconfig=config)
    quantizer.calib(model)(*x)
    weights = quantizer.quantize(model).state_dict()
    assert weights["up.weight"].shape[0] == 512
    split = weights["down.weight"].shape != (32, 512)
    assert split == (config is SPLIT)
    qat_model = quantizer.qat(model)
    train(qat_model, *x)
    assert torch.equal(quantizer.quantize(qat_model)(*x), qat_model(*x))


@pytest.mark.parametrize("hidden_first", [True, False])
def test_kinds_of_calls_that_were_calibrated(hidden_first: bool) -> None:
    model = Kinds().eval()
    quantizer = Quantizer("reference", qconfig=SPLIT)
    for hidden in (hidden_first, not hidden_first):
        quantizer.calib(model)(data(32), hidden=hidden)
    qat_model = quantizer.qat(model)
    train(qat_model, data(8))
    assert torch.equal(qat_model(data(4), hidden=True)[0], qat_model(data(4)))
    deployed = quantizer.quantize(qat_model)
    assert torch.equal(deployed(data(4)), qat_model(data(4)))
    assert torch.equal(deployed(data(4), hidden=True)[1], qat_model(data(4), hidden=True)[1])


def test_a_kind_of_call_that_comes_later_is_refused() -> None:
    model = Kinds().eval()
    quantizer = Quantizer("reference", qconfig=SPLIT)
    quantizer.calib(model)(data(32))
    qat_model = quantizer.qat(model)
    before = qat_model(data(4))
    with pytest.raises(InvalidConfig, match=r"^up: .*544 rows.*512 here.*calibrate with"):
        qat_model(data(4), hidden=True)
    assert torch.equal(qat_model(data(4)), before)
