"""Weights of static models: learned in the model's graph, a segment at a time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import (
    FLOAT,
    AdaRound,
    AutoRound,
    InvalidConfig,
    NotCalibrated,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    recipes,
    sqnr,
)
from torch_quant.autotuning.tasks import prepared
from torch_quant.backends import ReferenceBackend
from torch_quant.rounding import graphs

INT4 = QuantSpec.of("int4", per_channel=True)
METHODS = [AdaRound(80, batch_size=8), AutoRound(40, batch_size=8)]


class Residual(nn.Module):
    """As in MobileNet: it widens, goes over pixels channel by channel, and narrows again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.wide = nn.Conv2d(channels, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.norm = nn.BatchNorm2d(wide)
        self.narrow = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.depthwise(torch.relu(self.wide(x)))))
        return x + self.narrow(y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        Residual(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 5),
    ).eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth ones, whose neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(small, (8, 8), mode="bilinear")


def calibrated(
    model: nn.Module,
    config: QConfig,
    batches: Sequence[Any],
    backend: str = "reference",
    **given: Any,
) -> Quantizer:
    quantizer = Quantizer(backend, qconfig=config, **given)
    calib_model = quantizer.calib(model)
    for batch in batches:
        calib_model(batch)
    return quantizer


def rounded(
    model: nn.Module, config: QConfig, batches: Sequence[Any], backend: str = "reference"
) -> Quantizer:
    quantizer = calibrated(model, config, batches, backend)
    quantizer.round_weights(model, batches, progress=False)
    return quantizer


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_is_nearer_to_float_than_rounding_to_nearest(method: Any) -> None:
    """On images that it has not seen; the same each time, and nothing else changes."""
    model, batches, new = network(), [images(8, i) for i in range(4)], images(32, 9)
    exact, before = model(new), {name: x.clone() for name, x in model.state_dict().items()}
    nearest = calibrated(model, QConfig(weight=INT4), batches).quantize(model)(new)
    random = torch.get_rng_state()
    quantizer = calibrated(model, QConfig(weight=INT4, method=method), batches)
    report = quantizer.round_weights(model, batches, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert set(report.sites) == {"0", "1.wide", "1.depthwise", "1.narrow", "2", "3", "6"}
    found = quantizer.quantize(model)(new)
    assert sqnr(exact, found) > sqnr(exact, nearest) + 2
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    again = rounded(model, QConfig(weight=INT4, method=method), batches)
    assert torch.equal(again.quantize(model)(new), found)


def test_kernels_compute_what_the_reference_does() -> None:
    model, batches = network(), [images(16)]
    config = recipes.int8_static(smooth=None, method=METHODS[0])
    quantizer = rounded(model, config, batches, "onednn")
    same = ReferenceBackend(simulates="onednn")
    found, expected = (
        quantizer.quantize(model, backend=each)(batches[0]) for each in ("onednn", same)
    )
    assert sqnr(expected, found) > 40  # codes that lie between two
    with pytest.raises(NotCalibrated, match="when the weights were rounded"):
        quantizer.quantize(model, backend="reference")  # which has the transposed convolution too
    assert sqnr(model(batches[0]), found) > 30


def test_what_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More data, fallback, files, a copy of the model, another model, another method."""
    model, x, new = network(), images(16), images(8, 5)
    quantizer = rounded(model, QConfig(weight=INT4, method=METHODS[0]), [x])
    first = quantizer.quantize(model)(new)
    quantizer.save(tmp_path / "ranges")
    loaded = Quantizer.load(tmp_path / "ranges")
    assert torch.equal(loaded.quantize(model, example_inputs=x)(new), first)
    twin = copy.deepcopy(model)
    assert torch.equal(loaded.quantize(twin, example_inputs=x)(new), first)
    quantizer.calib(model)(2 * x)  # ranges grow; the weights stay as rounded
    wider = quantizer.quantize(model)
    assert not torch.equal(wider(new), first)
    assert sqnr(model(new), wider(new)) > 10
    amp_model = quantizer.amp(model)
    amp_model(x)
    (worst,) = quantizer.fallback(amp_model, num=1)
    quantizer.quantize(model)
    assert not quantizer.plan[worst].quantized
    quantizer.reset_fallback()
    other = network()
    nn.init.normal_(other[0].weight)
    with pytest.raises(QuantError, match="weight"):  # the ranges are not of these weights either
        loaded.quantize(other, example_inputs=x)
    quantizer.set("0", QConfig(weight=INT4))
    with pytest.raises(InvalidConfig, match=r"^0 was rounded to .* by adaround.* run quantizer"):
        quantizer.quantize(model)


def test_it_goes_with_transforms() -> None:
    """The default's: smoothed, with copies of channels, and corrected for what the codes give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 4)).eval()
    x = torch.randn(64, 32) * torch.logspace(-1, 1, 32)
    quantizer = rounded(model, recipes.int8_static(method=METHODS[0]), [x])
    made = quantizer.quantize(model)
    kinds = {each.name for site in quantizer.plan.values() for each in site.transforms}
    assert {"outlier_split", "bias_correction"} <= kinds
    assert sqnr(model(x), made(x)) > 30
    config = QConfig(weight=INT4, method=METHODS[0], transforms=(SmoothQuant(0.5),))
    quantizer = rounded(model, config, [x])
    quantizer.calib(model)(3 * x)  # other factors, so other weights
    with pytest.raises(InvalidConfig, match="has changed since it was rounded"):
        quantizer.quantize(model)


class Twice(nn.Module):
    """Calls one layer twice, and has a mask and a product of activations between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.layer(x)) * mask[..., None]
        y = y + torch.relu(self.layer(y))
        scores = torch.softmax(y @ y.transpose(1, 2), -1)
        return {"pooled": self.head((scores @ y).mean(1)), "mask": mask, "hidden": y}


def test_calls_that_share_a_layer_share_its_codes() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    mask = (torch.arange(6) < torch.randint(3, 7, (16, 1))).float()
    batch = {"x": torch.randn(16, 6, 16), "mask": mask}
    config = QConfig(weight=INT4, method=METHODS[0])
    quantizer = Quantizer("reference", qconfig=config)
    quantizer.calib(model)(**batch)
    report = quantizer.round_weights(model, [batch], progress=False)
    assert sorted(report.sites) == ["head", "layer"]
    made = quantizer.quantize(model)
    codes = [
        x for name, x in made.state_dict().items() if name in ("layer.weight", "layer.weight_1")
    ]
    assert len(codes) == 2
    assert torch.equal(*codes)
    nearest = Quantizer("reference", qconfig=QConfig(weight=INT4))
    nearest.calib(model)(**batch)
    exact, found, plain = (
        each(**batch)["hidden"] for each in (model, made, nearest.quantize(model))
    )
    assert sqnr(exact, found) > sqnr(exact, plain)


def test_a_layer_of_many() -> None:
    """An override's method is for its sites; round to nearest, and float, stand beside it."""
    model, x = network(), images(16)
    quantizer = calibrated(
        model,
        QConfig(weight=INT4),
        [x],
        overrides={"1.*": QConfig(weight=INT4, method=METHODS[1]), "6": None},
    )
    report = quantizer.round_weights(model, [x], progress=False)
    assert set(report.sites) == {"1.wide", "1.depthwise", "1.narrow"}
    assert "autoround" in str(report)
    plain = calibrated(model, QConfig(weight=INT4), [x], overrides={"6": None})
    exact = model(x)
    assert sqnr(exact, quantizer.quantize(model)(x)) > sqnr(exact, plain.quantize(model)(x))


def test_activations_of_a_float_format_and_of_none() -> None:
    """In a whole graph, convolutions with float activations; in modules, they are left out."""
    model, x = network(), images(16)
    config = QConfig(FLOAT, INT4, method=METHODS[1])
    whole = Quantizer("reference", qconfig=config, capture="whole")
    assert len(whole.round_weights(model, [x], progress=False).sites) == 7
    exact = model(x)
    nearest = Quantizer("reference", qconfig=QConfig(FLOAT, INT4))
    nearest = nearest.quantize(model, example_inputs=x)(x)
    assert sqnr(exact, whole.quantize(model)(x)) > sqnr(exact, nearest) + 0.5
    parts = Quantizer("reference", qconfig=config)
    assert parts.round_weights(model, [x], progress=False).sites == ("6",)
    assert parts.quantize(model)(x).shape == (16, 5)
    floats = QuantSpec.of("float4_e2m1", per_channel=True)
    quantizer = rounded(
        model, QConfig(QuantSpec.of("float8_e4m3fn"), floats, method=METHODS[0]), [x]
    )
    plain = calibrated(model, QConfig(QuantSpec.of("float8_e4m3fn"), floats), [x])
    assert sqnr(exact, quantizer.quantize(model)(x)) > sqnr(exact, plain.quantize(model)(x))


class Recurrent(nn.Module):
    """Layers on both sides of an LSTM, whose quantized form passes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Conv1d(4, 8, 3, padding=1), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(torch.relu(self.first(x)).transpose(1, 2))
        return self.head(y[:, -1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_an_operator_without_a_gradient(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(8, 4, 6)
    config = recipes.int8_static(method=METHODS[1])
    quantizer = rounded(model, config, [x], backend)
    assert set(quantizer.state.rounded.sites) == {"first", "head"}
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(-1)


@torch.enable_grad()
def test_training_begins_with_the_learned_codes() -> None:
    model, x = network(), images(16)
    with torch.no_grad():
        quantizer = rounded(model, QConfig(weight=INT4, method=METHODS[0]), [x])
        expected, target = quantizer.quantize(model)(x), model(x)
    qat_model = quantizer.qat(model, edge_bits=None)
    assert torch.equal(qat_model.eval()(x), expected)
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=1e-2)
    first = (qat_model(x) - target).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = (qat_model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < first
    assert torch.equal(quantizer.quantize(qat_model)(x), qat_model(x))


def test_autotune_calibrates_before_it_rounds() -> None:
    model, x = network(), images(16)
    config = {"backend": "reference", "qconfig": QConfig(weight=INT4, method=METHODS[1]).to_dict()}
    quantizer = prepared(model, config, [x])
    assert len(quantizer.state.rounded.sites) == 7
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 10


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x.sum()) > 0 else self.b(x)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    model, x = network(), images(8)
    config = QConfig(weight=INT4, method=METHODS[0])
    quantizer = Quantizer("reference", qconfig=config)
    with pytest.raises(NotCalibrated):
        quantizer.round_weights(model, [x], progress=False)
    quantizer = calibrated(model, config, [x])
    with pytest.raises(NotCalibrated, match=r"run quantizer\.round_weights\(model, batches\)"):
        quantizer.quantize(model)
    with pytest.raises(InvalidConfig, match="got no batches"):
        quantizer.round_weights(model, [])
    with pytest.raises(InvalidConfig, match="leave it out"):
        quantizer.round_weights(model, [x], folder=tmp_path / "kept")
    branches = Branches().eval()
    pieces = calibrated(branches, config, [torch.ones(4, 8), -torch.ones(4, 8)])
    with pytest.raises(InvalidConfig, match="in the graph of the whole model, and this one has"):
        pieces.round_weights(branches, [torch.ones(4, 8)])
    picks = Picks().eval()
    with pytest.raises(InvalidConfig, match="gives no float tensor"):
        rounded(picks, config, [torch.ones(4, 8)])
    monkeypatch.setattr(graphs, "_BYTES", 2**10)
    quantizer.round_weights(model, [x, x, x], progress=False)
    with caplog.at_level(logging.WARNING):
        quantizer.round_weights(model, [x] * 9, progress=False)
    assert "of 9 batches" in caplog.text


@pytest.mark.parametrize("wrong", [
    {"iterations": 0}, {"batch_size": True}, {"learning_rate": -1.0}, {"regularization": "1"},
    {"clip_search": 1}, {"seed": 0.5}, {"weighted": None},
], ids=str)  # fmt: skip
def test_options(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidConfig, match=rf"AdaRound\({name}="):
        AdaRound(**wrong)
