"""Accuracy-driven tuning of trained networks that int8 hurts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flows import assert_unchanged, snapshot
from torch import nn

from examples.digits_networks import DepthwiseCNN, SmallViT
from torch_quant import QConfig, Quantizer, QuantSpec, sqnr, tune

if TYPE_CHECKING:
    from examples.digits_data import Digits


def activations(bits: int) -> QConfig:
    return QConfig(input=QuantSpec.of(bits=bits))


def weights(bits: int) -> QConfig:
    spec = QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)
    return QConfig(weight=spec)


def perceptron() -> nn.Module:
    sizes = (64, 64, 64, 64)
    hidden = [m for size in sizes for m in (nn.Linear(64, size), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def outliers(model: SmallViT) -> None:
    """Two channels a thousand times as large as the others, which computes the very same."""
    readers = [layer for pair in zip(model.qkv, model.up, strict=True) for layer in pair]
    for norm, reader in zip(model.norms, readers, strict=True):
        for channel in (3, 11):
            norm.weight[channel] *= 1000.0
            norm.bias[channel] *= 1000.0
            reader.weight[:, channel] /= 1000.0


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install scikit-learn")
    from examples.digits_data import load_digits_split

    return load_digits_split()


BUILD: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: DepthwiseCNN(12, 2),
    "outliers": lambda: SmallViT(32, 2, 4),
    "perceptron": perceptron,
}
EPOCHS = {"depthwise": 5, "outliers": 8, "perceptron": 8}


def network(kind: str, training: Digits) -> nn.Module:
    """Trained here, which IPEX does not allow: once loaded, it takes away gradients of norms."""
    from examples.digits_data import train

    if "intel_extension_for_pytorch" in sys.modules:
        pytest.skip("IPEX has been loaded by other tests: run this file by itself")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        return train(BUILD[kind](), training, epochs=EPOCHS[kind]).eval()


def trained(kind: str, data: Digits) -> tuple[nn.Module, dict[Any, QConfig | None]]:
    """A network, and the formats that it does not bear."""
    model = network(kind, data)
    overrides: dict[str, dict[Any, QConfig | None]] = {
        "depthwise": {
            "blocks.0.3": activations(2),
            "blocks.1.3": activations(3),
            "blocks.1.0": activations(4),
        },
        "outliers": {},
        "perceptron": {"3": weights(2), "5": weights(2)},
    }
    if isinstance(model, SmallViT):
        before = model(data.images[:64])
        outliers(model)
        assert sqnr(before, model(data.images[:64])) > 80.0
    return model, overrides[kind]


@pytest.mark.long("a network is trained and tuned for each")
@pytest.mark.parametrize("kind", ["depthwise", "outliers", "perceptron"])
def test_a_network_that_int8_hurts_is_within_its_tolerance(
    kind: str, digits: tuple[Digits, Digits]
) -> None:
    training, held_out = digits
    model, overrides = trained(kind, training)
    # The default smooths outliers away.
    quantizer = Quantizer("reference", qconfig=QConfig(), overrides=overrides)
    calib_model = quantizer.calib(model)
    for images in training.images[:256].split(64):
        calib_model(images)
    evaluated: list[float] = []

    def accuracy(candidate: nn.Module) -> float:
        right = sum(
            int((candidate(images).argmax(1) == labels).sum())
            for images, labels in zip(
                held_out.images.split(100), held_out.labels.split(100), strict=True
            )
        )
        evaluated.append(right / len(held_out.labels))
        return evaluated[-1]

    exact = accuracy(model)
    assert exact > 0.6  # it has learned something
    in_int8 = accuracy(quantizer.quantize(model))
    assert in_int8 < 0.99 * exact, "or there is nothing to tune"
    layers = len(quantizer.plan.quantized)
    evaluated.clear()
    before = snapshot(model)

    quant_model = tune(quantizer, model, accuracy, tolerance=0.01, progress=False)
    assert_unchanged(model, before)
    assert len(evaluated) <= 2 + math.ceil(math.log2(layers))
    report = quantizer.tuning
    assert report is not None
    assert report.reached
    assert report.stopped == ""
    assert report.target == pytest.approx(0.99 * exact)
    assert [trial.metric for trial in report.trials] == evaluated
    assert [trial.in_float for trial in report.trials[:2]] == [None, 0]
    assert evaluated[:2] == [exact, in_int8]
    assert 0 < len(report.names) < layers
    assert report.best.in_float == len(report.names)  # no groups of several sites here
    assert accuracy(quant_model) == report.best.metric >= report.target
    text = str(report)
    for trial in report.trials:
        assert f"{trial.metric:.6g}" in text
    assert len([line for line in text.splitlines() if line[:1].isdigit()]) == len(report.trials)
    assert f"reached with {report.best.in_float} of {layers} layers in float" in text
    assert all(name in text for name in report.names)

    # The quantizer is left in that state.
    assert tuple(quantizer.fallen_back) == report.names
    assert {n for n, site in quantizer.plan.items() if not site.quantized} == set(report.names)
    x = held_out.images[:7]
    assert torch.equal(quantizer.quantize(model)(x), quant_model(x))
    other = Quantizer("reference", overrides=overrides)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.quantize(model, example_inputs=x)(x), quant_model(x))
