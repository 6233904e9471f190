"""Kinds of calls that were not calibrated are captured when they come."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import BACKENDS
from models import normal
from torch import Tensor, nn

from torch_quant import CaptureFailed, InvalidConfig, Quantizer, sqnr
from torch_quant.convert.quantized import quantized_graphs

X, Y = normal(6, 8), torch.arange(6) % 4


class Classifier(nn.Module):
    """A loss for labels; a mask and a second layer that only some calls take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.extra = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        deep: bool = False,
    ) -> dict[str, Tensor | None]:
        y = self.first(x).relu()
        logits = self.second(self.extra(y) if deep else y)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "torch_quant"]


def made(**settings: Any) -> tuple[nn.Module, Quantizer, nn.Module]:
    torch.manual_seed(0)
    model, quantizer = Classifier().eval(), Quantizer("reference", **settings)
    quantizer.calib(model)(X, labels=Y)
    return model, quantizer, quantizer.quantize(model)


def test_labels_may_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer, quant_model = made()
    found = quant_model(X)
    assert found["loss"] is None
    assert not told(caplog)
    wanted = quantizer.quantize(model, example_inputs={"x": X})
    assert torch.equal(found["logits"], wanted(X)["logits"])
    assert torch.equal(found["logits"], quant_model(X, Y)["logits"])


def test_sites_without_ranges_run_in_float_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, quantizer, quant_model = made()
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for size in (6, 3, 2):
            x = X[:size]
            assert sqnr(model(x, deep=True)["logits"], quant_model(x, deep=True)["logits"]) > 25
    (message,) = told(caplog)
    assert "deep: True" in message
    assert "no ranges are known for second, which" in message
    assert quantizer.plan.quantized == ("first", "second")


def test_serving_leaves_the_quantizer_alone() -> None:
    model, quantizer, quant_model = made()
    quant_model(X, deep=True)
    again = quantizer.quantize(model)
    assert torch.equal(again(X, Y)["logits"], quant_model(X, Y)["logits"])
    assert quantizer.plan.quantized == ("first", "second")


def test_ranges_are_those_of_quantizing() -> None:
    model, quantizer, quant_model = made()
    expected = quant_model(X, Y)["logits"]
    quantizer.calib(model)(X * 100, labels=Y)
    assert torch.equal(quant_model(X)["logits"], expected)


def test_setting_of_errors() -> None:
    _, _, quant_model = made(unseen_calls="error")
    with pytest.raises(
        CaptureFailed, match=r"it was captured with labels\. Run quantizer"
    ) as caught:
        quant_model(X)
    assert "s2" not in str(caught.value)
    with pytest.raises(InvalidConfig, match=r"unseen_calls='no'; expected \"capture\" or"):
        Quantizer("reference", unseen_calls="no")


def test_a_float_model_that_changed_or_went() -> None:
    model, quantizer, quant_model = made()
    before = quant_model(X, Y)["logits"]
    with torch.no_grad():
        model.first.weight.mul_(2)
    with pytest.raises(CaptureFailed, match="captured now: the float model has changed since"):
        quant_model(X)
    assert torch.equal(quant_model(X, Y)["logits"], before)
    model, quantizer, quant_model = made()
    del model, quantizer
    with pytest.raises(CaptureFailed, match="the float model or its quantizer no longer exists"):
        quant_model(X)


def test_copies_capture_and_pickles_do_not() -> None:
    model, quantizer, quant_model = made()
    again = copy.deepcopy(quant_model)
    loaded = pickle.loads(pickle.dumps(quant_model))
    assert torch.equal(again(X)["logits"], quant_model(X)["logits"])
    assert torch.equal(loaded(X, Y)["logits"], quant_model(X, Y)["logits"])
    with pytest.raises(CaptureFailed, match="it was captured with labels"):
        loaded(X)
    served = pickle.loads(pickle.dumps(quant_model))  # with what it captured so far
    assert torch.equal(served(X)["logits"], quant_model(X)["logits"])
    del model, quantizer


