"""Where the default splits: as the other layers are planned, and for good."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_quant import GPTQ, InvalidConfig, OutlierSplit, QConfig, Quantizer, Transform, recipes


class Readers(nn.Module):
    """Two layers read what GELU gives, of whose 512 channels one is far larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.one, self.two = nn.Linear(32, 512), nn.Linear(512, 32), nn.Linear(512, 32)
        with torch.no_grad():
            self.up.weight[5] *= 12

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        inside = functional.gelu(self.up(x))
        y: Tensor = self.one(inside) + self.two(inside)
        return (y, inside) if hidden else y


def data(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, 32, generator=torch.Generator().manual_seed(seed))


def calibrated(model: nn.Module, **options: object) -> Quantizer:
    quantizer = Quantizer("reference", **options)  # type: ignore[arg-type]
    quantizer.calib(model)(data(32))
    return quantizer


def is_split(quantizer: Quantizer, name: str) -> bool:
    transforms: tuple[Transform, ...] = quantizer.plan[name].transforms
    return any(isinstance(each, OutlierSplit) for each in transforms)


@pytest.mark.parametrize(
    ("overrides", "split"),
    [
        ({}, True),
        ({"up": None}, False),
        ({"two": None}, False),
        ({"two": recipes.int8_weight_only()}, False),
        ({"two": recipes.fast()}, False),
        ({"up": recipes.fast()}, True),
    ],
    ids=["all", "computing in float", "reader in float", "weight only", "plain", "computing plain"],
)
def test_the_default_splits_where_layers_compute_it(
    overrides: dict[str, QConfig | None], split: bool
) -> None:
    model = Readers().eval()
    quantizer = calibrated(model, overrides=overrides)
    shapes = {name: x.shape for name, x in quantizer.quantize(model).state_dict().items()}
    assert is_split(quantizer, "one") == split
    assert (shapes["one.weight"] == (32, 520)) == split
    assert (shapes["up.weight"] == (520, 32)) == split


def test_what_falls_back_later_ends_it_and_back_again() -> None:
    model = Readers().eval()
    quantizer = calibrated(model)
    start = quantizer.quantize(model)(data(4))
    quantizer.fallen_back = {"up": "float32"}
    quantizer.quantize(model)
    assert not is_split(quantizer, "one")
    quantizer.fallen_back = {}
    assert torch.equal(quantizer.quantize(model)(data(4)), start)
    assert is_split(quantizer, "one")


def test_a_kind_of_call_that_was_not_calibrated_keeps_them() -> None:
    model = Readers().eval()
    quantizer = calibrated(model)
    quant_model, x = quantizer.quantize(model), data(4, 1)
    assert is_split(quantizer, "one")
    before = quant_model(x)
    assert torch.equal(quant_model(x, hidden=True)[0], before)
    assert torch.equal(quant_model(x), before)


def test_rounded_weights_of_another_split_say_so() -> None:
    model = Readers().eval()
    plain = QConfig(method=GPTQ())
    split = replace(plain, transforms=(OutlierSplit(0.05),))
    quantizer = calibrated(model, qconfig=split)
    quantizer.overrides = dict.fromkeys(("up", "one", "two"), plain)
    quantizer.round_weights(model, [data(8)])
    quantizer.quantize(model)
    quantizer.overrides = {"up": plain}
    with pytest.raises(
        InvalidConfig, match=r"\(512, 32\) when .* \(544, 32\) now, as OutlierSplit"
    ):
        quantizer.quantize(model)
