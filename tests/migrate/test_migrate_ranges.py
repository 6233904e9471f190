"""Ranges of files that other tools wrote serve the sites of the model here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer, export_onnx, sqnr
from torch_quant.migrate import Migration, Outcome, from_ipex, from_onnx

onnx: Any = pytest.importorskip("onnx")
runtime: Any = pytest.importorskip("onnxruntime")
quantization: Any = pytest.importorskip("onnxruntime.quantization")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).relu().flatten(2)
        for layer in self.layers:
            y = layer(y)
        return self.head(y.mean(1)), torch.matmul(y, y.transpose(1, 2))


class Reader(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter([{"x": images(i).numpy()} for i in range(4)])

    def get_next(self) -> Any:
        return next(self.batches, None)


def images(seed: int) -> Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    torch.onnx.export(Net().eval(), (images(9),), path, dynamo=False, input_names=["x"])
    return path


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_ranges_of_a_file_that_onnxruntime_quantized(
    form: str, exported: Path, tmp_path: Path
) -> None:
    path, model, x = tmp_path / "int8.onnx", Net().eval(), images(9)
    how = quantization.QuantFormat[form]
    quantization.quantize_static(exported, path, Reader(), quant_format=how)
    found = from_onnx(path, model, x)
    assert not found.unmapped
    (theirs, *_) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    for backend in ("reference", "onednn"):
        quantizer = found.quantizer(backend=backend)
        ours = quantizer.quantize(model, example_inputs=x)(x)
        assert len(quantizer.plan.quantized) == 5
        # the file rounds results too, which ours leaves in float
        assert sqnr(torch.from_numpy(theirs), ours[0]) > 38
    scale = next(
        onnx.numpy_helper.to_array(each)
        for each in onnx.load(path).graph.initializer
        if each.name == "x_scale"
    )
    grid = quantizer.state.qparams(
        quantizer.plan["conv"].inputs[0], quantizer.plan["conv"].activation
    )
    assert float(grid.scale) == pytest.approx(float(scale), rel=1e-6)


def test_ranges_of_a_file_of_our_own_and_settings_beside_them(tmp_path: Path) -> None:
    model, x = Net().eval(), images(9)
    quantizer = Quantizer("onnx", qconfig=QConfig(), overrides={"layers.1.0": None})
    quantizer.calib(model)(x)
    export_onnx(quantizer.quantize(model), x, tmp_path / "ours.onnx")
    found = from_onnx(tmp_path / "ours.onnx", model, x)
    assert {row.entry for row in found.unmapped} == {"linear layers.1.0"}
    again = found.quantizer(backend="reference")
    again.quantize(model, example_inputs=x)
    assert "layers.1.0" not in again.plan.quantized
    for name in ("conv", "layers.0.0", "matmul"):
        (key, *_), spec = again.plan[name].inputs, again.plan[name].activation
        mine, read = (each.state.qparams(key, spec) for each in (quantizer, again))
        assert torch.allclose(mine.scale, read.scale)
        assert torch.equal(mine.zero_point, read.zero_point)
    found.save_summary(tmp_path / "summary.json")
    loaded = Quantizer("reference")
    loaded.load_summary(tmp_path / "summary.json")
    assert torch.equal(loaded.quantize(model, example_inputs=x)(x)[1], again.quantize(model)(x)[1])


def test_files_that_are_none_or_of_another_model(exported: Path, tmp_path: Path) -> None:
    model, x = Net().eval(), images(9)
    with pytest.raises(InvalidConfig, match="no product with quantized inputs"):
        from_onnx(exported, model, x)
    (tmp_path / "none.onnx").write_bytes(b"\x99no protobuf")
    with pytest.raises(InvalidConfig, match="cannot read the ONNX file"):
        from_onnx(tmp_path / "none.onnx", model, x)
    quantization.quantize_static(exported, tmp_path / "int8.onnx", Reader())
    other = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with pytest.raises(InvalidConfig, match="of another model"):
        from_onnx(tmp_path / "int8.onnx", other, x)


def broken(path: Path, *, before: str = "", inputs: int = 2, **tensors: Any) -> Path:
    """One product behind a pair, of which one thing is wrong."""
    make, numbers = onnx.helper.make_node, onnx.numpy_helper.from_array
    held = {"s": np.float32(0.1), "z": np.uint8(3), "0.weight": np.ones((4, 4), np.float32)}
    initializers = [numbers(np.asarray(v), k) for k, v in (held | tensors).items() if v is not None]
    if tensors.get("s", 0) is None:  # four bytes for a thousand numbers
        bad = onnx.TensorProto(name="s", data_type=1, dims=[1000], raw_data=b"\0\0\0\0")
        initializers.append(bad)
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"]),
        make("DequantizeLinear", ["q", "s", "z"][: 1 if before == "short" else 3], ["d"]),
        make("Identity", [] if before == "empty" else ["a" if before == "cycle" else "d"], ["b"]),
        make("Identity", ["b"], ["a"]),
        make("MatMul", ["a", "0.weight"][:inputs], [] if before == "no result" else ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    ends = [[onnx.helper.make_tensor_value_info(n, kind, [2, 4])] for n in ("x", "y")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *ends, initializers)), path)
    return path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"before": "cycle"},
            "Identity a: expected a graph without cycles; got 'a' made of itself",
        ),
        ({"before": "empty"}, "Identity b: expected 1 inputs or more; got 0"),
        ({"before": "short"}, "DequantizeLinear d: expected 2 inputs or more; got 1"),
        ({"before": "no result"}, "MatMul .*: expected a result; got none"),
        ({"inputs": 1}, "MatMul y: expected 2 inputs or more; got 1"),
        ({"z": np.zeros(0, np.uint8)}, "the zero point 'z': expected one, .*; got 0"),
        ({"s": None}, "the initializer 's' cannot be read: ValueError"),
        *(
            ({"s": np.float32(scale)}, f"the scale 's': expected a number above 0.*; got {scale}")
            for scale in (0.0, -0.5, float("nan"), float("inf"), 2.0**127)
        ),
    ],
)
def test_broken_files_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Each message names the file, the node or tensor, what was expected and what is there."""
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.ones(2, 4)
    path = broken(tmp_path / "broken.onnx", **wrong)
    with pytest.raises(InvalidConfig, match=r"broken.onnx: " + message.replace("+", r"\+")):
        from_onnx(path, model, x)
    good = from_onnx(broken(tmp_path / "good.onnx"), model, x)
    assert good.quantizer(backend="reference").quantize(model, example_inputs=x)(x).shape == (2, 4)


