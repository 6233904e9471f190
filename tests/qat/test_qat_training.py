"""A QAT model is trained like any module: modes, copies, checkpoints, compilers, devices."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, example, normal
from qat_training import FOUR_BITS, calibrated, loss_of, quiet, steps, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from torch_quant import QConfig, Quantizer

pytestmark = pytest.mark.usefixtures("grad")

METHODS = ("fixed", "lsq", "lsq_plus", "pact")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "mobile_cnn"])
def test_what_was_trained_is_deployed(name: str, method: str) -> None:
    quantizer, model, inputs = calibrated(name, qconfig=FOUR_BITS)
    before = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model, method)
    losses = steps(quantizer, qat_model, inputs, 4)
    assert losses[-1] < losses[0]
    trained = quiet(qat_model.eval(), inputs)
    deployed = quantizer.quantize(qat_model)
    assert torch.equal(quiet(deployed, inputs), trained)
    assert not torch.equal(trained, before)
    assert deployed.plan.quantized == qat_model.plan.quantized
    steps(quantizer, qat_model, inputs, 1)  # a snapshot: it does not follow
    assert torch.equal(quiet(deployed, inputs), trained)
    assert all(p.requires_grad is False for p in deployed.parameters())


def test_the_parameters_are_the_models_own() -> None:
    quantizer, model, inputs = calibrated("small_cnn")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    qat_model = quantizer.qat(model)
    own = dict(model.named_parameters())
    mine = dict(qat_model.named_parameters())
    assert all(mine[name] is parameter for name, parameter in own.items())
    extra = sorted(set(mine) - set(own))
    assert "conv.input_scale" in extra
    assert "conv.weight_scale" in extra
    assert set(before) <= set(qat_model.state_dict())
    steps(quantizer, qat_model, inputs)
    after = model.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in own)
    buffers = set(before) - set(own)
    assert all(torch.equal(after[name], before[name]) for name in buffers)  # frozen statistics
    assert not model.training


def test_batch_norms_get_gradients_through_the_fold() -> None:
    quantizer, model, inputs = calibrated("small_cnn")
    qat_model = quantizer.qat(model).train()
    loss_of(qat_model(*inputs)).backward()
    for norm in (model.bn, model.block.bn1, model.block.bn2):
        assert norm.weight.grad.abs().sum() > 0
        assert norm.bias.grad.abs().sum() > 0


def test_names_are_those_of_the_quantized_model() -> None:
    quantizer, model, _ = calibrated("tiny_transformer")
    ours = set(quantizer.qat(model).state_dict())
    theirs = set(quantizer.quantize(model).state_dict())
    assert theirs <= ours
    ranges = {name for name in ours if name.endswith("_range")}
    assert {f"{name.removesuffix('range')}scale" for name in ranges} <= theirs
    assert ours == theirs | set(model.state_dict()) | ranges | {"qat_switches"}


def test_groups_separate_scales() -> None:
    quantizer, model, _ = calibrated("mlp")
    qat_model = quantizer.qat(model)
    model[0].bias.requires_grad_(False)
    weights, scales = quantizer.parameter_groups(qat_model, lr=1e-2, scale_lr=1e-5)
    assert len(weights["params"]) == len(list(model.parameters())) - 1
    assert len(scales["params"]) == 6
    assert (weights["lr"], scales["lr"], scales["weight_decay"]) == (1e-2, 1e-5, 0.0)
    (only,) = quantizer.parameter_groups(quantizer.qat(model, "fixed"), lr=1e-2, scale_lr=1e-5)
    assert len(only["params"]) == len(weights["params"])


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_the_same_as_going_on(method: str) -> None:
    """Weights, scales and the optimizer go through a file, into another model object."""
    quantizer, model, inputs = calibrated("mobile_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model, method)
    groups = quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=1e-3)
    optimizer = torch.optim.Adam(groups)
    train(qat_model, inputs, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": qat_model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = quantizer.state_dict()
    expected = train(qat_model, inputs, optimizer, 3)

    other, again = Quantizer("reference", qconfig=FOUR_BITS), MODELS["mobile_cnn"]()
    other.load_state_dict(saved)
    resumed = other.qat(again, method, example_inputs=inputs)
    groups = other.parameter_groups(resumed, lr=1e-3, scale_lr=1e-3)
    optimizer = torch.optim.Adam(groups)
    file.seek(0)
    checkpoint_ = torch.load(file, weights_only=True)
    resumed.load_state_dict(checkpoint_["model"])
    optimizer.load_state_dict(checkpoint_["optimizer"])
    assert train(resumed, inputs, optimizer, 3) == expected
    for name, x in qat_model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name
    ours, theirs = (q.quantize(m) for q, m in ((other, resumed), (quantizer, qat_model)))
    assert torch.equal(quiet(ours, inputs), quiet(theirs, inputs))


def test_a_copy_is_independent_and_can_be_deployed() -> None:
    quantizer, model, inputs = calibrated("mobile_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    copied = copy.deepcopy(qat_model)
    first = quiet(copied, inputs)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    steps(quantizer, copied, inputs)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert torch.equal(quiet(qat_model, inputs), first)
    trained = quiet(copied, inputs)
    assert not torch.equal(trained, first)
    assert torch.equal(quiet(quantizer.quantize(copied), inputs), trained)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), first)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_an_average_of_weights() -> None:
    quantizer, model, inputs = calibrated("mlp", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    average = AveragedModel(qat_model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=1e-2)
    for _ in range(3):
        train(qat_model, inputs, optimizer, 1)
        average.update_parameters(qat_model)
    expected = quiet(average, inputs)
    assert not torch.equal(expected, quiet(qat_model, inputs))
    assert torch.equal(quiet(quantizer.quantize(average.module), inputs), expected)


def test_modes() -> None:
    quantizer, model, inputs = calibrated("small_cnn")
    qat_model = quantizer.qat(model)
    assert not qat_model.training
    expected = quiet(qat_model, inputs)
    assert qat_model.train() is qat_model
    assert qat_model.training
    assert qat_model.block.training
    assert not torch.equal(quiet(qat_model, inputs), expected)  # batch norms
    assert not model.training
    assert not qat_model.eval().training


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles(backend: str) -> None:
    quantizer, model, inputs = calibrated("mobile_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    loss = loss_of(qat_model(*inputs))
    loss.backward()
    expected = {n: p.grad.clone() for n, p in qat_model.named_parameters()}
    qat_model.zero_grad()
    compiled = torch.compile(qat_model, backend=backend)
    again = loss_of(compiled(*inputs))
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, parameter in qat_model.named_parameters():
        # Decomposed operators sum in another order.
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_autocast() -> None:
    quantizer, model, inputs = calibrated("mlp")
    qat_model = quantizer.qat(model)
    expected = quiet(qat_model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = qat_model(*inputs)
    assert y.dtype == torch.bfloat16
    loss_of(y.float()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in qat_model.parameters())
    error = (y.detach().float() - expected).square().mean() / expected.square().mean()
    assert float(error) < 1e-3  # bfloat16 has 8 bits: -30 dB is far above its noise


def test_gradient_checkpointing() -> None:
    quantizer, model, inputs = calibrated("mobile_cnn")
    qat_model = quantizer.qat(model)
    loss_of(qat_model(*inputs)).backward()
    expected = {n: p.grad.clone() for n, p in qat_model.named_parameters()}
    qat_model.zero_grad()
    x = inputs[0].clone().requires_grad_()
    loss_of(checkpoint(qat_model, x, use_reentrant=False)).backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in qat_model.named_parameters())


def test_moving_it_moves_the_float_model() -> None:
    """They share every tensor, so they cannot be on two devices; checked by a type on the CPU."""
    quantizer, model, inputs = calibrated("small_cnn")
    qat_model = quantizer.qat(model)
    qat_model.to(torch.float64)
    assert model.bn.running_mean.dtype == torch.float64
    assert model.conv.weight.dtype == torch.float64
    assert qat_model.conv.weight is model.conv.weight
    assert qat_model.bn.running_mean is model.bn.running_mean
    qat_model.to(torch.float32)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), quiet(qat_model, inputs))


def test_another_kind_of_call_is_captured_while_training() -> None:
    """Labels make another kind of call, which was not calibrated."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.head(self.body(x).relu())
            if labels is None:
                return {"logits": logits}
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    quantizer, model, (x,) = calibrated(Classifier(), normal(16, 8))
    qat_model = quantizer.qat(model)
    names = [name for name, _ in qat_model.named_parameters()]
    labels = torch.arange(16) % 4
    optimizer = torch.optim.SGD(quantizer.parameter_groups(qat_model, lr=0.1, scale_lr=1e-3))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        outputs = qat_model(x, labels=labels)
        outputs["loss"].backward()
        optimizer.step()
        losses.append(float(outputs["loss"].detach()))
    assert losses[-1] < losses[0]
    assert [name for name, _ in qat_model.named_parameters()] == names
    with torch.no_grad():
        both = qat_model(x, labels=labels)["logits"], qat_model(x)["logits"]
        assert torch.equal(*both)  # one set of weights and scales
        deployed = quantizer.quantize(qat_model)
        assert torch.equal(deployed(x)["logits"], both[0])
        assert torch.equal(deployed(x, labels=labels)["logits"], both[0])


