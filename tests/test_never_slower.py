"""Parts that are slower quantized go back to float. Tests bring the times; none reads a clock."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer
from torch_quant.convert.quantized import QuantizedModule, plan_of
from torch_quant.report.regions import Difference


class Net(nn.Module):
    """Two convolutions and two layers of one size, in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).mean((-2, -1)))  # type: ignore[no-any-return]


def calibrated(**options: Any) -> tuple[Quantizer, nn.Module, Tensor]:
    model, x = seeded(Net).eval(), normal(4, 3, 10, 10)
    quantizer = Quantizer("reference", **options)
    quantizer.calib(model)(x)
    return quantizer, model, x


def quantized_sites(model: nn.Module) -> set[str]:
    """The sites that a model has quantized; none of a float one."""
    return set(plan_of(model).quantized) if isinstance(model, QuantizedModule) else set()


class Clock:
    """Says what models take: so much, and for each site so much more or less if it is quantized.

    Args:
        costs: site -> milliseconds that it takes more quantized than in float.
        noise: by which calls differ, from one to the next.
    """

    def __init__(self, costs: Mapping[str, float], noise: float = 0.0) -> None:
        self.costs, self.noise, self.seen = dict(costs), noise, 0

    def __call__(self, models: Mapping[str, nn.Module]) -> dict[str, Sequence[float]]:
        self.seen += 1
        found = {}
        for i, (name, model) in enumerate(models.items()):
            time = 10.0 + sum(self.costs.get(site, 0.0) for site in quantized_sites(model))
            found[name] = [time + self.noise * ((k * 7 + i * 3) % 5 - 2) for k in range(9)]
        return found


SITES = ("stem.0", "stem.2", "body.0", "body.2", "body.3")


def test_what_is_slower_goes_back_and_what_is_faster_stays() -> None:
    quantizer, model, x = calibrated()
    clock = Clock(dict.fromkeys(SITES, -1.0) | {"stem.0": 0.7, "stem.2": 0.2})
    quant_model = quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert set(quantizer.plan.quantized) == {"body.0", "body.2", "body.3"}
    assert quantized_sites(quant_model) == {"body.0", "body.2", "body.3"}
    assert quantizer.regions is not None
    assert set(quantizer.regions.slower) == {"stem.0", "stem.2"}
    assert quantizer.regions.float32 == 10.0
    assert quantizer.regions.against.milliseconds == pytest.approx(-3.0)
    reason = quantizer.plan["stem.0"].reason
    assert reason.startswith("slower quantized: a call takes 0.9 ms more than with stem in float")
    assert reason in str(quantizer.coverage(model)).replace("\n", " ") or "slower" in str(
        quantizer.coverage(model)
    )
    decision = quantizer.explain("stem.0", model)["quantized"]
    assert (decision.value, decision.rule) == (False, "quantize(never_slower=True)")
    assert "taken back to float" in str(quantizer.regions)
    assert not quantizer.fallen_back


def test_float_parts_are_computed_by_the_very_same_parameters() -> None:
    quantizer, model, x = calibrated()
    everything = Clock(dict.fromkeys(SITES, 1.0))
    quant_model = quantizer.quantize(
        model, never_slower=everything, example_inputs=x, progress=False
    )
    assert quantizer.plan.quantized == ()
    assert torch.equal(quant_model(x), model(x))
    quantizer.reset_fallback()
    assert quantized_sites(quantizer.quantize(model)) == set(SITES)


def test_what_gains_only_together_is_found_together() -> None:
    """Each of two neighbours is faster quantized as long as the other is."""
    quantizer, model, x = calibrated()

    def clock(models: Mapping[str, nn.Module]) -> dict[str, Sequence[float]]:
        found = {}
        for name, each in models.items():
            both = len({"stem.0", "stem.2"} & quantized_sites(each))
            found[name] = [10.0 + {0: 0.0, 1: 3.0, 2: 1.0}[both]] * 5
        return found

    quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert set(quantizer.plan.quantized) == {"body.0", "body.2", "body.3"}


def test_small_losses_that_add_up() -> None:
    """Each is within the two-hundredth of a call of which nothing is said, all of them are not."""
    quantizer, model, x = calibrated()
    clock = Clock(dict.fromkeys(SITES, 0.012))
    quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert quantizer.plan.quantized == ()
    assert quantizer.regions is not None
    assert not quantizer.regions.against.certain


