"""What fell back is kept in states and summaries, and through more calibration."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from amp_proxies import Ready, analysed
from flows import BACKENDS
from models import example

from torch_quant import Quantizer


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


def test_a_state_without_a_fallback() -> None:
    _, quantizer, _ = analysed()
    state = quantizer.state_dict()
    del state["fallback"]
    other = Quantizer("reference")
    other.load_state_dict(state)
    assert other.fallen_back == {}
    assert other.state.batches == quantizer.state.batches
