"""Quantized models whose outputs are mostly noise are told of, and healthy ones are not."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
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


class Collapses(nn.Module):
    """One channel is large, and what it is multiplied by is 0."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(width, width), nn.Linear(width, 4)
        with torch.no_grad():
            self.first.bias[0] = 1e5
            self.head.weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


CALLS: list[int] = []


class Traces(Collapses):
    """Leaves traces of each call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        random.random()
        np.random.rand()
        y = super().forward(self.norm(x))
        self.last = y.detach().mean()
        return y


def test_the_users_code_is_not_called(caplog: Caplog) -> None:
    model, data = model_of(Traces), torch.randn(32, 16)
    model.norm.train()
    hooks: list[Any] = []
    model.register_forward_hook(lambda *given: hooks.append(given))
    quantizer = calibrated(model, data)
    model.last = None
    hooks.clear()
    before = len(CALLS), random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    running = model.norm.running_mean.clone()
    quantizer.quantize(model)
    assert messages(caplog)
    after = len(CALLS), random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    assert torch.equal(running, model.norm.running_mean)
    assert not hooks
    assert model.last is None


def test_hooks_that_raise_do_not_fail_it() -> None:
    model, data = model_of(Collapses), torch.randn(32, 16)

    def refuses(*given: Any) -> None:
        if len(seen) > calls[0]:
            raise RuntimeError("one call too many")
        seen.append(given)

    seen: list[Any] = []
    calls = [1000]
    model.register_forward_pre_hook(refuses)
    quantizer = calibrated(model, data)
    calls[0] = 0
    quantizer.quantize(model)


def test_whatever_is_raised_says_nothing(caplog: Caplog) -> None:
    model, data = model_of(Collapses), torch.randn(32, 16)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(data)
    sample = calib_model.captured.sample
    elsewhere = sample.call.with_tensors((data.to("meta"),))  # as if the model had moved since
    calib_model.captured.sample = replace(sample, call=elsewhere)
    quantizer.quantize(model)
    assert not messages(caplog)


def test_models_in_train_mode_and_changed_weights_are_looked_at(caplog: Caplog) -> None:
    model, data = model_of(Collapses).train(), torch.randn(32, 16)
    quantizer = calibrated(model, data)
    quantizer.quantize(model)
    assert len(messages(caplog)) == 1
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})
    quantizer.quantize(model)
    assert len(messages(caplog)) == 2


def test_a_model_that_is_captured_anew_has_no_sample() -> None:
    model = model_of(Collapses)
    model.mode = "a"
    quantizer = Quantizer("reference")
    captured = quantizer.calib(model).captured
    quantizer.calib(model)(torch.randn(32, 16))
    assert captured.sample is not None
    model.mode = "b"
    quantized = quantizer.quantize(model, example_inputs=torch.randn(2, 3, 16))
    assert captured.sample is None
    assert len(quantized.graphs) == 1


class Thresholds(Collapses):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) > 0).float()


def test_no_site_is_named_where_there_is_no_gradient(caplog: Caplog) -> None:
    model, data = model_of(Thresholds), torch.randn(32, 16)
    calibrated(model, data).quantize(model)
    (text,) = messages(caplog)
    assert "most of the noise" not in text
    assert "ranked by" not in caplog.text


class Wide(nn.Module):
    """Inputs of a few bytes that become many activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rest = nn.Embedding(8, 16), Collapses()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.table(x)).mean(1)


@pytest.mark.parametrize(("length", "named"), [(8, True), (2**17, False)])
def test_sites_are_named_where_that_takes_little_memory(
    length: int, named: bool, caplog: Caplog
) -> None:
    model, data = model_of(Wide), torch.randint(8, (5, length), dtype=torch.int32)
    calibrated(model, data).quantize(model)
    (text,) = messages(caplog)
    assert ("most of the noise" in text) == named


@dataclasses.dataclass
class Result:
    y: Tensor


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4000)

    def forward(self, x: Tensor) -> Result:
        return Result(self.layer(x))


def test_outputs_of_any_class_count() -> None:
    calib_model = Quantizer("reference").calib(model_of(Large))
    calib_model(torch.randn(2000, 4))
    assert calib_model.captured.sample is None
    calib_model(torch.randn(20, 4))
    assert calib_model.captured.sample is not None


def test_a_quantized_model_does_not_keep_the_sample() -> None:
    model = model_of(Collapses)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(torch.randn(32, 16))
    kept = weakref.ref(calib_model.captured.sample)
    quantized = quantizer.quantize(model)
    del quantizer, calib_model
    gc.collect()
    assert kept() is None
    assert quantized(torch.randn(2, 16)).shape == (2, 4)


RUNS: list[int] = []


@torch.library.custom_op("torch_quant_tests::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    """An operator of the user's, which leaves a trace."""
    RUNS.append(1)
    return x.clone()


@counted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Foreign(Collapses):
    def forward(self, x: Tensor) -> Tensor:
        return counted(super().forward(x))


def test_operators_of_others_are_not_run(caplog: Caplog) -> None:
    model, data = model_of(Foreign), torch.randn(32, 16)
    quantizer = calibrated(model, data)
    assert quantizer.calib(model).captured.sample is not None
    before = len(RUNS)
    quantizer.quantize(model)
    assert len(RUNS) == before
    assert not messages(caplog)


class Drops(Collapses):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_dropout_that_is_off_draws_nothing(caplog: Caplog) -> None:
    model, data = model_of(Drops), torch.randn(32, 16)
    calibrated(model, data).quantize(model)
    assert len(messages(caplog)) == 1
