"""OpenVINO computes in integers, whatever stands between the layers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import normal, seeded
from onnx_files import feeds, needs, run_openvino
from rewriting import apply, canonical, plan_for
from runtimes import compiled
from thinning import OLDEST
from torch import Tensor, fx, nn

from torch_quant import QConfig, QuantSpec, export_onnx, sqnr
from torch_quant.backends.openvino.forms.flat_rows import flat_rows
from torch_quant.backends.openvino.forms.move_numbers import move_numbers
from torch_quant.backends.openvino.forms.signed_products import signed_products
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE, QUANTIZE_PER_TENSOR
from torch_quant.passes.fold_scales import fold_scales
from torch_quant.passes.insert_qdq import insert_qdq

pytestmark = needs("onnx", "onnxscript", "openvino")

aten = torch.ops.aten
without_ipex = pytest.mark.skipif(
    OLDEST,
    reason="IPEX 2.8, once imported, has a layer norm that refuses empty batches and is wrong over "
    "two dimensions; run on the newest torch",
)


class Attention(nn.Module):
    """Self-attention of heads of 8 behind one projection each; more tokens than channels serve."""

    def __init__(self, width: int = 16, masked: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out, self.masked = nn.Linear(width, width), masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mask = x[..., 0].gt(0.0)[:, None, None] if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Written(nn.Module):
    """Attention of two products and a softmax; the keys are what a layer reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(self.q(x), x.transpose(-2, -1)) / math.sqrt(16)
        return self.out(torch.matmul(scores.softmax(-1), x))


class Images(nn.Module):
    """A block of ConvNeXt: depthwise convolution, norm and two layers of channels-last images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def quantized(model: nn.Module, *xs: Tensor) -> Any:
    calls: Any = [((x,), {}) for x in xs]
    return calibrated(model, calls, backend="openvino")


def operators(model: nn.Module) -> Counter[tuple[str, str]]:
    """Type and precision of what OpenVINO runs, without what it folds."""
    session: Any = compiled(model).opened[-1].session
    found: Counter[tuple[str, str]] = Counter()
    for node in session.compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        found[facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)] += 1
    return found


def in_float(model: nn.Module, *kinds: str) -> list[tuple[str, str]]:
    found = operators(model)
    assert any(kind in kinds for kind, _ in found), found
    return [each for each in found if each[0] in kinds and each[1] not in ("i8", "u8")]


@pytest.mark.thin
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [5, 70])
def test_attention_is_of_integers(
    length: int, masked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With more tokens than channels OpenVINO refuses layers that are flattened to a matrix."""
    model, x = seeded(lambda: Attention(masked=masked)), normal(2, length, 16)
    quantizer = quantized(model, x, normal(3, length, 16))
    quant_model = quantizer.quantize(model)
    reference = quantizer.quantize(model, backend="reference")
    y = quant_model(x)
    assert not [each for each in caplog.records if each.name == "torch_quant"], caplog.text
    assert not compiled(quant_model).in_pytorch
    assert sqnr(reference(x), y) > 30.0
    assert not in_float(quant_model, "FullyConnected")
    products = [
        precision
        for kind, precision in operators(quant_model)
        if kind in ("MatMul", "Subgraph", "ScaledDotProductAttentionWithKVCache")
    ]
    assert products
    assert {"i8"} >= set(products)


def test_signed_operands_of_products_alone() -> None:
    """What a layer reads too keeps its grid, which has a zero point."""
    model, x = seeded(Written), normal(2, 5, 16) + 0.5
    gm = canonical(model, x)
    apply(insert_qdq, gm, plan_for(gm))
    before = gm(x)[0]
    elements = [node.args[3] for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE)]
    changed = apply(signed_products, gm)
    after = [node.args[3] for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE)]
    assert changed == after.count("int8") == 2  # the query and, on these grids, the probabilities
    assert set(elements) == {"uint8"}
    assert 20.0 < sqnr(before, gm(x)[0]) < 100.0


@pytest.mark.parametrize("bits", [4, 8])
def test_asked_for_formats(bits: int) -> None:
    """Symmetric or narrow ones are as they were asked for."""
    spec = QuantSpec.of(bits=bits, signed=True, symmetric=True)
    gm = canonical(seeded(Attention), x := normal(2, 5, 16))
    apply(insert_qdq, gm, plan_for(gm, activation=spec))
    before = gm(x)[0]
    assert not apply(signed_products, gm)
    assert torch.equal(gm(x)[0], before)


def test_numbers_move() -> None:
    gm = _lowered(seeded(Attention), x := normal(2, 5, 16))
    before = gm(x)[0]
    assert apply(move_numbers, gm) == 3
    for node in gm.graph.find_nodes(op="call_function", target=aten.matmul.default):
        for operand in node.args:
            while operand.target is not DEQUANTIZE_PER_TENSOR:
                operand = operand.args[0]
            assert operand.args[0].target is QUANTIZE_PER_TENSOR
    assert torch.equal(gm(x)[0], before)


