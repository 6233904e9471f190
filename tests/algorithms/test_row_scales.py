"""Attention's probabilities on a scale for each row: nearer, at no cost, and only where it runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import (
    QConfig,
    Quantizer,
    QuantSpec,
    RowScales,
    ScaleType,
    load,
    native,
    recipes,
    save,
    sqnr,
)

needs_kernels = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)
BACKENDS = ["reference", pytest.param("onednn", marks=needs_kernels)]
ROWS = QConfig(transforms=[RowScales()])
KEYS = 96


class Looking(nn.Module):
    """Attention of one head that looks at one key, and others that look at all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        with torch.no_grad():
            self.qkv.weight[:8] *= 40.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*split, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def looking(backend: str, config: QConfig = ROWS) -> tuple[nn.Module, Quantizer]:
    model = seeded(Looking)
    data = [((normal(2, KEYS, 32), None), {})]
    return model, calibrated(model, data, backend=backend, qconfig=config)


def only_attention(config: QConfig) -> QConfig:
    return QConfig(transforms=config.transforms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_nearer_than_one_scale(backend: str) -> None:
    x = normal(2, KEYS, 32, salt=1)
    found = {}
    for name, config in {"one": QConfig(), "rows": ROWS}.items():
        model, quantizer = looking(backend, config)
        quantizer.overrides = {"op:linear": None}
        found[name] = sqnr(model(x), quantizer.quantize(model)(x))
    assert found["rows"] > found["one"] + 3.0, found


@needs_kernels
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec.of(bits=7),
        QuantSpec.of("int8", symmetric=False),
        QuantSpec.of("int8", symmetric=True),
        QuantSpec.of(bits=8, signed=False, symmetric=True),
        QuantSpec.of("int8", scale_type=ScaleType.E8M0),
        QuantSpec.of("uint8", scale_type=ScaleType.FLOAT16),
    ],
    ids=str,
)
def test_the_kernel_computes_what_the_reference_does(spec: QuantSpec) -> None:
    model, quantizer = looking("onednn", QConfig(spec, transforms=[RowScales()]))
    simulated, fast = quantizer.quantize(model, backend="reference"), quantizer.quantize(model)
    seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    seen[0, :, 2] = False  # a row that sees nothing
    hidden = torch.zeros(2, 1, 7, 7).masked_fill(~seen, -math.inf)
    for mask in (None, hidden):
        x = normal(2, 7, 32, salt=3)
        assert sqnr(simulated(x, mask), fast(x, mask)) > 60
        assert fast(x, mask).isfinite().all()


@needs_kernels
def test_without_the_kernels_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, quantizer = looking("onednn")
    fast, x = quantizer.quantize(model), normal(2, 9, 32, salt=2)
    expected = fast(x, None)
    monkeypatch.setattr("torch_quant.native.products.native.kernels", lambda: None)
    assert sqnr(expected, fast(x, None)) > 40


@needs_kernels
def test_rows_that_see_nothing_where_denormal_numbers_are_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, quantizer = looking("onednn")
    quantizer.overrides = {"op:linear": None}  # they would round NaN to a code
    fast, x = quantizer.quantize(model), normal(2, 9, 32, salt=2)
    hidden = torch.full((9, 9), -math.inf)
    monkeypatch.setattr("torch_quant.native.products.native.kernels", lambda: None)
    torch.set_flush_denormal(True)
    try:
        assert fast(x, hidden).isfinite().all()
    finally:
        torch.set_flush_denormal(False)


@needs_kernels
def test_saved_copied_and_of_other_sizes(tmp_path: Path) -> None:
    model, quantizer = looking("onednn")
    quant_model = quantizer.quantize(model)
    save(quant_model, tmp_path / "model")
    loaded = load(tmp_path / "model", model=seeded(Looking))
    for batch, tokens in ((1, 1), (3, 17)):
        x = normal(batch, tokens, 32, salt=tokens)
        assert torch.equal(loaded(x, None), quant_model(x, None))
        assert sqnr(model(x), quant_model(x, None)) > 20
    again = Quantizer.from_config(quantizer.to_config())
    calib_model = again.calib(model)
    calib_model(normal(2, KEYS, 32), None)
    assert torch.equal(again.quantize(model)(x, None), quant_model(x, None))


def test_other_backends_and_sites_do_without() -> None:
    model, quantizer = looking("reference", recipes.int8_static())
    quantizer.quantize(model)
    have = {name for name, entry in quantizer.plan.items() if RowScales() in entry.transforms}
    assert have == {"scaled_dot_product_attention"}
    pytest.importorskip("onnx")
    plan = quantizer.coverage(model, backend="onnx").plan
    assert not any(RowScales() in entry.transforms for entry in plan.values())
    assert plan["scaled_dot_product_attention"].quantized


def test_a_summary_that_another_backend_reads(tmp_path: Path) -> None:
    model, quantizer = looking("reference")
    quantizer.quantize(model)
    quantizer.save_summary(tmp_path / "summary.json")
    pytest.importorskip("onnx")
    for backend, expected in (("reference", (RowScales(),)), ("onnx", ())):
        other = Quantizer(backend)
        other.load_summary(tmp_path / "summary.json")
        calib_model = other.calib(model)
        calib_model(normal(2, KEYS, 32), None)
        plan = other.coverage(model).plan
        assert plan["scaled_dot_product_attention"].quantized
        assert plan["scaled_dot_product_attention"].transforms == expected


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec.of(bits=8, signed=True, symmetric=True),
        QuantSpec.of(bits=4),
        QuantSpec.of("float8_e4m3fn"),
        QuantSpec.of("int8", clip=0.9),
    ],
    ids=str,
)
def test_other_formats(spec: QuantSpec) -> None:
    x = normal(2, KEYS, 32, salt=1)
    found = []
    for transforms in ([], [RowScales()]):
        model, quantizer = looking("reference", QConfig(spec, transforms=transforms))
        quantizer.overrides = {"op:linear": None}
        found.append(sqnr(model(x), quantizer.quantize(model)(x)))
    assert found[1] >= found[0] - 0.1, found
    assert spec.integer or found[0] == found[1]


def test_a_trained_model_has_one_scale_that_is_trained() -> None:
    model, quantizer = looking("reference", recipes.int8_static())
    qat_model = quantizer.qat(model)
    names = [name for name in qat_model.state_dict() if "probabilities_scale" in name]
    assert len(names) == 1
    x = normal(2, 5, 32)
    trained = quantizer.quantize(qat_model)
    torch.testing.assert_close(trained(x, None), qat_model.eval()(x, None))
