"""Files after the last touches give the same integers, by the operators that were meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import normal, seeded
from onnx_files import (
    feeds,
    needs,
    operators,
    run_onnxruntime,
    run_openvino,
    session,
    tensors,
    unread,
    written,
)
from thinning import rarely
from torch import Tensor, nn

from torch_quant import Backend, QConfig, Quantizer, QuantSpec, sqnr
from torch_quant.backends.onnx.program import translate

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.8."),
        reason="what is rewritten is the file; once is enough, on the newest torch",
    ),
]

SIZES = ((3, 12, 16), (2, 11, 16), (3, 14, 9), (2, 13, 15))
"""Batches, heights and widths: even and odd ones."""


class Stem(nn.Module):
    """A convolution over an image, and another one behind it."""

    def __init__(self, channels: int = 3, kernel: Any = 3, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, kernel, **({"stride": 2} | options))
        self.next = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.stem(x).relu())


def both_files(
    model: nn.Module,
    quantizer: Quantizer,
    example: Tensor,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> tuple[Any, Path, Path]:
    """The model and its file, rewritten and as the exporter gives it."""
    quant_model = written(quantizer, model, ((example,), {}), folder / "new.onnx", **options)
    with monkeypatch.context() as patch:
        patch.setattr(translate, "rewrite", lambda model: None)
        written(quantizer, model, ((example,), {}), folder / "old.onnx", least=None, **options)
    return quant_model, folder / "new.onnx", folder / "old.onnx"


@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        (3, 7, {"padding": 3}),
        rarely(3, 3, {"padding": 1}),
        (1, 5, {"padding": 2, "bias": False}),
        rarely(4, 3, {}),
        rarely(3, 5, {"padding": 1}),
        rarely(3, 1, {}),
        (3, (3, 7), {"padding": (0, 3)}),
    ],
    ids=str,
)
def test_blocks_of_an_image_of_any_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    kernel: Any,
    options: dict[str, Any],
) -> None:
    model = seeded(lambda: Stem(channels, kernel, **options))
    x = normal(8, channels, 12, 16) + 0.7  # a zero point that is not the middle
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model, new, old = both_files(model, quantizer, x, tmp_path, monkeypatch)
    names = operators(new)
    assert names.count("SpaceToDepth") == 1
    assert "SpaceToDepth" not in operators(old)
    # Of floats: onnxruntime before 1.28 does not know it of integers.
    assert names.index("SpaceToDepth") < names.index("QuantizeLinear")
    report = Backend.ONNX.verify(new)
    assert report.complete, report
    assert len(report.fused) == 2, report
    for batch, height, width in SIZES:
        inputs = ((normal(batch, channels, height, width) + 0.7,), {})
        feed = feeds(quant_model, inputs)
        (found,), (expected,) = (run_onnxruntime(path, feed) for path in (new, old))
        assert torch.equal(found, expected), (height, width)
        assert found.shape == tensors(model, inputs)[0].shape


@pytest.mark.parametrize(
    ("kernel", "options"),
    [rarely(2, {}), (4, {"padding": 1}), rarely(6, {"padding": 2}), (3, {"padding": 1})],
    ids=str,
)
def test_blocks_of_an_image_of_even_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: int, options: dict[str, Any]
) -> None:
    """Even kernels have a position fewer over an odd size, so the size must be known."""
    model = seeded(lambda: Stem(3, kernel, **options))
    x = normal(4, 3, 12, 16) + 0.7
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model, new, old = both_files(model, quantizer, x, tmp_path, monkeypatch, dynamic=False)
    assert operators(new).count("SpaceToDepth") == 1
    assert "Pad" not in operators(new)
    feed = feeds(quant_model, ((normal(4, 3, 12, 16),), {}))
    (found,), (expected,) = (run_onnxruntime(path, feed) for path in (new, old))
    assert torch.equal(found, expected)


def test_a_weight_with_a_zero_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taps that are filled in stand for zero, whatever its code is."""
    model = seeded(lambda: Stem(3, 3, padding=1))
    with torch.no_grad():
        model.stem.weight.add_(0.2)
    affine = QuantSpec.of(signed=True, symmetric=False, per_channel=False)
    x = normal(4, 3, 12, 16)
    quantizer = calibrated(model, [((x,), {})], backend="onnx", qconfig=QConfig(weight=affine))
    quant_model, new, old = both_files(model, quantizer, x, tmp_path, monkeypatch)
    assert operators(new).count("SpaceToDepth") == 1
    feed = feeds(quant_model, ((normal(2, 3, 13, 16),), {}))
    (found,), (expected,) = (run_onnxruntime(path, feed) for path in (new, old))
    assert torch.equal(found, expected)


OTHERS: list[tuple[int, int, dict[str, Any]]] = [
    (5, 3, {"padding": 1}),
    (3, 3, {"padding": 1, "stride": 1}),
    (3, 3, {"padding": 1, "stride": (2, 1)}),
    (3, 3, {"padding": 2, "dilation": 2}),
    (2, 3, {"padding": 1, "groups": 2}),
    (3, 4, {"padding": 1}),
]


