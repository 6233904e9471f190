"""Training behind SmoothQuant: from the smoothed model, with the factors that it began with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import MODELS, example
from qat_training import calibrated, quiet, skip_beside_ipex, steps
from torch import Tensor, nn

from torch_quant import (
    BiasCorrection,
    CaptureFailed,
    InvalidConfig,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    recipes,
    switch,
)

pytestmark = pytest.mark.usefixtures("grad")


class Spiky(nn.Module):
    """Two layers read one tensor, some channels of which are far larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("spread", torch.linspace(-3, 3, 16).exp())
        self.one, self.two = nn.Linear(16, 12), nn.Linear(16, 12, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.spread
        return self.head(self.one(x).tanh() * self.two(x))


def data(rows: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


WEIGHT4 = QuantSpec.of("int4", symmetric=True, per_channel=True)
CONFIGS: dict[str, QConfig] = {
    "everywhere": QConfig(transforms=[SmoothQuant(0.5)]),
    "where it helps": recipes.int8_static(),
    "4 bits": QConfig(weight=WEIGHT4, transforms=[SmoothQuant(0.7)]),
}


def reference(config: QConfig) -> QConfig:
    """The same without what is left out."""
    kept = [each for each in config.transforms if not isinstance(each, BiasCorrection)]
    return QConfig(input=config.input, weight=config.weight, transforms=kept)


def smoothed(model: Any) -> set[str]:
    return {name for name, site in model.plan.items() if site.transforms}


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "fixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_from_the_first_step_to_deployment(name: str, method: str) -> None:
    config, inputs = CONFIGS[name], (data(8, 2),)
    rows = data(4096)  # of few, the largest says little of the next: nothing would be smoothed
    quantizer, model, _ = calibrated(Spiky(), rows, qconfig=config)
    before = copy.deepcopy(model.state_dict())
    other, again, _ = calibrated(Spiky(), rows, qconfig=reference(config))
    expected = other.quantize(again)
    qat_model = quantizer.qat(model, method, edge_bits=None)
    assert smoothed(qat_model) == smoothed(expected)
    assert smoothed(expected) >= {"one", "two"}
    assert torch.equal(quiet(qat_model, inputs), quiet(expected, inputs))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])  # the user's own, not multiplied
    assert {id(x) for x in model.parameters()} <= {id(x) for x in qat_model.parameters()}

    steps(quantizer, qat_model, (data(32, 3),), 5)
    after = quiet(qat_model, inputs)
    assert not torch.equal(after, quiet(expected, inputs))
    for _ in range(2):  # nothing is multiplied twice
        deployed = quantizer.quantize(qat_model)
        assert torch.equal(quiet(deployed, inputs), after)
        assert smoothed(deployed) == smoothed(qat_model)
    assert not torch.equal(model.one.weight, before["one.weight"])


def test_without_rounding_gradients_are_those_of_the_float_model() -> None:
    """They reach the user's weights through the factors."""
    quantizer, model, _ = calibrated(Spiky(), data(), qconfig=CONFIGS["everywhere"])
    floating, x = copy.deepcopy(model), data(32, 3)
    qat_model = quantizer.qat(model).train()
    switch(qat_model, fake_quantize=False)
    for each in (floating, qat_model):
        each(x).square().sum().backward()
    for name, parameter in floating.named_parameters():
        found = qat_model.get_parameter(name).grad
        # A factor and its inverse are multiplied in float32.
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-3)
    switch(qat_model, fake_quantize=True, observe=True)
    before = qat_model.one.weight_scale.detach().clone()
    with torch.no_grad():
        model.one.weight.mul_(2.0)
        qat_model(x)
    torch.testing.assert_close(qat_model.one.weight_scale.detach(), before * 2.0)


def test_copies_and_checkpoints_keep_the_factors() -> None:
    inputs = (data(8, 2),)
    quantizer, model, _ = calibrated(Spiky(), data(), qconfig=CONFIGS["everywhere"])
    qat_model = quantizer.qat(model)
    steps(quantizer, qat_model, (data(32, 3),), 3)
    expected = quiet(qat_model, inputs)
    average = copy.deepcopy(qat_model)
    steps(quantizer, qat_model, (data(32, 4),), 3)
    assert torch.equal(quiet(average, inputs), expected)
    assert torch.equal(quiet(quantizer.quantize(average), inputs), expected)

    # Another process begins with weights that were trained already, and then loads all of it.
    saved = average.state_dict()
    resumed = Spiky()
    resumed.load_state_dict({key: saved[key] for key in resumed.state_dict()})
    other, resumed, _ = calibrated(resumed, data(), qconfig=CONFIGS["everywhere"])
    second = other.qat(resumed)
    second.load_state_dict(saved)
    assert torch.equal(quiet(second, inputs), expected)
    assert torch.equal(quiet(other.quantize(second), inputs), expected)


class Optional(Spiky):
    """It has two kinds of calls."""

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y: Tensor = super().forward(x)
        return y + x[:, :5] if more else y


def begun(spread: float) -> tuple[Quantizer, nn.Module, Any]:
    """Before training; ``spread`` decides on the factors."""
    model = Optional()
    model.one.weight.data[:, 3] *= spread
    quantizer, model, _ = calibrated(model, data(), qconfig=CONFIGS["everywhere"])
    return quantizer, model, quantizer.qat(model)


