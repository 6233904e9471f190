"""The log of ``tune``, and trials of several models at a time."""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from autotuned import agreement, bits, finite, tuned
from flows import calibrated
from made_up_metrics import LAYERS, Metric, needing, ready
from models import normal, seeded
from torch import nn

from torch_quant import Backend, InvalidConfig, QConfig, Quantizer, QuantSpec, tune
from torch_quant.report.tuning import Tuning


class Killed(Exception):
    pass


def report_of(quantizer: Quantizer) -> Tuning:
    assert quantizer.tuning is not None
    return quantizer.tuning


def verdicts(quantizer: Quantizer) -> list[tuple[int | None, float, bool]]:
    return [(x.in_float, x.metric, x.passed) for x in report_of(quantizer).trials]


@pytest.mark.parametrize("killed", [2, 3, 4])
def test_a_killed_search_goes_on(killed: int, tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    model, expected = ready()
    best = tune(expected, model, Metric(expected, needing(3)), progress=False)
    model, quantizer = ready()
    metric = Metric(quantizer, needing(3))
    asked = metric.asked

    def value(count: int | None) -> float:
        if len(asked) == killed:
            raise Killed
        return needing(3)(count)

    metric.value = value
    with pytest.raises(Killed):
        tune(quantizer, model, metric, log=log, progress=False)
    with log.open("a") as file:
        file.write('{"of": "{')
    model, other = ready()  # calibrated in another process, on the same data
    again = Metric(other, needing(3))
    quant_model = tune(other, model, again, log=log, progress=False)
    assert asked[: killed - 1] + again.asked == [x for x, _, _ in verdicts(expected)]
    assert verdicts(other) == verdicts(expected)
    assert other.fallen_back == expected.fallen_back
    x = normal(3, 16)
    assert torch.equal(quant_model(x), best(x))
    tune(other, model, again, log=log, progress=False)  # it has fallen back by now: another search
    assert again.asked[-1] is None  # and these three in float were tried
    assert [x.in_float for x in report_of(other).trials] == [None, 0]


def test_a_log_is_lines_of_json(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    model, quantizer = ready()
    tune(quantizer, model, Metric(quantizer, needing(0)), log=log, progress=False)
    head, floating, quantized = map(json.loads, log.read_text().splitlines())
    assert set(head) == {"torch_quant", "model", "quantizer", "eval_fn"}
    assert sorted(floating) == ["groups", "metric", "of", "seconds"]
    assert len(floating["groups"]) == LAYERS
    assert sorted(quantized) == ["metric", "of", "seconds"]


@pytest.mark.parametrize(
    "options", [{"metric": "sqnr"}, {"amp_batches": 1}, {"dtype": torch.bfloat16}], ids=str
)
def test_other_rankings_and_fallbacks_are_other_trials(
    options: dict[str, Any], tmp_path: Path
) -> None:
    log = tmp_path / "trials.jsonl"
    model, quantizer = ready()
    metric = Metric(quantizer, needing(2))
    tune(quantizer, model, metric, log=log, progress=False)
    quantizer.reset_fallback()
    count = len(metric.asked)
    tune(quantizer, model, metric, log=log, progress=False, **options)
    assert metric.asked[count:]
    assert set(quantizer.fallen_back.values()) == {"bfloat16" if "dtype" in options else "float32"}


def test_logs_of_something_else(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    model, quantizer = ready()
    tune(quantizer, model, finite_chain, log=log, progress=False)
    said = r"is the log of a run with another {}; give another file, or remove it"
    other = calibrated(model, [((3.0 * normal(16, 16),), {})], backend="reference")
    with pytest.raises(InvalidConfig, match=said.format("quantizer")):
        tune(other, model, finite_chain, log=log, progress=False)
    four = QConfig(weight=QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True))
    other = calibrated(model, [((normal(16, 16),), {})], backend="reference", qconfig=four)
    with pytest.raises(InvalidConfig, match=said.format("quantizer")):
        tune(other, model, finite_chain, log=log, progress=False)
    quantizer.reset_fallback()
    with pytest.raises(InvalidConfig, match=said.format("eval_fn")):
        tune(quantizer, model, lambda _: 1.0, log=log, progress=False)
    with pytest.raises(InvalidConfig, match="there is no folder"):
        tune(quantizer, model, finite_chain, log=tmp_path / "no" / "t.jsonl", progress=False)
    log.unlink()
    tuned("mlp", {"8": bits(8)}, eval_fn=finite, log=log)
    with pytest.raises(InvalidConfig, match="is no log of tune; give another file"):
        tune(quantizer, model, finite, log=log, progress=False)


@pytest.mark.skipif(bool(Backend.ONEDNN.unavailable()), reason="needs another backend")
def test_a_log_of_another_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment chooses it; the quantizer's settings are the same."""
    log = tmp_path / "trials.jsonl"
    model, quantizer = ready("onednn")
    tune(quantizer, model, finite_chain, log=log, progress=False)
    monkeypatch.setenv("TORCH_QUANT_BACKEND", "reference")
    model, other = ready("onednn")
    assert other.to_config() == quantizer.to_config()
    with pytest.raises(InvalidConfig, match="is the log of a run with another quantizer"):
        tune(other, model, finite_chain, log=log, progress=False)


def test_trials_of_a_log_count(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    model, quantizer = ready()
    metric = Metric(quantizer, needing(4))
    for _ in range(2):
        quantizer.reset_fallback()
        tune(quantizer, model, metric, log=log, max_trials=3, progress=False)
        assert report_of(quantizer).stopped == "max_trials=3"
        assert len(metric.asked) == len(report_of(quantizer).trials) == 3


def finite_chain(candidate: nn.Module) -> float:
    return float(candidate(normal(4, 16)).isfinite().all())


def deep() -> tuple[nn.Module, Quantizer]:
    """Twelve layers, whose metric is the agreement itself: more in float are nearer."""
    model = seeded(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(12))))
    three = QConfig(weight=QuantSpec.of(bits=3, signed=True, symmetric=True, per_channel=True))
    data = [((normal(16, 16),), {})]
    return model, calibrated(model, data, backend="reference", qconfig=three)


def test_several_at_a_time() -> None:
    model, one = deep()
    metric = agreement(model, normal(32, 16))
    tune(one, model, metric, 0.05, progress=False)
    model, several = deep()
    with ThreadPoolExecutor(3) as executor:
        quant_model = tune(several, model, metric, 0.05, executor=executor, progress=False)
    assert 0 < report_of(one).best.in_float < 12  # type: ignore[operator]
    assert several.fallen_back == one.fallen_back
    assert report_of(several).best.metric == pytest.approx(report_of(one).best.metric, abs=1e-6)
    assert metric(quant_model) == pytest.approx(report_of(several).best.metric, abs=1e-6)
    assert report_of(several).reached
    counts = [x.in_float for x in report_of(several).trials]
    assert len(set(counts)) == len(counts) <= 2 + 3 * math.ceil(math.log(12, 4))


def test_an_executor_and_limits() -> None:
    model, quantizer = deep()
    metric = agreement(model, normal(32, 16))
    with ThreadPoolExecutor(4) as executor:
        options: dict[str, Any] = {"executor": executor, "progress": False}
        tune(quantizer, model, metric, 0.05, max_trials=4, **options)
        assert len(report_of(quantizer).trials) == 4
        quantizer.reset_fallback()
        tune(quantizer, model, metric, 0.05, timeout=0.0, **options)
        assert report_of(quantizer).stopped == "timeout=0 s"
        assert len(report_of(quantizer).trials) == 2


@pytest.mark.long("starts processes")
def test_in_processes() -> None:
    import multiprocessing

    model, quantizer = ready()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        options: dict[str, Any] = {"executor": executor, "progress": False}
        tune(quantizer, model, finite_chain, **options)
        assert report_of(quantizer).reached
        with pytest.raises(InvalidConfig, match="eval_fn cannot be sent to other processes"):
            tune(quantizer, model, lambda _: 1.0, **options)
