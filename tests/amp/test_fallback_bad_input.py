"""Bad input of ``amp``, ``sensitivity`` and ``fallback``: what the errors say; nothing changes."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amp_proxies import analysed
from flows import calibrated, run
from models import MODELS, example, normal, seeded
from torch import Tensor, nn

from torch_quant import InvalidConfig, NotCalibrated, QuantError, Quantizer
from torch_quant.amp.proxy import Latency


def test_amp_before_calib() -> None:
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\) returns"):
        Quantizer("reference").amp(MODELS["mlp"]())
    model, quantizer = MODELS["mlp"](), Quantizer("reference")
    quantizer.calib(model, example_inputs=example("mlp", 2))
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\) returns"):
        quantizer.amp(model)


def test_amp_of_what_is_no_float_model() -> None:
    model, quantizer, amp_model = analysed()
    for proxy in (amp_model, quantizer.calib(model), quantizer.quantize(model)):
        with pytest.raises(InvalidConfig, match="this is a proxy"):
            quantizer.amp(proxy)
    with pytest.raises(InvalidConfig, match=r"expected an nn\.Module, got str"):
        quantizer.amp("model")  # type: ignore[arg-type]
    with pytest.raises(NotCalibrated, match="not the one that was calibrated"):
        quantizer.amp(MODELS["small_cnn"]())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "psnr"}, r"unknown metric 'psnr'; expected \"output\" or \"sqnr\""),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"metric": "sqnr", "loss_fn": lambda y, x: y.sum()}, "drop one"),
    ],
    ids=["psnr", "loss", "loss_fn and sqnr"],
)
def test_amp_options(options: dict[str, Any], message: str) -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 8), {})], backend="reference")
    with pytest.raises(InvalidConfig, match=message):
        quantizer.amp(model, **options)


def test_a_model_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = MODELS["mlp"]()
    inputs = [(example("mlp", 8), {})]
    quantizer = calibrated(model, inputs, backend="reference")
    with pytest.raises(InvalidConfig, match=r"'0\.weight' was made under torch\.inference_mode"):
        quantizer.amp(model)
    local = quantizer.amp(model, metric="sqnr")  # takes no gradient
    local(*example("mlp", 8))
    assert len(quantizer.sensitivity(local)) == 3
    copied = copy.deepcopy(model)  # as the message says
    other = calibrated(copied, inputs, backend="reference").amp(copied)
    other(*example("mlp", 8))
    assert other.metric == "output"


def test_a_proxy_that_saw_no_data() -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 8), {})], backend="reference")
    amp_model = quantizer.amp(model)
    for use in (quantizer.sensitivity, lambda proxy: quantizer.fallback(proxy, 1)):
        with pytest.raises(NotCalibrated, match="no data was run through the AMP proxy"):
            use(amp_model)


def of_another_quantizer(model: nn.Module, quantizer: Quantizer) -> Any:
    other = calibrated(model, [(example("mlp", 8), {})], backend="reference")
    proxy = other.amp(model)
    proxy(*example("mlp", 8))
    return proxy


def of_another_model(model: nn.Module, quantizer: Quantizer) -> Any:
    _, _, proxy = (found := analysed())
    proxy.keep = found  # type: ignore[assignment]  # or its model is deleted
    return proxy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_another_quantizer, "of another model or another quantizer"),
        (of_another_model, "of another model or another quantizer"),
        (lambda model, quantizer: quantizer.calib(model), "got CalibModel"),
        (lambda model, quantizer: model, "got Sequential"),
        (lambda model, quantizer: quantizer.quantize(model), "got a quantized model"),
    ],
    ids=["quantizer", "model", "calib proxy", "float model", "quantized model"],
)
def test_a_proxy_of_something_else(make: Callable[..., Any], message: str) -> None:
    model, quantizer, _ = analysed()
    proxy = make(model, quantizer)
    with pytest.raises(InvalidConfig, match=message):
        quantizer.sensitivity(proxy)
    with pytest.raises(InvalidConfig, match=message):
        quantizer.fallback(proxy, 1)
    assert quantizer.fallen_back == {}


def test_a_proxy_of_a_model_that_was_deleted() -> None:
    model, quantizer, amp_model = analysed()
    del model
    gc.collect()
    with pytest.raises(InvalidConfig, match="was deleted; keep a reference"):
        quantizer.sensitivity(amp_model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes one of num=, min_sqnr= and max_slowdown=; 0 were given"),
        ({"num": 1, "min_sqnr": 30.0}, "2 were given"),
        ({"num": 0, "max_slowdown": 0.0}, "2 were given"),
        ({"num": -1}, "num=-1; expected a count of layers, 0 or more"),
        ({"num": 1.5}, r"num=1\.5; expected a count"),
        ({"num": True}, "num=True; expected a count"),
        ({"min_sqnr": math.nan}, "min_sqnr=nan; expected decibels"),
        ({"min_sqnr": math.inf}, "min_sqnr=inf; expected decibels"),
        ({"min_sqnr": "x"}, "min_sqnr='x'; expected decibels"),
        ({"min_sqnr": True}, "min_sqnr=True; expected decibels"),
        ({"max_slowdown": "0.1"}, r"max_slowdown='0\.1'; expected 0 or more"),
        ({"max_slowdown": -0.1}, r"max_slowdown=-0\.1; expected 0 or more"),
        ({"max_slowdown": math.nan}, "max_slowdown=nan; expected 0 or more"),
        ({"max_slowdown": 0.1, "latency": {"0": Latency()}}, "latency has no time for [24], [24]"),
        ({"num": 1, "dtype": torch.float16}, r"torch\.float16; expected torch\.float32 or"),
        ({"num": 1, "dtype": torch.int8}, r"torch\.int8; expected torch\.float32 or"),
    ],
    ids=lambda value: " ".join(map(str, value)) or "none" if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_change_nothing(arguments: dict[str, Any], message: str) -> None:
    _, quantizer, amp_model = analysed()
    with pytest.raises(InvalidConfig, match=message):
        quantizer.fallback(amp_model, **arguments)
    assert quantizer.fallen_back == {}


@pytest.mark.parametrize("measure", [[4], [-1], [0, 99]], ids=str)
def test_counts_out_of_range(measure: list[int]) -> None:
    _, quantizer, amp_model = analysed()
    with pytest.raises(
        InvalidConfig, match=r"measure=.*; expected (counts from 0 to 3|a count of layers)"
    ):
        quantizer.sensitivity(amp_model, measure=measure)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clean, self.bad = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.clean(x), self.bad(y)


@pytest.mark.parametrize("metric", ["output", "sqnr"])
@pytest.mark.parametrize("place", ["weight", "input"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_is_named(place: str, value: float, metric: str) -> None:
    model, inputs = seeded(TwoInputs), (normal(8, 16), normal(8, 16, salt=1))
    quantizer = calibrated(model, [(inputs, {})], backend="reference")
    amp_model = quantizer.amp(model, metric=metric)
    if place == "weight":
        model.bad.weight[1, 2] = value
    else:
        inputs[1][1, 2] = value
    with pytest.raises(QuantError, match=r"(?<!\w)bad\b") as caught:
        run(amp_model, (inputs, {}))
    assert "clean" not in str(caught.value)
    assert amp_model.recorder.batches == 0