def test_kernels_run_what_was_trained() -> None:
    quantizer, model, inputs = calibrated("mobile_cnn", backend="onednn")
    qat_model = quantizer.qat(model)
    steps(quantizer, qat_model, inputs)
    expected, actual = quiet(qat_model, inputs), quiet(quantizer.quantize(qat_model), inputs)
    noise = (actual - expected).square().mean() / expected.square().mean()
    assert float(noise) < 1e-3  # steps that round the other way; 8 bits alone make -40 dB
    other = quiet(quantizer.quantize(qat_model, backend="reference"), inputs)
    noise = (other - expected).square().mean() / expected.square().mean()
    assert float(noise) < 1e-3


@pytest.mark.parametrize("name", ["mlp", "tiny_transformer"])
def test_the_quantizer_is_as_it_was(name: str) -> None:
    """Neither calibrated ranges nor the float graphs are changed by making a QAT model."""
    quantizer, model, inputs = calibrated(name)
    expected, output = quiet(quantizer.quantize(model), inputs), quiet(model, inputs)
    quantizer.qat(model)
    assert torch.equal(quiet(quantizer.quantize(model), inputs), expected)
    assert torch.equal(quiet(quantizer.calib(model), inputs), output)
    assert example(name, 8)[0].shape == inputs[0].shape


