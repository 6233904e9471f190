"""Batch norms train as in the float model, and what was trained is deployed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import MODELS, normal
from qat_training import FOUR_BITS, calibrated, loss_of, quiet, steps, train
from torch import Tensor, nn

from torch_quant import FLOAT, InvalidConfig, QatSchedule, QConfig, Quantizer, QuantSpec, switch
from torch_quant.convert.quantized import quantized_graphs

pytestmark = pytest.mark.usefixtures("grad")

FINE = QConfig(
    input=FLOAT,
    weight=QuantSpec.of(bits=16, signed=True, symmetric=True, per_channel=True),
)
"""So fine that only the algebra is left to err. Ranges of activations are those of eval mode."""


class Norms(nn.Module):
    """A norm behind a convolution with a bias, one by itself, one behind a linear layer."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=momentum)
        self.alone = nn.BatchNorm2d(8, affine=False)
        self.fc, self.bn1 = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn(self.conv(x)).relu()
        x = self.alone(x.tanh())
        return self.bn1(self.fc(x.mean((2, 3)))), self.bn2(self.up(x))


def trained_norms(momentum: float | None = 0.1) -> nn.Module:
    """Norms whose statistics and gains are those of a model that was trained."""
    torch.manual_seed(0)
    model = Norms(momentum)
    for norm in (model.bn, model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, -1.0, 2.0)
    for _ in range(20):
        model(torch.randn(16, 3, 8, 8) * 2 + 1)
    return model.eval()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_train_mode_is_that_of_the_float_model(momentum: float | None) -> None:
    """Outputs, gradients and running statistics, up to rounding to 16 bits."""
    model = trained_norms(momentum)
    quantizer, model, (x,) = calibrated(model, normal(16, 3, 8, 8), qconfig=FINE, capture="whole")
    qat_model = quantizer.qat(model, "fixed").train()
    floating = copy.deepcopy(model).train()
    ours, theirs = qat_model(x), floating(x)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for one, two in zip(ours, theirs, strict=True):
        # Half a step of 16 bits, and of what a convolution sums up.
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)
    whole = sum(float(p.grad.norm()) ** 2 for p in floating.parameters()) ** 0.5
    for (name, mine), (_, other) in zip(
        model.named_parameters(), floating.named_parameters(), strict=True
    ):
        assert float((mine.grad - other.grad).norm()) < 5e-3 * whole, name
    for (name, mine), (_, other) in zip(
        model.named_buffers(), floating.named_buffers(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m)
    assert int(model.bn.num_batches_tracked) == 21


def test_frozen_norms_compute_what_is_deployed() -> None:
    quantizer, model, (x,) = calibrated(trained_norms(), normal(16, 3, 8, 8), qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    expected = quiet(qat_model, (x,))
    before = {name: y.clone() for name, y in model.named_buffers()}
    switch(qat_model.train(), freeze_bn=True)
    outputs = qat_model(x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    loss_of(outputs).backward()
    assert all(torch.equal(y, before[name]) for name, y in model.named_buffers())
    for norm in (model.bn, model.bn1, model.bn2):
        assert norm.weight.grad.abs().sum() > 0
    switch(qat_model, freeze_bn=False)
    assert not torch.equal(qat_model(x)[0], expected[0])
    assert not torch.equal(model.bn.running_mean, before["bn.running_mean"])


def test_one_norm_is_frozen_as_in_pytorch() -> None:
    quantizer, model, (x,) = calibrated(trained_norms(), normal(16, 3, 8, 8))
    qat_model = quantizer.qat(model).train()
    qat_model.bn.eval()
    before = {name: y.clone() for name, y in model.named_buffers()}
    qat_model(x)
    assert torch.equal(model.bn.running_mean, before["bn.running_mean"])
    assert not torch.equal(model.bn2.running_mean, before["bn2.running_mean"])
    assert not torch.equal(model.alone.running_mean, before["alone.running_mean"])


def statistics(model: nn.Module, name: str) -> Tensor:
    """A copy of the running mean of a norm."""
    found: Tensor = model.get_buffer(f"{name}.running_mean").clone()
    return found


@pytest.mark.parametrize("capture", ["modules", "whole"])
def test_a_norm_in_eval_mode_stays_so_when_others_are_unfrozen(capture: str) -> None:
    quantizer, model, (x,) = calibrated(trained_norms(), normal(16, 3, 8, 8), capture=capture)
    qat_model = quantizer.qat(model).train()
    qat_model.bn.eval()
    before = {name: statistics(model, name) for name in ("bn", "bn2")}
    switch(qat_model, freeze_bn=True)
    qat_model(x)
    copied = copy.deepcopy(qat_model)
    assert torch.equal(statistics(model, "bn2"), before["bn2"])
    for each in (qat_model, copied):
        switch(each, freeze_bn=False)
        each(x)
        assert torch.equal(statistics(each, "bn"), before["bn"])
        assert not torch.equal(statistics(each, "bn2"), before["bn2"])
    qat_model.train()(x)  # of the whole model, as in PyTorch
    assert not torch.equal(statistics(model, "bn"), before["bn"])


class Frozen(nn.Module):
    """As those of detection models: by its running statistics, in train mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.rand(8))
        self.register_buffer("running_var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=False)


def test_norms_that_are_frozen_by_design_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(), nn.Tanh(), Frozen(), nn.BatchNorm2d(8))
    quantizer, model, (x,) = calibrated(model.eval(), normal(16, 3, 8, 8))
    before = {name: y.clone() for name, y in model.named_buffers()}
    quantizer.qat(model).train()(x)
    moved = {name for name, y in model.named_buffers() if not torch.equal(y, before[name])}
    assert moved == {"4.running_mean", "4.running_var", "4.num_batches_tracked"}


@pytest.mark.parametrize("name", ["bn", "alone"])
def test_momentum_may_change(name: str) -> None:
    """As schedules of it do: one body for all momenta. Of 1, the statistics are the batch's."""
    model = trained_norms()
    quantizer, model, (x,) = calibrated(model, normal(16, 3, 8, 8), qconfig=FINE, capture="whole")
    qat_model = quantizer.qat(model)
    switch(qat_model, observe=True)  # the folded weights leave their range as statistics move
    qat_model.train()
    floating = copy.deepcopy(model).train()
    for momentum in (0.1, 0.5, None, 1.0):
        for each in (qat_model, floating):
            each.get_submodule(name).momentum = momentum
            quiet(each, (x,))
        # Of a weight rounded to 16 bits.
        ours, theirs = statistics(model, name), statistics(floating, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    ((_, graph),) = quantized_graphs(qat_model)
    assert len(graph.modes) == 2  # and the deployed one


def test_layers_with_norms_that_fell_back() -> None:
    """It trains in bfloat16, its norm moves, and what was trained is deployed."""
    quantizer, model, (x,) = calibrated(trained_norms(), normal(16, 3, 8, 8))
    amp_model = quantizer.amp(model)
    quiet(amp_model, (x,))
    quantizer.fallback(amp_model, num=3, dtype=torch.bfloat16)
    qat_model = quantizer.qat(model).train()
    before = {name: y.clone() for name, y in model.named_buffers()}
    floating = copy.deepcopy(model).train()
    ours, theirs = qat_model(x), floating(x)
    for one, two in zip(ours, theirs, strict=True):
        # Some roundings to 8 bits of mantissa, of values of size 1.
        assert one.dtype == torch.float32
        assert float((one - two).detach().norm() / two.detach().norm()) < 0.03
    loss_of(ours).backward()
    loss_of(theirs).backward()
    pairs = [(model.get_parameter(name).grad, x.grad) for name, x in floating.named_parameters()]
    apart = sum(float((one - two).norm()) ** 2 for one, two in pairs) ** 0.5
    assert apart < 0.05 * sum(float(two.norm()) ** 2 for _, two in pairs) ** 0.5
    assert all(not torch.equal(y, before[name]) for name, y in model.named_buffers())
    trained = quiet(qat_model.eval(), (x,))
    deployed = quiet(quantizer.quantize(qat_model), (x,))
    assert all(torch.equal(a, b) for a, b in zip(deployed, trained, strict=True))


def test_norms_of_several_processes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained_norms())
    quantizer, model, _ = calibrated(model, normal(16, 3, 8, 8))
    with caplog.at_level("WARNING", "torch_quant"):
        quantizer.qat(model)
    assert "bn, alone, bn1, bn2: a QAT model that trains in several processes" in caplog.text
    assert "freeze_bn_at=0" in caplog.text


@pytest.mark.parametrize("method", ["fixed", "lsq", "lsq_plus", "pact"])
@pytest.mark.parametrize("name", ["small_cnn", "mobile_cnn"])
def test_what_was_trained_is_deployed(name: str, method: str) -> None:
    quantizer, model, inputs = calibrated(name, qconfig=FOUR_BITS)
    before = {key: x.clone() for key, x in model.named_buffers()}
    qat_model = quantizer.qat(model, method).train()
    losses = steps(quantizer, qat_model, inputs, 4)
    assert losses[-1] < losses[0]
    moved = [key for key, x in model.named_buffers() if not torch.equal(x, before[key])]
    assert len(moved) == len(before)
    trained = quiet(qat_model.eval(), inputs)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), trained)
    copied = copy.deepcopy(qat_model)
    steps(quantizer, copied.train(), inputs, 1)
    assert torch.equal(quiet(qat_model, inputs), trained)
    after = quiet(copied.eval(), inputs)
    assert not torch.equal(after, trained)
    assert torch.equal(quiet(quantizer.quantize(copied), inputs), after)


def test_a_gain_of_zero() -> None:
    """Nothing is divided by it, and it learns."""
    quantizer, model, (x,) = calibrated(trained_norms(), normal(16, 3, 8, 8))
    with torch.no_grad():
        model.bn.weight[:2] = torch.tensor([0.0, 1e-30])
        model.bn.bias[:2] = 0.5
    quantizer.calib(model)(x)
    qat_model = quantizer.qat(model).train()
    outputs = qat_model(x)
    loss_of(outputs).backward()
    floating = copy.deepcopy(model).train()
    loss_of(floating(x)).backward()
    assert all(bool(y.isfinite().all()) for y in outputs)
    ours, theirs = model.bn.weight.grad, floating.bn.weight.grad
    assert bool(ours.isfinite().all())
    assert ours[0] != 0
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05 * float(theirs.abs().max()))


