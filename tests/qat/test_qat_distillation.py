"""The float model as a teacher, and the detector of what is not finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, example, normal
from qat_training import FOUR_BITS, calibrated, loss_of, quiet
from torch import Tensor, nn

from torch_quant import Distillation, InvalidConfig, QuantError, detect_nonfinite, switch

pytestmark = pytest.mark.usefixtures("grad")


def test_the_teacher_is_the_float_model_and_stays() -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    expected = quiet(model, inputs)
    qat_model = quantizer.qat(model, edge_bits=None).train()
    switch(qat_model, freeze_bn=True)
    distillation = Distillation(qat_model, hidden=["block", "conv"])
    # From the start, for those who have a loss of their own. Norms are folded, see below.
    torch.testing.assert_close(quiet(distillation.teacher, inputs), expected, rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.Adam(quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=2e-3))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = distillation.loss(*inputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.7 * losses[0]
    # Folded and not: the same values in another order.
    torch.testing.assert_close(quiet(distillation.teacher, inputs), expected, rtol=1e-3, atol=1e-3)
    assert set(distillation.distances) == {"block", "conv", "outputs"}
    error = F.mse_loss(quiet(qat_model, inputs), expected) / expected.square().mean()
    assert float(error) == pytest.approx(distillation.distances["outputs"], rel=0.9)
    assert torch.equal(
        quiet(quantizer.quantize(qat_model), inputs), quiet(qat_model.eval(), inputs)
    )


def test_hidden_results_are_those_of_the_modules() -> None:
    quantizer, model, inputs = calibrated("small_cnn")
    qat_model = quantizer.qat(model)
    distillation = Distillation(qat_model, hidden=["block", "bn"])
    seen: dict[str, Tensor] = {}
    for name in ("block", "bn"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.__setitem__(name, y)
        )
    quiet(model, inputs)
    switches, theirs = distillation._theirs, dict[str, Tensor]()

    def record(name: str, x: Tensor) -> None:
        theirs[name] = switches.tapped[name] = x

    switches.record = record  # type: ignore[method-assign]
    distillation.loss(*inputs)
    for name, x in seen.items():
        torch.testing.assert_close(theirs[name], x, rtol=1e-3, atol=1e-4)


def test_logits_are_compared_as_published() -> None:
    quantizer, model, inputs = calibrated("mlp", qconfig=FOUR_BITS)
    theirs = quiet(model, inputs)
    qat_model = quantizer.qat(model)
    loss = Distillation(qat_model, temperature=2.0).loss(*inputs)
    ours = quiet(qat_model, inputs)
    p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-3)


def test_wrong_questions() -> None:
    quantizer, model, _ = calibrated("mlp")
    qat_model = quantizer.qat(model)
    with pytest.raises(InvalidConfig, match=r"hidden=\['layer'\].*expected some of 0, 1"):
        Distillation(qat_model, hidden=["layer"])
    with pytest.raises(InvalidConfig, match="temperature=0"):
        Distillation(qat_model, temperature=0)
    with pytest.raises(InvalidConfig, match=r"expected what quantizer\.qat"):
        Distillation(model)


def test_the_first_site_that_is_not_finite_is_named() -> None:
    quantizer, model, inputs = calibrated("mlp")
    qat_model = quantizer.qat(model).train()
    expected = qat_model(*inputs)
    with detect_nonfinite(qat_model):
        assert torch.equal(qat_model(*inputs), expected)
        loss_of(qat_model(*inputs)).backward()
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    assert not bool(qat_model(*inputs).isfinite().all())
    with (
        detect_nonfinite(qat_model),
        pytest.raises(QuantError, match=r"^2: the result holds NaN.*in the forward pass"),
    ):
        qat_model(*inputs)


@pytest.mark.parametrize("train", [False, True])
def test_a_scale_or_a_weight_that_is_not_finite(train: bool) -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model).train(train)
    with detect_nonfinite(qat_model):
        loss_of(qat_model(*inputs)).backward()
        with torch.no_grad():
            qat_model.block.conv2.input_scale.fill_(float("inf"))
        with pytest.raises(QuantError, match=r"block.conv2: the input's scale holds infinity"):
            qat_model(*inputs)
        with torch.no_grad():
            qat_model.conv.weight[0] = float("nan")
        with pytest.raises(QuantError, match=r"^conv: the weight holds NaN"):
            qat_model(*inputs)


def test_a_loss_that_is_not_finite() -> None:
    quantizer, model, inputs = calibrated("mlp")
    qat_model = quantizer.qat(model).train()
    with detect_nonfinite(qat_model):
        loss = (qat_model(*inputs) * 0).sqrt().sum()  # infinity times 0
        with pytest.raises(QuantError, match="the gradient of 4: the result holds NaN"):
            loss.backward()


def test_a_detector_of_models_in_pieces() -> None:
    quantizer, model, _ = calibrated(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), normal(4, 8), capture="modules"
    )
    qat_model = quantizer.qat(model)
    with (
        detect_nonfinite(qat_model),
        pytest.raises(QuantError, match=r"^0: the input holds infinity"),
    ):
        qat_model(normal(4, 8) / 0)
    assert MODELS["mlp"]() is not None
    assert example("mlp")
