"""Taking the worst sites back to float: how many, and which."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from amp_proxies import achieved, analysed
from flows import BACKENDS, assert_unchanged, snapshot
from models import example
from torch import Tensor, nn

from torch_quant import Quantizer, sqnr
from torch_quant.amp.proxy import Latency


def achieved_with(
    names: list[str],
    model: nn.Module,
    quantizer: Quantizer,
    x: tuple[Tensor, ...],
    precision: str = "float32",
) -> float:
    """``achieved`` by another quantizer with the same ranges, and only ``names`` in float."""
    other = Quantizer(quantizer.backend)
    fallen = dict.fromkeys(names, precision)
    other.load_state_dict(quantizer.state_dict() | {"fallback": fallen})
    other.calib(model, example_inputs=x)
    return achieved(model, other, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mlp", "small_cnn", "tiny_transformer"])
def test_the_worst_ones_go_to_float(name: str, backend: str) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    before = snapshot(model)
    ranking = quantizer.sensitivity(amp_model)
    assert quantizer.fallback(amp_model, 2) == ranking.names[:2]
    assert quantizer.fallen_back == dict.fromkeys(ranking.names[:2], "float32")
    planned = quantizer.plan
    quant_model = quantizer.quantize(model)
    assert dict(quantizer.plan) == dict(planned)
    for site in ranking:
        entry = quantizer.plan[site.name]
        assert entry.quantized == (site.name not in ranking.names[:2])
        assert entry.reason == ("" if entry.quantized else "fallen back")
    assert "fallen back" in quantizer.coverage(model).reasons.values()
    again = quantizer.sensitivity(amp_model)
    assert [site.name for site in again if site.fallen_back] == ranking.names[:2]
    assert "in float" in str(again)
    quant_model(*example(name, 3))
    assert_unchanged(model, before)


def test_calls_add_up_until_reset() -> None:
    model, quantizer, amp_model = analysed()
    x = example("mlp", 4)
    names = quantizer.sensitivity(amp_model).names
    all_int8 = quantizer.quantize(model)(*x)
    assert quantizer.fallback(amp_model, 1) == names[:1]
    assert quantizer.fallback(amp_model, 0) == []
    assert quantizer.fallback(amp_model, 1, dtype=torch.bfloat16) == names[1:2]
    assert quantizer.fallen_back == {names[0]: "float32", names[1]: "bfloat16"}
    assert achieved(model, quantizer, x) > sqnr(model(*x), all_int8)
    quantizer.reset_fallback()
    assert quantizer.fallen_back == {}
    assert torch.equal(quantizer.quantize(model)(*x), all_int8)
    assert quantizer.plan.quantized == ("0", "2", "4")


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("small_cnn", "output"),
        ("small_cnn", "sqnr"),
        ("small_cnn", "loss"),
        ("tiny_transformer", "output"),
    ],
)
def test_as_few_as_reach_an_sqnr(name: str, metric: str) -> None:
    options: dict[str, Any] = {"metric": metric}
    if metric == "loss":
        options = {"loss_fn": lambda outputs, batch: outputs.square().mean()}
    model, quantizer, amp_model = analysed(name, **options)
    x = example(name, 16)
    names = quantizer.sensitivity(amp_model).names
    target = max(achieved_with(names[:k], model, quantizer, x) for k in range(3)) + 0.5
    taken = quantizer.fallback(amp_model, min_sqnr=target)
    assert 3 <= len(taken) < len(names)
    assert taken == names[: len(taken)]
    assert achieved(model, quantizer, x) >= target
    assert achieved_with(taken[:-1], model, quantizer, x) < target


def test_a_target_that_int8_reaches_needs_none() -> None:
    model, quantizer, amp_model = analysed()
    assert quantizer.fallback(amp_model, min_sqnr=-10.0) == []
    assert quantizer.fallen_back == {}
    assert achieved(model, quantizer, example("mlp", 16)) >= -10.0


def test_a_target_that_only_float_reaches(caplog: pytest.LogCaptureFixture) -> None:
    _, quantizer, amp_model = analysed()
    with caplog.at_level(logging.WARNING, "torch_quant"):
        taken = quantizer.fallback(amp_model, min_sqnr=200.0)
    assert set(taken) == {"0", "2", "4"}
    assert "min_sqnr=200 dB is reached only with every layer in float" in caplog.text


def test_what_fell_back_before_counts_towards_the_target() -> None:
    model, quantizer, amp_model = analysed("small_cnn")
    x = example("small_cnn", 16)
    target = achieved(model, quantizer, x) + 2.0
    first = quantizer.fallback(amp_model, min_sqnr=target)
    assert first
    assert quantizer.fallback(amp_model, min_sqnr=target) == []
    assert achieved(model, quantizer, x) >= target


def test_a_target_is_checked_in_the_precision_that_is_asked_for() -> None:
    """bfloat16 adds noise of its own, about 50 dB down: it cannot give 60 dB anywhere."""
    model, quantizer, amp_model = analysed()
    names = quantizer.sensitivity(amp_model).names
    x = example("mlp", 16)
    high = achieved_with(names[:2], model, quantizer, x)
    low = achieved_with(names[:2], model, quantizer, x, "bfloat16")
    assert low < high
    quantizer.fallback(amp_model, min_sqnr=(low + high) / 2, dtype=torch.bfloat16)
    assert set(quantizer.fallen_back) == {"0", "2", "4"}


def test_as_good_as_it_gets_within_a_slowdown() -> None:
    """Free ones always, those that cost a second never, whatever the model takes as a whole."""
    _, quantizer, amp_model = analysed("small_cnn")
    ranking = quantizer.sensitivity(amp_model)
    latency = {name: Latency(1e6 + 10.0, 10.0) for name in ranking.names}
    latency[ranking.names[1]] = Latency(10.0, 10.0)
    latency[ranking.names[3]] = Latency(5.0, 10.0)
    taken = quantizer.fallback(amp_model, max_slowdown=0.0, latency=latency)
    assert taken == [ranking.names[1], ranking.names[3]]
    assert quantizer.fallback(amp_model, max_slowdown=0.0, latency=latency) == []
    rest = quantizer.fallback(amp_model, max_slowdown=1e12, latency=latency)
    assert rest == [ranking.names[0], *ranking.names[2:3], *ranking.names[4:]]
    assert len(quantizer.fallen_back) == len(ranking)


def test_measured_times_serve_as_a_table() -> None:
    _, quantizer, amp_model = analysed("mlp")
    taken = quantizer.fallback(amp_model, max_slowdown=1e9, latency=amp_model.measure_latency(2))
    assert set(taken) == {"0", "2", "4"}
    quantizer.reset_fallback()
    assert set(quantizer.fallback(amp_model, max_slowdown=1e9)) == {"0", "2", "4"}
