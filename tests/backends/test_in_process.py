"""Runtimes in this process: calls, sizes, memory, threads, copies, files, options."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import example, mlp, normal, seeded, small_cnn
from onnx_files import feeds, needs, run_onnxruntime, run_openvino
from runtimes import (
    RUNTIMES,
    Everything,
    Pieces,
    by_onnxruntime,
    by_openvino,
    check_calls_of_any_form,
    compiled,
    each_runtime,
    everything,
)
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    FLOAT,
    Backend,
    BackendUnavailable,
    InvalidConfig,
    QConfig,
    Quantizer,
    export_onnx,
    recipes,
    sqnr,
)  # fmt: skip
from torch_quant.backends import OpenVINOBackend, ReferenceBackend

pytestmark = needs("onnx", "onnxscript", "onnxruntime", "openvino")


@each_runtime
def test_calls_of_any_form_and_size(name: str) -> None:
    """Inputs and outputs are those of the model, from one session, and outlive the next call."""
    model = seeded(Everything)
    quantizer = calibrated(model, [everything(4), everything(6)], backend=name)
    quant_model, reference = quantizer.quantize(model), quantizer.quantize(model, backend="onnx")
    assert isinstance(quant_model, Everything)
    check_calls_of_any_form(quant_model, reference)
    assert len(compiled(quant_model).opened) == 1


@by_openvino
def test_it_runs_what_the_file_holds(name: str, tmp_path: Path) -> None:
    model, x = small_cnn(), example("small_cnn", 3)
    quantizer = calibrated(model, [(example("small_cnn", 16), {})], backend=name)
    quant_model, written = quantizer.quantize(model), quantizer.quantize(model, backend="onnx")
    export_onnx(written, x, tmp_path / "model.onnx", progress=False)
    run_file = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}[name]
    (expected,) = run_file(tmp_path / "model.onnx", feeds(written, (x, {})))
    assert torch.equal(quant_model(*x), expected)


@by_onnxruntime
def test_memory_that_is_handed_over(name: str) -> None:
    """Transposed, offset, expanded and differentiable inputs; none of them is written to."""
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU()))
    quant_model = calibrated(model, [((normal(32, 16),), {})], backend=name).quantize(model)
    x = normal(6, 16)
    expected = quant_model(x)
    wide = torch.zeros(6, 40)
    wide[:, 3:19] = x
    with torch.enable_grad():
        needing = x.clone().requires_grad_()
        outputs = [quant_model(each) for each in (x.t().contiguous().t(), wide[:, 3:19], needing)]
    for found in outputs:
        assert torch.equal(found, expected)
        assert not found.requires_grad
    assert torch.equal(quant_model(x[:1].expand(6, 16)), expected[:1].expand(6, 8))
    before = expected.clone()
    expected.zero_()  # the caller's own now
    assert torch.equal(quant_model(x), before)
    with torch.inference_mode():
        assert torch.equal(quant_model(x), before)


@each_runtime
def test_threads_may_share_a_model(name: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)))
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend=name)
    quant_model = quantizer.quantize(model)
    inputs = [normal(size, 16) + size for size in range(1, 9)]
    start, failures = threading.Barrier(4), []
    expected = [quantizer.quantize(model, backend="onnx")(x) for x in inputs]

    def work(first: int) -> None:
        start.wait()
        for i in range(40):  # the first calls of all four come at once
            place = (first + i) % len(inputs)
            found = quant_model(inputs[place])
            if not torch.allclose(found, expected[place], atol=1e-4):
                failures.append(place)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not failures
    assert len(compiled(quant_model).opened) == 1


@by_openvino
def test_copies_pickles_and_saved_models(name: str, tmp_path: Path) -> None:
    model, x = mlp(), example("mlp", 3)
    quantizer = calibrated(model, [(example("mlp", 32), {})], backend=name)
    quantizer.backend = RUNTIMES[name](threads=1)  # of this process: no part of what is saved
    quant_model = quantizer.quantize(model)
    expected = quant_model(*x)
    assert sqnr(model(*x), expected) > 20
    for again in (copy.deepcopy(quant_model), pickle.loads(pickle.dumps(quant_model))):
        assert again.graphs[0].compiled is None
        assert torch.equal(again(*x), expected)
        assert again.graphs[0].compiled is not quant_model.graphs[0].compiled
    torch_quant.save(quant_model, tmp_path)
    assert {each.suffix for each in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = torch_quant.load(tmp_path, mlp())
    assert torch.equal(loaded(*x), expected)
    assert loaded(*example("mlp", 5)).shape == (5, *expected.shape[1:])
    assert name.upper() in repr(loaded)
    with pytest.raises(InvalidConfig, match="compiles its kernels with the weights"):
        loaded.load_state_dict(quant_model.state_dict())


@each_runtime
def test_options(name: str, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Linear(16, 8))
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend=RUNTIMES[name](threads=2))
    version = RUNTIMES[name]().version
    assert f"Backend.{name.upper()} {version} with threads=2" in repr(quantizer)
    assert version in str(quantizer.coverage(model))
    quant_model = quantizer.quantize(model, example_inputs=normal(2, 16))
    assert f"{name.upper()} {version} with threads=2" in repr(quant_model)
    assert compiled(quant_model).opened  # an example makes the session
    for wrong in (0, -1, True, 2.0, "2"):
        with pytest.raises(InvalidConfig, match=r"threads=.*expected an int from 1 on, or None"):
            RUNTIMES[name](threads=wrong)  # type: ignore[arg-type]
    settings = {"onnxruntime": {"session.set_denormal_as_zero": "1"},
                "openvino": {"INFERENCE_PRECISION_HINT": "bf16"}}[name]  # fmt: skip
    other = quantizer.quantize(model, backend=RUNTIMES[name](settings=settings))
    assert sqnr(quant_model(normal(2, 16)), other(normal(2, 16))) > 30
    with pytest.raises(InvalidConfig, match="options of its own, which are no data"):
        torch_quant.save(other, tmp_path)


def test_openvinos_own_settings(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Linear(16, 8))
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend="openvino")

    def session(backend: OpenVINOBackend) -> Any:
        quant_model = quantizer.quantize(model, backend=backend)
        quant_model(normal(2, 16))
        return compiled(quant_model).opened[0].session

    made = session(OpenVINOBackend(cache_dir=tmp_path)).compiled
    assert made.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert str(made.get_property("PERFORMANCE_HINT")).endswith("LATENCY")
    assert made.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    assert list(tmp_path.iterdir())
    assert session(OpenVINOBackend(threads=2)).compiled.get_property("INFERENCE_NUM_THREADS") == 2
    quant_model = quantizer.quantize(model, backend=OpenVINOBackend(device="NOWHERE"))
    with pytest.raises(BackendUnavailable, match=r"device='NOWHERE'.*; there is .*CPU"):
        quant_model(normal(2, 16))


class Waiting(nn.Module):
    """Takes its time to be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.over = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.over.wait(60)
        return x + 1.0


