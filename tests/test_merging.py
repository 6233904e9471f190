"""Calibration on parts of the data, folded into one quantizer."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, example
from torch import nn

import torch_quant
from torch_quant import InvalidConfig, QConfig, Quantizer, SmoothQuant
from torch_quant.statistics import MinMaxObserver

PACKAGE = Path(torch_quant.__file__).parent


def calibrated_on(model: nn.Module, rows: slice, **options: Any) -> Quantizer:
    quantizer = Quantizer("reference", **options)
    quantizer.calib(model)(*(x[rows] for x in example("attention_explicit", 12)))
    return quantizer


@pytest.mark.parametrize(
    "options",
    [{"qconfig": QConfig()}, {"qconfig": QConfig(transforms=[SmoothQuant(0.7)])}],
    ids=["plain", "smooth"],
)
def test_parts_give_the_ranges_of_the_whole(options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS["attention_explicit"]()
    parts = [calibrated_on(model, slice(i, i + 4), **options) for i in (0, 4, 8)]
    merged, one_by_one = Quantizer("reference", **options), Quantizer("reference", **options)
    merged.merge(parts[2], *(part.state_dict() for part in parts[:2]))
    calib_model = one_by_one.calib(model)
    for x in example("attention_explicit", 12)[0].split(4):
        calib_model(x)
    assert merged.state.batches == one_by_one.state.batches == 3
    ours, theirs = (q.state.state_dict()["statistics"] for q in (merged, one_by_one))
    assert ours.keys() == theirs.keys()
    for key, kept in theirs.items():
        for what, values in kept.items():
            assert torch.equal(ours[key][what]["min_val"], values["min_val"]), (key, what)
            assert torch.equal(ours[key][what]["max_val"], values["max_val"]), (key, what)
    x = example("attention_explicit", 3)
    quant_model = merged.quantize(model, example_inputs=x)
    assert torch.equal(quant_model(*x), one_by_one.quantize(model)(*x))


def test_merging_after_quantizing_is_not_ignored() -> None:
    model = MODELS["attention_explicit"]()
    quantizer, x = calibrated_on(model, slice(4)), example("attention_explicit", 3)
    first = quantizer.quantize(model)(*x)
    other = Quantizer("reference")
    other.calib(model)(100.0 * x[0])
    quantizer.merge(other)
    assert not torch.equal(quantizer.quantize(model)(*x), first)


def test_what_does_not_fit_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, other = MODELS["attention_explicit"](), MODELS["mlp"]()
    quantizer = calibrated_on(model, slice(4))
    foreign = Quantizer("reference")
    foreign.calib(other)(*example("mlp", 4))
    averaged = calibrated_on(model, slice(4), qconfig=QConfig(observer="histogram"))
    before, x = quantizer.state_dict(), example("attention_explicit", 3)
    expected = quantizer.quantize(model)(*x)
    good = calibrated_on(model, slice(8, 12))
    for wrong, message in (
        (foreign, "calibration 1 cannot be merged: the model is not the one"),
        (averaged, "calibration 1 .*minmax and histogram cannot be merged"),
        ({"state": 1}, "lacks model"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            quantizer.merge(good, wrong)  # type: ignore[arg-type]
    assert quantizer.state.batches == before["state"]["batches"]
    assert torch.equal(quantizer.quantize(model)(*x), expected)
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quantizer.merge(calibrated_on(model, slice(4)))
    assert "other weights" in caplog.text


def test_few_frames_between_a_tensor_and_its_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is watched of each tensor costs little Python: probe, state, observer, its record."""
    found: list[list[str]] = []
    record = MinMaxObserver._record

    def counted(self: MinMaxObserver, *args: torch.Tensor) -> None:
        frames = [
            frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(PACKAGE)
        ]
        names = [frame.function for frame in frames]
        found.append(names[: names.index("forward") + 1])
        record(self, *args)

    monkeypatch.setattr(MinMaxObserver, "_record", counted)
    Quantizer("reference").calib(MODELS["mlp"]())(*example("mlp", 4))
    assert found
    # The record itself, which stands in for the observer's own here, is the fourth.
    assert all(names == ["observe", "observe", "forward"] for names in found)
