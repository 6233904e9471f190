"""Scales as numbers and vectors of channels, where kernels want them so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS, example, normal, seeded, tokens
from rewriting import WEIGHT, Two, apply, canonical, plan_for
from torch import Tensor, fx, nn

from torch_quant.core.granularity import PerGroup
from torch_quant.core.spec import QuantSpec
from torch_quant.ops.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE,
    QUANTIZE_PER_TENSOR,
)
from torch_quant.passes.constants import settle_names
from torch_quant.passes.fold_scales import fold_scales
from torch_quant.passes.insert_qdq import insert_qdq


def inserted(model: nn.Module, *inputs: Tensor, **formats: Any) -> fx.GraphModule:
    gm = canonical(model, *inputs)
    apply(insert_qdq, gm, plan_for(gm, **formats))
    return gm


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("name", MODELS)
def test_it_changes_no_number(name: str) -> None:
    """Bit for bit: both forms compute with the same float32 scale."""
    gm, x = inserted(MODELS[name](), *example(name)), example(name, 3)
    expected = gm(*x)[0]
    assert apply(fold_scales, gm) > 0
    assert not calls(gm, QUANTIZE)
    assert not calls(gm, DEQUANTIZE)
    assert torch.equal(gm(*x)[0], expected)
    assert apply(fold_scales, gm) == 0


def test_activations_get_numbers_and_weights_vectors() -> None:
    gm = inserted(seeded(Two), x := normal(2, 16))
    quantizer = calls(gm, QUANTIZE)[0]
    scale, zero_point = (gm.get_buffer(each.target) for each in quantizer.args[1:3])
    assert apply(fold_scales, gm) == 6  # two of each: quantize, dequantize, weight
    folded = calls(gm, QUANTIZE_PER_TENSOR)[0].args[1:]
    assert folded == (float(scale), int(zero_point), 0, 255, torch.uint8)
    assert calls(gm, DEQUANTIZE_PER_TENSOR)[0].args[1:] == folded[:2]
    for node in calls(gm, DEQUANTIZE_PER_CHANNEL):
        assert [gm.get_buffer(each.target).dim() for each in node.args[:3]] == [2, 1, 1]
        assert node.args[3] == 0
    assert not [name for name in settle_names(gm).state_dict() if "input" in name]
    assert torch.isfinite(gm(x)[0]).all()


def test_the_axis_is_that_of_the_operator() -> None:
    """Also where the sizes do not tell."""
    for inputs, outputs in ((4, 6), (4, 4), (1, 1)):
        gm = inserted(nn.ConvTranspose1d(inputs, outputs, 3), normal(2, inputs, 9))
        apply(fold_scales, gm)
        (weight,) = calls(gm, DEQUANTIZE_PER_CHANNEL)
        assert weight.args[3] == 1


def test_a_weight_of_two_sites_stays_one() -> None:
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.l1.weight = self.l0.weight

    gm = inserted(seeded(Tied), normal(2, 16))
    apply(fold_scales, gm)
    first, second = calls(gm, DEQUANTIZE_PER_CHANNEL)
    for x, y in zip(first.args[:3], second.args[:3], strict=True):
        assert gm.get_buffer(x.target) is gm.get_buffer(y.target)


def test_one_scale_of_a_weight_is_a_number() -> None:
    whole = QuantSpec.of(signed=True, symmetric=True)
    gm = inserted(nn.Embedding(64, 8), tokens(2), weight=whole)
    expected = gm(tokens(3))[0]
    assert apply(fold_scales, gm) == 1
    (node,) = calls(gm, DEQUANTIZE_PER_TENSOR)
    assert [type(each) for each in node.args[1:]] == [float, int]
    assert torch.equal(gm(tokens(3))[0], expected)


@pytest.mark.parametrize(
    "formats",
    [
        {"weight": QuantSpec.of("int4", granularity=PerGroup(8))},
        {"activation": QuantSpec.of("float8_e4m3fn"), "weight": QuantSpec.of("float8_e4m3fn")},
    ],
    ids=["groups", "floats"],
)
def test_what_no_int8_kernel_takes_stays(formats: dict[str, QuantSpec]) -> None:
    gm = inserted(seeded(Two), normal(2, 16), **formats)
    before = len(calls(gm, DEQUANTIZE))
    apply(fold_scales, gm)
    kept = 2 if formats.get("activation", WEIGHT).integer else before
    assert len(calls(gm, DEQUANTIZE)) == kept


def test_a_parameter_may_be_an_activation() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(3, 16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.p

    gm = inserted(Projected(), x := normal(2, 3, 5, 16))
    expected = gm(x)[0]
    assert apply(fold_scales, gm) == 4
    assert len(calls(gm, QUANTIZE_PER_TENSOR)) == 2
    assert torch.equal(gm(x)[0], expected)
