"""An LSTM whose matrices cannot share the scale of a row stays in float, and a warning says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import QConfig, Quantizer, recipes, sqnr


class Recurrent(nn.Module):
    def __init__(self, bidirectional: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 32, 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(64 if bidirectional else 32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def heavy(count: int, far: float) -> Tensor:
    """Mostly small, a few of them large, as the power of sounds is."""
    x = torch.randn(count, 20, 12).square()
    return torch.where(torch.rand(count, 20, 12) < 0.01, far * x, 0.05 * x)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both ways"])
def test_an_lstm_with_a_far_reaching_input_stays_in_float(
    bidirectional: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, data = Recurrent(bidirectional).eval(), heavy(16, 200.0)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(data)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quant_model = quantizer.quantize(model)
    reason = quantizer.plan["lstm"].reason
    assert "W_hh would have" in reason
    assert "recipes.int8_dynamic()" in reason
    assert quantizer.plan.quantized == ("head",)
    assert quantizer.coverage(model).plan.coverage < 0.2
    assert [r.getMessage() for r in caplog.records if "lstm" in r.getMessage()] == [
        f"stays in float: lstm ({reason})"
    ]
    x = heavy(8, 200.0)
    with torch.no_grad():
        assert sqnr(model(x), quant_model(x)) > 25


def test_what_the_warning_says_cures_it(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, data = Recurrent().eval(), heavy(16, 200.0)
    quantizer = Quantizer("reference", overrides={"op:lstm": recipes.int8_dynamic()})
    quantizer.calib(model)(data)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quant_model = quantizer.quantize(model)
    assert "stays in float" not in caplog.text
    assert quantizer.plan.quantized == ("lstm", "head")
    with torch.no_grad():
        assert sqnr(model(data), quant_model(data)) > 20


def test_plain_inputs_are_quantized_and_later_batches_may_change_that() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(torch.randn(16, 20, 12))
    assert "lstm" in quantizer.coverage(model).plan.quantized
    before = quantizer.quantize(model)
    x = torch.randn(4, 20, 12)
    expected = before(x)
    calib_model(heavy(16, 200.0))
    assert "lstm" not in quantizer.coverage(model).plan.quantized
    assert torch.equal(before(x), expected)
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25


def test_noise_in_a_term_that_is_small_beside_the_other_does_not_count() -> None:
    torch.manual_seed(0)
    model, data = Recurrent().eval(), torch.randn(16, 20, 12) * 0.01
    with torch.no_grad():
        model.lstm.weight_ih_l0.mul_(0.01)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(data)
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("lstm", "head")
    assert sqnr(model(data), quant_model(data)) > 40


def test_an_input_of_zeros_is_not_to_be_divided() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(torch.zeros(4, 20, 12))
    reason = quantizer.coverage(model).plan["lstm"].reason
    assert "the input was 0 in every batch" in reason
    assert "divide" not in reason


INT4 = recipes.weight_only(bits=4, group_size=None).weight


@pytest.mark.parametrize(
    ("given", "format_"),
    [
        ({"overrides": {"[l]stm": "int8_static"}}, "int8"),
        ({"overrides": {"[l]stm": QConfig(weight=INT4)}}, "int4 weights, int8 activations"),
        ({"qconfig": QConfig(weight=INT4)}, "int4 weights, int8 activations"),
    ],
    ids=["by name", "by name in int4", "formats of all"],
)
def test_what_is_asked_for_is_done(
    given: dict[str, Any], format_: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, data = Recurrent().eval(), heavy(16, 200.0)
    quantizer = Quantizer("reference", **given)
    quantizer.calib(model)(data)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quantizer.quantize(model)
    assert quantizer.plan["lstm"].format == format_
    assert quantizer.plan.quantized == ("lstm", "head")
    (told,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("lstm")]
    assert told.startswith(f"lstm is quantized as it was asked to be, but {format_} would keep too")


def test_an_edited_summary_and_a_later_setting_ask_for_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Recurrent().eval(), heavy(16, 200.0)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(data)
    quantizer.quantize(model)
    assert quantizer.plan.quantized == ("head",)
    file = tmp_path / "summary.json"
    quantizer.save_summary(file)
    summary = json.loads(file.read_text())
    for site in summary["sites"]:
        site.update(quantized=True, reason="")
    file.write_text(json.dumps(summary))
    edited = Quantizer("reference")
    edited.load_summary(file)
    edited.quantize(model, example_inputs=data)
    assert edited.plan.quantized == ("lstm", "head")
    quantizer.set("[l]stm", recipes.fast())
    quantizer.quantize(model)
    assert quantizer.plan.quantized == ("lstm", "head")


def test_a_model_of_nothing_else_stays_in_float(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, data = nn.LSTM(12, 32, batch_first=True).eval(), heavy(16, 200.0)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(data)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quant_model = quantizer.quantize(model)
    assert not quantizer.plan.quantized
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told.startswith("stays in float: ")
    assert torch.equal(model(data)[0], quant_model(data)[0])
