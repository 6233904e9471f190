"""Axes that OpenVINO takes wrong unless they are written in other forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flows import calibrated
from models import normal, seeded
from onnx_files import feeds, needs, run_onnxruntime, run_openvino, tensors, written
from thinning import third
from torch import Tensor, nn

from torch_quant import Backend, sqnr

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime", "openvino"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.8."), reason="the exporter is tested on the newest torch"
    ),
]


class Pooled(nn.Module):
    """A reduction over tokens, factors and sums of channels, and a quantized layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.layer = how, nn.BatchNorm1d(32), nn.Linear(32, 24)
        with torch.no_grad():
            self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(x, self.how)(dim=1)
        return self.layer(self.norm(x[0] if isinstance(x, tuple) else x))


class Windows(nn.Module):
    """Rows that are split into as many tokens as a layer without a bias has outputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 16, 16)).view(-1, 16, 2, 8).transpose(1, 2)


class Spectrum(nn.Module):
    """A Fourier transform over some axes, and a quantized layer."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes, self.layer = axes, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.fft.fftn(x, dim=self.axes).real)


CASES = {
    "mean": (lambda: Pooled("mean"), (4, 9, 32)),
    "sum": (lambda: Pooled("sum"), (4, 9, 32)),
    "amax": (lambda: Pooled("amax"), (4, 9, 32)),
    "windows": (lambda: Windows(False), (4, 8, 8, 16)),
    "windows with a bias": (lambda: Windows(True), (4, 8, 8, 16)),
    "both axes": (lambda: Spectrum(1, 2), (4, 9, 16)),
    "last axis": (lambda: Spectrum(-1), (4, 9, 16)),
    "second axis": (lambda: Spectrum(1), (4, 9, 16)),
    "first axis": (lambda: Spectrum(0), (4, 9, 16)),
}


@pytest.mark.parametrize("name", third(CASES, 0))
def test_both_runtimes_give_the_model(name: str, tmp_path: Path) -> None:
    build, shape = CASES[name]
    model, path = seeded(build).eval(), tmp_path / "model.onnx"
    batches = [((normal(*shape) * (i + 1),), {}) for i in range(3)]
    quantizer = calibrated(model, batches, backend="onnx")
    quant_model = written(quantizer, model, batches[0], path, least=50.0)
    report = Backend.ONNX.verify(path)
    assert report.complete, str(report)
    inputs = ((normal(3, *shape[1:]),), {})
    expected = tensors(quant_model, inputs)
    for run_file in (run_onnxruntime, run_openvino):
        assert sqnr(expected, run_file(path, feeds(quant_model, inputs))) > 50


def test_equal_sizes_have_one_name(tmp_path: Path) -> None:
    """Two inputs whose sizes belong together say so in the file."""
    import onnx

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x @ y)

    model, path = seeded(Product), tmp_path / "model.onnx"
    batches = [((normal(2, 5, n), normal(2, n, 6)), {}) for n in (4, 7)]
    quantizer = calibrated(model, batches, backend="onnx")
    written(quantizer, model, batches[0], path, least=40.0)
    first, second = onnx.load(path).graph.input
    names = [
        [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (first, second)
    ]
    assert names[0][2] == names[1][1]