def test_dtypes_of_a_config_of_one_side() -> None:
    config: dict[str, Any] = {"qconfig": QConfig.from_dict(FOUR_BITS.to_dict())}
    quantizer, model, inputs = calibrated("mlp", **config)
    assert quiet(quantizer.qat(model), inputs).dtype == torch.float32


def test_scales_move_by_a_share_of_themselves() -> None:
    """Adam's first step moves a parameter by its rate, whatever the gradient is."""
    quantizer, model, inputs = calibrated("mobile_cnn")
    qat_model = quantizer.qat(model)
    absolute = quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=0.01)
    groups = quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=0.01, relative=True)
    assert len(absolute) == 2
    assert len(groups) > 3
    scales = [scale for group in groups[1:] for scale in group["params"]]
    assert {id(x) for x in scales} == {id(x) for x in absolute[1]["params"]}
    before = [scale.detach().clone() for scale in scales]
    optimizer = torch.optim.Adam(groups)
    train(qat_model, inputs, optimizer, 1)
    for scale, old in zip(scales, before, strict=True):
        moved = scale.grad.abs() > 1e-6  # type: ignore[union-attr]
        share = float((scale.detach() - old).abs()[moved].mean() / old.abs().mean())
        if moved.any():
            assert 0.007 < share < 0.0145  # 0.01, within half a power of two
    with torch.no_grad():
        scales[0].zero_()  # one that is 0 has no size
    quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=0.01, relative=True)
