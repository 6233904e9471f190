"""The cheapest configuration that keeps a metric, against trying all of them."""

from __future__ import annotations

import math
import re
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from autotuned import NETWORKS, agreement, bits, finite, many, tuned
from flows import assert_unchanged, snapshot
from models import mlp, normal, seeded
from thinning import some
from torch import Tensor, nn

from torch_quant import (
    FLOAT,
    AutoRound,
    BiasCorrection,
    InvalidConfig,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    autotune,
    recipes,
)
from torch_quant.convert.quantized import QuantizedModule


@pytest.mark.parametrize("name", some(NETWORKS, "mlp"))
def test_what_trying_all_finds_in_a_third_of_the_evaluations(name: str) -> None:
    configurations = many()
    found = tuned(name, configurations)
    assert found.reached
    assert len({each.size for each in found}) > 12
    assert found.evaluations <= len(configurations) // 3
    build, inputs = NETWORKS[name]
    model = seeded(build)
    metric = agreement(model, inputs(3))
    sizes = []
    for each, configuration in zip(found, configurations.values(), strict=True):
        quantizer = Quantizer("reference", qconfig=configuration)
        calib_model = quantizer.calib(model)
        for salt in (0, 1):
            calib_model(inputs(salt))
        value = metric(quantizer.quantize(model))
        if each.metric is not None:
            assert value == pytest.approx(each.metric, abs=1e-6)
        if value >= found.target:
            sizes.append(each.size)
    assert found.best.size == min(sizes)
    assert metric(found.model) == pytest.approx(found.best.metric, abs=1e-6)
    assert found.quantizer.to_config() == found.best.configuration


def test_several_at_a_time() -> None:
    expected = tuned("mlp", many())
    with ThreadPoolExecutor(3) as executor:
        found = tuned("mlp", many(), executor=executor)
    assert found.best == expected.best or found.best.size == expected.best.size
    assert found.evaluations <= 2 * expected.evaluations


@pytest.mark.long("starts processes")
def test_in_processes(tmp_path: Path) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as executor:
        found = tuned("mlp", {"8": bits(8), "4": bits(4)}, eval_fn=finite, executor=executor)
        assert found.best.name == "4"
        with pytest.raises(InvalidConfig, match="eval_fn cannot be sent to other processes"):
            tuned("mlp", {"8": bits(8)}, eval_fn=lambda _: 1.0, executor=executor)


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    configurations = {"8": bits(8, 8), "8 alone": bits(8), "4 alone": bits(4)}
    found = tuned("mlp", configurations, objective=("size", "latency"), tolerance=1.0, seconds=0.05)
    assert found.front
    assert found.best in found.front
    for each in found.front:
        others = [x for x in found if x.passed and x is not each]
        assert not any(x.size < each.size and x.latency < each.latency for x in others)
    text = str(found)
    assert "target: metric >= 0: reached by" in text
    assert found.best.name in found._repr_html_()
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5_000


def test_recipes_and_everything_that_says_a_configuration() -> None:
    build, inputs = NETWORKS["mlp"]
    model = seeded(build)
    before = snapshot(model)
    given = ["int8_static", "int8_dynamic", bits(8), {"qconfig": {"recipe": "fast"}}]
    given += [Quantizer("reference", qconfig=bits(5, 8)), recipes.weight_only(group_size=16)]
    metric = agreement(model, inputs(3))
    options: dict[str, Any] = {"backend": "reference", "progress": False}
    found = autotune(model, given, [inputs(0)], metric, "size", **options)
    names = [each.name for each in found]
    assert names[:2] == ["int8_static", "int8_dynamic"]
    assert names[3] == "fast"
    assert not any(each.why_not for each in found)
    assert_unchanged(model, before)


def test_gptq_is_given_data() -> None:
    options = {"group_size": 16}
    methods = ("rtn", "gptq")
    configurations = {x: recipes.int4_weight_only(method=x, **options) for x in methods}  # type: ignore[arg-type]
    nearest, gptq = tuned("mlp", configurations, tolerance=1.0)
    assert gptq.sqnr > nearest.sqnr + 0.3


def test_what_cannot_be_quantized_and_what_misses(caplog: pytest.LogCaptureFixture) -> None:
    configurations = {"8": bits(8), "of 7": recipes.weight_only(group_size=7)}
    found = tuned("mlp", configurations)
    assert found.best.name == "8"
    (odd,) = [each for each in found if each.name == "of 7"]
    assert odd.why_not
    assert f"of 7: {odd.why_not}" in str(found)
    with pytest.raises(QuantError, match="no configuration can be quantized; of 7: "):
        tuned("mlp", {"of 7": recipes.weight_only(group_size=7)})
    found = tuned("mlp", {"3": bits(3), "2": bits(2)}, tolerance=0.0)
    assert not found.reached
    assert found.best.name == "3"
    assert "NOT reached; the best is 3" in caplog.text
    assert found.model is not None


def test_limits() -> None:
    found = tuned("mlp", many(), max_trials=2)
    assert found.evaluations == 1
    assert found.stopped == "max_trials=2"
    found = tuned("mlp", many(), timeout=0.0)
    assert found.evaluations == 0
    assert found.best is None
    assert found.stopped == "timeout=0 s"
    assert "nothing was evaluated" in str(found)


