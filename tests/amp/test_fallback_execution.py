"""What runs once sites fell back: the float model's own arithmetic, or bfloat16."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from amp_proxies import achieved, analysed
from flows import BACKENDS, EVERY_BACKEND, QUICK, assert_unchanged, calibrated, settled, snapshot
from models import example
from processor import needs_bfloat16
from thinning import some
from torch import Tensor, nn

from torch_quant import Backend, export_torchscript, sqnr

BOTH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.thin
@pytest.mark.parametrize("backend", some(EVERY_BACKEND, *QUICK))
@pytest.mark.parametrize("name", ["mlp", "small_cnn", "tiny_transformer"])
def test_everything_in_float_is_the_float_model(
    name: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    count = len(quantizer.sensitivity(amp_model))
    with caplog.at_level(logging.WARNING, "torch_quant"):
        assert len(quantizer.fallback(amp_model, 1000)) == count
    assert f"num=1000, but only {count} are left in int8" in caplog.text
    x = example(name, 5)
    quant_model = quantizer.quantize(model)
    # Batch norms are folded, so products are rounded in another order.
    torch.testing.assert_close(quant_model(*x), model(*x), rtol=1e-4, atol=1e-5)
    assert quantizer.fallback(amp_model, 0) == []
    assert quantizer.plan.quantized == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sites_compute_with_the_same_values(backend: str) -> None:
    model, quantizer, amp_model = analysed("mlp", backend)
    (worst,) = quantizer.fallback(amp_model, 1)
    quant_model = quantizer.quantize(model)
    kept = [x for x in quant_model.state_dict().values() if x.dtype == torch.float32]
    layer = model.get_submodule(worst)
    assert isinstance(layer, nn.Linear)
    for x in (layer.weight, layer.bias):
        assert any(torch.equal(x, y) for y in kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sites_give_what_the_float_ops_give(backend: str) -> None:
    """All but the first in float: behind the int8 layer, the float model's own arithmetic."""
    model, quantizer, _ = analysed("mlp", backend)
    assert isinstance(model, nn.Sequential)
    quantizer.load_state_dict(
        quantizer.state_dict() | {"fallback": dict.fromkeys(["2", "4"], "float32")}
    )
    x = example("mlp", 5)
    first = nn.Sequential(model[0])
    alone = calibrated(first, [(example("mlp", 32), {})], backend=backend).quantize(first)
    assert torch.equal(quantizer.quantize(model)(*x), model[1:](alone(*x)))


def lower(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return F.linear(x.bfloat16(), layer.weight.bfloat16(), bias).float()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_sites_compute_in_bfloat16(backend: str) -> None:
    model, quantizer, amp_model = analysed("mlp", backend)
    assert isinstance(model, nn.Sequential)
    quantizer.fallback(amp_model, 3, dtype=torch.bfloat16)
    assert {site.precision for site in quantizer.plan.values()} == {"bfloat16"}
    (x,) = example("mlp", 5)
    expected = x
    for layer in model:
        expected = lower(layer, expected) if isinstance(layer, nn.Linear) else layer(expected)
    outputs = quantizer.quantize(model)(x)
    assert outputs.dtype == torch.float32
    assert torch.equal(outputs, expected)
    assert not torch.equal(outputs, model(x))


@pytest.mark.thin
@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=[needs_bfloat16] * (b == "ipex")) for b in some(EVERY_BACKEND, *QUICK)],
)
@pytest.mark.parametrize("name", ["small_cnn", "tiny_transformer", "attention_explicit"])
def test_bfloat16_is_close(name: str, backend: str) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    before = snapshot(model)
    ranking = quantizer.sensitivity(amp_model)
    quantizer.fallback(amp_model, len(ranking), dtype=torch.bfloat16)
    # Eight bits of mantissa: relative errors of 2^-9 are -54 dB, and add up over some layers.
    assert achieved(model, quantizer, example(name, 8)) > 35.0
    assert_unchanged(model, before)


@pytest.mark.thin
@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small_cnn", "tiny_transformer"])
def test_traced_exported_copied_and_saved(
    name: str, backend: str, precision: str, tmp_path: Path
) -> None:
    model, quantizer, amp_model = analysed(name, backend)
    quantizer.fallback(amp_model, 2, dtype=BOTH[precision])
    quant_model = quantizer.quantize(model)
    x = example(name, 3)
    expected = quant_model(*x)
    assert torch.equal(copy.deepcopy(quant_model)(*x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quant_model))(*x), expected)
    compiles = Backend.get(backend).compiles
    if backend != "onnx":  # whose file is export_onnx's
        export_torchscript(quant_model, example(name, 2), tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert torch.equal(settled(loaded, x) if compiles else loaded(*x), expected)
    sizes = tuple({0: torch.export.Dim.AUTO} for _ in x)
    program = torch.export.export(quant_model, example(name, 2), dynamic_shapes=sizes, strict=False)
    if compiles:  # not what its compiler reads: the same graph in float
        assert sqnr(expected, program.module()(*x)) > 30.0
    else:
        assert torch.equal(program.module()(*x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_backend_keeps_what_fell_back(backend: str) -> None:
    model, quantizer, amp_model = analysed("small_cnn", "reference")
    taken = quantizer.fallback(amp_model, 2)
    quantizer.quantize(model, backend=backend)
    assert all(quantizer.plan[name].reason == "fallen back" for name in taken)
