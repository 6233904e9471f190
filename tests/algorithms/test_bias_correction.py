"""Bias correction: its formula, what it gains, and where it is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS, calibrated
from models import MODELS, example, seeded
from torch import Tensor, nn
from torch.nn import functional

from torch_quant import (
    GPTQ,
    BiasCorrection,
    InvalidConfig,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    SmoothQuant,
    recipes,
    sqnr,
)
from torch_quant.algorithms.bias_correction import output_shift
from torch_quant.core.functional import fake_quantize
from torch_quant.core.qparams import choose_qparams
from torch_quant.core.window import Window
from torch_quant.statistics import ChannelMean, WindowMean

CORRECTED = QConfig(transforms=[BiasCorrection()])
FOUR_BITS = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)


class Rectified(nn.Module):
    """Convolutions of each kind behind rectifiers, so that inputs have means far from 0."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=bias)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=4, bias=bias)
        self.head = nn.Linear(12, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.depthwise, self.grouped):
            x = functional.relu6(layer(x))
        return self.head(x.mean((2, 3)))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def taps_of(x: Tensor, window: Window) -> Tensor:
    means = WindowMean(window)
    for part in x.split(5):
        means.observe(part)
    return means.mean.reshape(x.shape[1], -1)


@pytest.mark.parametrize("image", [1, 2, 5, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_each_tap_has_the_mean_of_what_it_reads(image: int, stride: int, padding: int) -> None:
    kernel, dilation = (3, 2), (1, 2)
    if image + 2 * padding < 3:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 4, image, image, generator=generator)
    error = torch.randn(6, 4, *kernel, generator=generator)
    pads = ((padding,) * 2, (padding,) * 2)
    window = Window(kernel, (stride, stride), *pads, dilation)
    added = functional.conv2d(x, error, None, stride, padding, dilation).mean((0, 2, 3))
    torch.testing.assert_close(output_shift(error, taps_of(x, window)), added)


def test_small_images_with_large_means_and_errors_that_cancel() -> None:
    """GPTQ makes errors of one tap up for those of others, and the padding's are free."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.tensor([4.0, -1.0])
    x = torch.rand(128, 16, 2, generator=generator) + ramp
    model = seeded(lambda: nn.Conv1d(16, 8, 3, stride=2, padding=1))
    found = {}
    for name, transforms in (("plain", []), ("corrected", [BiasCorrection()])):
        config = QConfig(weight=FOUR_BITS, method=GPTQ(), transforms=transforms)
        quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
        found[name] = sqnr(model(x), quantizer.quantize(model)(x))
    assert found["corrected"] > found["plain"] - 0.1, found


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 3), (6, 3), (2, 3)])
def test_the_shift_is_what_the_error_adds(groups: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 6, 9, 9, generator=generator)
    error = torch.randn(12, 6 // groups, size, size, generator=generator)
    added = functional.conv2d(x, error, groups=groups).mean((0, 2, 3))
    found = output_shift(error, x.mean((0, 2, 3)))
    # The border's pixels are read by fewer taps: the means differ by some hundredths.
    torch.testing.assert_close(found, added, rtol=0, atol=0.05 * size * size)
    torch.testing.assert_close(
        output_shift(error, taps_of(x, Window((size,) * 2, (1, 1), (0, 0), (0, 0), (1, 1)))),
        added,
    )
    torch.testing.assert_close(  # of a constant image, they do not
        output_shift(error, torch.ones(6)),
        functional.conv2d(torch.ones(1, 6, 9, 9), error, groups=groups).mean((0, 2, 3)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_means_of_outputs_are_those_of_the_float_model(backend: str, bias: bool) -> None:
    model = seeded(lambda: Rectified(bias))
    x, unseen = images(64), images(64, 1)
    shift, quality = {}, {}
    for name, transforms in (("plain", []), ("corrected", [BiasCorrection()])):
        config = QConfig(transforms=transforms)
        quantizer = calibrated(model, [((x,), {})], backend=backend, qconfig=config)
        error = quantizer.quantize(model)(unseen) - model(unseen)
        shift[name] = float(error.mean(0).norm())
        quality[name] = sqnr(model(unseen), model(unseen) + error)
    assert shift["corrected"] < shift["plain"] / 2, shift
    assert quality["corrected"] > quality["plain"] + 2, quality


def test_one_layer_to_rounding() -> None:
    """The bias is what the formula says, to float32's rounding."""
    layer = seeded(lambda: nn.Linear(16, 8))
    x = torch.rand(256, 16, generator=torch.Generator().manual_seed(0)) + 1
    config = QConfig(weight=FOUR_BITS, transforms=[BiasCorrection()])
    quantizer = calibrated(layer, [((x,), {})], backend="reference", qconfig=config)
    quantized = quantizer.quantize(layer)
    spec = FOUR_BITS.on(0)
    rounded = fake_quantize(
        layer.weight, choose_qparams(*layer.weight.aminmax(dim=1, keepdim=True), spec)
    )
    expected = layer.bias - ((rounded - layer.weight) * x.mean(0)).sum(1)
    torch.testing.assert_close(quantized.state_dict()["bias"], expected)


def test_a_layer_that_is_called_twice_has_a_bias_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(functional.relu(self.layer(x)) + 3)

    model = seeded(Twice)
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=CORRECTED)
    state = quantizer.quantize(model).state_dict()
    biases = [value for name, value in state.items() if "bias" in name]
    assert len(biases) == 2
    assert not torch.equal(*biases)