@without_ipex
@pytest.mark.parametrize("shape", [(2, 6, 16), (2, 5, 6, 16), (2, 3, 5, 6, 16)])
def test_rows_are_flat(shape: tuple[int, ...]) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4), nn.Tanh()
        )
    )
    gm = _lowered(model, x := normal(*shape))
    before = gm(x)[0]
    changed = apply(flat_rows, gm)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert bool(changed) is (len(shape) > 3)
    assert names.count("aten.flatten.using_ints") == names.count("aten.reshape.default")
    assert names.count("aten.reshape.default") == (1 if changed else 0)
    assert torch.equal(gm(x)[0], before)
    for batch in (4, 0):
        other = normal(batch, *shape[1:])
        assert gm(other)[0].shape == (*other.shape[:-1], 4)


class Spectra(nn.Module):
    """A norm over time, of which there may be any, behind a layer of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.transpose(-2, -1)).transpose(-2, -1)
        return F.gelu(F.layer_norm(y, y.shape[-1:]))


def test_rows_of_any_length() -> None:
    model = seeded(Spectra)
    quantizer = quantized(model, *(xs := [normal(4, 1, 8, 6), normal(3, 1, 8, 11)]))
    quant_model, reference = (quantizer.quantize(model, backend=b) for b in ("openvino", "onnx"))
    for x in (*xs, normal(4, 1, 8, 12), normal(2, 1, 8, 9)):
        found, expected = quant_model(x), reference(x)
        assert found.shape == expected.shape
        assert sqnr(expected, found) > 30.0


@without_ipex
def test_a_norm_over_two_dimensions_is_left() -> None:
    gm = _lowered(seeded(lambda: nn.LayerNorm((6, 16))), normal(2, 5, 6, 16))
    assert not apply(flat_rows, gm)


def _lowered(model: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = canonical(model, x)
    apply(insert_qdq, gm, plan_for(gm))
    apply(fold_scales, gm)
    return gm


def test_images_in_channels_last() -> None:
    """No operator of its own for what follows a layer; sizes stay free."""
    model = seeded(Images)
    xs = [normal(2, 3, 12, 16), normal(3, 3, 8, 20)]
    quantizer = quantized(model, *xs)
    quant_model, reference = quantizer.quantize(model), quantizer.quantize(model, backend="onnx")
    for x in (*xs, normal(1, 3, 20, 4)):
        torch.testing.assert_close(quant_model(x), reference(x), rtol=0.0, atol=0.05)
        assert sqnr(reference(x), quant_model(x)) > 30.0
    assert len(compiled(quant_model).opened) == 1
    found = operators(quant_model)
    assert found["MVN", "f32"] == 1
    assert not [each for each in found if each[0] in ("RMS", "Reduce") and each[1] != "i32"]
    assert not in_float(quant_model, "FullyConnected")


def test_its_file_is_its_own(tmp_path: Path) -> None:
    """``export_onnx`` writes the form that OpenVINO runs fastest, which is not that for all."""
    model, x = seeded(Attention), normal(2, 70, 16)
    quantizer = quantized(model, x)
    quant_model = quantizer.quantize(model)
    export_onnx(quant_model, x, tmp_path / "own.onnx", progress=False)
    (found,) = run_openvino(tmp_path / "own.onnx", feeds(quant_model, ((x,), {})))
    assert torch.equal(found, quant_model(x))


def test_training_ends_near_where_it_was() -> None:
    """Grids are trained as they were calibrated, and get the zero point 0 at the end."""
    model, x = seeded(Attention), normal(4, 9, 16)
    quantizer = quantized(model, x)
    before = quantizer.quantize(model)(x)
    qat_model = quantizer.qat(model)
    assert sqnr(before, qat_model(x)) > 30.0
    optimizer = torch.optim.SGD(qat_model.parameters(), 1e-4)
    with torch.enable_grad():
        qat_model(x).square().mean().backward()
    optimizer.step()
    trained, simulated = quantizer.quantize(qat_model)(x), qat_model.eval()(x)
    assert sqnr(simulated, trained) > 30.0


def test_a_fallback_and_a_wish_for_products() -> None:
    model, x = seeded(Attention), normal(2, 9, 16)
    quantizer = quantized(model, x)
    before = quantizer.quantize(model)(x)
    quantizer.set("op:scaled_dot_product_attention", QConfig(QuantSpec.of(symmetric=True)))
    asked = quantizer.quantize(model)
    assert sqnr(before, asked(x)) > 25.0
    quantizer.set("op:scaled_dot_product_attention", None)
    assert sqnr(quantizer.quantize(model, backend="onnx")(x), quantizer.quantize(model)(x)) > 40.0
