"""Methods that want data, and mixtures of experts whose weights are one tensor."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_experts import moe, tokens
from torch import nn

from torch_quant import (
    AWQ,
    FLOAT,
    GPTQ,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    sqnr,
)

SPEC = QuantSpec.of("int4", granularity=PerGroup(16))


def quantizer_of(method: Any, transforms: Any = ()) -> Quantizer:
    config = QConfig(FLOAT, SPEC, method=method, transforms=transforms)
    return Quantizer("reference", qconfig=config, capture="modules")


def plain_experts(model: nn.Module) -> dict[str, Any]:
    """Their codes without data, over the full range."""
    quantizer = quantizer_of(RoundToNearest(full_range=True))
    made = quantizer.quantize(model, example_inputs={"input_ids": tokens(2, 12)})
    return experts_of(model, made.state_dict())


def experts_of(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name, x in model.named_parameters() if ".experts." in name}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
@pytest.mark.parametrize(
    ("method", "transforms"),
    [
        (GPTQ(full_range=True), ()),
        (RoundToNearest(clip_search=True, weighted=True, full_range=True), ()),
        (GPTQ(full_range=True, match_float=True), (AWQ(),)),
    ],
    ids=["gptq", "weighted", "awq"],
)
def test_experts_are_rounded_without_data_and_told(
    kind: str, method: Any, transforms: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = moe(kind), tokens(2, 12)
    quantizer = quantizer_of(method, transforms)
    with caplog.at_level(logging.WARNING):
        made = quantizer.round_weights(model, [{"input_ids": tokens(8, 12)}] * 2, progress=False)
    (told,) = [each.message for each in caplog.records if "experts" in each.message]
    assert "rounded without data: model.layers.0.mlp.experts." in told
    assert not any("experts" in site for site in made.sites)
    quant_model = quantizer.quantize(model, example_inputs={"input_ids": x})
    found, expected = experts_of(model, quant_model.state_dict()), plain_experts(model)
    assert len(found) >= 4
    if not transforms:  # which may scale what experts read
        assert all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        assert sqnr(model(x).logits, quant_model(x).logits) > 8  # 4 bits; a token may go elsewhere


def test_calibrated_experts_have_data() -> None:
    """By a calib proxy, all experts of a tensor share the moments of the rows that they read."""
    model = moe("mixtral")
    quantizer = quantizer_of(GPTQ(full_range=True))
    quantizer.calib(model)(tokens(8, 12))
    found, expected = (
        experts_of(model, quantizer.quantize(model).state_dict()),
        plain_experts(model),
    )
    assert not any(torch.equal(found[name], expected[name]) for name in found)


def test_blocks_leave_experts_to_calibration() -> None:
    model = moe("mixtral")
    quantizer = quantizer_of(GPTQ(full_range=True))
    quantizer.calib(model)(tokens(8, 12))
    calibrated = experts_of(model, quantizer.quantize(model).state_dict())
    quantizer.round_weights(model, [{"input_ids": tokens(8, 12)}], progress=False)
    again = experts_of(model, quantizer.quantize(model).state_dict())
    assert all(torch.equal(again[name], calibrated[name]) for name in again)
