"""Runtimes in this process: what is recorded, fixed, refused or computed elsewhere."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from flows import calibrated
from models import normal, seeded
from onnx_files import needs
from runtimes import RUNTIMES, by_onnxruntime, by_openvino, compiled, each_runtime
from torch import Tensor, nn

import torch_quant
from torch_quant import InvalidConfig, Quantizer, recipes
from torch_quant.backends import OnnxRuntimeBackend, in_process

pytestmark = needs("onnx", "onnxscript", "onnxruntime", "openvino")


@by_onnxruntime
def test_what_cannot_be_recorded(name: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU()))
    quant_model = calibrated(model, [((normal(32, 16),), {})], backend=name).quantize(model)
    x = normal(4, 16)
    told = "run outside of PyTorch.*export_onnx writes the file that runs here"
    with pytest.raises(InvalidConfig, match=told):
        torch.jit.trace(quant_model, x)
    with pytest.raises(InvalidConfig, match=told):
        torch.export.export(quant_model, (x,), strict=False)
    with pytest.raises(InvalidConfig, match=told):
        torch_quant.export_torchscript(quant_model, x, "model.pt")
    with pytest.raises(InvalidConfig, match=r"takes tensors on the CPU: input is on meta"):
        quant_model(x.to("meta"))
    whole = torch.compile(lambda x: quant_model(x * 2.0) + 1.0, backend="eager")
    assert torch.equal(whole(x), quant_model(x * 2.0) + 1.0)  # it goes on behind the call
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a runtime outside of PyTorch"):
        torch.compile(lambda x: quant_model(x) + 1.0, backend="eager", fullgraph=True)(x)


class Unread(nn.Module):
    """Reads the second of three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, ids: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x)


@by_openvino
def test_inputs_that_nothing_reads(name: str) -> None:
    model, rest = seeded(Unread), (torch.arange(3), torch.ones(2, 2))
    quantizer = calibrated(model, [((rest[0], normal(32, 16), rest[1]), {})], backend=name)
    quant_model = quantizer.quantize(model)
    simulation = quantizer.quantize(model, backend="reference")
    for rows in (4, 7):
        inputs = rest[0], normal(rows, 16), rest[1]
        assert torch_quant.sqnr(simulation(*inputs), quant_model(*inputs)) > 30
    compiled(quant_model)


class Unrolled(nn.Module):
    """ONNX has no LSTM with projections: the exporter writes it out for the example's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, proj_size=6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_sizes_that_the_exporter_fixes(caplog: pytest.LogCaptureFixture) -> None:
    """A session for each, and a word of it."""
    model = seeded(Unrolled)
    quantizer = calibrated(model, [((normal(8, 3, 8),), {})], backend="onnxruntime")
    quant_model, reference = quantizer.quantize(model), quantizer.quantize(model, backend="onnx")
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for shape in ((2, 3, 8), (2, 4, 8), (2, 3, 8)):
            torch.testing.assert_close(
                quant_model(normal(*shape)), reference(normal(*shape)), rtol=0.0, atol=1e-4
            )
    assert len(compiled(quant_model).opened) == 2
    assert [record.message for record in caplog.records if "a session for each" in record.message]


def test_the_session_that_is_not_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is called between others keeps its session."""
    monkeypatch.setattr(in_process, "_MOST", 2)
    model = seeded(Unrolled)
    quantizer = calibrated(model, [((normal(8, 3, 8),), {})], backend="onnxruntime")
    quant_model = quantizer.quantize(model, example_inputs=normal(2, 2, 8))
    runs = compiled(quant_model)
    (usual,) = runs.opened
    for steps in (3, 4):
        quant_model(normal(2, steps, 8))
        assert len(runs.opened) == 2
        quant_model(normal(2, 2, 8))
        assert runs.opened[-1] is usual
    quant_model(normal(2, 2, 8))
    assert len(runs.opened) == 2
    assert runs.opened[-1] is usual


class Counting(nn.Module):
    """Writes to a buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return self.layer(x) + self.seen


@each_runtime
def test_what_has_no_onnx_form_runs_in_pytorch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(Counting)
    quantizer = calibrated(model, [((normal(8, 8),), {})], backend=name)
    quant_model = quantizer.quantize(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        first, second = quant_model(normal(2, 8)), quant_model(normal(2, 8))
    torch.testing.assert_close(second, first + 1.0)
    told = [record.message for record in caplog.records if "runs in PyTorch" in record.message]
    assert len(told) == 1
    assert "it writes to" in told[0]


def test_a_runtime_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As OpenVINO does with some graphs; here the session's program is of another model."""
    models = [seeded(lambda: nn.Linear(16, 8), seed=seed) for seed in (0, 1)]
    made = [calibrated(each, [((normal(32, 16),), {})], backend="onnxruntime") for each in models]
    other, quant_model = (q.quantize(m) for q, m in zip(made, models, strict=True))
    with caplog.at_level(logging.WARNING, "torch_quant"):
        other(normal(4, 16))
        assert "another result" not in caplog.text
        session = compiled(other).opened[0].session
        monkeypatch.setattr(OnnxRuntimeBackend, "open", lambda *_: session)
        quant_model(normal(4, 16))
    assert "gives another result than the quantized graph" in caplog.text


@by_onnxruntime
def test_dynamic_activations_have_no_form_in_the_file(name: str) -> None:
    model = seeded(lambda: nn.Linear(16, 8))
    coverage = Quantizer(recipes.int8_dynamic(), backend=name).coverage(model, normal(2, 16))
    assert "dynamic" in str(coverage)
    assert not coverage.share


def test_packages_that_are_missing() -> None:
    """Importing torch_quant needs none of them."""
    code = f"""
import importlib.util
names = {list(RUNTIMES)}
found = importlib.util.find_spec
importlib.util.find_spec = lambda each, *rest: None if each in names else found(each, *rest)
import torch_quant
for name in names:
    assert name not in [each.name for each in torch_quant.available_backends()]
    try:
        torch_quant.Quantizer(backend=name)
    except torch_quant.BackendUnavailable as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in RUNTIMES:
        assert f"{name} missing: pip install {name}" in told.stdout