def test_resuming_while_statistics_move() -> None:
    quantizer, model, inputs = calibrated("mobile_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    schedule = QatSchedule(qat_model, observe_until=3, freeze_bn_at=4)
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=1e-3)

    def go_on(
        qat_model: nn.Module, schedule: QatSchedule, optimizer: torch.optim.Optimizer
    ) -> None:
        train(qat_model, inputs, optimizer, 1)
        schedule.step()

    go_on(qat_model, schedule, optimizer)
    go_on(qat_model, schedule, optimizer)
    saved, state = copy.deepcopy(qat_model.state_dict()), quantizer.state_dict()
    for _ in range(4):
        go_on(qat_model, schedule, optimizer)

    other, again = Quantizer("reference", qconfig=FOUR_BITS), MODELS["mobile_cnn"]()
    other.load_state_dict(state)
    resumed = other.qat(again, example_inputs=inputs).train()
    resumed.load_state_dict(saved)
    schedule = QatSchedule(resumed, observe_until=3, freeze_bn_at=4)
    assert schedule.steps == 2
    optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-3)
    for _ in range(4):
        go_on(resumed, schedule, optimizer)
    assert repr(schedule) == "QatSchedule(step 6: batch norms frozen)"
    for name, x in qat_model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def test_a_pickle_in_train_mode() -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    again = pickle.loads(pickle.dumps(qat_model))
    assert torch.equal(again(*inputs), qat_model(*inputs))
    assert torch.equal(again.bn.running_mean, model.bn.running_mean)
    assert torch.equal(quiet(again.eval(), inputs), quiet(qat_model.eval(), inputs))