def test_nothing_is_captured_while_tracing() -> None:
    model, quantizer, quant_model = made()
    with pytest.raises(CaptureFailed, match="while the model is traced"):
        torch.jit.trace(lambda x: quant_model(x)["logits"], (X,), check_trace=False)
    quant_model(X)
    traced = torch.jit.trace(lambda x: quant_model(x)["logits"], (X,), check_trace=False)
    assert torch.equal(traced(X), quant_model(X)["logits"])
    del model, quantizer


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_any_grad_mode(mode: Any) -> None:
    model, quantizer, quant_model = made()
    with mode():
        found = quant_model(X.clone())["logits"]
    assert torch.equal(found, quant_model(X, Y)["logits"])
    del model, quantizer


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_graphs_own_their_tensors(backend: str) -> None:
    torch.manual_seed(0)
    model, quantizer = Classifier().eval(), Quantizer(backend)
    quantizer.calib(model)(X, labels=Y)
    quant_model = quantizer.quantize(model)
    expected = quant_model(X, deep=True)["logits"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(quant_model(X, deep=True)["logits"], expected)
    assert len(list(quantized_graphs(quant_model))) == 2


class Detector(nn.Module):
    """As detectors do: a transform of a list, each length another kind of call, then layers.

    With ``scale``, the results go through another method of the transform, and a part of it.
    """

    class Transform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squash = nn.Tanh()

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.stack([self.squash((x - x.mean()) / x.std()) for x in images])

        def postprocess(self, y: Tensor) -> Tensor:
            return y * 2

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.transform, self.linear, self.scale = self.Transform(), nn.Linear(8, 8), scale

    def forward(self, images: list[Tensor]) -> Tensor:
        y = self.linear(self.transform(images))
        if self.scale:
            y = self.transform.squash(self.transform.postprocess(y))
        return y if y.sum() < 1e9 else -y


@pytest.mark.parametrize("scale", [False, True], ids=["called", "its parts called too"])
def test_a_piece_without_sites_serves_any_call(scale: bool) -> None:
    torch.manual_seed(0)
    model, quantizer = Detector(scale).eval(), Quantizer("reference", unseen_calls="error")
    calib_model = quantizer.calib(model)
    for count in (1, 2):
        calib_model([normal(3, 8)] * count)
    quant_model = quantizer.quantize(model)
    for count in (3, 5, 1):
        images = [normal(3, 8)] * count
        assert sqnr(model(images), quant_model(images)) > 25


class Branching(nn.Module):
    """Its code branches on a number, so that each value needs a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, times: int) -> Tensor:
        return self.linear(x) * 2 if times > 10 else self.linear(x)


@pytest.mark.long("five seconds: 33 captures")
def test_graphs_for_values_of_a_constant_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, quantizer = Branching().eval(), Quantizer("reference")
    quantizer.calib(model)(X, 0)
    quant_model = quantizer.quantize(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for value in range(16):
            assert sqnr(model(X, value), quant_model(X, value)) > 25
        (message,) = told(caplog)
        assert "captured anew for every value of times (4 so far)" in message
        for value in (16, 17, 16):
            with pytest.raises(
                CaptureFailed, match=r"value of times \(16 so far\).*calib\(model\)"
            ):
                quant_model(X, value)
        assert sqnr(model(X, 12), quant_model(X, 12)) > 25
    assert len(quant_model.graphs) == 16
    assert len(told(caplog)) == 1
    calib_model = quantizer.calib(model)
    for value in range(17):
        calib_model(X, value)
    assert sqnr(model(X, 100), quantizer.quantize(model)(X, 100)) > 25  # as the message says


def test_the_plan_has_what_was_captured_since() -> None:
    _model, quantizer, quant_model = made()
    before, other = quantizer.plan, copy.deepcopy(quant_model)
    assert list(quant_model.plan) == ["first", "second"]
    quant_model(X, deep=True)
    assert list(quant_model.plan) == ["first", "second", "extra"]
    assert quant_model.plan.quantized == ("first", "second", "extra")
    for again in (copy.deepcopy(quant_model), pickle.loads(pickle.dumps(quant_model))):
        assert again.plan == quant_model.plan
    assert quantizer.plan == other.plan == before
