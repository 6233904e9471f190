"""What cannot be trained, and what the errors say."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from models import MODELS, example, normal
from qat_training import FOUR_BITS, calibrated, quiet
from torch import nn

from torch_quant import (
    BiasCorrection,
    InvalidConfig,
    NotCalibrated,
    QConfig,
    Quantizer,
    QuantSpec,
    UnsupportedOp,
    recipes,
    save,
)

pytestmark = pytest.mark.usefixtures("grad")


def test_before_calibration() -> None:
    model, inputs = MODELS["mlp"](), example("mlp")
    with pytest.raises(
        NotCalibrated, match=r"run it through what quantizer\.calib\(model\) returns"
    ):
        Quantizer("reference").qat(model)
    with pytest.raises(NotCalibrated, match="no calibration data was seen"):
        Quantizer("reference").qat(model, example_inputs=inputs)
    weights = Quantizer("reference", qconfig=recipes.int8_weight_only())
    weights.qat(model, example_inputs=inputs)  # it needs no ranges


def test_an_unknown_method() -> None:
    quantizer, model, _ = calibrated("mlp")
    with pytest.raises(InvalidConfig, match=r"unknown QAT method 'lsk'; expected fixed.*mean lsq"):
        quantizer.qat(model, "lsk")


def test_nothing_to_train() -> None:
    quantizer, model, _ = calibrated("mlp")
    qat_model = quantizer.qat(model, "fixed")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InvalidConfig, match="every parameter of the model is frozen"):
        quantizer.qat(model)
    with pytest.raises(InvalidConfig, match="frozen: nothing to train"):
        quantizer.parameter_groups(qat_model, lr=0.1, scale_lr=0.1)
    with pytest.raises(InvalidConfig, match=r"expected what quantizer.qat\(model\) makes"):
        quantizer.parameter_groups(model, lr=0.1, scale_lr=0.1)


def test_a_frozen_parameter_stays() -> None:
    quantizer, model, inputs = calibrated("mlp")
    model[0].weight.requires_grad_(False)
    qat_model = quantizer.qat(model)
    qat_model(*inputs).sum().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_a_model_that_has_changed() -> None:
    quantizer, model, inputs = calibrated("mlp")
    qat_model = quantizer.qat(model)
    model.append(nn.Linear(10, 2))
    with pytest.raises(NotCalibrated, match="not the one that was calibrated"):
        quantizer.qat(model)
    del model[-1]
    with pytest.raises(InvalidConfig, match="this is a proxy"):
        quantizer.qat(qat_model)
    with pytest.raises(InvalidConfig, match="of another quantizer"):
        Quantizer("reference").quantize(qat_model)
    assert quiet(quantizer.quantize(qat_model), inputs).shape == (8, 10)


def test_transforms_and_rounded_weights() -> None:
    config = QConfig(transforms=[BiasCorrection()])
    quantizer, model, _ = calibrated("mlp", qconfig=config)
    with pytest.raises(InvalidConfig, match="leave it out of the QConfig"):
        quantizer.qat(model)
    quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only(group_size=8))
    quantizer.round_weights(model, [example("mlp")], progress=False)
    with pytest.raises(InvalidConfig, match="round_weights"):
        quantizer.qat(model)


def test_nothing_to_quantize() -> None:
    model, x = nn.Sequential(nn.PReLU()), normal(4, 8)
    with pytest.raises(UnsupportedOp, match="nothing in the model can be quantized"):
        Quantizer("reference").qat(model, example_inputs=x)


def test_a_pickle_is_no_more_than_a_module(tmp_path: Path) -> None:
    quantizer, model, inputs = calibrated("mlp", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    again = pickle.loads(pickle.dumps(qat_model))
    assert torch.equal(quiet(again, inputs), quiet(qat_model, inputs))
    with pytest.raises(InvalidConfig, match="was unpickled"):
        quantizer.quantize(again)
    with pytest.raises(InvalidConfig, match=r"quantizer\.quantize"):
        save(qat_model, tmp_path / "model")


def test_quantizing_in_the_middle_of_training() -> None:
    quantizer, model, inputs = calibrated("mlp", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    qat_model(*inputs).sum().backward()
    one, two = (quiet(quantizer.quantize(qat_model), inputs) for _ in range(2))
    assert torch.equal(one, two)
    assert qat_model.training
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("bits", [0, 1, 17, 2.5])
def test_bits_out_of_range(bits: float) -> None:
    with pytest.raises(InvalidConfig, match="bits"):
        QuantSpec.of(bits=bits)  # type: ignore[arg-type]


def test_training_goes_on_where_the_model_was_changed() -> None:
    """The QAT model computes what it was made of, and deploys that."""
    quantizer, model, inputs = calibrated("mlp", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    expected = quiet(qat_model, inputs)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), expected)
