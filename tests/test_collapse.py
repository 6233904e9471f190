"""Quantized models whose outputs are mostly noise are told of, and healthy ones are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import Quantizer, recipes, sqnr

Caplog = pytest.LogCaptureFixture


def messages(caplog: Caplog) -> list[str]:
    found = [x.getMessage() for x in caplog.records if x.name == "torch_quant"]
    return [text for text in found if "dB of SQNR" in text]


class Cancels(nn.Module):
    """A layer whose results are large and taken off again, so that their noise is all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.large, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        exact = self.large.weight @ x[..., None]
        noise = self.large(x) - exact.squeeze(-1)
        return self.head(self.first(x) + 1000.0 * (noise - self.large.bias))


def model_of(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def calibrated(model: nn.Module, data: Tensor, backend: str = "reference", **given: Any) -> Any:
    quantizer = Quantizer(backend, **given)
    with torch.no_grad():
        quantizer.calib(model)(data)
    return quantizer


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_a_collapse_is_told_with_the_site_and_the_cure_works(backend: str, caplog: Caplog) -> None:
    model, data = model_of(Cancels), torch.randn(32, 16)
    quantizer = calibrated(model, data, backend, overrides={"op:matmul": None})
    quant_model = quantizer.quantize(model)
    (text,) = messages(caplog)
    assert sqnr(model(data), quant_model(data)) < 10
    assert "most of the noise from large" in text
    assert "quantizer.fallback(amp_model, min_sqnr=20)" in text
    amp_model = quantizer.amp(model)
    amp_model(data)
    assert quantizer.fallback(amp_model, min_sqnr=20) == ["large"]
    caplog.clear()
    better = quantizer.quantize(model)
    assert not messages(caplog)
    assert sqnr(model(data), better(data)) > 20


def test_healthy_models_are_not(caplog: Caplog) -> None:
    make = lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))  # noqa: E731
    model, data = model_of(make), torch.randn(32, 16)
    for recipe in (recipes.fast(), recipes.int8_static()):
        calibrated(model, data, qconfig=recipe).quantize(model)
    assert not messages(caplog)


def test_nothing_is_told_of_weights_that_changed_since(caplog: Caplog) -> None:
    model, data = model_of(lambda: nn.Sequential(nn.Linear(16, 8))), torch.randn(32, 16)
    quantizer = calibrated(model, data)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 16))
    quantizer.quantize(model)
    assert not messages(caplog)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.randn_like(x[:, :1])


def test_random_numbers_are_neither_drawn_nor_compared(caplog: Caplog) -> None:
    model, data = model_of(Draws), torch.randn(32, 16)
    quantizer = calibrated(model, data)
    before = torch.get_rng_state()
    quantizer.quantize(model)
    assert torch.equal(before, torch.get_rng_state())
    assert not messages(caplog)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x * 1.0)
        x.zero_()
        return y


def test_inputs_are_kept_as_they_were(caplog: Caplog) -> None:
    model, data = model_of(Overwrites), torch.randn(32, 16)
    quantizer = calibrated(model, data)
    assert not data.any()
    data.fill_(7.0)
    quantizer.quantize(model)
    assert (data == 7.0).all()
    assert not messages(caplog)


def test_what_is_large_is_not_kept() -> None:
    model = model_of(lambda: nn.Sequential(nn.Linear(16, 8)))
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(torch.randn(4, 16))
    assert calib_model.captured.sample is not None
    calib_model(torch.randn(200_000, 16))
    assert calib_model.captured.sample is None
