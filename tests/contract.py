"""What works with everything that is registered works with an extension: the whole workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flows import Inputs, assert_unchanged, run, snapshot
from torch import nn

from torch_quant import NotCalibrated, Quantizer, sqnr

__all__ = ["check_workflow"]


def check_workflow(
    model: nn.Module,
    inputs: Inputs,
    site: str,
    folder: Path,
    least: float = 20.0,
    summary_is_all: bool = True,
    **options: Any,
) -> tuple[Quantizer, nn.Module]:
    """Calibrate, rank, fall back, quantize, report, save and load; the quantized model is returned.

    Args:
        model: has a site that the extension makes, or makes different.
        inputs: of the model.
        site: its name.
        folder: an empty one.
        least: output SQNR, dB.
        summary_is_all: whether a summary, which holds ranges alone, needs no data beside it.
        options: of the quantizer.
    """
    before, expected = snapshot(model), run(model, inputs)
    quantizer = Quantizer(**options)
    calib_model = quantizer.calib(model)
    assert torch.equal(run(calib_model, inputs), expected)
    amp_model = quantizer.amp(model)
    assert torch.equal(run(amp_model, inputs), expected)
    assert site in [each.name for each in quantizer.sensitivity(amp_model)]

    quant_model = quantizer.quantize(model)
    actual = run(quant_model, inputs)
    assert site in quantizer.plan.quantized
    assert sqnr(expected, actual) > least
    assert not torch.equal(actual, expected)
    assert site in str(quantizer.coverage(model)) or quantizer.coverage(model).plan[site].quantized

    quantizer.save_summary(folder / "summary.json")
    for load in (
        lambda other: other.load_summary(folder / "summary.json"),
        lambda other: other.load_state_dict(quantizer.state_dict()),
    ):
        other = Quantizer(**options)
        load(other)
        args, kwargs = inputs
        if not summary_is_all and other.settings.summary.plan:
            with pytest.raises(NotCalibrated, match="were not recorded"):
                other.quantize(model, example_inputs=kwargs or args)
            run(other.calib(model), inputs)
        again = other.quantize(model, example_inputs=kwargs or args)
        assert other.plan[site] == quantizer.plan[site]
        torch.testing.assert_close(run(again, inputs), actual, rtol=0.0, atol=1e-5)

    assert quantizer.fallback(amp_model, num=len(quantizer.plan.quantized))
    assert quantizer.plan[site].reason == "fallen back"
    torch.testing.assert_close(run(quantizer.quantize(model), inputs), expected)
    assert_unchanged(model, before)
    return quantizer, quant_model