def test_another_thread_may_export() -> None:
    """PyTorch then says of every thread that it is compiling."""
    model, waiting, x = seeded(lambda: nn.Linear(16, 8)), Waiting(), normal(4, 16)
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend="onnxruntime")
    quant_model = quantizer.quantize(model, example_inputs=x)
    expected = quant_model(x)
    exporting = threading.Thread(target=lambda: torch.export.export(waiting, (x,), strict=False))
    exporting.start()
    assert waiting.begun.wait(60)
    try:
        assert torch.compiler.is_compiling()
        assert torch.equal(quant_model(x), expected)
    finally:
        waiting.over.set()
        exporting.join()


@by_onnxruntime
def test_a_model_in_pieces(name: str) -> None:
    model = seeded(Pieces)
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend=name)
    quant_model = quantizer.quantize(model)
    for size in (3, 8):
        x = normal(size, 16)
        expected = quantizer.quantize(model, backend="onnx")(x)
        torch.testing.assert_close(quant_model(x), expected, rtol=0.0, atol=1e-4)
    sessions = [compiled(part) for part in (quant_model.first, quant_model.second)]
    assert all(len(each.opened) == 1 for each in sessions)


WEIGHT_ONLY = {
    "int4": recipes.int4_weight_only(group_size=32),
    "int8": QConfig(FLOAT, recipes.int8_weight_only().weight),
}


@pytest.mark.thin
@pytest.mark.parametrize("recipe", WEIGHT_ONLY)
@each_runtime
def test_weights_alone(name: str, recipe: str) -> None:
    """Kernels round activations to 8 bits block by block, which costs some 40 dB."""
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)))
    quantizer = Quantizer(WEIGHT_ONLY[recipe], backend=name)
    x = normal(4, 64)
    quant_model = quantizer.quantize(model, example_inputs=x)
    assert quantizer.plan.coverage == 1.0
    exact = quantizer.quantize(model, backend=ReferenceBackend(Backend.get(name)))(x)
    assert sqnr(exact, quant_model(x)) > 30
    assert len(compiled(quant_model).opened) == 1


@by_onnxruntime
@pytest.mark.newest("its capture alone takes a quarter of a minute")
def test_windows_of_a_batch_of_one(name: str) -> None:
    """The exporter once took a batch of 1 for all batches up to 2, in layers behind merged windows.

    OpenVINO then gave one image's result for more, onnxruntime refused them.
    """
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    config = transformers.SwinConfig(**sizes, depths=[2, 1], num_heads=[1, 1])
    model = seeded(lambda: transformers.SwinModel(config))
    quantizer = Quantizer(backend=name, dynamic={"pixel_values": [0]})
    calib_model = quantizer.calib(model)
    with torch.no_grad():
        for batch in (1, 2):
            calib_model(pixel_values=normal(batch, 3, 32, 32))
    quant_model = quantizer.quantize(model)
    for batch in (1, 2, 5):
        x = normal(batch, 3, 32, 32)
        found, expected = (each(pixel_values=x)[0] for each in (quant_model, model))
        assert sqnr(expected, found) > 18.0
    assert len(compiled(quant_model).opened) == 1
