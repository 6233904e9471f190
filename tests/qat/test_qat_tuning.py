"""What was trained can be taken back to float, by sensitivity or by a metric."""

from __future__ import annotations

import pytest
import torch
from qat_training import FOUR_BITS, calibrated, quiet, steps
from torch import Tensor, nn

from torch_quant import InvalidConfig, Quantizer, tune

pytestmark = [
    pytest.mark.usefixtures("grad"),
]


def trained() -> tuple[Quantizer, nn.Module, nn.Module, tuple[Tensor, ...]]:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    steps(quantizer, qat_model, inputs, 4)
    return quantizer, model, qat_model.eval(), inputs


def noise(model: nn.Module, floating: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    expected = quiet(floating, inputs)
    return float((quiet(model, inputs) - expected).square().mean() / expected.square().mean())


def test_fallback_on_a_trained_model() -> None:
    quantizer, model, qat_model, inputs = trained()
    whole = quantizer.quantize(qat_model)
    assert torch.equal(quiet(whole, inputs), quiet(qat_model, inputs))
    amp_model = quantizer.amp(model)
    quiet(amp_model, inputs)
    (name,) = quantizer.fallback(amp_model, num=1)
    partly = quantizer.quantize(qat_model)
    assert not partly.plan[name].quantized
    assert len(partly.plan.quantized) == len(whole.plan.quantized) - 1
    assert noise(partly, model, inputs) < noise(whole, model, inputs)
    quantizer.reset_fallback()
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), quiet(qat_model, inputs))


def test_tuning_a_trained_model() -> None:
    quantizer, model, qat_model, inputs = trained()
    expected = quiet(model, inputs)
    start = noise(quantizer.quantize(qat_model), model, inputs)

    def closeness(candidate: nn.Module) -> float:
        found = quiet(candidate, inputs)
        return 1.0 - float((found - expected).square().mean() / expected.square().mean())

    best = tune(quantizer, qat_model, closeness, tolerance=start * 0.9, progress=False)
    assert quantizer.tuning is not None
    assert quantizer.tuning.reached
    assert 0 < len(best.plan.quantized) < len(qat_model.plan.quantized)
    assert noise(best, model, inputs) <= start * 0.9 + 1e-6
    # What stayed in int8 has the scales that were trained.
    kept = best.plan.quantized[0]
    scale = f"{kept}.weight_scale"
    assert torch.equal(best.state_dict()[scale], qat_model.state_dict()[scale])


def test_a_part_is_no_trained_model() -> None:
    quantizer, _, qat_model, inputs = trained()
    with pytest.raises(InvalidConfig, match="a part of one"):
        tune(quantizer, qat_model.block, lambda m: float(m(*inputs).mean()), progress=False)
