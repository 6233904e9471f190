"""How fast a model is on each backend: measured, never guessed. No test asserts a time."""

from __future__ import annotations

import logging

import pytest
import torch
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import BackendUnavailable, InvalidConfig, NotCalibrated, Quantizer
from torch_quant.backends import Backend, available_backends
from torch_quant.report.speed import Profile, Run


class Mixer(nn.Module):
    """Dropout, a counter, and an input that it changes: what measuring has to leave alone."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        self.calls.add_(1)
        if cache is not None:
            cache.append(x)
        hidden = nn.functional.dropout(self.up(x).relu(), 0.5, self.training)
        y: Tensor = self.down(hidden)
        return y


def calibrated(model: nn.Module, x: Tensor) -> Quantizer:
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    return quantizer


def test_every_backend_with_kernels_beside_float() -> None:
    model, x = seeded(Mixer).train(), normal(8, 32)
    quantizer = calibrated(model, x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    profile = quantizer.profile(model, x, seconds=0.01)
    wanted = [each.name for each in available_backends() if each.has_kernels]
    assert [run.backend for run in profile] == [None, None, *wanted]
    assert [run.name for run in profile][:2] == ["float32", "bfloat16"]
    for run in profile:
        assert run.median is not None
        assert run.p90 is not None
        assert run.p90 >= run.median > 0
        assert run.sqnr is None if run.name == "float32" else (run.sqnr or 0.0) > 25
    assert profile.fastest in wanted
    assert "times float32" in str(profile)
    assert f"1 threads, {profile.rounds} calls" in str(profile)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_inputs_that_the_model_changes_stay() -> None:
    model, x = seeded(Mixer).eval(), normal(4, 32)
    quantizer, cache = Quantizer("reference"), [x]
    quantizer.calib(model)(x, cache=[x])
    profile = quantizer.profile(
        model, {"x": x, "cache": cache}, backends=[Backend.REFERENCE], seconds=0.01
    )
    assert len(cache) == 1
    assert [run.why_not for run in profile] == ["", "", ""]


def test_the_fastest_is_taken_and_the_table_kept(caplog: pytest.LogCaptureFixture) -> None:
    model, x = seeded(Mixer).eval(), normal(8, 32)
    quantizer = calibrated(model, x)
    with caplog.at_level(logging.WARNING):
        quant_model = quantizer.quantize(model, backend="fastest", example_inputs=x)
    assert quantizer.measured is not None
    assert quant_model.quantization.backend == quantizer.measured.fastest
    assert ("slower than float" in caplog.text) == (quantizer.measured.gain < 1.0)
    again = quantizer.quantize(model, backend=quantizer.measured.fastest)
    assert torch.equal(quant_model(x), again(x))
    assert quantizer.backend is Backend.REFERENCE  # as it was asked for


def test_what_the_numbers_mean() -> None:
    runs = (
        Run("float32", median=10.0, p90=11.0),
        Run("bfloat16", median=8.0, p90=9.0, sqnr=40.0),
        Run("quantized, A", "a", 4.0, 5.0, 30.0),
        Run("quantized, B", "b", 2.0, 9.0, 30.0),
        Run("quantized, C", "c", why_not="it has no kernel"),
    )
    profile = Profile(runs, threads=1, rounds=7)
    assert (profile.fastest, profile.gain) == ("b", 4.0)
    assert "quantized, C does not run: it has no kernel" in str(profile)
    nothing = Profile((*runs[:2], runs[-1]), threads=1, rounds=7)
    assert (nothing.fastest, nothing.gain) == (None, 0.0)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(Mixer).eval(), normal(8, 32)
    with pytest.raises(InvalidConfig, match=r"quantizer.quantize\(model, backend="):
        Quantizer(backend="fastest")
    quantizer = Quantizer("reference")
    with pytest.raises(NotCalibrated):
        quantizer.profile(model, x)
    quantizer.calib(model)(x)
    with pytest.raises(InvalidConfig, match="measures on inputs: give example_inputs"):
        quantizer.quantize(model, backend="fastest")
    for seconds in (0, -1.0, "5", True, float("nan")):
        with pytest.raises(InvalidConfig, match="expected a time of more than 0"):
            quantizer.profile(model, x, seconds=seconds)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="unknown backend 'onedn'"):
        quantizer.profile(model, x, backends=["onedn"])
    onednn = type(Backend.get("onednn"))
    monkeypatch.setattr(onednn, "unavailable", lambda self: "no oneDNN in this build")
    with pytest.raises(BackendUnavailable, match="no oneDNN"):
        quantizer.profile(model, x, backends=["onednn"])