@pytest.mark.parametrize("capture", ["modules", None])
def test_norms_of_models_in_pieces(capture: str | None) -> None:
    quantizer, model, inputs = calibrated("small_cnn", capture=capture)
    qat_model = quantizer.qat(model).train()
    before = {key: x.clone() for key, x in model.named_buffers()}
    loss_of(qat_model(*inputs)).backward()
    moved = {key for key, x in model.named_buffers() if not torch.equal(x, before[key])}
    assert moved == set(before)
    switch(qat_model, freeze_bn=True)
    before = {key: x.clone() for key, x in model.named_buffers()}
    qat_model(*inputs)
    assert all(torch.equal(x, before[key]) for key, x in model.named_buffers())
    trained = quiet(qat_model.eval(), inputs)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), trained)


class Counted(Tensor):
    """Counts how often its values are read, which waits for an accelerator."""

    reads = 0

    def tolist(self) -> list[int]:
        Counted.reads += 1
        return super().tolist()


def test_a_call_reads_the_switches_once() -> None:
    """Not once for each of the parts, and of them all follow what is set between calls."""
    quantizer, model, inputs = calibrated("small_cnn", capture="modules")
    qat_model = quantizer.qat(model).train()
    qat_model._buffers["qat_switches"] = qat_model.qat_switches.as_subclass(Counted)
    Counted.reads = 0
    qat_model(*inputs)
    assert Counted.reads == 1
    before = {key: x.clone() for key, x in model.named_buffers()}
    with torch.no_grad():
        qat_model.qat_switches[3] = 1  # as a checkpoint does
    qat_model(*inputs)
    assert Counted.reads == 2
    assert all(torch.equal(x, before[key]) for key, x in model.named_buffers())


