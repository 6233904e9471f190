"""The ONNX backend op by op: one step of the reference, and fused by onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import example, mobile_cnn, normal, seeded, small_cnn, tiny_transformer
from onnx_files import feeds, needs, operators, run_onnxruntime, run_openvino, tensors, written
from processor import WEIGHT_BITS
from thinning import rarely, some
from torch import Tensor, nn

from torch_quant import Backend, InvalidConfig, ModuleFilter, QConfig, QuantSpec, sqnr
from torch_quant.backends import ReferenceBackend

pytestmark = needs("onnx", "onnxscript", "onnxruntime")

OPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear_2d": (lambda: nn.Linear(16, 8), (5, 16)),
    "linear_3d": (lambda: nn.Linear(16, 8), (3, 5, 16)),
    "linear_no_bias": (lambda: nn.Linear(16, 8, bias=False), (3, 5, 16)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (3, 8, 20)),
    "conv1d_same": (lambda: nn.Conv1d(8, 16, 3, padding="same", dilation=2), (3, 8, 20)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 9, 11)),
    "conv2d_no_bias": (lambda: nn.Conv2d(8, 16, 3, bias=False), (3, 8, 9, 11)),
    "conv2d_valid": (lambda: nn.Conv2d(8, 16, 3, padding="valid"), (3, 8, 9, 11)),
    "conv2d_depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (3, 8, 9, 11)),
    "conv2d_grouped": (lambda: nn.Conv2d(8, 16, (3, 2), stride=(2, 1), groups=4), (3, 8, 9, 11)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (2, 4, 5, 6, 7)),
}
FEW = (
    "linear_2d", "linear_no_bias", "conv1d_same", "conv2d_depthwise", "conv2d_grouped", "conv3d",
)  # fmt: skip
"""Each rank, groups, a padding by name, no bias: the others are between them."""
BEHIND: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}


def shifted(*shape: int) -> Tensor:
    """Values whose zero point is neither end of the range."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def check_one_step(
    model: nn.Module, x: Tensor, path: Path, config: QConfig | None = None, fused: int = 1
) -> list[str]:
    """File, quantized model and reference differ by one step of the output at most.

    Returns:
        The integer kernels that onnxruntime runs.
    """
    quantizer = calibrated(model, [((x,), {})], backend="onnx", qconfig=config)
    quant_model = written(quantizer, model, ((x,), {}), path)
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.ONNX))
    expected = simulation(x)
    first = model[0] if isinstance(model, nn.Sequential) else model
    step = max(float(y.max() - y.min()) for y in (expected, first(x))) / 255
    step *= 1.5  # the steepest slope of the functions behind a product, hardswish's
    (found,) = run_onnxruntime(path, feeds(quant_model, ((x,), {})))
    assert (quant_model(x) - expected).abs().max() <= 1.01 * step
    assert (found - expected).abs().max() <= 1.01 * step
    assert sqnr(model(x), found) > 25
    report = Backend.ONNX.verify(path)
    assert len(report.fused) == fused, str(report)
    return [site.kernel for site in report.fused]


@pytest.mark.parametrize("name", some(OPS, *FEW))
def test_each_product(name: str, tmp_path: Path) -> None:
    build, shape = OPS[name]
    check_one_step(seeded(build), shifted(*shape), tmp_path / "model.onnx")


