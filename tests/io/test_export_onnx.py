"""ONNX files: names, free sizes, metadata, written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import CASES, calibrated, run
from models import example, images, mlp, normal, seeded, tiny_transformer, tokens
from onnx_files import feeds, needs, run_onnxruntime, session, tensors, written
from thinning import rarely
from torch import Tensor, nn

from torch_quant import (
    Backend,
    BackendUnavailable,
    InvalidConfig,
    QuantPlan,
    UnsupportedOp,
    export_onnx,
    sqnr,
)
from torch_quant.io import onnx as onnx_io

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime"),
    pytest.mark.newest("the exporter is tested on the newest torch"),
]


def small() -> tuple[Any, Tensor]:
    """A quantized ``mlp`` and an input of it."""
    model, (x,) = mlp(), example("mlp", 4)
    return calibrated(model, [((x,), {})], backend="onnx").quantize(model), x


class Named(nn.Module):
    """Inputs and outputs by name; one input goes to an output as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, pixels: Tensor, other: dict[str, Tensor], scale: float = 2.0
    ) -> dict[str, Any]:
        y = self.query(pixels) * scale
        return {"logits": y, "both": (self.key(other["left"]), y), "seen": pixels, "size": 3}


def test_names_sizes_and_metadata(tmp_path: Path) -> None:
    import onnx

    model = seeded(Named)
    inputs = ((normal(2, 5, 8), {"left": normal(2, 3, 8)}), {})
    many = ((normal(64, 5, 8), {"left": normal(64, 3, 8)}), {})
    quantizer = calibrated(model, [many], backend="onnx")
    quant_model = written(quantizer, model, inputs, tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    sizes = {
        each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in (*file.graph.input, *file.graph.output)
    }
    assert list(sizes) == ["pixels", "other['left']", "logits", "both.0", "both.1", "seen"]
    assert sizes["pixels"] == ["batch", "pixels_1", 8]
    assert sizes["logits"] == ["batch", "pixels_1", 8]
    names = {node.name for node in file.graph.node}
    assert {"query", "key"} <= names
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    plan = QuantPlan.from_dict(json.loads(metadata["torch_quant.plan"]))
    assert dict(plan) == dict(quantizer.plan)
    calibration = json.loads(metadata["torch_quant.calibration"])
    assert calibration == {"batches": 1, "observers": ["minmax"]}
    assert metadata["torch_quant.version"]

    others = ((normal(4, 7, 8), {"left": normal(4, 1, 8)}), {})
    found = run_onnxruntime(tmp_path / "model.onnx", feeds(quant_model, others))
    assert sqnr(tensors(model, others), found) > 25


class Pieces(nn.Module):
    """Two linears whose paths differ in a dot, and Python code that needs values."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.a = nn.Sequential()
        self.a.add_module("b", nn.Linear(8, 8))
        self.a_b, self.norm, self.branches = nn.Linear(8, 8), nn.LayerNorm(8), branches

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.branches and float(x.sum()) > 1e9:
            x = x + 1
        return self.a_b(x)


@pytest.mark.parametrize("branches", [False, True], ids=["whole", "in pieces"])
def test_initializers_are_called_as_the_models_tensors(branches: bool, tmp_path: Path) -> None:
    import onnx

    model, x = seeded(lambda: Pieces(branches=branches)).eval(), normal(4, 8)
    quant_model = calibrated(model, [((x,), {})], backend="onnx").quantize(model)
    files = export_onnx(quant_model, x, tmp_path / "m.onnx", pieces=True)
    assert len(files) == (3 if branches else 1)
    found = {
        each.name: list(each.dims)
        for file in files
        for each in onnx.load(file).graph.initializer
        if not each.name.startswith("val_")
    }
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    for path in ("a.b", "a_b"):
        expected |= {f"{path}.weight_scale": [8], f"{path}.bias_scale": [8]}
    assert {name for name in found if name.partition("_zero_point")[0] == name} == set(expected)
    assert all(found[name] == shape for name, shape in expected.items())


def test_one_tensor_is_called_output(tmp_path: Path) -> None:
    quant_model, x = small()
    assert export_onnx(quant_model, x, tmp_path / "m.onnx") == [tmp_path / "m.onnx"]
    loaded = session(tmp_path / "m.onnx")
    assert [each.name for each in loaded.get_inputs()] == ["input"]
    assert [each.name for each in loaded.get_outputs()] == ["output"]
    assert loaded.get_inputs()[0].shape == ["batch", 16]


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (lambda x, y: {"x": y}, ["x_out"]),
        (lambda x, y: {"x": x, "x_out": y}, ["x_out_1", "x_out"]),
        (lambda x, y: {"a": {"b": y}, "a.b": y * 2.0, "a.b_1": x}, ["a.b", "a.b_2", "a.b_1"]),
        (lambda x, y: {"val_0": y * 2.0, "linear": x}, ["val_0", "linear"]),
    ],
    ids=["input", "that input", "repeated", "inner"],
)
def test_names_that_are_taken(outputs: Any, names: list[str], tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Any:
            return outputs(x, self.layer(x))

    model, inputs = seeded(Model), ((normal(8, 16),), {})
    quantizer = calibrated(model, [inputs], backend="onnx")
    written(quantizer, model, inputs, tmp_path / "model.onnx")
    loaded = session(tmp_path / "model.onnx")
    assert [each.name for each in loaded.get_inputs()] == ["x"]
    assert [each.name for each in loaded.get_outputs()] == names


def test_static_sizes(tmp_path: Path) -> None:
    quant_model, x = small()
    export_onnx(quant_model, x, tmp_path / "m.onnx", dynamic=False)
    assert session(tmp_path / "m.onnx").get_inputs()[0].shape == [4, 16]


@pytest.mark.parametrize("opset", [18, *map(rarely, (19, 20, 21))])  # blocked weights need 21
def test_opsets(opset: int, tmp_path: Path) -> None:
    quant_model, x = small()
    export_onnx(quant_model, x, tmp_path / "m.onnx", opset=opset)
    report = Backend.ONNX.verify(tmp_path / "m.onnx")
    assert report.opset == opset
    assert report.complete, str(report)
    (found,) = run_onnxruntime(tmp_path / "m.onnx", {"input": x.numpy()})
    assert sqnr(quant_model(x), found) > 35


@pytest.mark.parametrize("opset", [11, 17])
def test_an_opset_too_low(opset: int, tmp_path: Path) -> None:
    quant_model, x = small()
    with pytest.raises(InvalidConfig, match="expected 18 or more"):
        export_onnx(quant_model, x, tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_torch_onnx_export_takes_the_model(tmp_path: Path) -> None:
    model = tiny_transformer()
    quantizer = calibrated(model, [(example("tiny_transformer", 16), {})], backend="onnx")
    quant_model, args = quantizer.quantize(model), example("tiny_transformer", 2)
    sizes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    program = torch.onnx.export(quant_model, args, dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert program is not None
    program.save(tmp_path / "m.onnx", external_data=False)
    loaded = session(tmp_path / "m.onnx")
    others = example("tiny_transformer", 5)
    feed = {each.name: x.numpy() for each, x in zip(loaded.get_inputs(), others, strict=True)}
    assert sqnr(model(*others), torch.from_numpy(loaded.run(None, feed)[0])) > 25
    assert Backend.ONNX.verify(tmp_path / "m.onnx").complete


def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is protobuf's 2 GB, lowered here."""
    monkeypatch.setattr(onnx_io, "_LARGEST", 1000)
    quant_model, x = small()
    export_onnx(quant_model, x, tmp_path / "m.onnx")
    assert {each.name for each in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    (found,) = run_onnxruntime(tmp_path / "m.onnx", {"input": x.numpy()})
    assert sqnr(quant_model(x), found) > 35
    assert Backend.ONNX.verify(tmp_path / "m.onnx").complete


def test_pieces_are_exported_if_asked(tmp_path: Path) -> None:
    case = CASES["branch_on_data"]
    model = case.build()
    quant_model = calibrated(model, case.ones(), backend="onnx").quantize(model)
    args, kwargs = case.inputs(2)
    inputs = kwargs or args
    with pytest.raises(InvalidConfig, match=r"captured in pieces.*pieces=True"):
        export_onnx(quant_model, inputs, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    files = export_onnx(quant_model, inputs, tmp_path / "m.onnx", pieces=True)
    assert files
    assert set(files) == set(tmp_path.iterdir())
    for file in files:
        report = Backend.ONNX.verify(file)
        assert report.complete, str(report)
    run(quant_model, case.inputs(2))


# Bad input


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    quant_model, x = small()
    with pytest.raises(InvalidConfig, match="give a writable folder"):
        export_onnx(quant_model, x, tmp_path / "absent" / "m.onnx")
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(InvalidConfig, match="give a writable folder"):
            export_onnx(quant_model, x, tmp_path / "m.onnx")
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    quant_model, x = small()
    (tmp_path / "m.onnx").write_text("before")

    def full(model: Any, path: Path, **options: Any) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(InvalidConfig, match="No space left"):
        export_onnx(quant_model, x, tmp_path / "m.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "before"


def test_missing_packages_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant_model, x = small()
    export_onnx(quant_model, x, tmp_path / "m.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install onnx onnxscript"):
        export_onnx(quant_model, x, tmp_path / "m.onnx")
    with pytest.raises(BackendUnavailable, match="pip install onnx onnxruntime"):
        Backend.ONNX.verify(tmp_path / "m.onnx")
    assert "pip install onnx onnxscript" in (Backend.ONNX.unavailable() or "")


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_a_model_for_another_backend(backend: str, tmp_path: Path) -> None:
    if Backend.get(backend).unavailable():
        pytest.skip(f"Backend {backend}: {Backend.get(backend).unavailable()}")
    model, (x,) = mlp(), example("mlp", 4)
    quant_model = calibrated(model, [((x,), {})], backend=backend).quantize(model)
    with pytest.raises(InvalidConfig, match=r"backend=Backend\.ONNX"):
        export_onnx(quant_model, x, tmp_path / "m.onnx")
    with pytest.raises(InvalidConfig, match="expected a quantized model, got Sequential"):
        export_onnx(model, x, tmp_path / "m.onnx")


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.inner = nn.Linear(4, 4), nn.Module()

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(self.linear(x)).real

    model, x = Odd(), normal(2, 4, 4)
    quant_model = calibrated(model, [((x,), {})], backend="onnx").quantize(model)
    with pytest.raises(UnsupportedOp, match=r"linalg_eig\S* at \S*eigvals has no ONNX form"):
        export_onnx(quant_model, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_unpickled_in_a_process_that_has_not_seen_the_operators(tmp_path: Path) -> None:
    quant_model, x = small()
    torch.save((quant_model, x, quant_model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch, torch_quant; "
        "m, x, y = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(m(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_images_of_other_sizes(tmp_path: Path) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3))
    )
    inputs = ((images(2, 16),), {})
    quantizer = calibrated(model, [((images(64, 16),), {})], backend="onnx")
    quant_model = written(quantizer, model, inputs, tmp_path / "m.onnx")
    others = ((images(3, 24),), {})
    found = run_onnxruntime(tmp_path / "m.onnx", feeds(quant_model, others))
    assert sqnr(tensors(model, others), found) > 25


class Positions(nn.Module):
    """Texts of up to 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, 8), nn.Embedding(16, 8)
        self.register_buffer("positions", torch.arange(16)[None])
        self.linear = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[-1]
        words = self.words(ids.view(-1, length))
        return self.linear(words + self.places(self.positions[:, :length]))


@pytest.mark.parametrize("length", [16, rarely(9)])
def test_an_example_as_long_as_texts_may_be(length: int, tmp_path: Path) -> None:
    model = seeded(Positions)
    inputs = ((tokens(2, length),), {})
    quantizer = calibrated(model, [((tokens(16, length),), {})], backend="onnx")
    quant_model = written(quantizer, model, inputs, tmp_path / "m.onnx")
    for other in (1, 5, 16):
        others = ((tokens(3, other),), {})
        found = run_onnxruntime(tmp_path / "m.onnx", feeds(quant_model, others))
        assert sqnr(tensors(model, others), found) > 25


class FloatPieces(nn.Module):
    """Between two layers, pieces that hold nothing to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop(self.first(x)))
        return self.second(x if x.sum().item() < 1e9 else -x)


@pytest.mark.long("two pieces; test_pieces_are_exported_if_asked has them")
def test_pieces_without_anything_quantized(tmp_path: Path) -> None:
    """They are files too: the chain would not be whole without them."""
    model = seeded(FloatPieces)
    quantizer = calibrated(model, [((normal(64, 8),), {})], backend="onnx")
    quant_model, x = quantizer.quantize(model), normal(3, 8)
    files = export_onnx(quant_model, x, tmp_path / "m.onnx", pieces=True)
    assert [file.name for file in files] == [
        f"m.{name}.onnx" for name in ("first", "drop", "norm", "second")
    ]
    assert "0 of 0 quantized products" in str(Backend.ONNX.verify(files[1]))
    y = x
    for file in files:
        loaded = session(file)
        (y,) = run_onnxruntime(file, {loaded.get_inputs()[0].name: y.numpy()})
    torch.testing.assert_close(y, quant_model(x), rtol=1e-4, atol=1e-4)
    assert export_onnx(quant_model.first, x, tmp_path / "one.onnx")


def test_a_model_fallen_back_as_a_whole(tmp_path: Path) -> None:
    model, x = mlp(), example("mlp", 16)[0]
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    amp_model = quantizer.amp(model)
    amp_model(x)
    quantizer.fallback(amp_model, num=len(quantizer.quantize(model).plan))
    quant_model = written(quantizer, model, ((x,), {}), tmp_path / "m.onnx")
    (found,) = run_onnxruntime(tmp_path / "m.onnx", feeds(quant_model, ((x,), {})))
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
