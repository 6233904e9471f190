"""Training begins with the codes that a weight method chose, not with the nearest ones."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from models import MODELS, example, normal
from qat_training import calibrated, quiet, skip_beside_ipex, steps
from torch import Tensor, nn

from torch_quant import (
    GPTQ,
    Distillation,
    QatSchedule,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    switch,
)

pytestmark = pytest.mark.usefixtures("grad")

WEIGHT = QuantSpec.of("int4", symmetric=True, per_channel=True)
CONFIGS = {
    "plain": QConfig(weight=WEIGHT, method=GPTQ()),
    "smoothed": QConfig(weight=WEIGHT, method=GPTQ(), transforms=[SmoothQuant(0.6)]),
}


class Mixer(nn.Module):
    """Layers that read one tensor whose channels are of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("spread", torch.linspace(-2, 2, 16).exp())
        self.one, self.two = nn.Linear(16, 24), nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        x = self.one(x * self.spread).tanh() * self.two(x * self.spread)
        return self.head(x) * (2.0 if twice else 1.0)


def made(name: str, config: QConfig) -> tuple[Quantizer, nn.Module, tuple[Any, ...]]:
    if name == "mixer":
        return calibrated(Mixer(), normal(256, 16), qconfig=config)
    return calibrated(MODELS[name](), *example(name, 16), qconfig=config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["mixer", "mobile_cnn", "tiny_transformer"])
def test_the_first_step_is_what_is_deployed(name: str, config: str) -> None:
    if name == "tiny_transformer":
        skip_beside_ipex()
    quantizer, model, inputs = made(name, CONFIGS[config])
    before = {key: x.clone() for key, x in model.state_dict().items()}
    expected = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model, edge_bits=None)
    assert torch.equal(quiet(qat_model, inputs), expected)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())

    teacher = Distillation(qat_model).teacher
    torch.testing.assert_close(quiet(teacher, inputs), quiet(model, inputs), rtol=1e-4, atol=1e-4)

    for _ in range(2):
        steps(quantizer, qat_model, inputs, 2)
        trained = quiet(qat_model, inputs)
        assert not torch.equal(trained, expected)
        assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in qat_model.parameters())


def test_where_norms_move() -> None:
    """Where a norm is unfolded the offset is that of the folded weight, as when it is deployed."""
    quantizer, model, inputs = made("mobile_cnn", CONFIGS["plain"])
    qat_model = quantizer.qat(model, edge_bits=None).train()
    schedule = QatSchedule(qat_model, freeze_bn_at=3)
    optimizer = torch.optim.SGD(quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=1e-5))
    for _ in range(5):
        optimizer.zero_grad()
        loss = qat_model(*inputs).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        assert bool(loss.isfinite())
    switch(qat_model, observe=True)
    qat_model(*inputs)
    qat_model.eval()
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), quiet(qat_model, inputs))


def test_copies_and_checkpoints_keep_the_start() -> None:
    """It is in the state_dict, so a model that begins elsewhere goes on from there."""
    quantizer, model, inputs = made("mixer", CONFIGS["smoothed"])
    qat_model = quantizer.qat(model)
    steps(quantizer, qat_model, inputs, 2)
    expected = quiet(qat_model, inputs)
    copied = copy.deepcopy(qat_model)
    file = io.BytesIO()
    torch.save(qat_model.state_dict(), file)
    file.seek(0)

    other, again = Quantizer("reference", qconfig=CONFIGS["smoothed"]), Mixer()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    other.load_state_dict(quantizer.state_dict())
    resumed = other.qat(again, example_inputs=inputs)
    assert not torch.equal(quiet(resumed, inputs), expected)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for whose, trained in ((quantizer, copied), (other, resumed)):
        assert torch.equal(quiet(trained, inputs), expected)
        assert torch.equal(quiet(whose.quantize(trained), inputs), expected)
    steps(other, resumed, inputs, 2)
    assert torch.equal(quiet(other.quantize(resumed), inputs), quiet(resumed, inputs))


def test_new_kinds_of_calls() -> None:
    quantizer, model, inputs = made("mixer", CONFIGS["plain"])
    qat_model = quantizer.qat(model)
    steps(quantizer, qat_model, inputs, 2)
    with torch.no_grad():
        twice = qat_model(*inputs, twice=True)
        assert torch.equal(twice, qat_model(*inputs) * 2.0)
        assert torch.equal(quantizer.quantize(qat_model)(*inputs, twice=True), twice)


def test_it_is_better_than_the_nearest_codes() -> None:
    """On the same scales, which are what training began with before."""
    quantizer, model, inputs = made("mixer", CONFIGS["plain"])
    qat_model = quantizer.qat(model, edge_bits=None)
    nearest = copy.deepcopy(qat_model)
    offsets = [x for name, x in nearest.named_buffers() if name.endswith("_offset")]
    assert len(offsets) == 3
    for each in offsets:
        each.zero_()
    expected = quiet(model, inputs)
    errors = [
        float((quiet(each, inputs) - expected).square().mean()) for each in (qat_model, nearest)
    ]
    assert errors[0] < 0.8 * errors[1]