@pytest.mark.thin
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_a_product(name: str, kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(8, 8, 3)
        return nn.Sequential(layer, BEHIND[name]())

    x = shifted(4, 5, 16) if kind == "linear" else shifted(2, 8, 9, 9)
    model = seeded(build)
    kernels = check_one_step(model, x, tmp_path / "model.onnx")
    assert kernels == ["QGemm" if kind == "linear" else "QLinearConv"]


FORMATS = {
    "signed": QConfig(input=QuantSpec.of(signed=True)),
    "symmetric": QConfig(input=QuantSpec.of(signed=True, symmetric=True)),
    "unsigned_symmetric": QConfig(input=QuantSpec.of(symmetric=True)),
    "weight_per_tensor": QConfig(
        weight=QuantSpec.of(bits=WEIGHT_BITS, signed=True, symmetric=True)
    ),
    "weight_affine": QConfig(weight=QuantSpec.of(bits=WEIGHT_BITS, signed=True)),
    "weight_7_bits": QConfig(
        weight=QuantSpec.of(bits=7, signed=True, symmetric=True, per_channel=True)
    ),
    "activation_7_bits": QConfig(input=QuantSpec.of(bits=7)),
}


@pytest.mark.thin
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, kind: str, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(8, 8, 3))
    x = shifted(4, 16) if kind == "linear" else shifted(2, 8, 9, 9)
    quantizer = calibrated(model, [((x,), {})], backend="onnx", qconfig=FORMATS[name])
    quant_model = written(quantizer, model, ((x,), {}), tmp_path / "model.onnx")
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.ONNX))
    expected = simulation(x)
    width = expected.max() - expected.min()
    if "symmetric" in name:  # as many steps on both sides of 0
        width = 2 * expected.abs().max()
    step = width / (127 if "activation" in name else 254 if "symmetric" in name else 255)
    (found,) = run_onnxruntime(tmp_path / "model.onnx", feeds(quant_model, ((x,), {})))
    assert (quant_model(x) - expected).abs().max() <= 1.01 * step
    assert (found - expected).abs().max() <= 1.01 * step


def test_a_weight_with_zero_points_by_channel_stays_in_float() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    weight = QuantSpec.of(signed=True, per_channel=True)
    quantizer = calibrated(
        model, [((shifted(4, 16),), {})], backend="onnx", overrides={"0": QConfig(weight=weight)}
    )
    quantizer.quantize(model)
    assert "one integer zero point for all channels" in quantizer.plan["0"].reason


def test_a_bias_that_dwarfs_its_weights_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(16, 4)
    with torch.no_grad():
        model.weight[1] *= 1e-12
        model.weight[2] = 0.0
        model.bias.copy_(torch.tensor([0.1, 5.0, -7.0, 0.0]))
    x = shifted(6, 16)
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model = written(quantizer, model, ((x,), {}), tmp_path / "model.onnx")
    (found,) = run_onnxruntime(tmp_path / "model.onnx", feeds(quant_model, ((x,), {})))
    assert torch.allclose(found[:, 1:3], model.bias[1:3].expand(6, 2), rtol=1e-4)
    assert sqnr(model(x), found) > 30


# Networks


@needs("openvino")
@pytest.mark.parametrize("build", [rarely(small_cnn), rarely(mobile_cnn), tiny_transformer])
def test_networks_in_two_runtimes(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    name, model = build.__name__, build()
    quantizer = calibrated(model, [(example(name, 32), {})], backend="onnx")
    quant_model = written(quantizer, model, (example(name, 2), {}), tmp_path / "model.onnx")
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.ONNX))
    inputs = (example(name, 50), {})
    expected = tensors(model, inputs)
    simulated = sqnr(expected, tensors(simulation, inputs))
    for run_file in (run_onnxruntime, run_openvino):
        found = run_file(tmp_path / "model.onnx", feeds(quant_model, inputs))
        assert sqnr(expected, found) >= simulated - 0.5, run_file.__name__


def test_a_residual_network_is_integers_throughout(tmp_path: Path) -> None:
    model = small_cnn()
    quantizer = calibrated(model, [(example("small_cnn", 32), {})], backend="onnx")
    written(quantizer, model, (example("small_cnn"), {}), tmp_path / "model.onnx")
    report = Backend.ONNX.verify(tmp_path / "model.onnx")
    assert report.complete, str(report)
    assert report.operators["QLinearConv"] == 3
    assert report.operators.get("MaxPool", 0) == 1
    kinds = operators(tmp_path / "model.onnx")
    assert kinds.count("QuantizeLinear") <= 6  # the input, three results, the pool, the sum
    assert "Clip" not in kinds


