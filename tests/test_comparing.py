"""``Quantizer.compare``: where the error comes in, against what is known of each case."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import InvalidConfig, NotCalibrated, Quantizer, QuantSpec, recipes, sqnr
from torch_quant.config import QConfig


class Chain(nn.Module):
    """Three products with a norm, a rectifier and a residual sum between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean += 0.2
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(x + torch.nn.functional.gelu(self.middle(x)))


class Masked(nn.Module):
    """Padding is left out of a sum of its own inside, and has results all the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * attention_mask[..., None])


def test_padding_that_counts_is_told() -> None:
    model, x = Masked().eval(), torch.randn(3, 5, 8)
    whole = {"x": x, "attention_mask": torch.ones(3, 5)}
    padded = {"x": x, "attention_mask": torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]] * 3)}
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for each in (whole, padded):
        calib_model(**each)
    told = "some of the inputs is padding, and what is given there counts in SQNR too"
    found = quantizer.compare(model, [whole])
    assert not found.padded
    assert told not in str(found)
    found = quantizer.compare(model, [whole, padded])  # one of them is enough
    assert found.padded
    assert told in str(found)
    assert told in found._repr_html_()
    for batch, expected in ((whole, False), (padded, True)):
        profile = quantizer.profile(model, batch, backends=["reference"], seconds=0.01)
        assert profile.padded is expected
        assert (told in str(profile)) is expected


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3, 8, 8) for n in (4, 7)]


def _calibrated(model: nn.Module, batches: list[Any], **options: Any) -> Quantizer:
    quantizer = Quantizer(**options)
    calib_model = quantizer.calib(model)
    for each in batches:
        calib_model(each)
    return quantizer


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_it_is_what_hooks_on_the_float_model_see(backend: str, batches: list[Tensor]) -> None:
    model = Chain().eval()
    quantizer = _calibrated(model, batches, backend=backend)
    found = quantizer.compare(model, batches)
    assert [each.site for each in found] == ["conv", "middle", "head"]
    quant_model = quantizer.quantize(model)
    expected = [model(x) for x in batches], [quant_model(x) for x in batches]
    assert found.outputs == pytest.approx(sqnr(*expected), abs=1e-4)
    head = found.layers[-1]
    assert head.after == pytest.approx(found.simulated, abs=1e-6)
    assert abs(found.simulated - found.outputs) < 3.0
    assert sum(each.share for each in found) == pytest.approx(1.0)
    assert found.batches == 2
    assert math.isinf(found.layers[0].before)


def test_a_folded_norm_and_what_is_before(batches: list[Tensor]) -> None:
    """With one layer quantized, its result is known: the float one of a model rounded by hand."""
    model = Chain().eval()
    quantizer = _calibrated(
        model, batches, backend="reference", overrides={"conv": None, "head": None},
        qconfig=recipes.fast(),
    )  # fmt: skip
    found = quantizer.compare(model, batches)
    conv, middle, head = found
    assert conv.after > 120.0  # the norm is folded, in float
    assert middle.before > 120.0
    assert (conv.share, middle.share, head.share) == (0.0, 1.0, 0.0)
    assert math.isfinite(head.before)
    seen: list[Tensor] = []
    with_hook = model.middle.register_forward_hook(lambda m, args, y: seen.extend((args[0], y)))
    for x in batches:
        model(x)
    with_hook.remove()
    inputs, results = torch.cat(seen[::2]), torch.cat(seen[1::2])
    only = quantizer.quantize(model)
    low, high = float(inputs.min()), float(inputs.max())
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    zero = round(-min(low, 0.0) / scale)
    x = ((inputs / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    codes, step = only.middle.weight, only.middle.weight_scale
    weight = codes.float() * step.reshape(-1, 1)
    by_hand = torch.nn.functional.linear(x, weight, model.middle.bias)
    assert middle.after == pytest.approx(sqnr(results, by_hand), abs=0.05)


def test_the_worst_layer_comes_first(batches: list[Tensor]) -> None:
    few = QConfig(input=QuantSpec.of(bits=3), weight=QuantSpec.of(bits=3, symmetric=True))
    model = Chain().eval()
    quantizer = _calibrated(model, batches, backend="reference", overrides={"middle": few})
    found = quantizer.compare(model, batches)
    assert found.worst[0].site == "middle"
    assert "most comes in at middle" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80


class Pieces(nn.Module):
    """Python between two parts decides by a value, and calls one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum().item() > -1e9:
            x = self.second(self.second(x))
        return x


def test_pieces_and_a_layer_that_is_called_twice() -> None:
    model, x = Pieces().eval(), torch.randn(5, 8)
    quantizer = _calibrated(model, [x], backend="reference")
    found = quantizer.compare(model, [x, x[:2]])
    assert {each.site.partition("@")[0] for each in found} == {"first", "second"}
    assert found.outputs == pytest.approx(found.simulated, abs=1e-6)


class Counting(nn.Module):
    """Keeps how often it was called, as a buffer that its graph writes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


def test_the_model_is_left_as_it_was() -> None:
    model, x = Counting().eval(), torch.randn(5, 4)
    quantizer = _calibrated(model, [x], backend="reference")
    calls, version = float(model.calls), quantizer.state.version
    found = quantizer.compare(model, [x, x])
    assert float(model.calls) == calls
    assert quantizer.state.version == version
    assert found.outputs == pytest.approx(found.simulated, abs=1e-6)
    assert found.outputs > 25.0


def test_mistakes(batches: list[Tensor]) -> None:
    model = Chain().eval()
    with pytest.raises(NotCalibrated):
        Quantizer("reference").compare(model, batches)
    quantizer = _calibrated(model, batches, backend="reference")
    with pytest.raises(InvalidConfig, match="no batches"):
        quantizer.compare(model, [])


def test_a_layer_without_a_signal_adds_all() -> None:
    """Float products cancel to 0 there, and rounded weights, 1 and -64 / 127, leave something."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -0.5]).expand(2, 2))
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    quantizer = _calibrated(model, [x], backend="reference")
    first, second = quantizer.compare(model, [x])
    assert (first.before, first.after, first.share) == (math.inf, -math.inf, 1.0)
    assert (second.before, second.share) == (-math.inf, 0.0)
