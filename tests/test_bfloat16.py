"""Products in bfloat16 as a configuration: alone, beside int8, and what the reports say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flows import BACKENDS, calibrated
from models import MODELS, example, normal, seeded
from processor import needs_bfloat16
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    BFLOAT16,
    FLOAT,
    GPTQ,
    InvalidConfig,
    ModuleFilter,
    QConfig,
    Quantizer,
    SmoothQuant,
    recipes,
    sqnr,
)

X = normal(8, 16)
RUNS = [pytest.param(b, marks=[needs_bfloat16] * (b == "ipex")) for b in BACKENDS]


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def lower(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()


@pytest.mark.parametrize("backend", RUNS)
def test_all_products_without_data(backend: str, tmp_path: Path) -> None:
    model = seeded(_mlp)
    quantizer = Quantizer(backend, qconfig="bfloat16")
    quant_model = quantizer.quantize(model, example_inputs=X[:2])
    expected = lower(model[2], lower(model[0], X).relu())
    assert torch.equal(quant_model(X), expected)
    assert not torch.equal(quant_model(X), model(X))
    said = "100.0% of the multiply-accumulates in bfloat16, 2 of 2 sites"
    assert said in str(quantizer.coverage(model))
    assert "as configured, in bfloat16" in str(quantizer.coverage(model))
    assert [row["format"] for row in quantizer.coverage(model).by_op()] == ["bfloat16"]
    assert repr(quant_model).count("bias=True, bfloat16)") == 2
    assert quantizer.explain("0", model)["quantized"].rule == "Quantizer(qconfig=...)"
    torch_quant.save(quant_model, tmp_path)
    assert torch.equal(torch_quant.load(tmp_path)(X), expected)
    weights = [x for x in quant_model.state_dict().values() if x.dim() == 2]
    assert {x.dtype for x in weights} == {torch.bfloat16}  # half the bytes


@pytest.mark.parametrize("backend", RUNS)
def test_beside_int8(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(_mlp)
    quantizer = Quantizer(backend, overrides={"2": recipes.bfloat16()})
    quantizer.calib(model)(X)
    quant_model = quantizer.quantize(model)
    first = nn.Sequential(model[0], model[1])
    alone = calibrated(first, [((X,), {})], backend=backend).quantize(first)
    assert torch.equal(quant_model(X), lower(model[2], alone(X)))
    assert "66.7% of the multiply-accumulates in int8, 1 of 2 sites, 33.3% in bfloat16" in repr(
        quant_model
    )
    assert repr(quant_model).count("bias=True, bfloat16)") == 1
    assert [row["format"] for row in quantizer.coverage(model).by_op()] == ["int8; bfloat16"]
    again = Quantizer.from_config(quantizer.to_config())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.quantize(model, example_inputs=X)(X), quant_model(X))
    amp_model = quantizer.amp(model)
    amp_model(X)
    assert [each.name for each in quantizer.sensitivity(amp_model)] == ["0"]
    assert quantizer.fallback(amp_model, 1, dtype=torch.bfloat16) == ["0"]
    assert torch.equal(quantizer.quantize(model)(X), lower(model[2], lower(model[0], X).relu()))
    assert "gains nothing" not in caplog.text


def test_the_zoos_products() -> None:
    """Attention and convolutions as well, whole graphs, at other sizes."""
    for name in ("tiny_transformer", "small_cnn", "attention_explicit"):
        model = MODELS[name]().eval()
        quantizer = Quantizer("reference", qconfig=recipes.bfloat16())
        quant_model = quantizer.quantize(model, example_inputs=example(name, 2))
        x = example(name, 5)
        assert 35 < sqnr(model(*x), quant_model(*x)) < 70
        assert {site.precision for site in quantizer.plan.values()} == {"bfloat16"}
        assert quantizer.coverage(model).plan.summary.startswith("100.0%")


def test_an_obstacle_comes_first() -> None:
    """What cannot be touched stays float32, as a layer inside of autocast, or filtered ones."""
    model = seeded(_mlp)
    quantizer = Quantizer(
        "reference", qconfig="bfloat16", module_filter=ModuleFilter(include_names=["0"])
    )
    quantizer.quantize(model, example_inputs=X)
    assert [site.precision for site in quantizer.plan.values()] == ["bfloat16", "float32"]


def test_one_operand_alone_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"input=BFLOAT16, weight=None.*both operands"):
        QConfig(BFLOAT16)
    with pytest.raises(InvalidConfig, match=r"input=FLOAT, weight=BFLOAT16.*both operands"):
        QConfig(FLOAT, BFLOAT16)
    with pytest.raises(InvalidConfig, match="both operands"):
        QConfig.from_dict({"weight": "bfloat16"})
    assert QConfig.from_dict({"input": "bfloat16", "weight": "bfloat16"}) == recipes.bfloat16()
    assert QConfig.from_dict(recipes.bfloat16().to_dict()) == recipes.bfloat16()


def test_what_would_have_no_effect_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="so observer, transforms, method would have no effect"):
        QConfig(BFLOAT16, BFLOAT16, observer="minmax", transforms=[SmoothQuant(0.5)], method=GPTQ())
    with pytest.raises(InvalidConfig, match=r"BFLOAT16, method=\.\.\.\).*leave it out"):
        QConfig(BFLOAT16, BFLOAT16, method=GPTQ())
    data = {"qconfig": {**recipes.bfloat16().to_dict(), "transforms": ["smoothquant"]}}
    with pytest.raises(InvalidConfig, match="transforms would have no effect"):
        Quantizer.from_config(data)


def test_as_a_candidate_it_is_of_no_use_but_does_not_fail() -> None:
    """Candidates are scored by the noise of integers, of which there is none."""
    model = seeded(_mlp)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(X)
    amp_model = quantizer.amp(model)
    amp_model(X)
    found = quantizer.optimize(amp_model, candidates={"bf16": recipes.bfloat16()}, progress=False)
    assert not found.chosen
    amp_model = quantizer.amp(model, candidates=[recipes.bfloat16()])
    amp_model(X)
    with pytest.raises(InvalidConfig, match="no candidate serves any site"):
        quantizer.allocate(amp_model, min_sqnr=20.0)


def test_an_onnx_file_says_who_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = seeded(_mlp), tmp_path / "model.onnx"
    quantizer = Quantizer("onnx", overrides={"2": recipes.bfloat16()})
    quantizer.calib(model)(X)
    torch_quant.export_onnx(quantizer.quantize(model), X, path, progress=False)
    assert "the ONNX file has 2 in bfloat16" in caplog.text
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # once it loads, the warning may go
        runtime.InferenceSession(path)
    caplog.clear()
    quantizer.set("2", None)  # as the warning says
    torch_quant.export_onnx(quantizer.quantize(model), X, path, progress=False)
    assert "bfloat16" not in caplog.text
    assert runtime.InferenceSession(path)


def test_openvinos_results_are_rounded() -> None:
    """As PyTorch's are, which the same backend's float layers are not."""
    pytest.importorskip("openvino")
    model = seeded(_mlp)
    quantizer = Quantizer("openvino", qconfig="bfloat16")
    y = quantizer.quantize(model, example_inputs=X)(X)
    assert torch.equal(y, y.bfloat16().float())
    assert sqnr(lower(model[2], lower(model[0], X).relu()), y) > 45.0
