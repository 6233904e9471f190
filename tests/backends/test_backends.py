"""How backends are named: by attribute for type checkers, by name for all, by the environment."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import Tensor, fx, nn

from torch_quant import Backend, BackendUnavailable, InvalidConfig, Quantizer
from torch_quant.backends import (
    IPEXBackend,
    ReferenceBackend,
    Verification,
    base,
    best_backend,
    register_backend,
)
from torch_quant.backends.ipex.verify import IPEXReport
from torch_quant.backends.onnx.verify import OnnxReport
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.passes.base import PassContext


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @register_backend
    class Toy(ReferenceBackend):
        name = "toy"
        priority = -20

        def lower(self, context: PassContext) -> fx.GraphModule:
            return super().lower(context)

    return Backend.get("toy")


def test_a_backend_from_outside(toy: Backend) -> None:
    model, x = nn.Linear(4, 2), torch.ones(8, 4)
    quantizer = Quantizer(backend="toy")
    assert quantizer.backend is toy
    assert repr(toy) == "Backend.TOY"
    assert Backend.TOY is toy  # type: ignore[attr-defined]
    quantizer.calib(model)(x)
    assert quantizer.quantize(model)(x).shape == (8, 2)


def test_threads_share_what_a_compiler_made_for_numbers() -> None:
    class Compiling(ReferenceBackend):
        compiles = True

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, factor: float) -> Tensor:
            return self.linear(x) * factor

    model, x = Scaled(), torch.ones(8, 4)
    quantizer = Quantizer(backend=Compiling())
    quantizer.calib(model)(x, 0.5)
    (graph,) = quantizer.quantize(model).graphs
    assert isinstance(graph, QuantizedGraph)
    errors: list[BaseException] = []

    def look(thread: int) -> None:
        try:
            for step in range(4000):
                number = torch.tensor(float((step * 7 + thread * 31) % 97))
                graph._variant(
                    graph.compiler,
                    tuple(  # type: ignore[arg-type]
                        number if place in graph.kind.numbers else x for place in range(2)
                    ),
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look, args=(i,)) for i in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    assert len(graph.variants) == 8


def test_a_misspelt_backend_says_which_is_close() -> None:
    with pytest.raises(InvalidConfig, match=r"unknown backend 'ONEDN'; .*did you mean onednn"):
        _ = Backend.ONEDN  # type: ignore[attr-defined]
    with pytest.raises(InvalidConfig, match="did you mean reference"):
        Quantizer("referense")


def test_reports_of_runtimes_have_one_shape() -> None:
    ipex = IPEXReport(1, {"linear": 1}, {"linear": 2}, {"head": "a reason"})
    onnx = OnnxReport("m.onnx", "", {}, 18, "1.31", {}, (), missing=("head",))
    for report in (ipex, onnx):
        assert isinstance(report, Verification)
        assert not report.complete
        assert list(report.left_out) == ["head"]
        assert "head" in str(report)


@pytest.mark.parametrize(
    ("backend", "args", "message"),
    [
        ("onnx", (nn.Linear(2, 2),), "expected the path of an exported file, got a model"),
        ("onnx", ("model.onnx", torch.ones(2, 2)), "takes the file alone"),
        ("ipex", ("model.pt",), r"expected the quantized model, got 'model.pt'; .*torch.jit.load"),
        ("reference", (nn.Linear(2, 2),), "runs every kernel that the plan names"),
    ],
)
def test_verify_refuses_what_it_cannot_read(
    backend: str, args: tuple[object, ...], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        Backend.get(backend).verify(*args)  # type: ignore[arg-type]


# The environment


def test_the_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_QUANT_BACKEND", "reference")
    assert Quantizer().backend is Backend.REFERENCE
    assert repr(Quantizer()).startswith("Quantizer(Backend.REFERENCE by TORCH_QUANT_BACKEND, ")


def test_the_environment_goes_before_the_program(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_QUANT_BACKEND", " REFERENCE ")
    quantizer = Quantizer("onednn")
    assert quantizer.backend is Backend.REFERENCE
    assert "by TORCH_QUANT_BACKEND in the place of Backend.ONEDNN" in repr(quantizer)
    assert "TORCH_QUANT_BACKEND is set" in caplog.text
    model, x = nn.Linear(4, 2), torch.ones(8, 4)
    quantizer.calib(model)(x)
    assert "Backend.ONEDNN" in str(quantizer.coverage(model, backend="onednn"))  # asked at the call
    quantizer.backend = Backend.ONEDNN  # later, by the program
    assert "TORCH_QUANT_BACKEND" not in repr(quantizer)


def test_the_same_backend_keeps_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_QUANT_BACKEND", "reference")
    mine = ReferenceBackend(Backend.ONEDNN)
    quantizer = Quantizer(mine)
    assert quantizer.backend is mine
    assert "TORCH_QUANT_BACKEND" not in repr(quantizer)


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_QUANT_BACKEND", value)
    assert Quantizer().backend is best_backend()


def test_an_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_QUANT_BACKEND", "onedn")
    with pytest.raises(
        InvalidConfig,
        match=r"the environment variable TORCH_QUANT_BACKEND: unknown backend 'onedn'.*onednn",
    ):
        Quantizer("reference")


def test_a_backend_of_the_environment_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IPEXBackend, "unavailable", lambda self: "it is elsewhere")
    monkeypatch.setenv("TORCH_QUANT_BACKEND", "ipex")
    with pytest.raises(BackendUnavailable, match=r"TORCH_QUANT_BACKEND: Backend.IPEX does not run"):
        Quantizer()