def test_a_moved_input_is_left_alone() -> None:
    """The recorded tensor has its channels elsewhere."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:  # [n, h, w, c]
            return self.head(self.conv(x.permute(0, 3, 1, 2)).relu().flatten(1)[:, :16])

    model, x = seeded(Moved), torch.rand(8, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=CORRECTED)
    quantizer.quantize(model)
    assert quantizer.plan["conv"].transforms == ()


def test_smoothing_comes_first_whatever_the_order_of_sites() -> None:
    """The first site of the graph has the correction only."""
    model = MODELS["tiny_transformer"]()
    batches = [(example("tiny_transformer", 32), {})]
    found = {}
    for name, config in (("default", None), ("fast", QConfig())):
        quantizer = calibrated(model, batches, backend="reference", qconfig=config)
        inputs = example("tiny_transformer", 8)
        found[name] = sqnr(model(*inputs), quantizer.quantize(model)(*inputs))
    assert found["default"] > found["fast"] - 0.5, found


def test_parts_of_the_data_merge() -> None:
    model, x = seeded(Rectified), images(32)
    whole = calibrated(model, [((x,), {})], backend="reference", qconfig=CORRECTED)
    parts = [
        calibrated(model, [((part,), {})], backend="reference", qconfig=CORRECTED)
        for part in x.split(16)
    ]
    parts[0].merge(parts[1])
    for key, kept in whole.state.statistics.items():
        for what in [what for what in kept if what.endswith("]")]:
            mean, other = kept[what], parts[0].state.statistics[key][what]
            assert isinstance(mean, ChannelMean)
            assert isinstance(other, ChannelMean)
            torch.testing.assert_close(mean.mean, other.mean)


def test_asked_for_after_calibration() -> None:
    model, (x,) = seeded(Rectified), (images(8),)
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=QConfig())
    quantizer.qconfig = CORRECTED
    with pytest.raises(QuantError, match=r"window_mean\[3x3, before=1x1, after=1x1\] of :x"):
        quantizer.quantize(model)
    quantizer.qconfig = QConfig(transforms=[BiasCorrection(always=False)])
    quantizer.quantize(model)
    assert not any(site.transforms for site in quantizer.plan.values())


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("axis", "2", 'axis "2"; expected "-1" to "-4"'),
        ("axis", "-3, 3x3, stride=2", "'3x3, stride=2' is no window; expected as '3x3, stride=2x2"),
        ("axis", "-2, 3x3", "a window of 2 dimensions along axis -2"),
        ("axis", "-1", "no linear layer or convolution reads so many there"),
        ("rows", 0, "'rows' is 0; expected 1 or more"),
        ("sums", [], "expected numbers"),
        ("sums", ["a", 1, 2], '"a" is no finite number'),
        ("sums", [0.0] * 45, "means of 5 channels along -3"),
    ],
)
def test_summary_with_wrong_means(entry: str, value: Any, message: str, tmp_path: Path) -> None:
    model, x = seeded(Rectified), images(8)
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=CORRECTED)
    expected = quantizer.quantize(model)(x)
    path = tmp_path / "summary.json"
    quantizer.save_summary(path)
    right = Quantizer("reference")
    right.load_summary(path)
    assert torch.equal(right.quantize(model, example_inputs=x)(x), expected)
    edited = json.loads(path.read_text())
    label = "-3, 3x3, before=1x1, after=1x1"
    key = next(key for key, known in edited["means"].items() if label in known)
    if entry == "axis":
        edited["means"][key] = {value: edited["means"][key][label]}
    else:
        edited["means"][key][label][entry] = value
    path.write_text(json.dumps(edited, indent=1))

    def use() -> None:
        wrong = Quantizer("reference")
        wrong.load_summary(path)
        wrong.quantize(model, example_inputs=x)

    with pytest.raises(InvalidConfig, match=message):
        use()


def test_a_summary_can_be_calibrated_further(tmp_path: Path) -> None:
    """Its means weigh as much as the data behind them."""
    model, x = seeded(Rectified), images(32)
    quantizer = calibrated(model, [((x[:24],), {})], backend="reference", qconfig=CORRECTED)
    quantizer.quantize(model)
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer("reference", qconfig=CORRECTED)
    other.load_summary(tmp_path / "summary.json")
    other.calib(model)(x[24:])
    whole = calibrated(model, [((x,), {})], backend="reference", qconfig=CORRECTED)
    for key, kept in whole.state.statistics.items():
        for what, mean in kept.items():
            if isinstance(mean, ChannelMean):
                found = other.state.statistics[key][what]
                assert isinstance(found, ChannelMean)
                torch.testing.assert_close(found.mean, mean.mean)


class TwoReaders(nn.Module):
    """One tensor that has its channels here for one layer and there for another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.linear(x)


