"""Settings, ranges or weights that change between the calls of an AMP proxy: as if it were new."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amp_proxies import assert_same, facts, fresh, ready
from flows import calibrated
from models import MODELS, example
from torch import nn

from torch_quant import ModuleFilter, NotCalibrated, QConfig, Quantizer, QuantSpec
from torch_quant.backends import Backend

Change = Callable[[Quantizer, nn.Sequential, Path], Any]
FEW = QConfig(weight=QuantSpec.of(bits=3, signed=True, symmetric=True, per_channel=True))


def recalibrate(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    quantizer.calib(model)(20.0 * example("mlp", 8)[0])


def load_other_ranges(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    """Of as many batches."""
    other = calibrated(model, [((9.0 * example("mlp", 8)[0],), {})], backend="reference")
    quantizer.load_state_dict(other.state_dict())


def load_a_summary(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    path = folder / "summary.json"
    few = ready(model, 5.0 * example("mlp", 16)[0], qconfig=FEW)
    few.quantize(model)
    few.save_summary(path)
    quantizer.load_summary(path)


def replace_parameters(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    state = {k: 2.0 * v for k, v in model.state_dict().items()}
    state["0.weight"][0] *= 10.0  # a scale for all of it would leave the noise in proportion
    model.load_state_dict(state, assign=True)


def change_in_place(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    model[0].weight.mul_(2.0)
    model[2].bias.add_(1.0)


def change_data(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    model[0].weight.data.mul_(2.0)


def assign_overrides(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    quantizer.overrides = {"0": FEW}


def write_into_overrides(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    quantizer.overrides["0"] = FEW


def assign_a_filter(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    quantizer.module_filter = ModuleFilter(exclude_names="2")


def assign_a_qconfig(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    quantizer.qconfig = FEW


def assign_a_backend(quantizer: Quantizer, model: nn.Sequential, folder: Path) -> None:
    quantizer.backend = Backend.ONEDNN


CHANGES: dict[str, tuple[Change, str]] = {
    "more calibration": (recalibrate, "ranges"),
    "a state of as many batches": (load_other_ranges, "ranges"),
    "a summary": (load_a_summary, "the summary, ranges"),
    "replaced parameters": (replace_parameters, "weights"),
    "parameters in place": (change_in_place, "weights"),
    "parameters by data": (change_data, "weights"),
    "overrides assigned": (assign_overrides, "overrides"),
    "overrides in place": (write_into_overrides, "overrides"),
    "module filter": (assign_a_filter, "module_filter"),
    "qconfig": (assign_a_qconfig, "qconfig"),
    "backend": (assign_a_backend, "the backend"),
}


@pytest.fixture(params=sorted(CHANGES))
def changed(request: pytest.FixtureRequest) -> tuple[Change, str]:
    return CHANGES[request.param]


def report(quantizer: Quantizer, amp_model: Any) -> Any:
    return quantizer.sensitivity(amp_model, measure=[0]).to_dict()


def test_the_next_batch_begins_anew(
    changed: tuple[Change, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, names = changed
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    amp_model = fresh(quantizer, model, *x)
    amp_model(*example("mlp", 4))
    change(quantizer, model, tmp_path)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        assert_same(amp_model(*x), model(*x))
    assert caplog.text.count(f"{names} changed since this AMP proxy saw its first batch") == 1
    assert_same(amp_model(*x), model(*x))
    new = fresh(quantizer, model, *x)
    new(*x)
    assert facts(amp_model) == facts(new)
    assert report(quantizer, amp_model) == report(quantizer, new)
    assert quantizer.fallback(amp_model, num=1)


def test_without_a_next_batch_nothing_is_told(changed: tuple[Change, str], tmp_path: Path) -> None:
    change, names = changed
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    amp_model = fresh(quantizer, model, *x)
    change(quantizer, model, tmp_path)
    for ask in (
        lambda: quantizer.sensitivity(amp_model),
        lambda: quantizer.fallback(amp_model, num=1),
        amp_model.measure_latency,
    ):
        with pytest.raises(NotCalibrated, match=f"{names} changed since the AMP proxy saw its"):
            ask()
    assert not quantizer.fallen_back
    amp_model(*x)
    assert quantizer.fallback(amp_model, num=1)
    assert amp_model.measure_latency(repeats=1)


def test_before_the_first_batch_changes_are_taken_without_a_word(
    changed: tuple[Change, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, _ = changed
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    amp_model = quantizer.amp(model)
    change(quantizer, model, tmp_path)
    amp_model(*x)
    assert "AMP proxy" not in caplog.text
    assert facts(amp_model) == facts(fresh(quantizer, model, *x))


def test_a_proxy_that_was_full_records_again() -> None:
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    amp_model = fresh(quantizer, model, *x, max_batches=1)
    quantizer.overrides["0"] = FEW
    amp_model(*x)
    amp_model(*x)
    assert facts(amp_model) == facts(fresh(quantizer, model, *x))


def test_what_was_changed_back_holds_again() -> None:
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    amp_model = fresh(quantizer, model, *x)
    before = report(quantizer, amp_model)
    quantizer.overrides["0"] = FEW
    model.load_state_dict(dict(model.state_dict()))  # the same values, written once more
    del quantizer.overrides["0"]
    assert report(quantizer, amp_model) == before


def test_a_buffer_that_each_call_writes_is_no_change() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1.0
            return self.linear(x)

    model, x = Counts().eval(), torch.ones(8, 16)
    quantizer = ready(model, x)
    amp_model = fresh(quantizer, model, x)
    amp_model(x)
    assert quantizer.sensitivity(amp_model).batches == 2


def test_no_latency_without_data() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    with pytest.raises(NotCalibrated, match="no data was run through the AMP proxy"):
        quantizer.amp(model).measure_latency()