class Wide(nn.Module):
    """Layers of one size, and one of another in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Sequential(nn.Linear(8, 16), *(nn.Linear(16, 16) for _ in range(6)))
        self.r = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(self.l(x).relu())  # type: ignore[no-any-return]


def test_faster_parts_do_not_go_back_with_slower_ones() -> None:
    """Two parts lose more together than each alone, and so do wholes that hold both."""
    model, x = seeded(Wide).eval(), normal(4, 8)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    quantizer.quantize(model)
    sites = quantizer.plan.quantized
    clock = Clock(dict.fromkeys(sites, -0.01) | {"r": 0.2, "l.0": 0.2})
    quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert len(sites) == 8
    assert set(quantizer.plan.quantized) == set(sites) - {"r", "l.0"}
    assert quantizer.regions is not None
    assert set(quantizer.regions.slower) == {"r", "l.0"}
    everything = Clock(dict.fromkeys(sites, 0.2))
    quantizer.quantize(model, never_slower=everything, example_inputs=x, progress=False)
    assert quantizer.plan.quantized == ()
    assert " ms more than with everything in float (10 ms)" in quantizer.plan["r"].reason


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_chance_takes_nothing_back(noise: float) -> None:
    quantizer, model, x = calibrated()
    clock = Clock({"stem.0": 0.05, "body.3": 0.1}, noise)
    quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert set(quantizer.plan.quantized) == set(SITES)
    assert quantizer.regions is not None
    assert {each.verdict for each in quantizer.regions} == {"no difference"}


def test_what_the_user_asks_for_stays(caplog: pytest.LogCaptureFixture) -> None:
    quantizer, model, x = calibrated(overrides={"stem.0": QConfig(), "body.0": None})
    clock = Clock(dict.fromkeys(SITES, 0.5))
    with caplog.at_level(logging.WARNING):
        quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert quantizer.plan.quantized == ("stem.0",)
    assert quantizer.plan["body.0"].reason == "left in float by an override"
    assert "the quantized model is slower than float" in caplog.text
    assert quantizer.regions is not None
    assert quantizer.regions.against.certain


def in_bfloat16(model: nn.Module) -> set[str]:
    """The sites that a model has in bfloat16."""
    plan = plan_of(model) if isinstance(model, QuantizedModule) else {}
    return {name for name, site in plan.items() if site.precision == "bfloat16"}


def test_sites_in_bfloat16_go_back_as_well(tmp_path: Path) -> None:
    model, x = seeded(Net).eval(), normal(4, 3, 10, 10)
    quantizer = Quantizer("reference", qconfig="bfloat16", overrides={"body.0": "int8_dynamic"})

    def clock(models: Mapping[str, nn.Module]) -> dict[str, Sequence[float]]:
        slow = {name: len(in_bfloat16(each) - {"stem.0"}) for name, each in models.items()}
        return {name: [10.0 + slow[name]] * 9 for name in models}

    quant_model = quantizer.quantize(model, never_slower=clock, example_inputs=x, progress=False)
    assert in_bfloat16(quant_model) == {"stem.0"}
    assert set(quantizer.plan.quantized) == {"body.0"}
    assert quantizer.plan["body.3"].precision == "float32"
    assert quantizer.plan["body.3"].reason.startswith("slower quantized: a call takes")
    assert quantizer.explain("body.3", model)["quantized"].rule == "quantize(never_slower=True)"
    assert quantizer.regions is not None
    assert "not tried, since an override says what they are: body.0" in str(quantizer.regions)
    quantizer.save(tmp_path)
    again = Quantizer.load(tmp_path)
    assert torch.equal(again.quantize(model, example_inputs=x)(x), quant_model(x))
    quantizer.reset_fallback()
    assert in_bfloat16(quantizer.quantize(model)) == set(SITES) - {"body.0"}


def test_it_is_of_one_backend_and_is_saved(tmp_path: Path) -> None:
    quantizer, model, x = calibrated()
    quantizer.quantize(model, never_slower=Clock({"body.3": 1.0}), example_inputs=x, progress=False)
    expected = set(SITES) - {"body.3"}
    assert set(quantizer.plan.quantized) == expected
    assert quantizer.slower.keys() == {"reference"}
    quantizer.save(tmp_path)
    again = Quantizer.load(tmp_path)
    again.quantize(model, example_inputs=x)
    assert set(again.plan.quantized) == expected
    assert again.plan["body.3"].reason == quantizer.plan["body.3"].reason
    other = quantizer.coverage(model, backend="onnx") if _onnx() else None
    assert other is None or "body.3" in other.plan.quantized
    quantizer.quantize(model, never_slower=Clock({}), example_inputs=x, progress=False)
    assert set(quantizer.plan.quantized) == set(SITES)


def _onnx() -> bool:
    from torch_quant import Backend

    return Backend.get("onnx").unavailable() is None


def test_beside_what_fell_back() -> None:
    quantizer, model, x = calibrated()
    amp_model = quantizer.amp(model)
    amp_model(x)
    (gone,) = quantizer.fallback(amp_model, num=1)
    slower = next(name for name in SITES if name != gone)
    quantizer.quantize(model, never_slower=Clock({slower: 1.0}), example_inputs=x, progress=False)
    assert set(quantizer.plan.quantized) == set(SITES) - {gone, slower}
    assert quantizer.plan[gone].reason == "fallen back"
    assert slower not in [name for group in quantizer.sensitivity(amp_model).left for name in group]


def test_calls_that_were_not_calibrated_keep_to_it() -> None:
    quantizer, model, x = calibrated()
    quant_model = quantizer.quantize(
        model, never_slower=Clock({"body.3": 1.0}), example_inputs=x, progress=False
    )
    quant_model(x.double().float()[:, :, :7, :9])
    assert "body.3" not in quantized_sites(quant_model)


def test_regions_by_operator_and_by_module() -> None:
    quantizer, model, x = calibrated()
    clock = Clock({"stem.0": 1.0, "body.3": -0.5})
    report = quantizer.profile_regions(model, x, measure=clock, progress=False)
    sites = {each.name: set(each.sites) for each in report}
    assert {"body.0", "body.2"} in sites.values()  # of one size
    assert len(sites) == 4
    verdicts = {each.sites[0]: each.verdict for each in report}
    assert verdicts["stem.0"] == "slower"
    assert verdicts["body.3"] == "faster"
    assert verdicts["stem.2"] == "no difference"
    assert report.whole == pytest.approx(10.5)
    assert not report.slower
    assert quantized_sites(quantizer.quantize(model)) == set(SITES)
    parts = quantizer.profile_regions(model, x, by="module", measure=clock, progress=False)
    assert {each.name: len(each.sites) for each in parts} == {"stem": 2, "body": 3}
    for way in ("shape", "", None):
        with pytest.raises(InvalidConfig, match="expected 'operator' or 'module'"):
            quantizer.profile_regions(model, x, by=way, measure=clock, progress=False)  # type: ignore[arg-type]


def test_measured_here_it_runs() -> None:
    quantizer, model, x = calibrated()
    quant_model = quantizer.quantize(
        model, never_slower=True, example_inputs=x, seconds=0.1, progress=False
    )
    assert quant_model(x).shape == (4, 5)
    assert quantizer.regions is not None
    assert quantizer.regions.float32 > 0
    assert set(quantizer.slower["reference"]) == set(SITES) - set(quantizer.plan.quantized)


def test_differences() -> None:
    clear = Difference.of([2.0, 2.1, 2.2, 2.1, 2.0], [1.0, 1.1, 1.2, 1.0, 1.1])
    assert clear.certain
    assert clear.milliseconds == pytest.approx(1.0, abs=0.1)
    assert clear.whole == 1.1
    assert not Difference.of([1.001] * 5, [1.0] * 5).certain  # a thousandth of the call
    assert not Difference.of([1.0] * 5, [2.0] * 5).certain
    for times, others in (([1.0] * 3, [1.0] * 4), ([1.0] * 2, [1.0] * 2), ([], [])):
        with pytest.raises(InvalidConfig, match="of calls that were made in turns"):
            Difference.of(times, others)


def test_bad_input() -> None:
    quantizer, model, x = calibrated()
    with pytest.raises(InvalidConfig, match="measures on inputs: give example_inputs"):
        quantizer.quantize(model, never_slower=True)
    with pytest.raises(InvalidConfig, match="expected True, False, or a function"):
        quantizer.quantize(model, never_slower="yes", example_inputs=x)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="seconds=0"):
        quantizer.quantize(model, never_slower=True, example_inputs=x, seconds=0)
    with pytest.raises(InvalidConfig, match="no times were measured of without"):
        quantizer.quantize(
            model, never_slower=lambda models: {"quantized": [1.0] * 5}, example_inputs=x,
            progress=False,
        )  # fmt: skip
    state = quantizer.state_dict()
    for wrong in ([1], {"reference": {"head": 1}}):
        with pytest.raises(InvalidConfig, match=r"slower|reference"):
            quantizer.load_state_dict(state | {"slower": wrong})
    assert not quantizer.slower


def test_a_model_in_training_is_refused() -> None:
    quantizer, model, x = calibrated()
    qat_model = quantizer.qat(model)
    with pytest.raises(InvalidConfig, match=r"first, then qat\(model\)"):
        quantizer.quantize(qat_model, never_slower=True, example_inputs=x)
