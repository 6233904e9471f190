"""Files whose sizes are free give in OpenVINO what they give in onnxruntime, and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import images, seeded
from onnx_files import (
    feeds,
    needs,
    operators,
    run_onnxruntime,
    run_openvino,
    session,
    tensors,
    written,
)
from thinning import rarely
from torch import Tensor, nn

from torch_quant import sqnr

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime", "openvino"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.8."),
        reason="what is rewritten is the file; once is enough, on the newest torch",
    ),
]


class Patches(nn.Module):
    """A vision transformer's beginning: patches, behind a token for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


class ChannelsLast(nn.Module):
    """ConvNeXt's block: linear layers over the pixels of what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + (self.scale * self.linear(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Pooled(nn.Module):
    """EfficientNet's end: a window as large as the widest layer, whatever the image."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.pool = nn.AvgPool2d(window, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x))
        return self.head(x.reshape(x.shape[:2]))


@pytest.mark.parametrize(
    ("build", "form", "sizes"),
    [
        rarely(Patches, "ReduceSum", (16,)),
        (ChannelsLast, "ReduceSum", (16, 24)),
        rarely(lambda: Pooled(64), "GlobalAveragePool", (16, 24)),
        (lambda: Pooled(16), "GlobalAveragePool", (16, 12)),
    ],
    ids=["patches", "channels_last", "large_window", "window_of_the_image"],
)
def test_both_runtimes_give_the_model(
    build: type[nn.Module], form: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    model, file = seeded(build), tmp_path / "m.onnx"
    batches = [((images(8, size),), {}) for size in sizes]
    quant_model = written(
        calibrated(model, batches, backend="onnx"), model, ((images(2, sizes[0]),), {}), file
    )
    assert form in operators(file)
    assert "AveragePool" not in operators(file)
    for batch in (2, 3, 5):
        for size in sizes:
            inputs = ((images(batch, size),), {})
            expected = tensors(quant_model, inputs)
            for run_file in (run_onnxruntime, run_openvino):
                found = run_file(file, feeds(quant_model, inputs))
                assert [x.shape for x in found] == [x.shape for x in expected]
                assert sqnr(expected, found) > 40, (run_file, batch, size)


@pytest.mark.parametrize(
    "options", [{"stride": 3}, rarely({"stride": 2}), {"stride": 2, "padding": 1}]
)
def test_windows_over_the_end(options: dict[str, int], tmp_path: Path) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.AvgPool2d(3, ceil_mode=True, **options),
            nn.Conv2d(8, 4, 1),
        )
    )
    quantizer = calibrated(model, [((images(8),), {})], backend="onnx")
    quant_model = written(quantizer, model, ((images(2),), {}), tmp_path / "m.onnx", least=40)
    assert "AveragePool" in operators(tmp_path / "m.onnx")
    inputs = ((images(3, 17),), {})
    for run_file in (run_onnxruntime, run_openvino):
        found = run_file(tmp_path / "m.onnx", feeds(quant_model, inputs))
        assert sqnr(tensors(quant_model, inputs), found) > 40


class Padded(nn.Module):
    """A pool whose padding counts, behind a convolution, with something between or not."""

    def __init__(self, between: str = "", **options: bool) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool, self.wide = nn.AvgPool2d(3, 2, 1, **options), nn.MaxPool2d(2)
        self.head, self.between = nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.between == "concat":
            y = torch.cat([y[:, :4], self.other(y)[:, :4]], 1)
        elif self.between == "max pool":
            y = self.wide(y)
        elif self.between == "relu":
            y = y.relu()
        y = self.pool(y)
        return y if self.between == "nothing behind" else self.head(y)


@pytest.mark.parametrize(
    ("model", "pads", "integers"),
    [
        (Padded, 1, True),
        (lambda: Padded(ceil_mode=True), 1, False),
        (lambda: Padded("relu"), 0, True),
        (lambda: Padded(count_include_pad=False), 0, True),
        rarely(lambda: Padded("nothing behind"), 1, False),
        rarely(lambda: Padded("concat"), 1, False),
        (lambda: Padded("max pool"), 1, False),
    ],
    ids=["plain", "ceil", "relu", "not counted", "nothing behind", "concat", "max pool"],
)
def test_padding_that_counts(model: Any, pads: int, integers: bool, tmp_path: Path) -> None:
    """Where the pool reads codes it is a code, and onnxruntime still pools integers."""
    model, file = seeded(model), tmp_path / "m.onnx"
    quantizer = calibrated(model, [((images(8),), {})], backend="onnx")
    written(quantizer, model, ((images(2),), {}), file, least=40)
    assert operators(file).count("Pad") == pads
    session(file, optimized_model_filepath=str(tmp_path / "fused.onnx"))
    assert ("QLinearAveragePool" in operators(tmp_path / "fused.onnx")) == integers


class Relative(nn.Module):
    """Distances on two grids, as a vision transformer's, whose sizes are made real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.conv(x)
        coarse = self.pool(fine)
        q, k = fine.shape[-1], coarse.shape[-1]
        far = torch.arange(q)[:, None].float() - torch.arange(k)[None, :] * (q / k)  # integers
        return torch.cat([coarse.mean((1, 2)), (far + (k - 1) * (q / k)).mean(0)[None]])


def test_a_size_as_a_real_number_is_that_of_the_call(tmp_path: Path) -> None:
    model = seeded(Relative)
    calls = [((images(1, side),), {}) for side in (16, 24)]
    quantizer = calibrated(model, calls, backend="onnx")
    quant_model = written(quantizer, model, calls[0], tmp_path / "sizes.onnx", least=None)
    for call in calls:
        (found,) = run_onnxruntime(tmp_path / "sizes.onnx", feeds(quant_model, call))
        assert sqnr(tensors(quant_model, call)[0], found) > 60


class Parts(nn.Module):
    """As many columns as there are parts of four, the last of which may be smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((1, 2))[:, : -(-x.shape[-1] // 4)]


def test_a_division_rounds_down_where_the_dividend_is_negative(tmp_path: Path) -> None:
    calls = [((images(2, side),), {}) for side in (16, 18, 23)]
    model = seeded(Parts)
    quantizer = calibrated(model, calls[:2], backend="onnx")
    quant_model = written(quantizer, model, calls[0], tmp_path / "parts.onnx", least=None)
    for call, columns in zip(calls, (4, 5, 6), strict=True):
        (found,) = run_onnxruntime(tmp_path / "parts.onnx", feeds(quant_model, call))
        assert found.shape == (2, columns)
        assert sqnr(tensors(quant_model, call)[0], found) > 60