def test_zeros_before_a_max_pool(tmp_path: Path) -> None:
    """onnxruntime would have the pool pad with minus infinity in their place."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)))
    with torch.no_grad():
        model[0].bias.sub_(20.0)
    x = shifted(2, 3, 10, 10)
    assert model[0](x).max() < 0
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model = written(quantizer, model, ((x,), {}), tmp_path / "model.onnx")
    (found,) = run_onnxruntime(tmp_path / "model.onnx", feeds(quant_model, ((x,), {})))
    assert torch.equal(found == 0, model(x) == 0)
    assert sqnr(model(x), found) > 30


def test_data_moves_as_integers_and_embeddings_are_gathered(tmp_path: Path) -> None:
    model = tiny_transformer()
    quantizer = calibrated(model, [(example("tiny_transformer", 32), {})], backend="onnx")
    written(quantizer, model, (example("tiny_transformer"), {}), tmp_path / "model.onnx")
    report = Backend.ONNX.verify(tmp_path / "model.onnx")
    assert report.complete, str(report)
    kinds = {site.kernel for site in report.sites}
    assert kinds == {"QGemm", "MatMulIntegerToFloat"}
    import onnx

    graph = onnx.load(tmp_path / "model.onnx").graph
    floats = [x for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT]
    assert max(math.prod(x.dims) for x in floats) <= 4 * 32 + 12 * 32  # norms, scales


class Masked(nn.Module):
    """Attention under one kind of mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        if self.kind == "causal":
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        elif self.kind == "boolean":
            y = F.scaled_dot_product_attention(q, q, q, attn_mask=keep[:, None, None, :] > 0)
        elif self.kind == "float":
            hidden = torch.zeros_like(keep, dtype=torch.float32).masked_fill(keep == 0, -math.inf)
            y = F.scaled_dot_product_attention(q, q, q, attn_mask=hidden[:, None, None, :])
        else:
            y = F.scaled_dot_product_attention(q, q, q, scale=0.3)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.thin
@pytest.mark.parametrize("floating", [False, True], ids=["int8", "left_in_float"])
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "float"])
def test_masks_of_attention(kind: str, floating: bool, tmp_path: Path) -> None:
    """A row without any key gives zeros, as in PyTorch."""
    model = nn.Sequential()
    model.add_module("attention", Masked(kind))
    model.add_module("out", seeded(lambda: nn.Linear(16, 16)))
    model.forward = lambda x, keep: model.out(model.attention(x, keep))  # type: ignore[method-assign]
    x = normal(4, 6, 16)
    keep = (torch.arange(6) < torch.tensor([6, 4, 1, 0])[:, None]).long()
    options = {"exclude_op_types": "scaled_dot_product_attention"} if floating else {}
    quantizer = calibrated(
        model,
        [((x, keep), {})],
        backend="onnx",
        module_filter=ModuleFilter(**options),  # type: ignore[arg-type]
    )
    quant_model = written(quantizer, model, ((x, keep), {}), tmp_path / "model.onnx")
    (found,) = run_onnxruntime(tmp_path / "model.onnx", feeds(quant_model, ((x, keep), {})))
    expected = model(x, keep)
    assert sqnr(expected, quant_model(x, keep)) > 30
    assert sqnr(expected, found) > 30
    report = Backend.ONNX.verify(tmp_path / "model.onnx")
    assert report.complete, str(report)
    assert len(report.sites) == (1 if floating else 3)


# Verifying


def test_verify_says_why_something_is_not_fused(tmp_path: Path) -> None:
    """A convolution whose result is written to in place has no quantized result."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, :1].mul_(2.0)
            return y

    model, x = Written(), normal(2, 3, 8, 8)
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    written(quantizer, model, ((x,), {}), tmp_path / "model.onnx")
    report = Backend.ONNX.verify(tmp_path / "model.onnx")
    assert not report.complete
    (site,) = report.not_fused
    assert site.site == "conv"
    assert "QLinearConv gives integers only" in site.reason
    assert "conv: " in str(report)


def test_verify_reads_files_of_others(tmp_path: Path) -> None:
    """A plain export has no plan in it."""
    model, x = nn.Linear(4, 2), shifted(3, 4)
    quant_model = calibrated(model, [((x,), {})], backend="onnx").quantize(model)
    program = torch.onnx.export(quant_model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "plain.onnx", external_data=False)
    report = Backend.ONNX.verify(tmp_path / "plain.onnx")
    assert report.complete
    assert report.version == ""
    assert "another program" in str(report)


def test_verify_of_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("text.onnx", "absent.onnx"):
        with pytest.raises(InvalidConfig, match="no valid ONNX model"):
            Backend.ONNX.verify(tmp_path / name)