def trained() -> tuple[dict[str, Any], Tensor]:
    """A checkpoint, and what its model computes of ``data(8, 2)``."""
    quantizer, _, qat_model = begun(50.0)
    steps(quantizer, qat_model, (data(32, 3),), 3)
    return copy.deepcopy(qat_model.state_dict()), quiet(qat_model, (data(8, 2),))


@pytest.mark.parametrize("how", ["itself", "copy", "assign"])
def test_a_checkpoint_of_other_weights(how: str) -> None:
    """Its factors are deployed, not those of the weights that the model began with."""
    saved, expected = trained()
    quantizer, _, qat_model = begun(1.0)
    if how == "copy":
        qat_model = copy.deepcopy(copy.deepcopy(qat_model))
    names = [name for name in saved if name.endswith("smooth_factor")]
    assert names
    for name in names:
        assert not torch.equal(qat_model.get_buffer(name), saved[name])
    qat_model.load_state_dict(copy.deepcopy(saved), assign=how == "assign")
    for name in names:
        assert torch.equal(qat_model.get_buffer(name), saved[name])
    assert torch.equal(quiet(qat_model, (data(8, 2),)), expected)
    assert torch.equal(quiet(quantizer.quantize(qat_model), (data(8, 2),)), expected)


def test_a_checkpoint_is_of_one_copy() -> None:
    saved, expected = trained()
    quantizer, _, qat_model = begun(1.0)
    inputs = (data(8, 2),)
    twin = copy.deepcopy(qat_model)
    before = quiet(twin, inputs)
    qat_model.load_state_dict(saved)
    assert torch.equal(quiet(quantizer.quantize(twin), inputs), before)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), expected)


def test_new_kinds_of_calls_of_a_loaded_model() -> None:
    saved, _ = trained()
    quantizer, _, qat_model = begun(1.0)
    early = quantizer.quantize(qat_model)
    qat_model.load_state_dict(saved)
    deployed = quantizer.quantize(qat_model)
    inputs = (data(8, 2), True)
    expected = quiet(qat_model, inputs)
    assert qat_model.state_dict().keys() == saved.keys()  # no tensor of its own
    x = data(8, 2)
    torch.testing.assert_close(expected - x[:, :5], quiet(qat_model, (x,)))
    assert torch.equal(quiet(deployed, inputs), expected)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), expected)
    with pytest.raises(CaptureFailed, match="no longer has the weights that were deployed"):
        early(*inputs)


def test_new_kinds_of_calls_are_refused_where_weights_are_elsewhere() -> None:
    saved, _ = trained()
    quantizer, _, qat_model = begun(1.0)
    twin = copy.deepcopy(qat_model)
    twin.load_state_dict(saved)
    deployed = quantizer.quantize(twin)
    with pytest.raises(CaptureFailed, match="a copy of the QAT model was deployed"):
        deployed(data(8, 2), True)
    qat_model.load_state_dict(saved, assign=True)
    with pytest.raises(CaptureFailed, match=r"one\.weight .*replaced.*without assign=True"):
        qat_model(data(8, 2), True)


def test_a_transformer_in_several_kinds_of_calls() -> None:
    """One is captured while training; layers that it shares have the same factors and scales."""
    skip_beside_ipex()
    model, inputs = MODELS["tiny_transformer"](), example("tiny_transformer", 8)
    quantizer, model, _ = calibrated(model, *inputs, qconfig=CONFIGS["everywhere"])
    qat_model = quantizer.qat(model)
    assert smoothed(qat_model)
    steps(quantizer, qat_model, inputs)
    deployed = quantizer.quantize(qat_model)
    for batch in (1, 5):
        inputs = example("tiny_transformer", batch)
        assert torch.equal(quiet(deployed, inputs), quiet(qat_model, inputs))


def test_what_falls_back_afterwards() -> None:
    quantizer, model, _ = calibrated(Spiky(), data(), qconfig=CONFIGS["everywhere"])
    qat_model = quantizer.qat(model)
    steps(quantizer, qat_model, (data(32, 3),), 3)
    amp_model = quantizer.amp(model)
    amp_model(data())
    quantizer.fallback(amp_model, num=3)
    deployed = quantizer.quantize(qat_model)
    assert not deployed.plan.quantized
    torch.testing.assert_close(quiet(deployed, (data(8),)), quiet(model, (data(8),)))


def test_what_would_have_to_follow_the_weights() -> None:
    config = QConfig(transforms=[SmoothQuant(0.5), BiasCorrection()])
    quantizer, model, _ = calibrated(Spiky(), data(), qconfig=config)
    with pytest.raises(InvalidConfig, match=r"bias_correction.*leave it out"):
        quantizer.qat(model)
    optional = QConfig(transforms=[SmoothQuant(0.5), BiasCorrection(always=False)])
    quantizer, model, _ = calibrated(Spiky(), data(), qconfig=optional)
    assert [str(x) for x in quantizer.qat(model).plan["one"].transforms] == [str(SmoothQuant(0.5))]
