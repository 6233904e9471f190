"""Weights of a few bits under float activations, in ONNX files: kernels, numbers, sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, IN_FLOAT, ids, quantized
from models import normal, seeded
from onnx_files import check_free_sizes, needs
from thinning import rarely, some
from torch import Tensor, nn

from torch_quant import (
    FLOAT,
    Backend,
    InvalidConfig,
    QConfig,
    Quantizer,
    QuantSpec,
    export_checkpoint,
    export_onnx,
    load_checkpoint,
    recipes,
    sqnr,
)

pytestmark = needs("onnx", "onnxscript", "onnxruntime")

INT4 = recipes.int4_weight_only(group_size=32)
QCONFIGS = {
    "int4": INT4,
    "int4-16": recipes.int4_weight_only(group_size=16),
    "int4-channel": recipes.int4_weight_only(group_size=None),
    "int8": recipes.int8_weight_only(),
    "int8-48": recipes.int8_weight_only(group_size=48),
}


class Net(nn.Module):
    """With and without a bias, rows and sequences, rectifiers and none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle = nn.Linear(96, 192), nn.Linear(192, 192, bias=False)
        self.down, self.pooled, self.head = (
            nn.Linear(192, 40), nn.Linear(192, 96), nn.Linear(96, 8, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.middle(self.up(x).relu()).clamp(-1, 1)
        return self.down(hidden), self.head(self.pooled(hidden[:, 0])).relu()


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def net() -> nn.Module:
    return seeded(Net).eval()


def written(
    model: nn.Module, example: Any, path: Path, qconfig: QConfig = INT4, **options: Any
) -> Any:
    """Quantized and exported, embeddings in float."""
    quantizer = Quantizer(qconfig, backend="onnx", overrides=IN_FLOAT)
    quant_model = quantizer.quantize(model, example_inputs=example)
    export_onnx(quant_model, example, path, progress=False, **options)
    return quant_model


def onnxruntime_gives(path: Path, feeds: dict[str, Any], level: int | None) -> list[Tensor]:
    """Outputs at an accuracy level of fused weights: 4 rounds activations to int8, 0 does not."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in feeds.items()})
    return [torch.from_numpy(x) for x in found]


def openvino_gives(path: Path, feeds: dict[str, Any], **options: str) -> list[Tensor]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", **options}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    found = compiled({name: x.numpy() for name, x in feeds.items()})
    return [torch.from_numpy(found[i].copy()) for i in range(len(compiled.outputs))]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same products of the same floats, added up in another order."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Activations rounded to int8, block by block: 1 part in 254 of each block's largest."""
    assert all(sqnr(y, x) > 30 for x, y in zip(found, expected, strict=True))


@pytest.mark.thin
@pytest.mark.parametrize("matmul_nbits", [False, True], ids=["standard", "nbits"])
@pytest.mark.parametrize("name", QCONFIGS)
def test_runtimes_compute_it_on_kernels(name: str, matmul_nbits: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    quant_model = written(net(), normal(2, 5, 96), path, QCONFIGS[name], matmul_nbits=matmul_nbits)
    report = Backend.ONNX.verify(path)
    assert report.complete, report
    assert {each.kernel for each in report.sites} == {"MatMulNBits"}
    assert len(report.sites) == 5
    usual = 18 if torch.__version__.startswith("2.8.") else 20  # of PyTorch's exporter
    assert report.opset == (usual if matmul_nbits else 21)
    check_free_sizes(path, quant_model, ((normal(2, 5, 96),), {}), 30.0)
    x = normal(3, 7, 96)
    expected, feeds = list(quant_model(x)), {"x": x}
    near(onnxruntime_gives(path, feeds, None), expected)
    if not matmul_nbits:
        close(onnxruntime_gives(path, feeds, 0), expected)


@needs("openvino")
@pytest.mark.parametrize("name", some(QCONFIGS, "int8-48"))
def test_openvino_reads_the_same_file(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", normal(3, 7, 96)
    quant_model = written(net(), normal(2, 5, 96), path, QCONFIGS[name])
    expected = list(quant_model(x))
    near(openvino_gives(path, {"x": x}), expected)
    close(openvino_gives(path, {"x": x}, DYNAMIC_QUANTIZATION_GROUP_SIZE="0"), expected)


@pytest.mark.parametrize("name", ["tied", rarely("qwen2")])
def test_decoders(name: str, tmp_path: Path) -> None:
    path, example = tmp_path / "decoder.onnx", {**ids(), "use_cache": False}
    quant_model = written(DECODERS[name](), example, path)
    report = Backend.ONNX.verify(path)
    assert report.complete, report
    assert len(report.fused) == 8
    found = onnxruntime_gives(path, ids(3, 9), 0)
    close(found, [quant_model(**ids(3, 9), use_cache=False).logits])


@pytest.mark.long("six seconds; the codes of a file and of a checkpoint are tested apart")
def test_a_checkpoint_becomes_a_file(tmp_path: Path) -> None:
    """The integers go from the GPTQ layout into ONNX as they are."""
    example = {**ids(), "use_cache": False}
    original = quantized(DECODERS["qwen2"]())
    folder = export_checkpoint(original, tmp_path / "gptq", format="gptq")
    quant_model = load_checkpoint(folder, backend="onnx", example_inputs=example)
    export_onnx(quant_model, example, tmp_path / "model.onnx", progress=False)
    assert Backend.ONNX.verify(tmp_path / "model.onnx").complete
    found = onnxruntime_gives(tmp_path / "model.onnx", ids(3, 9), 0)
    close(found, [original(**ids(3, 9)).logits])


def test_what_the_file_holds(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "net.onnx"
    quant_model = written(net(), normal(2, 5, 96), path)
    file = onnx.load(path)
    held = {each.name: each for each in file.graph.initializer}
    weight, scale = held["up.weight"], held["up.weight_scale"]
    assert (weight.data_type, list(weight.dims)) == (onnx.TensorProto.INT4, [96, 192])
    assert list(scale.dims) == [3, 192]
    codes = onnx.numpy_helper.to_array(weight).astype("int8")
    assert torch.equal(torch.from_numpy(codes).T, quant_model.up.weight)
    assert {node.name for node in file.graph.node if node.op_type == "MatMul"} == {
        "up", "middle", "down", "pooled", "head",
    }  # fmt: skip
    # Half a byte an element and 4 bytes for 32 of them; the rest is biases and the graph.
    elements = 96 * 192 + 192 * 192 + 192 * 40 + 192 * 96 + 96 * 8
    assert path.stat().st_size < elements * (0.5 + 4 / 32) + 40_000
    written(net(), normal(2, 5, 96), tmp_path / "nbits.onnx", matmul_nbits=True)
    held = {each.name: each for each in onnx.load(tmp_path / "nbits.onnx").graph.initializer}
    assert list(held["up.weight"].dims) == [192, 3, 16]
    assert list(held["up.weight_scale"].dims) == [192 * 3]


def test_blocks_without_a_kernel_are_right_and_reported(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", normal(2, 5, 96)
    eights = recipes.int4_weight_only(group_size=8)
    quant_model = written(net(), x, path, eights)
    close(onnxruntime_gives(path, {"x": x}, None), list(quant_model(x)))
    report = Backend.ONNX.verify(path)
    assert "a scale for each 8 inputs; MatMulNBits wants 16" in report.left_out["up"]
    with pytest.raises(InvalidConfig, match=r"up\.weight has a scale for each 8 inputs"):
        written(net(), x, tmp_path / "nbits.onnx", eights, matmul_nbits=True)


def test_a_weight_of_two_products(tmp_path: Path) -> None:
    model, x = seeded(Twice).eval(), normal(2, 5, 96)
    path, nbits = tmp_path / "twice.onnx", tmp_path / "nbits.onnx"
    expected = [written(model, x, path)(x)]
    close(onnxruntime_gives(path, {"x": x}, 0), expected)
    left = Backend.ONNX.verify(path).left_out
    assert left.keys() == {"layer", "layer@1"}
    assert all("export_onnx(matmul_nbits=True) has a kernel" in why for why in left.values())
    written(model, x, nbits, matmul_nbits=True)
    near(onnxruntime_gives(nbits, {"x": x}, None), expected)
    assert Backend.ONNX.verify(nbits).complete
    assert nbits.stat().st_size < 96 * 96 * 0.7 + 20_000


def test_an_opset_without_blocks(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", normal(2, 5, 96)
    with pytest.raises(InvalidConfig, match=r"opset=20.*need 21 or more"):
        written(net(), x, path, opset=20)
    assert not path.exists()
    written(net(), x, path, opset=20, matmul_nbits=True)
    assert Backend.ONNX.verify(path).opset == 20


REFUSED: dict[str, Callable[[], QuantSpec]] = {
    "affine": lambda: recipes.int4_weight_only(symmetric=False).weight,  # type: ignore[return-value]
    "three bits": lambda: QuantSpec.of(bits=3, signed=True, symmetric=True, per_channel=True),
    "float8": lambda: QuantSpec.of("float8_e4m3fn", per_channel=True),
    "one scale": lambda: QuantSpec.of("int8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_formats_without_a_kernel_stay_in_float(name: str) -> None:
    quantizer = Quantizer(QConfig(FLOAT, REFUSED[name]()), backend="onnx")
    coverage = quantizer.coverage(net(), normal(2, 5, 96))
    assert coverage.share == 0
    assert "signed weights of 4 or 8 bits" in str(coverage)
