"""Taking the worst sites back to float: how many, which, and what then runs."""

from __future__ import annotations

import copy
import gc
import io
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import assert_unchanged, calibrated, run, settled, snapshot
from models import MODELS, example, normal, seeded
from torch import Tensor, nn

from torch_quant import (
    Backend,
    InvalidConfig,
    NotCalibrated,
    QuantError,
    Quantizer,
    export_torchscript,
    sqnr,
)
from torch_quant.backends import available_backends
from torch_quant.proxies import AmpModel, Latency

BACKENDS = [backend.name for backend in available_backends()]
BOTH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Ready = tuple[nn.Module, Quantizer, AmpModel]


def analysed(name: str = "mlp", backend: str = "reference", **options: Any) -> Ready:
    """A calibrated quantizer, and an AMP proxy that has seen one batch of 16, which it keeps."""
    model = MODELS[name]()
    quantizer = calibrated(model, [(example(name, 32), {})], backend=backend)
    amp_model = quantizer.amp(model, **options)
    amp_model(*example(name, 16))
    return model, quantizer, amp_model


def achieved(model: nn.Module, quantizer: Quantizer, x: tuple[Tensor, ...]) -> float:
    """Output SQNR by a run, dB."""
    return sqnr(model(*x), quantizer.quantize(model)(*x))


def achieved_with(
    names: list[str],
    model: nn.Module,
    quantizer: Quantizer,
    x: tuple[Tensor, ...],
    precision: str = "float32",
) -> float:
    """The same by another quantizer with the same ranges, and only ``names`` in float."""
    other = Quantizer(quantizer.backend)
    fallen = dict.fromkeys(names, precision)
    other.load_state_dict(quantizer.state_dict() | {"fallback": fallen})
    other.calib(model, example_inputs=x)
    return achieved(model, other, x)


# ---- how many, and which


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


