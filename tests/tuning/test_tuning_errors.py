"""What goes wrong in tuning leaves the quantizer as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import calibrated
from made_up_metrics import Metric, needing, ready
from models import normal
from torch import nn

from torch_quant import InvalidConfig, NotCalibrated, Quantizer, tune


def state_of(quantizer: Quantizer) -> Any:
    return dict(quantizer.fallen_back), dict(quantizer.plan), quantizer.tuning


class Broken(Exception):
    pass


def raising(at: int) -> Callable[[int | None], float]:
    calls = [0]

    def value(count: int | None) -> float:
        calls[0] += 1
        if calls[0] == at:
            raise Broken
        return needing(3)(count)

    return value


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_eval_fn_that_raises(at: int) -> None:
    model, quantizer = ready()
    amp_model = quantizer.amp(model)
    amp_model(normal(4, 16))
    quantizer.fallback(amp_model, 1)
    x = normal(3, 16)
    expected = quantizer.quantize(model)(x)
    before = state_of(quantizer)
    with pytest.raises(Broken):
        tune(quantizer, model, Metric(quantizer, raising(at)), progress=False)
    assert state_of(quantizer) == before
    assert torch.equal(quantizer.quantize(model)(x), expected)


@pytest.mark.parametrize("value", [None, "0.9", [], "high"], ids=repr)
@pytest.mark.parametrize("when", ["float", "quantized"])
def test_a_metric_that_is_no_number(value: Any, when: str) -> None:
    model, quantizer = ready()
    before = state_of(quantizer)
    metric = Metric(quantizer, lambda c: value if (c is None) == (when == "float") else 1.0)
    if value == "0.9":
        tune(quantizer, model, metric, progress=False)  # a number, as Python reads it
        return
    with pytest.raises(InvalidConfig, match=r"eval_fn gave .* for .*; expected a number"):
        tune(quantizer, model, metric, progress=False)
    assert state_of(quantizer) == before


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_float_model_without_a_finite_metric(value: float) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: value)
    with pytest.raises(InvalidConfig, match=f"eval_fn gave {value} for the float model"):
        tune(quantizer, model, metric, progress=False)
    assert metric.asked == [None]


def test_a_quantized_model_that_gives_nan_did_not_pass() -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda c: 1.0 if c is None or c >= 2 else math.nan)
    tune(quantizer, model, metric, progress=False)
    assert len(quantizer.fallen_back) == 2
    model, quantizer = ready()
    metric = Metric(quantizer, lambda c: 1.0 if c is None else math.nan if c != 3 else 0.5)
    tune(quantizer, model, metric, progress=False)
    assert quantizer.tuning is not None
    assert not quantizer.tuning.reached
    assert quantizer.tuning.best.metric == 0.5


def test_an_eval_fn_that_never_calls_the_model() -> None:
    model, quantizer = ready()
    before = state_of(quantizer)
    with pytest.raises(NotCalibrated, match="eval_fn never called the model"):
        tune(quantizer, model, lambda candidate: 1.0, progress=False)
    assert state_of(quantizer) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, r"tolerance=-0\.1; expected 0 or more"),
        ({"tolerance": math.nan}, "tolerance=nan"),
        ({"tolerance": math.inf}, "tolerance=inf"),
        ({"max_trials": 1}, "max_trials=1; expected at least 2"),
        ({"metric": "psnr"}, "unknown metric 'psnr'"),
        ({"dtype": torch.float16}, r"torch\.float16; expected torch\.float32 or"),
        ({"executor": 4}, r"executor=4; expected an executor of concurrent\.futures"),
        ({"eval_fn": 0.9}, r"eval_fn=0\.9; expected a function of a model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_cost_no_evaluation(options: dict[str, Any], message: str) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, needing(0))
    with pytest.raises(InvalidConfig, match=message):
        tune(quantizer, model, **{"eval_fn": metric, "progress": False, **options})
    assert metric.asked == []


def test_a_quantizer_that_saw_no_data() -> None:
    model, _ = ready()
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\)"):
        tune(Quantizer("reference"), model, lambda candidate: 1.0, progress=False)
    quantizer = calibrated(model, [((normal(4, 16),), {})], backend="reference")
    with pytest.raises(NotCalibrated, match="not the one that was calibrated"):
        tune(quantizer, nn.Linear(16, 16), lambda candidate: 1.0, progress=False)
