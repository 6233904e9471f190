from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from models import normal, seeded, tokens
from rewriting import WEIGHT, Two, canonical, context_of, plan_for, weight_grid_of
from torch import Tensor, fx, nn

from torch_quant.backends import ReferenceBackend
from torch_quant.core.functional import dequantize, quantize
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import find_sites
from torch_quant.ops.qdq import DEQUANTIZE
from torch_quant.passes.base import PassContext, run_passes
from torch_quant.passes.constants import settle_names
from torch_quant.passes.insert_qdq import insert_qdq

aten = torch.ops.aten


def quantized(model: nn.Module, *inputs: Tensor, weight: QuantSpec = WEIGHT) -> fx.GraphModule:
    """The canonical graph with everything quantized."""
    gm = canonical(model, *inputs)
    plan = plan_for(gm, weight=weight)
    context = context_of(gm, plan)
    run_passes(context, [insert_qdq])
    return context.gm


def codes_of(gm: fx.GraphModule, position: int = 0) -> Tensor:
    """The integer weight of the nth product."""
    found = gm.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    weights = [n.args[0] for n in found if n.args[0].op == "get_attr"]
    return gm.get_buffer(weights[position].target)


def grid(weight: Tensor, spec: QuantSpec = WEIGHT, axis: int = 0) -> QParams:
    return weight_grid_of("", weight, spec, axis)


def test_weights_are_buffers_of_integers() -> None:
    model = seeded(Two)
    gm = quantized(model, normal(2, 16))
    for position, layer in enumerate((model.l0, model.l1)):
        codes = codes_of(gm, position)
        assert codes.dtype == torch.int8
        assert codes.is_contiguous()
        assert not codes.requires_grad
        assert torch.equal(codes, quantize(layer.weight.detach(), grid(layer.weight.detach())))
    roles = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    endings = ("bias", *roles)
    assert set(settle_names(gm).state_dict()) == {
        f"{layer}.{ending}" for layer in ("l0", "l1") for ending in endings
    }


class LyingTheOtherWay(nn.Module):
    """GPT-2's layout: the weight is the transpose of a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_transposed_weight_is_contiguous() -> None:
    model = seeded(LyingTheOtherWay)
    codes = codes_of(quantized(model, normal(2, 16)))
    assert codes.shape == (8, 16)
    assert codes.is_contiguous()
    weight = model.weight.detach().t()
    assert torch.equal(codes, quantize(weight, grid(weight)))


def test_a_channels_last_weight_is_contiguous() -> None:
    model = seeded(lambda: nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
    assert codes_of(quantized(model, normal(2, 3, 6, 6))).is_contiguous()


def test_tied_weights_share_one_buffer() -> None:
    gm = quantized(AWKWARD["tied_embedding"].build(), tokens(2))
    assert codes_of(gm, 0) is codes_of(gm, 2)
    assert codes_of(gm, 0).shape == (64, 16)
    assert codes_of(gm, 1) is not codes_of(gm, 0)


def test_calls_of_one_module_share_one_buffer() -> None:
    gm = quantized(AWKWARD["reused_linear"].build(), normal(2, 24, 16))
    assert codes_of(gm, 0) is codes_of(gm, 1)
    assert codes_of(gm, 0) is codes_of(gm, 2)


def test_equal_weights_of_two_layers_are_two_buffers() -> None:
    model = seeded(Two)
    model.l1.weight.data.copy_(model.l0.weight)
    gm = quantized(model, normal(2, 16))
    assert codes_of(gm, 0) is not codes_of(gm, 1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.rand(8, 1))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * 2)


def test_a_computed_weight_and_bias_are_computed_once() -> None:
    model = seeded(Scaled)
    gm = quantized(model, normal(2, 16))
    weight = (model.weight * model.scale).detach()
    assert torch.equal(codes_of(gm), quantize(weight, grid(weight)))
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert product.args[2].op == "get_attr"
    assert torch.equal(gm.get_buffer(product.args[2].target), model.bias * 2)
    assert not gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)


def test_a_folded_batch_norm_is_in_the_integers() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    gm = quantized(model, normal(2, 3, 6, 6))
    factor = model[1].weight * torch.rsqrt(model[1].running_var + model[1].eps)
    weight = (model[0].weight * factor.reshape(-1, 1, 1, 1)).detach()
    assert torch.equal(codes_of(gm), quantize(weight, grid(weight)))
    assert not gm.graph.find_nodes(op="call_function", target=aten.rsqrt.default)


@pytest.mark.parametrize("name", ["normed_weights", "standardized_conv"])
def test_weights_of_parametrized_and_standardized_layers(name: str) -> None:
    entry = AWKWARD[name]
    gm = quantized(entry.build(), *entry.inputs(2)[0])
    used = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    assert not any(target.endswith(("original0", "original1")) for target in used)
    assert codes_of(gm, 0).dtype == codes_of(gm, 1).dtype == torch.int8


def test_a_later_change_of_the_model_does_not_reach_the_integers() -> None:
    model = seeded(Two)
    gm = quantized(model, normal(2, 16))
    before = codes_of(gm).clone()
    model.l0.weight.data.zero_()
    assert torch.equal(codes_of(gm), before)


def of_table(gm: fx.GraphModule, rows: int = 64) -> Tensor:
    """All rows of the only embedding: the weight, as it is dequantized."""
    return gm(torch.arange(rows)[None])[0][0]


SPECS: list[QuantSpec] = [
    WEIGHT,
    QuantSpec.of(signed=True, per_channel=True),
    QuantSpec.of(per_channel=True),
    QuantSpec.of(signed=True, symmetric=True),
    QuantSpec.of(signed=True),
    QuantSpec.of(symmetric=True),
    QuantSpec.of(),
    QuantSpec.of(bits=4, signed=True, symmetric=True),
    QuantSpec.of(bits=4),
]


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    backend = ReferenceBackend()
    run_passes(context := PassContext(gm), [lambda inner: len(backend.lower(inner).graph.nodes)])
    return context.gm


@pytest.mark.parametrize("finish", [lambda gm: gm, lowered], ids=["as inserted", "reference"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_of_any_format_is_the_dequantized_one(
    spec: QuantSpec, finish: Callable[[fx.GraphModule], fx.GraphModule]
) -> None:
    """Bit for bit, since an embedding computes nothing; the range is lopsided, so that zero points
    are not 0, and every code of it occurs."""
    model = nn.Embedding(64, 8)
    model.weight.data.copy_(torch.linspace(-0.5, 1.5, 512).view(64, 8))
    weight = model.weight.detach()
    qparams = grid(weight, spec)
    gm = finish(quantized(model, tokens(2), weight=spec))
    assert torch.equal(of_table(gm), dequantize(quantize(weight, qparams), qparams))


def test_sites_in_other_formats_share_nothing() -> None:
    """Tied weights in two formats are two buffers."""
    model = AWKWARD["tied_embedding"].build()
    gm = canonical(model, tokens(2))
    plan = plan_for(gm)
    low = plan_for(gm, weight=QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True))
    mixed = type(plan)([plan["embed"], plan["mix"], low["head"]])
    context = context_of(gm, mixed)
    run_passes(context, [insert_qdq])
    assert codes_of(context.gm, 0) is not codes_of(context.gm, 2)
    assert int(codes_of(context.gm, 2).max()) <= 7
    assert len(list(find_sites(gm.graph))) == 3
