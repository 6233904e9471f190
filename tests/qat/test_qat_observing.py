"""While a QAT model observes, its scales follow the data; its switches go with it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import normal
from qat_training import FOUR_BITS, calibrated, loss_of, quiet, steps
from torch import nn

from torch_quant import InvalidConfig, QatSchedule, QuantSpec, switch
from torch_quant.qat.observing import MOMENTUM
from torch_quant.statistics import MinMaxObserver

pytestmark = pytest.mark.usefixtures("grad")


def test_the_range_of_an_activation_is_a_moving_average() -> None:
    quantizer, model, (x,) = calibrated(nn.Sequential(nn.Linear(8, 4)), normal(64, 8))
    qat_model = quantizer.qat(model).train()
    low, high = (float(end) for end in qat_model[0].input_range)
    assert low == pytest.approx(float(x.min()), abs=0.02)  # a step of 8 bits
    assert high == pytest.approx(float(x.max()), abs=0.02)
    switch(qat_model, observe=True)
    for scale in (3.0, 5.0):
        batch = x * scale
        qat_model(batch)
        low += MOMENTUM * (float(batch.min()) - low)
        high += MOMENTUM * (float(batch.max()) - high)
    torch.testing.assert_close(qat_model[0].input_range, torch.tensor([low, high]))
    expected = (high - low) / 255
    assert float(qat_model[0].input_scale.detach()) == pytest.approx(expected, rel=1e-5)
    switch(qat_model, observe=False)
    before = qat_model[0].input_scale.detach().clone()
    qat_model(x * 9)
    assert torch.equal(qat_model[0].input_scale, before)


def test_observing_in_float() -> None:
    """Scales follow the data before anything is rounded, and as they do while it is."""
    quantizer, model, (x,) = calibrated(nn.Sequential(nn.Linear(8, 4)), normal(64, 8))
    in_float, rounded = quantizer.qat(model).train(), quantizer.qat(model).train()
    before = {name: y.clone() for name, y in in_float[0].state_dict().items()}
    switch(in_float, observe=True, fake_quantize=False)
    switch(rounded, observe=True)
    torch.testing.assert_close(quiet(in_float, (x * 3,)), quiet(model, (x * 3,)))
    quiet(rounded, (x * 3,))
    assert float(in_float[0].input_scale.detach()) > 1.01 * float(before["input_scale"])
    for name in ("input_scale", "input_range", "weight_scale"):
        assert torch.equal(getattr(in_float[0], name), getattr(rounded[0], name)), name


def test_a_schedule_that_observes_in_float() -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    scales = {name: y for name, y in qat_model.named_parameters() if name.endswith("input_scale")}
    schedule = QatSchedule(qat_model, observe_until=3, quantize_from=3)
    assert repr(schedule) == "QatSchedule(step 0: observing, in float)"
    for _ in range(3):
        before = {name: float(y.detach()) for name, y in scales.items()}
        quiet(qat_model, (inputs[0] * 5,))
        assert all(float(y.detach()) != before[name] for name, y in scales.items())
        schedule.step()
    before = {name: float(y.detach()) for name, y in scales.items()}
    quiet(qat_model, (inputs[0] * 5,))
    assert all(float(y.detach()) == before[name] for name, y in scales.items())


def test_an_empty_batch_leaves_the_range() -> None:
    """As the last shard of a data set may be. Others that come with it are observed."""
    quantizer, model, (x,) = calibrated(nn.Sequential(nn.Linear(8, 4)), normal(64, 8))
    qat_model = quantizer.qat(model).train()
    switch(qat_model, observe=True)
    before = qat_model[0].input_range.clone()
    scale = qat_model[0].input_scale.detach().clone()
    assert qat_model(x[:0]).shape == (0, 4)
    assert torch.equal(qat_model[0].input_range, before)
    # It is computed from the range again, in float32.
    torch.testing.assert_close(qat_model[0].input_scale.detach(), scale)
    qat_model(x * 3)
    assert not torch.equal(qat_model[0].input_range, before)


@pytest.mark.parametrize("name", ["observe", "fake_quantize", "freeze_bn"])
def test_a_switch_is_a_bool(name: str) -> None:
    quantizer, model, _ = calibrated("mlp")
    qat_model = quantizer.qat(model)
    with pytest.raises(InvalidConfig, match=f"{name}='no'; expected True, False, or None"):
        switch(qat_model, **{name: "no"})
    assert qat_model.qat_switches.tolist() == [0, 0, 1, 0]


def test_eval_mode_observes_nothing() -> None:
    quantizer, model, inputs = calibrated("small_cnn")
    qat_model = quantizer.qat(model)
    switch(qat_model, observe=True)
    before = copy.deepcopy(qat_model.state_dict())
    qat_model(inputs[0] * 5)
    assert all(torch.equal(x, before[name]) for name, x in qat_model.state_dict().items())


@pytest.mark.parametrize("method", ["fixed", "lsq", "lsq_plus"])
def test_weights_have_their_present_range(method: str) -> None:
    quantizer, model, inputs = calibrated("mlp", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model, method, edge_bits=None).train()
    QatSchedule(qat_model, observe_until=9)
    steps(quantizer, qat_model, inputs, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        qat_model(*inputs)
    spec = FOUR_BITS.weight
    assert isinstance(spec, QuantSpec)
    seen = MinMaxObserver(spec.on(0).granularity)
    seen.observe(model[0].weight)
    torch.testing.assert_close(qat_model[0].weight_scale.detach(), seen.qparams(spec.on(0)).scale)
    trained = quiet(qat_model.eval(), inputs)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), trained)


def test_scales_get_gradients_of_zero() -> None:
    """So that DistributedDataParallel finds one for every parameter."""
    quantizer, model, inputs = calibrated("mobile_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model, "lsq_plus").train()
    switch(qat_model, observe=True)
    loss_of(qat_model(*inputs)).backward()
    for name, parameter in qat_model.named_parameters():
        assert parameter.grad is not None, name
        learned = name.endswith(("_scale", "_zero_point"))
        assert bool((parameter.grad == 0).all()) == learned, name


def test_switches_are_in_the_state_dict() -> None:
    quantizer, model, inputs = calibrated("small_cnn")
    qat_model = quantizer.qat(model).train()
    saved = copy.deepcopy(qat_model.state_dict())
    switch(qat_model, observe=True, freeze_bn=True)
    assert qat_model.qat_switches.tolist() == [0, 1, 1, 1]
    frozen = copy.deepcopy(qat_model.state_dict())
    copied = copy.deepcopy(qat_model)
    qat_model.load_state_dict(saved)
    qat_model(*inputs)
    assert not torch.equal(qat_model.bn.running_mean, saved["bn.running_mean"])
    qat_model.load_state_dict(frozen)
    qat_model(*inputs)
    assert torch.equal(qat_model.bn.running_mean, saved["bn.running_mean"])
    assert copied.qat_switches.tolist() == [0, 1, 1, 1]
    qat_model.load_state_dict(frozen)
    assert torch.equal(copied(*inputs), qat_model(*inputs))