# ---- what then runs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mlp", "small_cnn", "tiny_transformer"])
def test_everything_in_float_is_the_float_model(
    name: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    count = len(quantizer.sensitivity(amp_model))
    with caplog.at_level(logging.WARNING, "torch_quant"):
        assert len(quantizer.fallback(amp_model, 1000)) == count
    assert f"num=1000, but only {count} are left in int8" in caplog.text
    x = example(name, 5)
    quant_model = quantizer.quantize(model)
    # Batch norms are folded, so products are rounded in another order.
    torch.testing.assert_close(quant_model(*x), model(*x), rtol=1e-4, atol=1e-5)
    assert quantizer.fallback(amp_model, 0) == []
    assert quantizer.plan.quantized == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sites_compute_with_the_very_same_parameters(backend: str) -> None:
    model, quantizer, amp_model = analysed("mlp", backend)
    (worst,) = quantizer.fallback(amp_model, 1)
    quant_model = quantizer.quantize(model)
    storages = {x.data_ptr() for x in quant_model.state_dict().values() if x.dtype == torch.float32}
    layer = model.get_submodule(worst)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.data_ptr() in storages
    assert layer.bias.data_ptr() in storages


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sites_give_what_the_float_ops_give(backend: str) -> None:
    """All but the first in float: behind the int8 layer, the float model's own arithmetic."""
    model, quantizer, _ = analysed("mlp", backend)
    assert isinstance(model, nn.Sequential)
    quantizer.load_state_dict(
        quantizer.state_dict() | {"fallback": dict.fromkeys(["2", "4"], "float32")}
    )
    x = example("mlp", 5)
    first = nn.Sequential(model[0])
    alone = calibrated(first, [(example("mlp", 32), {})], backend=backend).quantize(first)
    assert torch.equal(quantizer.quantize(model)(*x), model[1:](alone(*x)))


def lower(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return F.linear(x.bfloat16(), layer.weight.bfloat16(), bias).float()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_sites_compute_in_bfloat16(backend: str) -> None:
    model, quantizer, amp_model = analysed("mlp", backend)
    assert isinstance(model, nn.Sequential)
    quantizer.fallback(amp_model, 3, dtype=torch.bfloat16)
    assert {site.precision for site in quantizer.plan.values()} == {"bfloat16"}
    (x,) = example("mlp", 5)
    expected = x
    for layer in model:
        expected = lower(layer, expected) if isinstance(layer, nn.Linear) else layer(expected)
    outputs = quantizer.quantize(model)(x)
    assert outputs.dtype == torch.float32
    assert torch.equal(outputs, expected)
    assert not torch.equal(outputs, model(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small_cnn", "tiny_transformer", "attention_explicit"])
def test_bfloat16_is_close(name: str, backend: str) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    before = snapshot(model)
    ranking = quantizer.sensitivity(amp_model)
    quantizer.fallback(amp_model, len(ranking), dtype=torch.bfloat16)
    # Eight bits of mantissa: relative errors of 2^-9 are -54 dB, and add up over some layers.
    assert achieved(model, quantizer, example(name, 8)) > 35.0
    assert_unchanged(model, before)


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small_cnn", "tiny_transformer"])
def test_traced_exported_copied_and_saved(
    name: str, backend: str, precision: str, tmp_path: Path
) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    quantizer.fallback(amp_model, 2, dtype=BOTH[precision])
    quant_model = quantizer.quantize(model)
    x = example(name, 3)
    expected = quant_model(*x)
    assert torch.equal(copy.deepcopy(quant_model)(*x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quant_model))(*x), expected)
    export_torchscript(quant_model, example(name, 2), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    compiles = Backend.of(backend).compiles
    assert torch.equal(settled(loaded, x) if compiles else loaded(*x), expected)
    sizes = tuple({0: torch.export.Dim.AUTO} for _ in x)
    program = torch.export.export(quant_model, example(name, 2), dynamic_shapes=sizes, strict=False)
    if compiles:  # not what its compiler reads: the same graph in float
        assert sqnr(expected, program.module()(*x)) > 30.0
    else:
        assert torch.equal(program.module()(*x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_backend_keeps_what_fell_back(backend: str) -> None:
    model, quantizer, amp_model = analysed("small_cnn", "reference")
    taken = quantizer.fallback(amp_model, 2)
    quantizer.quantize(model, backend=backend)
    assert all(quantizer.plan[name].reason == "fallen back" for name in taken)


# ---- saved and loaded


def mixed(backend: str = "reference", name: str = "small_cnn") -> Ready:
    """One site in float32, one in bfloat16, the rest in int8."""
    model, quantizer, amp_model = analysed(name, backend)
    quantizer.fallback(amp_model, 1)
    quantizer.fallback(amp_model, 1, dtype=torch.bfloat16)
    return model, quantizer, amp_model


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_keeps_what_fell_back(backend: str) -> None:
    model, quantizer, _ = mixed(backend)
    x = example("small_cnn", 3)
    expected = quantizer.quantize(model)(*x)
    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    other = Quantizer(backend)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.fallen_back == quantizer.fallen_back
    assert torch.equal(other.quantize(model, example_inputs=example("small_cnn", 32))(*x), expected)
    assert dict(other.plan) == dict(quantizer.plan)
    other.reset_fallback()
    assert quantizer.fallen_back  # not shared


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_summary_keeps_what_fell_back(backend: str, tmp_path: Path) -> None:
    model, quantizer, _ = mixed(backend)
    x = example("small_cnn", 3)
    expected = quantizer.quantize(model)(*x)
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer(backend)
    other.load_summary(tmp_path / "summary.json")
    assert torch.equal(other.quantize(model, example_inputs=example("small_cnn", 32))(*x), expected)
    assert dict(other.plan) == dict(quantizer.plan)
    assert {site.precision for site in other.plan.values()} == {"float32", "bfloat16"}


def test_a_summary_can_be_written_right_after_the_fallback(tmp_path: Path) -> None:
    model, quantizer, _ = mixed()
    quantizer.save_summary(tmp_path / "before.json")
    quantizer.quantize(model)
    quantizer.save_summary(tmp_path / "after.json")
    assert (tmp_path / "before.json").read_text() == (tmp_path / "after.json").read_text()


def test_more_calibration_keeps_what_fell_back() -> None:
    model, quantizer, _ = mixed()
    taken = dict(quantizer.fallen_back)
    quantizer.calib(model)(*example("small_cnn", 8))
    quantizer.quantize(model)
    assert quantizer.fallen_back == taken
    assert {n for n, site in quantizer.plan.items() if site.reason == "fallen back"} == set(taken)


# ---- bad input, of the whole feature


def test_amp_before_calib() -> None:
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\) first"):
        Quantizer("reference").amp(MODELS["mlp"]())
    model, quantizer = MODELS["mlp"](), Quantizer("reference")
    quantizer.calib(model, example_inputs=example("mlp", 2))
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\) first"):
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
        (lambda model, quantizer: quantizer.quantize(model), "got QuantizedRegion"),
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


def test_a_state_without_a_fallback() -> None:
    _, quantizer, _ = analysed()
    state = quantizer.state_dict()
    del state["fallback"]
    other = Quantizer("reference")
    other.load_state_dict(state)
    assert other.fallen_back == {}
    assert other.state.batches == quantizer.state.batches
