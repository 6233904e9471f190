"""Formats beyond int8, end to end: REFERENCE computes them, other backends say why they do not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from flows import IN_PROCESS, calibrated
from models import MODELS, example, normal
from torch import nn

from torch_quant import FloatType, PerBlock, PerGroup, PerToken, QConfig, Quantizer, QuantSpec, sqnr
from torch_quant.backends import available_backends
from torch_quant.core.elements import register_element_type
from torch_quant.core.functional import fake_quantize
from torch_quant.core.granularity import block_extremes
from torch_quant.core.qparams import choose_qparams

TOY = register_element_type(FloatType("float5_e2m2", 2, 2))
FORMATS: dict[str, tuple[QConfig, float]] = {
    "int4 groups": (QConfig(weight=QuantSpec.of("int4", granularity=PerGroup(16))), 15.0),
    "int16": (QConfig(QuantSpec.of("uint16"), QuantSpec.of("int16", per_channel=True)), 75.0),
    "float8": (
        QConfig(QuantSpec.of("float8_e4m3fn"), QuantSpec.of("float8_e4m3fn", per_channel=True)),
        25.0,
    ),
    "mxfp4": (
        QConfig(weight=QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0")),
        13.0,
    ),
    "float6 blocks": (
        QConfig(weight=QuantSpec.of("float6_e2m3", granularity=PerBlock((2, 8)))), 20.0
    ),
    "a toy": (QConfig(QuantSpec.of(TOY), QuantSpec.of(TOY, per_channel=True)), 12.0),
}  # fmt: skip


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 16))
    return layers.eval()


@pytest.mark.parametrize("name", FORMATS)
def test_reference_computes_it(name: str, tmp_path: Path) -> None:
    config, least = FORMATS[name]
    model, x = mlp(), normal(64, 64)
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
    quantized = quantizer.quantize(model)
    expected = quantized(x)
    assert quantizer.plan.coverage == 1.0
    assert sqnr(model(x), expected) > least
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer("reference")
    other.load_summary(tmp_path / "summary.json")
    assert torch.equal(other.quantize(model, example_inputs=x)(x), expected)
    amp_model = quantizer.amp(model)
    assert torch.equal(amp_model(x), model(x))
    assert len(quantizer.sensitivity(amp_model)) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_one_layer_is_what_the_definition_says(name: str) -> None:
    config, _ = FORMATS[name]
    model, x = nn.Sequential(mlp()[0]), normal(16, 64)
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
    spec = config.weight
    assert spec is not None
    cut = QuantSpec(spec.element, spec.symmetric, spec.granularity.on(0), spec.scale_type)
    weight = model[0].weight
    qparams = choose_qparams(*block_extremes(weight, cut.granularity), cut)
    of_x = quantizer.state.qparams(":input", config.input or QuantSpec())
    faked = torch.nn.functional.linear(
        fake_quantize(x, of_x), fake_quantize(weight, qparams), model[0].bias
    )
    assert sqnr(faked, quantizer.quantize(model)(x)) > 100.0  # torch rounds some ties otherwise


ELSEWHERE = [
    (name, backend.name)
    for name in FORMATS
    for backend in available_backends()
    if backend.name != "reference"
    and not (name == "int4 groups" and backend.name in ("onnx", *IN_PROCESS))
]
"""All but what has kernels there."""


@pytest.mark.parametrize(("name", "backend"), ELSEWHERE)
def test_other_backends_say_why_not(name: str, backend: str) -> None:
    model, x = mlp(), normal(8, 64)
    coverage = Quantizer(backend, qconfig=FORMATS[name][0]).coverage(model, x)
    assert coverage.share == 0.0
    assert all("the kernels take" in reason for reason in coverage.reasons.values())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QConfig(weight=QuantSpec.of("int4", granularity=PerGroup(24))), "not a multiple of 24"),
        (QConfig(QuantSpec.of("int8", granularity=PerToken())), "one scale for the whole tensor"),
        (QConfig(weight=QuantSpec.of("int8", dynamic=True)), "not at each call"),
        (
            QConfig(QuantSpec.of("int8", granularity=PerGroup(24), dynamic=True)),
            "not a multiple of 24",
        ),
    ],
)
def test_reference_refuses_the_rest(config: QConfig, reason: str) -> None:
    coverage = Quantizer("reference", qconfig=config).coverage(mlp(), normal(8, 64))
    assert coverage.share == 0.0
    assert all(reason in each for each in coverage.reasons.values())


def test_attention_and_convolutions_in_float8() -> None:
    config = FORMATS["float8"][0]
    for name in ("tiny_transformer", "small_cnn"):
        model, x = MODELS[name](), example(name, 4)
        quantizer = calibrated(model, [(x, {})], backend="reference", qconfig=config)
        assert sqnr(model(*x), quantizer.quantize(model)(*x)) > 15.0