def test_a_loss_and_numbers_that_are_none() -> None:
    build, inputs = NETWORKS["mlp"]
    model = seeded(build)
    near = agreement(model, inputs(3))
    configurations = {"8": bits(8), "2": bits(2)}

    def loss(candidate: nn.Module) -> float:
        return 2.0 - near(candidate)

    found = tuned("mlp", configurations, eval_fn=loss, higher_is_better=False, tolerance=0.02)
    assert found.best.name == "8"
    answers = iter([1.0, math.nan, 1.0])
    found = tuned("mlp", configurations, eval_fn=lambda _: next(answers))
    assert found.best.name == "8"
    with pytest.raises(InvalidConfig, match="eval_fn gave nan for the float model"):
        tuned("mlp", configurations, eval_fn=lambda _: math.nan)
    with pytest.raises(InvalidConfig, match="eval_fn gave 'x' for the float model"):
        tuned("mlp", configurations, eval_fn=lambda _: "x")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "latncy"}, "objective='latncy'; expected 'latency' or 'size', or a list"),
        ({"objective": ["size", "size"]}, "expected each of them once"),
        ({"tolerance": -1}, "tolerance=-1; expected 0 or more"),
        ({"tolerance": "1%"}, "tolerance='1%'; expected 0 or more"),
        ({"timeout": "5"}, "timeout='5'; expected seconds"),
        ({"max_trials": "5"}, "max_trials='5'; expected at least 2"),
        ({"objective": None}, "objective=None; expected 'latency' or 'size'"),
        ({"max_trials": 1}, "max_trials=1; expected at least 2"),
        ({"margin": -1.0}, "margin=-1.0; expected decibels"),
        ({"eval_fn": 3}, "eval_fn=3; expected a function of a model"),
        ({"objective": "latency", "seconds": 0}, "seconds=0; expected a time"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(said)):
        tuned("mlp", {"8": bits(8)}, **options)


@pytest.mark.parametrize(
    ("configurations", "said"),
    [
        ([], "configurations is empty"),
        ("fast", "expected a list of several, or a dict by names"),
        (["fats"], "configurations['fats']: "),
        ([3], "configurations['configuration 1'] is 3: expected the name of a recipe"),
        (["fast", "fast"], "'fast' stands twice"),
        ({"a": "fast", "b": recipes.fast()}, "'b' is the same as 'a'"),
    ],
)
def test_wrong_configurations(configurations: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(said)):
        tuned("mlp", configurations)


def test_no_data() -> None:
    with pytest.raises(InvalidConfig, match="data has no batches"):
        autotune(seeded(mlp), ["fast"], [], lambda _: 1.0, progress=False)


class Drawing(nn.Module):
    """Adds random numbers, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.first(x).relu()
        return self.second(y + torch.randn_like(y))


def test_random_numbers_and_counters_of_a_model() -> None:
    model = seeded(Drawing)
    before = snapshot(model)

    def metric(candidate: nn.Module) -> float:
        if not isinstance(candidate, QuantizedModule):
            candidate.to(torch.float64)  # it is not the user's
        return 1.0

    options: dict[str, Any] = {"objective": "size", "backend": "reference", "progress": False}
    found = autotune(model, {"8": bits(8, 8)}, [normal(32, 16)], metric, **options)
    assert next(iter(found)).sqnr > 25
    assert_unchanged(model, before)
    assert model.calls == 0


def test_methods_that_want_blocks_ranges_or_both() -> None:
    spec = QuantSpec.of(bits=8)
    configurations = {
        "static, rounded": QConfig(input=spec, method=AutoRound(iterations=4)),
        "weights, corrected": QConfig(
            FLOAT, bits(4).weight, transforms=[BiasCorrection()], method=None
        ),
        "weights, smoothed": QConfig(FLOAT, bits(4).weight, transforms=[SmoothQuant(0.5)]),
    }
    for each in tuned("mlp", configurations, tolerance=1.0):
        assert each.sqnr is not None, each.why_not


def test_an_executor_that_meets_a_limit_or_an_error(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as executor:
        found = tuned("mlp", many(), executor=executor, timeout=0.0)
        assert not any(each.sqnr is not None for each in found)
        assert found.stopped == "timeout=0 s"
        assert "does not run" not in str(found)
        log = tmp_path / "trials.jsonl"
        build, inputs = NETWORKS["mlp"]
        model = seeded(build)
        started = threading.Event()

        def metric(candidate: nn.Module) -> float:
            if "calib" in type(candidate).__name__ or not started.is_set():
                started.set()
                return 1.0
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            autotune(
                model, many(), [inputs(0)], metric, "size", backend="reference",
                executor=executor, log=log, progress=False,
            )  # fmt: skip
        measured = [line for line in log.read_text().splitlines() if '"sqnr"' in line]
        assert len(measured) == len(many())


def test_one_batch_is_not_several() -> None:
    for data in (normal(4, 16), {"x": normal(4, 16)}, "data", 3):
        with pytest.raises(InvalidConfig, match=f"data is one {type(data).__name__}; expected sev"):
            autotune(seeded(mlp), ["fast"], data, finite, progress=False)  # type: ignore[arg-type]