class Others(nn.Module):
    """Convolutions that are no blocks, each over the first channels of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(
            Stem(channels, kernel, **options) for channels, kernel, options in OTHERS
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            stem(x[:, :channels]) for stem, (channels, *_) in zip(self.stems, OTHERS, strict=True)
        ]


def test_other_convolutions_stay(tmp_path: Path) -> None:
    model, x = seeded(Others), normal(4, 5, 12, 16)
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    written(quantizer, model, ((x,), {}), tmp_path / "model.onnx")
    found = operators(tmp_path / "model.onnx")
    assert found.count("Conv") == 2 * len(OTHERS)
    assert "SpaceToDepth" not in found


def test_one_image_for_two_convolutions_of_one_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets its own blocks; what another one still reads stays."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.conv.weight, self.conv.bias
            halves = nn.functional.conv2d(x, weight, bias, stride=2, padding=1)
            return halves.mean() + self.conv(x) + nn.functional.conv2d(x, weight, stride=2).sum()

    model, x = seeded(Twice), normal(4, 3, 12, 16)
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model, new, old = both_files(model, quantizer, x, tmp_path, monkeypatch)
    assert operators(new).count("SpaceToDepth") == 2
    session(new)
    feed = feeds(quant_model, ((normal(2, 3, 11, 16),), {}))
    (found,), (expected,) = (run_onnxruntime(path, feed) for path in (new, old))
    torch.testing.assert_close(found, expected)


def test_an_input_called_as_a_new_constant(tmp_path: Path) -> None:
    class Clash(Stem):
        def forward(self, x: Tensor, conv2d_before: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + conv2d_before

    model, x = seeded(lambda: Clash(3, 3, padding=1)), normal(4, 3, 12, 16)
    inputs = ((x, torch.ones(1)), {})
    quant_model = written(calibrated(model, [inputs]), model, inputs, tmp_path / "m.onnx")
    assert "SpaceToDepth" in operators(tmp_path / "m.onnx")
    (found,) = run_onnxruntime(tmp_path / "m.onnx", feeds(quant_model, inputs))
    torch.testing.assert_close(found, quant_model(*inputs[0]), rtol=0.1, atol=0.1)


@needs("openvino")
def test_blocks_in_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(lambda: Stem(3, 7, padding=3)), normal(4, 3, 12, 16)
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model, new, old = both_files(model, quantizer, x, tmp_path, monkeypatch)
    for batch, height, width in SIZES:
        feed = feeds(quant_model, ((normal(batch, 3, height, width),), {}))
        (found,), (expected,) = (run_openvino(path, feed) for path in (new, old))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class SamePadding(nn.Module):
    """As TensorFlow pads: with stride 2 one pixel more behind than before."""

    def __init__(self, twice: bool = False, value: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, stride=2), nn.Conv2d(6, 5, 3, stride=2)
        self.twice, self.value = twice, value

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(nn.functional.pad(x, (0, 1, 0, 1))).relu()
        padded = nn.functional.pad(x, (0, 1, 1, 2), value=self.value)
        y: Tensor = self.second(padded)
        return y + padded.mean() if self.twice else y


@pytest.mark.parametrize(
    ("model", "pads"),
    [
        (SamePadding, 0),
        rarely(lambda: SamePadding(twice=True), 1),
        rarely(lambda: SamePadding(value=0.25), 1),
    ],
    ids=["all", "one has another reader", "one has another value"],
)
def test_convolutions_take_zeros_around_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, pads: int
) -> None:
    model = seeded(model)
    x = normal(8, 6, 12, 16) + 0.7
    for fallback in ((), ("second",)):
        overrides = dict.fromkeys(fallback)
        quantizer = calibrated(model, [((x,), {})], backend="onnx", overrides=overrides)
        quant_model, new, old = both_files(model, quantizer, x, tmp_path, monkeypatch)
        if not fallback:  # the exporter does so for convolutions of floats
            assert operators(old).count("Pad") == 2
        assert operators(new).count("Pad") == pads
        assert not unread(new)
        assert Backend.ONNX.verify(new).complete
        for batch, height, width in SIZES:
            inputs = ((normal(batch, 6, height, width) + 0.7,), {})
            feed = feeds(quant_model, inputs)
            (found,), (expected,) = (run_onnxruntime(path, feed) for path in (new, old))
            torch.testing.assert_close(found, expected)
            (vino,) = run_openvino(new, feed)
            assert found.shape == vino.shape


class Clipped(nn.Module):
    """One value, cut off between two pairs of bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * 2.0
        near, far = torch.tensor(0.1), torch.tensor(1.5)
        inner = torch.minimum(torch.maximum(x, -near), near)
        return inner * 10.0 + torch.minimum(torch.maximum(x, -far), far)


def test_a_value_that_is_clipped_twice(tmp_path: Path) -> None:
    model, file = seeded(Clipped), tmp_path / "m.onnx"
    inputs = ((normal(5, 8),), {})
    quant_model = written(calibrated(model, [inputs], backend="onnx"), model, inputs, file)
    assert operators(file).count("Clip") == 2
    (found,) = run_onnxruntime(file, feeds(quant_model, inputs))
    assert sqnr(quant_model(*inputs[0]), found) > 60
