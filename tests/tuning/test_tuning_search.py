"""The search for the fewest layers in float, steered by metrics made up for it."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from flows import BACKENDS
from made_up_metrics import LAYERS, Metric, needing, ready
from models import normal
from torch import Tensor, nn

from torch_quant import tune
from torch_quant.amp.proxy import AmpModel
from torch_quant.report.tuning import Trial, Tuning


@pytest.mark.parametrize("needed", range(LAYERS))
def test_the_fewest_layers_that_will_do(needed: int) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, needing(needed))
    quant_model = tune(quantizer, model, metric, progress=False)
    assert len(quantizer.fallen_back) == needed
    assert len(metric.asked) <= 2 + math.ceil(math.log2(LAYERS))
    assert len(set(metric.asked)) == len(metric.asked)
    report = quantizer.tuning
    assert report is not None
    assert report.reached
    assert report.best.in_float == needed
    amp_model = quantizer.amp(model)
    amp_model(normal(4, 16))
    worst = quantizer.sensitivity(amp_model).names[:needed]
    assert list(quantizer.fallen_back) == worst
    assert torch.equal(quantizer.quantize(model)(normal(3, 16)), quant_model(normal(3, 16)))


def test_a_layer_called_0_is_no_count() -> None:
    report = Tuning(target=0.9, groups=2, names=("0",), trials=[Trial(1, 1.0, True, 0.1)])
    assert str(report).endswith("layers in float, by name: '0'")


def test_a_target_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: 1.0 if count is None else 0.5 + 0.01 * count)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quant_model = tune(quantizer, model, metric, progress=False)
    report = quantizer.tuning
    assert report is not None
    assert not report.reached
    assert "tuning did not reach its target" in caplog.text
    assert "NOT reached" in str(report)
    best = max(count for count in metric.asked if count is not None)
    assert report.best.in_float == len(quantizer.fallen_back) == best
    assert torch.equal(quantizer.quantize(model)(normal(3, 16)), quant_model(normal(3, 16)))


@pytest.mark.parametrize(
    ("options", "trials", "reason"),
    [
        ({"max_trials": 2}, 2, "max_trials=2"),
        ({"max_trials": 3}, 3, "max_trials=3"),
        ({"timeout": 0.0}, 2, "timeout=0 s"),
        ({"timeout": 1e6, "max_trials": 99}, 5, ""),
    ],
    ids=["2 trials", "3 trials", "no time", "enough"],
)
def test_a_search_that_is_cut_short(options: dict[str, Any], trials: int, reason: str) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, needing(2))
    tune(quantizer, model, metric, progress=False, **options)
    report = quantizer.tuning
    assert report is not None
    assert len(metric.asked) == len(report.trials) == trials
    assert report.stopped == reason
    assert (f"stopped early: {reason}" in str(report)) == bool(reason)
    # What was tried and passed is kept, be it not the fewest.
    passed = [t.in_float for t in report.quantized if t.passed]
    assert len(quantizer.fallen_back) == (min(passed) if passed else 0)


def test_lower_is_better() -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: 2.0 if count is None or count >= 3 else 3.0)
    tune(quantizer, model, metric, 0.1, higher_is_better=False, progress=False)
    assert len(quantizer.fallen_back) == 3
    assert quantizer.tuning is not None
    assert quantizer.tuning.target == pytest.approx(2.2)
    assert "metric <= 2.2" in str(quantizer.tuning)


def test_lower_is_better_and_out_of_reach() -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: 1.0 if count is None else 9.0 - count)
    tune(quantizer, model, metric, higher_is_better=False, progress=False)
    assert len(quantizer.fallen_back) == max(c for c in metric.asked if c is not None)
    assert quantizer.tuning is not None
    assert not quantizer.tuning.reached


@pytest.mark.parametrize(
    ("exact", "tolerance", "relative", "higher", "target"),
    [
        (0.8, 0.01, True, True, 0.792),
        (0.8, 0.01, False, True, 0.79),
        (-10.0, 0.1, True, True, -11.0),
        (-10.0, 0.1, True, False, -9.0),
        (4.0, 0.5, False, False, 4.5),
        (0.8, 0.0, True, True, 0.8),
    ],
)
def test_the_target(
    exact: float, tolerance: float, relative: bool, higher: bool, target: float
) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: exact)
    tune(quantizer, model, metric, tolerance, relative, higher_is_better=higher, progress=False)
    assert quantizer.tuning is not None
    assert quantizer.tuning.target == pytest.approx(target)
    assert quantizer.fallen_back == {}
    assert metric.asked == [None, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fallback_in_bfloat16(backend: str) -> None:
    model, quantizer = ready(backend)
    metric = Metric(quantizer, needing(2))
    tune(quantizer, model, metric, dtype=torch.bfloat16, progress=False)
    assert list(quantizer.fallen_back.values()) == ["bfloat16"] * 2


@pytest.mark.parametrize("needed", [1, 3], ids=["enough already", "more is needed"])
def test_what_fell_back_before_is_kept(needed: int) -> None:
    model, quantizer = ready()
    amp_model = quantizer.amp(model)
    amp_model(normal(4, 16))
    best = quantizer.sensitivity(amp_model).names[-1]
    quantizer.load_state_dict(quantizer.state_dict() | {"fallback": {best: "bfloat16"}})
    metric = Metric(quantizer, needing(needed))
    tune(quantizer, model, metric, progress=False)
    assert len(quantizer.fallen_back) == needed
    assert quantizer.fallen_back[best] == "bfloat16"
    assert quantizer.tuning is not None
    assert quantizer.tuning.names == tuple(quantizer.fallen_back)
    assert metric.asked[:2] == [None, 1]


def test_everything_fell_back_before() -> None:
    model, quantizer = ready()
    fallen = {str(i): "float32" for i in range(LAYERS)}
    quantizer.load_state_dict(quantizer.state_dict() | {"fallback": fallen})
    metric = Metric(quantizer, needing(0))
    quant_model = tune(quantizer, model, metric, progress=False)
    assert quantizer.fallen_back == fallen
    assert metric.asked == [None, LAYERS]
    torch.testing.assert_close(quant_model(normal(3, 16)), model(normal(3, 16)))


def test_a_metric_may_be_a_tensor_and_may_hide_its_gradients() -> None:
    model, quantizer = ready()
    x = normal(8, 16)
    expected = model(x)

    def error(candidate: nn.Module) -> Tensor:
        with torch.inference_mode():
            return (candidate(x) - expected).square().mean()

    tune(quantizer, model, error, 1.0, relative=False, higher_is_better=False, progress=False)
    assert quantizer.tuning is not None
    assert quantizer.tuning.trials[0].metric == 0.0
    assert quantizer.tuning.reached


def test_it_ranks_on_the_first_batches_only() -> None:
    model, quantizer = ready()
    seen: list[AmpModel] = []

    def metric(candidate: nn.Module) -> float:
        for _ in range(5):
            candidate(normal(4, 16))
        if isinstance(candidate, AmpModel):
            seen.append(candidate)
        return 1.0

    tune(quantizer, model, metric, amp_batches=2, progress=False)
    (amp_model,) = seen
    assert amp_model.recorder.batches == 2


def test_it_is_silent_if_asked_to(capfd: pytest.CaptureFixture[str]) -> None:
    model, quantizer = ready()
    tune(quantizer, model, Metric(quantizer, needing(1)), progress=False)
    assert capfd.readouterr() == ("", "")