def test_readers_along_other_axes_have_means_of_their_own(tmp_path: Path) -> None:
    model = seeded(TwoReaders)
    ramp = torch.arange(8.0)
    x = torch.rand(64, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x + ramp[:, None, None] + 8 * ramp  # other means along each axis
    config = QConfig(weight=FOUR_BITS, transforms=[BiasCorrection()])
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
    quant_model = quantizer.quantize(model)
    plain = calibrated(
        model, [((x,), {})], backend="reference", qconfig=QConfig(weight=FOUR_BITS)
    ).quantize(model)
    for dims, *outputs in zip(
        ((0, 2, 3), (0, 1, 2)), model(x), quant_model(x), plain(x), strict=True
    ):
        exact, corrected, shifted = (each.mean(dims) for each in outputs)
        assert (corrected - exact).norm() < (shifted - exact).norm() / 5
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer("reference")
    other.load_summary(tmp_path / "summary.json")
    for one, two in zip(other.quantize(model, example_inputs=x)(x), quant_model(x), strict=True):
        assert torch.equal(one, two)


def test_a_summary_of_an_earlier_version_has_means_of_channels(tmp_path: Path) -> None:
    model, x, path = seeded(lambda: nn.Conv2d(3, 8, 3)), images(8), tmp_path / "old.json"
    quantizer = calibrated(model, [((x,), {})])
    expected = quantizer.quantize(model, backend="reference")(x)
    quantizer.save_summary(path)
    data = json.loads(path.read_text())
    (means,) = data["means"].values()
    ((label, known),) = means.items()
    sums = torch.tensor(known["sums"]).reshape(3, 9).mean(1).tolist()
    means["-3"] = means.pop(label) | {"sums": sums}
    path.write_text(json.dumps(data))
    other = Quantizer()
    other.load_summary(path)
    found = other.quantize(model, example_inputs=x, backend="reference")(x)
    assert sqnr(expected, found) > 40


def test_it_comes_last_in_whatever_order() -> None:
    model = MODELS["mlp"]()
    x = torch.randn(256, *example("mlp", 1)[0].shape[1:]).abs() + 1
    transforms = [SmoothQuant(0.5), BiasCorrection()]
    found = []
    for order in (transforms, transforms[::-1]):
        config = QConfig(weight=FOUR_BITS, transforms=order)
        quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
        found.append(quantizer.quantize(model)(x))
    assert torch.equal(*found)


def test_numbers_that_float32_cannot_sum() -> None:
    """What is only wanted where it helps is no reason to refuse data."""
    model = seeded(Rectified)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    x = images(4)
    x[0, 0, :2, :2] = 3e38
    calib_model(x)
    assert torch.isfinite(quantizer.quantize(model)(images(4))).all()


def test_a_weight_method_with_statistics() -> None:
    """The inputs are what they were, so GPTQ knows them."""
    model, x = MODELS["mlp"](), example("mlp", 64)[0]
    config = QConfig(weight=FOUR_BITS, transforms=[BiasCorrection()], method=RoundToNearest())
    weighted = QConfig(
        weight=FOUR_BITS,
        transforms=[BiasCorrection()],
        method=RoundToNearest(clip_search=True, weighted=True),
    )
    for each in (config, weighted):
        quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=each)
        assert sqnr(model(x), quantizer.quantize(model)(x)) > 10


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_options(value: object) -> None:
    with pytest.raises(InvalidConfig, match="expected True or False"):
        BiasCorrection(always=value)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="expected True or False"):
        recipes.int8_static(correct_bias=value)  # type: ignore[arg-type]


class Turned(nn.Module):
    """A call of another kind reads the channels in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, *, turn: bool = False) -> Tensor:
        return self.head(x.flip(-1) if turn else x)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("config", [None, CORRECTED], ids=["default", "always"])
def test_channels_that_one_kind_of_call_moves(config: QConfig | None, first: bool) -> None:
    model = seeded(Turned)
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)
    quantizer = Quantizer("reference", qconfig=config)
    calib_model = quantizer.calib(model)
    for turn in (first, not first):
        calib_model(x, turn=turn)
    quant_model = quantizer.quantize(model)
    for turn in (False, True):
        assert sqnr(model(x, turn=turn), quant_model(x, turn=turn)) > 30