def test_a_summary_of_ipex(tmp_path: Path) -> None:
    """As ``save_qconf_summary`` writes it; ``tests/io/test_ipex_summary.py`` has IPEX's own."""

    def tensor(scale: float, zero_point: int) -> dict[str, Any]:
        return {"inf_dtype": "torch.quint8", "scale": [scale], "zero_point": [zero_point]}

    def entry(kind: str, name: str, *inputs: dict[str, Any]) -> dict[str, Any]:
        return {"op_type": kind, "op_type_is_module": bool(name), "fqn": name,
                "input_tensor_infos": list(inputs)}  # fmt: skip

    relu = "<method 'relu' of 'torch._C.TensorBase' objects>"
    operators = {
        "0": entry("<class 'torch.nn.modules.conv.Conv2d'>", "conv", tensor(0.02, 120)),
        "1": entry(relu, "", tensor(0.1, 0)),
    }
    (tmp_path / "ipex.json").write_text(json.dumps({" ": {"q_op_infos": operators}}))
    model, x = Net().eval(), images(9)
    found: Migration = from_ipex(tmp_path / "ipex.json", model, x)
    outcomes = {row.entry: row.outcome for row in found}
    assert outcomes["conv2d conv"] is Outcome.SAME
    assert outcomes["(root), operator 1: relu"] is Outcome.LEFT_OUT
    assert outcomes["linear head"] is Outcome.LEFT_OUT
    quantizer = found.quantizer(backend="reference")
    quantizer.quantize(model, example_inputs=x)
    assert quantizer.plan.quantized == ("conv",)
    with pytest.raises(InvalidConfig, match="has no ranges"):
        Migration("settings alone", quantizer.qconfig).save_summary(tmp_path / "x.json")