@pytest.mark.long("the compiler works twice")
def test_a_compiler_follows_the_modes() -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    copied = copy.deepcopy(qat_model)
    compiled = torch.compile(copied, backend="aot_eager")
    for mode in (True, False, True):
        for each in (qat_model, copied):
            each.train(mode)
        # Decomposed operators sum in another order, and a sum may round to another step.
        ours, theirs = quiet(compiled, inputs), quiet(qat_model, inputs)
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    switch(qat_model, freeze_bn=True)
    switch(copied, freeze_bn=True)
    ours, theirs = quiet(compiled, inputs), quiet(qat_model, inputs)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    torch.testing.assert_close(copied.bn.running_mean, qat_model.bn.running_mean)


def test_bad_schedules() -> None:
    quantizer, model, _ = calibrated("small_cnn")
    qat_model = quantizer.qat(model)
    with pytest.raises(InvalidConfig, match=r"observe_until=-1; expected a number of steps"):
        QatSchedule(qat_model, observe_until=-1)
    with pytest.raises(InvalidConfig, match=r"freeze_bn_at=0.5"):
        QatSchedule(qat_model, freeze_bn_at=0.5)
    with pytest.raises(InvalidConfig, match=r"lies before observe_until=5"):
        QatSchedule(qat_model, observe_until=5, quantize_from=2)
    with pytest.raises(InvalidConfig, match=r"a part of a QAT model"):
        switch(qat_model.block, observe=True)
    with pytest.raises(InvalidConfig, match=r"the module inside"):
        QatSchedule(nn.DataParallel(qat_model))


def test_in_float_until_ranges_are_known() -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train()
    schedule = QatSchedule(qat_model, quantize_from=1, freeze_bn_at=0)
    with torch.no_grad():
        # Folded and not: the same values in another order.
        torch.testing.assert_close(qat_model(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)
        schedule.step()
        assert torch.equal(qat_model(*inputs), quantizer.quantize(model)(*inputs))
    loss_of(qat_model(*inputs)).backward()
