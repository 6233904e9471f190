"""The default smooths where that is predicted to help, and says in the plan where it does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flows import BACKENDS, calibrated
from models import MODELS, example, seeded
from test_smoothquant import Spiky, data, spiky
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    BiasCorrection,
    InvalidConfig,
    QConfig,
    Quantizer,
    SmoothQuant,
    recipes,
    sqnr,
)
from torch_quant.algorithms.predicted_noise import predicted_noise

SITES = ("query", "key", "value", "out")


def transforms(quantizer: Quantizer, model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Site -> how it is smoothed."""
    quantizer.quantize(model)
    return {
        name: tuple(each for each in site.transforms if isinstance(each, SmoothQuant))
        for name, site in quantizer.plan.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_smooths_spikes(backend: str) -> None:
    found = {}
    (x,), _ = data(64, 1)
    for name, config in (("default", None), ("fast", recipes.fast())):
        model = spiky()
        quantizer = calibrated(model, [data(32)], backend=backend, qconfig=config)
        found[name] = sqnr(model(x), quantizer.quantize(model)(x))
    assert found["default"] >= found["fast"] + 10, found


def test_where_nothing_sticks_out_the_graph_is_as_it_was() -> None:
    model = seeded(Spiky)  # its norm's channels are alike
    (x,), _ = data(8, 1)
    only = recipes.int8_static(correct_bias=False)
    default = calibrated(model, [data(32)], backend="reference", qconfig=only)
    fast = calibrated(model, [data(32)], backend="reference", qconfig=recipes.fast())
    assert set(transforms(default, model).values()) == {()}
    assert torch.equal(default.quantize(model)(x), fast.quantize(model)(x))


def test_the_plan_has_what_is_done() -> None:
    model = spiky()
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(data(32)[0][0])
    quantizer.quantize(model)
    asked = {each for site in quantizer.plan.values() for each in site.transforms}
    assert asked == {SmoothQuant(0.8), BiasCorrection()}  # for good
    found = {each.what: each for each in quantizer.explain("query").decisions}
    assert found["smoothquant"].value == SmoothQuant(0.8)
    assert found["smoothquant"].rule == "the default"
    plain_model = seeded(Spiky)
    plain = calibrated(plain_model, [data(32)], backend="reference")
    found = {each.what: each for each in plain.explain("query").decisions}
    assert found["smoothquant"].value is None
    assert "only where the noise is predicted to fall" in found["smoothquant"].why


@torch.no_grad()
def test_each_change_is_seen() -> None:
    """More data, or other weights, after the plan was asked for."""
    model = seeded(Spiky)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(data(8)[0][0])
    assert transforms(quantizer, model)["query"] == ()
    again = transforms(quantizer, model)
    assert again == transforms(quantizer, model)
    for name, value in spiky().state_dict().items():
        model.get_parameter(name).data = value  # which changes no version
    calib_model(data(8)[0][0])
    assert transforms(quantizer, model)["query"] == (SmoothQuant(0.8),)


def test_a_calibration_without_channels_is_served(caplog: pytest.LogCaptureFixture) -> None:
    """As one of an earlier version, or by other settings."""
    model = spiky()
    fast = calibrated(model, [data(32)], backend="reference", qconfig=recipes.fast())
    (x,), _ = data(8, 1)
    other = Quantizer("reference")
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other.quantize(model, example_inputs=x)(x), fast.quantize(model)(x))
    other.calib(model)(x)  # its channels are now known of one batch of two
    assert set(transforms(other, model).values()) == {()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_keep_the_decision(backend: str, tmp_path: Path) -> None:
    model = spiky()
    quantizer = calibrated(model, [data(32)], backend=backend)
    (x,), _ = data(8, 1)
    quant_model = quantizer.quantize(model)
    expected = quant_model(x)
    quantizer.save(tmp_path / "ranges")
    loaded = Quantizer.load(tmp_path / "ranges")
    assert torch.equal(loaded.quantize(model, example_inputs=x)(x), expected)
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer(backend)
    other.load_summary(tmp_path / "summary.json")
    assert torch.equal(other.quantize(model, example_inputs=x)(x), expected)
    if backend != "onnx":
        torch_quant.save(quant_model, tmp_path / "model")
        assert torch.equal(torch_quant.load(tmp_path / "model", model=model)(x), expected)
    quantizer.to_config(tmp_path / "q.json")
    third = Quantizer.from_config(tmp_path / "q.json")
    assert third.qconfig == quantizer.qconfig == recipes.int8_static()


def test_a_proxy_and_fallback_know_it() -> None:
    model = spiky()
    quantizer = calibrated(model, [data(32)], backend="reference")
    amp_model = quantizer.amp(model)
    amp_model(data(256, 1)[0][0])
    predicted = quantizer.sensitivity(amp_model).predicted()
    (x,), _ = data(64, 2)
    assert predicted == pytest.approx(sqnr(model(x), quantizer.quantize(model)(x)), abs=2.0)
    quantizer.fallback(amp_model, num=4)
    assert torch.equal(quantizer.quantize(model)(x), model(x))


def test_qat_begins_with_it() -> None:
    """With the factors of that moment, whatever the weights become."""
    model = spiky()
    quantizer = calibrated(model, [data(32)], backend="reference")
    qat_model = quantizer.qat(model)
    (x,), _ = data(8, 1)
    assert sum(bool(site.transforms) for site in qat_model.plan.values()) == 4
    assert torch.equal(quantizer.quantize(qat_model)(x), qat_model(x))


def test_other_sizes_and_kinds_of_calls() -> None:
    model = MODELS["tiny_transformer"]()
    quantizer = calibrated(model, [(example("tiny_transformer", 64), {})], backend="reference")
    quant_model = quantizer.quantize(model)
    for batch in (1, 5):
        inputs = example("tiny_transformer", batch)
        assert sqnr(model(*inputs), quant_model(*inputs)) > 20


@pytest.mark.parametrize(("rows", "most"), [(64, 6.0), (4096, 1.3)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@torch.no_grad()
def test_predicted_noise_is_what_quantization_adds(spread: float, rows: int, most: float) -> None:
    """To unseen rows. With few that were seen, it is clipped values above all.

    The tail that is assumed is heavier than that of this normal distribution.
    """
    generator = torch.Generator().manual_seed(0)
    channels = torch.linspace(0, 1, 64).mul(math.log(spread)).exp()
    found = []
    for _ in range(8):  # the largest of some rows varies
        x, unseen = (channels * torch.randn(n, 64, generator=generator) for n in (rows, 20000))
        layer = nn.Linear(64, 48, bias=False)
        layer.weight.copy_(torch.randn(48, 64, generator=generator))
        quantizer = Quantizer("reference", qconfig=recipes.fast())
        quantizer.calib(layer)(x)
        noise = (quantizer.quantize(layer)(unseen) - layer(unseen)).square().sum(-1).mean()
        squares = x.square().mean(0)
        predicted = predicted_noise(x.amin(0), x.amax(0), squares, rows, [layer.weight])
        found.append((predicted, float(noise)))
    predicted, noise = map(sum, zip(*found, strict=True))
    assert noise / 1.3 < predicted < noise * most


def test_few_rows_are_no_reason_to_smooth() -> None:
    """Every channel would be clipped at the largest of the rows that were seen."""
    model = spiky()
    few = calibrated(model, [((data(1)[0][0][:, :2],), {})], backend="reference")
    assert SmoothQuant(0.8) not in {t for each in transforms(few, model).values() for t in each}


@pytest.mark.parametrize("gain", [-1.0, float("inf"), float("nan"), "1", True])
def test_gain_out_of_range(gain: object) -> None:
    with pytest.raises(InvalidConfig, match="expected a factor, 0 or more"):
        SmoothQuant(0.8, min_gain=gain)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match='expected "auto", None or a number'):
        recipes.int8_static(smooth="always")  # type: ignore[arg-type]


def test_a_qconfig_of_ones_own_says_all() -> None:
    model = spiky()
    quantizer = calibrated(model, [data(8)], backend="reference", qconfig=QConfig())
    assert set(transforms(quantizer, model).values()) == {()}


class Reader(nn.Module):
    """A layer that nothing else reads with."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def test_channels_of_zeros_only() -> None:
    model, x = seeded(Reader), torch.zeros(4, 32)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    assert torch.isfinite(quant_model(torch.randn(4, 32))).all()
