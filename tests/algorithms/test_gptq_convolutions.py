"""GPTQ on convolutions: the error of what they give, whatever groups, window and scales."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import normal, randomize_batch_norms, seeded
from torch import Tensor, nn

from torch_quant import (
    GPTQ,
    PerChannel,
    PerGroup,
    PerTensor,
    QConfig,
    Quantizer,
    QuantSpec,
    load,
    recipes,
    save,
    sqnr,
)
from torch_quant.core.functional import dequantize
from torch_quant.core.window import Window
from torch_quant.statistics import HESSIAN, Hessian, Patches, patches

KINDS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 6, (3, 2), stride=(2, 1), dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 16, 5, groups=8, padding="same"),
    "1d": lambda: nn.Conv1d(8, 6, 4, padding="same"),
    "3d": lambda: nn.Conv3d(8, 6, 2),
}
WEIGHT = QuantSpec.of("int4", granularity=PerChannel())


def smooth(*shape: int) -> Tensor:
    """Images whose neighbours are alike, in pixels and in channels, and that are not around 0."""
    x = normal(*shape)
    for axis in range(1, x.dim()):
        x = x.cumsum(axis) / x.shape[axis] ** 0.5
    return x + 1.0


def images(kind: str, count: int = 8) -> Tensor:
    return smooth(count, 8, *(12,) * (int(kind[0]) if kind[0].isdigit() else 2))


def quantized(model: nn.Module, x: Tensor, method: Any, weight: QuantSpec = WEIGHT) -> Any:
    quantizer = Quantizer("reference", qconfig=QConfig(weight=weight, method=method))
    for each in x.split(4):
        quantizer.calib(model)(each)
    return quantizer.quantize(model)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_rounding_to_nearest(kind: str) -> None:
    model, x = seeded(lambda: nn.Sequential(KINDS[kind]())).eval(), images(kind)
    before = copy.deepcopy(model.state_dict())
    plain = sqnr(model(x), quantized(model, x, None)(x))
    for method in (GPTQ(), GPTQ(act_order=False, clip_search=False)):
        assert sqnr(model(x), quantized(model, x, method)(x)) > plain + 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_window_of_one_is_a_linear_layer(granularity: Any, symmetric: bool) -> None:
    x, weight = smooth(4, 8, 5, 5), normal(10, 8)
    spec = QuantSpec.of("int4", symmetric=symmetric, granularity=granularity)
    images, hessian = Patches(Window((1, 1), (1, 1), (0, 0), (0, 0), (1, 1))), Hessian()
    images.observe(x)
    hessian.observe(x.movedim(1, -1))
    codes, found = GPTQ().quantize(weight, spec, {HESSIAN: hessian})
    mine, grid = GPTQ().quantize(weight[..., None, None], spec, {"patches": images})
    assert torch.equal(mine.flatten(1), codes)
    torch.testing.assert_close(grid.scale.flatten(), found.scale.flatten())  # sums in other order
    assert grid.spec == spec
    assert grid.scale.shape == spec.granularity.grid((10, 8, 1, 1))


def test_groups_are_rounded_as_layers_of_their_own() -> None:
    x, weight = smooth(4, 6, 7, 7), normal(9, 2, 2, 2)
    window = Window((2, 2), (1, 1), (0, 0), (0, 0), (1, 1), 3)
    images = Patches(window)
    images.observe(x)
    spec = QuantSpec.of("int4", granularity=PerChannel(0))
    codes, found = GPTQ().quantize(weight, spec, {patches(window): images})
    for group in range(3):
        alone = Patches(replace(window, groups=1))
        alone.observe(x[:, 2 * group : 2 * group + 2])
        rows = slice(3 * group, 3 * group + 3)
        one, grid = GPTQ().quantize(weight[rows], spec, {"patches": alone})
        torch.testing.assert_close(found.scale[rows], grid.scale)
        assert torch.equal(codes[rows], one)


def test_moments_of_independent_inputs_round_to_nearest() -> None:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 4)
    images = Patches(window)
    images.sums, images.rows, images.batches = torch.eye(9).repeat(4, 1, 1), 1, 1
    weight, spec = normal(4, 1, 3, 3), QuantSpec.of("int8", granularity=PerChannel(0))
    codes, found = GPTQ(clip_search=False).quantize(weight, spec, {"patches": images})
    nearest = (weight / found.scale).round().clamp(-127, 127)
    assert torch.equal(codes.float(), nearest)
    assert float((dequantize(codes, found) - weight).abs().max()) <= float(found.scale.max()) / 2


def test_blocks_that_no_convolution_has_and_missing_data_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = seeded(lambda: nn.Sequential(KINDS["dense"]())).eval(), images("dense")
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quantized(model, x, GPTQ(), QuantSpec.of("int4", granularity=PerGroup(4)))
    assert "rounded to nearest where it has other scales" in caplog.text
    caplog.clear()
    spec = QuantSpec.of("int4", granularity=PerChannel(0))
    with caplog.at_level(logging.WARNING, "torch_quant"):
        GPTQ().quantize(normal(4, 8, 3, 3), spec, {"patches": Patches()})
    assert "no calibration data reached it" in caplog.text


class Net(nn.Module):
    """Convolutions with batch norms, one of them depthwise, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        )
        self.mix, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x).relu()).relu()
        x = self.mix(x).relu().flatten(2).transpose(1, 2)
        y: Tensor = self.out(self.head(x).relu())
        return y


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_the_recipe_on_a_network_with_norms_smoothing_and_corrections(
    backend: str, tmp_path: Path
) -> None:
    model = seeded(Net).eval()
    randomize_batch_norms(model)
    data = [smooth(4, 3, 20, 20) * (1 + i) for i in range(4)]

    def calibrated(method: str | None, weight: QuantSpec | None = None) -> Quantizer:
        config = replace(recipes.int8_static(smooth=0.8, method=method), weight=weight)
        quantizer = Quantizer(backend, qconfig=config)
        for x in data:
            quantizer.calib(model)(x)
        return quantizer

    x = smooth(4, 3, 24, 16) * 2
    found = {}
    for method in (None, "gptq"):
        quantizer = calibrated(method)
        found[method] = quantizer.quantize(model)
        assert len(quantizer.plan.quantized) == 5
    assert sqnr(model(x), found["gptq"](x)) >= sqnr(model(x), found[None](x)) - 0.5
    save(found["gptq"], tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(x), found["gptq"](x))
    again = Quantizer(backend, qconfig=recipes.int8_static(smooth=0.8, method="gptq"))
    quantizer = calibrated("gptq")
    again.load_state_dict(quantizer.state_dict())
    loaded = again.quantize(model, example_inputs=x)
    assert torch.equal(loaded(x), quantizer.quantize(model)(x))
    qat_model = quantizer.qat(copy.deepcopy(model), example_inputs=x)
    assert torch.equal(qat_model(x), qat_model(x))
    assert sqnr(model(x), qat_model(x)) > 20
    amp_model = quantizer.amp(model)
    assert torch.equal(amp_model(x), model(x))
    quantizer.fallback(amp_model, 1)
    assert sqnr(model(x), quantizer.quantize(model)(x)) > sqnr(model(x), found["gptq"](x)) - 1
    four = QuantSpec.of("int4", granularity=PerChannel())
    if backend == "reference":
        few = {m: calibrated(m, four).quantize(model)(x) for m in (None, "gptq")}
        assert sqnr(model(x), few["gptq"]) > sqnr(model(x), few[None]) + 2


def test_smoothed_layers_are_rounded_by_what_they_read() -> None:
    """As the layer that has the factors in its weight and reads what is divided by them."""
    factor = torch.linspace(0.2, 30, 16)
    x = smooth(64, 16) * factor
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 12))).eval()

    def made(method: Any) -> Tensor:
        config = QConfig(
            weight=WEIGHT, transforms=recipes.int8_static(smooth=0.5).transforms, method=method
        )
        quantizer = Quantizer("reference", qconfig=config)
        quantizer.calib(model)(x)
        return quantizer.quantize(model)(x)

    assert sqnr(model(x), made(GPTQ())) > sqnr(model(x), made(None)) + 3
