from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, example, normal, seeded, tokens
from rewriting import (
    Compute,
    FixedParams,
    Two,
    canonical,
    context_of,
    grid_of,
    operators,
    plan_for,
    weight_grid_of,
)
from torch import Tensor, fx, nn

from torch_quant.core.functional import fake_quantize
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import NotCalibrated
from torch_quant.graph.sites import find_sites
from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.ops.table import pattern_of
from torch_quant.passes.base import run_passes
from torch_quant.passes.insert_qdq import insert_qdq

aten = torch.ops.aten

INPUT = ":args_0"


def insert(gm: fx.GraphModule, plan: QuantPlan | None = None) -> tuple[fx.GraphModule, int]:
    """A copy with the pairs that ``plan`` (by default, everything) wants, and how many sites."""
    context = context_of(gm, plan)
    (count,) = run_passes(context, [insert_qdq]).values()
    return context.gm, count


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    """Of an operator, those that read no constant: weights are left out."""
    found = gm.graph.find_nodes(op="call_function", target=target)
    return [node for node in found if node.args[0].op != "get_attr"]


def faked(x: Tensor, key: str, spec: QuantSpec | None = None) -> Tensor:
    """``x`` as a consumer sees it."""
    return fake_quantize(x, grid_of(key, spec or QuantSpec()))


def faked_weight(weight: Tensor, axis: int = 0) -> Tensor:
    spec = QuantSpec.of(signed=True, symmetric=True, per_channel=True)
    return fake_quantize(weight, weight_grid_of("", weight, spec, axis))


CONSUMERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(16, 8), (3, 16)),
    "linear without bias": (nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_layer_computes_on_what_the_grids_give(name: str) -> None:
    """Bit for bit: the same float operator on the same fake-quantized tensors."""
    model, shape = CONSUMERS[name]
    gm, count = insert(canonical(model, normal(*shape)))
    assert count == 1
    (product,) = [node for node in gm.graph.nodes if pattern_of(node)]
    assert product.args[0].target is DEQUANTIZE
    assert product.args[0].args[0].target is QUANTIZE
    assert product.args[1].target is DEQUANTIZE
    assert product.args[1].args[0].op == "get_attr"
    pattern = pattern_of(product)
    assert pattern is not None
    weight = model.get_parameter("weight").detach()
    x = normal(shape[0] + 1, *shape[1:])
    wanted = torch.func.functional_call(
        model, {"weight": faked_weight(weight, pattern.weight_axis)}, (faked(x, INPUT),)
    )
    assert torch.equal(gm(x)[0], wanted)


def test_both_operands_of_a_product() -> None:
    gm, count = insert(canonical(Compute(torch.matmul), normal(2, 3, 8), normal(2, 8, 5)))
    assert count == 1
    assert len(calls(gm, QUANTIZE)) == len(calls(gm, DEQUANTIZE)) == 2
    x, y = normal(4, 3, 8), normal(4, 8, 5)
    assert torch.equal(gm(x, y)[0], faked(x, ":args_0") @ faked(y, ":args_1"))


def test_an_embedding_has_integer_rows_only() -> None:
    model = nn.Embedding(64, 8)
    gm, count = insert(canonical(model, tokens(2)))
    assert count == 1
    assert not calls(gm, QUANTIZE)
    expected = F.embedding(tokens(3), faked_weight(model.weight.detach()))
    assert torch.equal(gm(tokens(3))[0], expected)


def test_attention_quantizes_its_inputs_and_its_probabilities() -> None:
    name = "scaled_dot_product_attention"
    inputs = tuple(normal(2, 3, 5, 8, salt=i) for i in range(3))
    gm, count = insert(canonical(Compute(F.scaled_dot_product_attention), *inputs))
    assert count == 1
    assert len(calls(gm, QUANTIZE)) == 4
    assert operators(gm).count("matmul") == 2
    q, k, v = (faked(x, f":args_{i}") for i, x in enumerate(inputs))
    probabilities = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, -1)
    expected = faked(probabilities, f"{name}.probabilities") @ v
    torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


class Branches(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.l0(x) + self.l1(x) + x


def test_a_shared_tensor_is_quantized_once() -> None:
    """Each consumer dequantizes for itself; who is not quantized reads the float tensor."""
    model = seeded(Branches)
    gm, count = insert(canonical(model, normal(4, 16)))
    assert count == 2
    (quantize,) = calls(gm, QUANTIZE)
    assert len(quantize.users) == len(calls(gm, DEQUANTIZE)) == 2
    x = normal(3, 16)
    layers = [
        F.linear(faked(x, INPUT), faked_weight(m.weight), m.bias) for m in (model.l0, model.l1)
    ]
    assert torch.equal(gm(x)[0], layers[0] + layers[1] + x)


def test_two_formats_of_one_tensor() -> None:
    model = seeded(Branches)
    gm = canonical(model, normal(4, 16))
    low = QuantSpec.of(bits=4)
    entries = plan_for(gm)
    mixed = QuantPlan([entries["l0"], plan_for(gm, activation=low)["l1"]])
    gm, _ = insert(gm, mixed)
    assert len(calls(gm, QUANTIZE)) == 2
    x = normal(3, 16)
    expected = (
        F.linear(faked(x, INPUT), faked_weight(model.l0.weight), model.l0.bias)
        + F.linear(faked(x, INPUT, low), faked_weight(model.l1.weight), model.l1.bias)
        + x
    )
    assert torch.equal(gm(x)[0], expected)


def test_one_tensor_in_both_places_of_an_operator() -> None:
    gm, _ = insert(canonical(Compute(lambda x: torch.matmul(x, x)), normal(2, 5, 5)))
    assert len(calls(gm, QUANTIZE)) == len(calls(gm, DEQUANTIZE)) == 1
    x = normal(3, 5, 5)
    assert torch.equal(gm(x)[0], faked(x, INPUT) @ faked(x, INPUT))


def test_one_tensor_and_its_transpose() -> None:
    gm, _ = insert(canonical(Compute(lambda x: x @ x.transpose(1, 2)), normal(2, 5, 8)))
    assert len(calls(gm, QUANTIZE)) == 1
    assert len(calls(gm, DEQUANTIZE)) == 2
    x = normal(3, 4, 8)
    assert torch.equal(gm(x)[0], faked(x, INPUT) @ faked(x, INPUT).transpose(1, 2))


def test_data_moves_as_integers() -> None:
    """source -> quantize -> transpose -> reshape -> dequantize -> product."""

    class Moves(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.l0(x.sigmoid().transpose(1, 2).reshape(x.shape[0], -1, 16))

    model = seeded(Moves)
    gm, _ = insert(canonical(model, normal(2, 16, 4)))
    (quantize,), (dequantize,) = calls(gm, QUANTIZE), calls(gm, DEQUANTIZE)
    assert quantize.args[0].target is aten.sigmoid.default
    chain, node = [], dequantize.args[0]
    while node is not quantize:
        chain.append(node.target)
        node = node.args[0]
    assert chain == [aten.reshape.default, aten.transpose.int]
    assert operators(gm).count("transpose") == 1  # the float one is gone
    x = normal(3, 16, 6)
    moved = faked(x.sigmoid(), "sigmoid").transpose(1, 2).reshape(3, -1, 16)
    expected = F.linear(moved, faked_weight(model.l0.weight), model.l0.bias)
    assert torch.equal(gm(x)[0], expected)


def test_one_movement_for_two_consumers() -> None:
    class Shared(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(1, 2).flatten(0, 1)
            return self.l0(y) + self.l1(y)

    gm, _ = insert(canonical(seeded(Shared), normal(2, 16, 4)))
    assert len(calls(gm, QUANTIZE)) == 1
    assert operators(gm).count("transpose") == operators(gm).count("flatten") == 1


def test_fewer_bits_are_clamped_to() -> None:
    model = nn.Linear(16, 8)
    gm = canonical(model, normal(4, 16))
    low = QuantSpec.of(bits=4)
    gm, _ = insert(gm, plan_for(gm, activation=low))
    codes = []

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is QUANTIZE:
                codes.append(value)
            return value

    Look(gm).run(normal(64, 16) * 10)
    assert (int(codes[0].min()), int(codes[0].max())) == (0, 15)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_without_sites_changes_nothing(name: str) -> None:
    """Bit for bit, by the very same parameters."""
    model = MODELS[name]()
    gm = canonical(model, *example(name))
    names = tuple(site.name for _, _, site in find_sites(gm.graph))
    floats, count = insert(gm, plan_for(gm, floats=names))
    assert count == 0
    assert not [node for node in floats.graph.nodes if node.target in (QUANTIZE, DEQUANTIZE)]
    assert torch.equal(floats(*example(name, 3))[0], gm(*example(name, 3))[0])
    own = {id(x) for x in model.parameters()}
    assert {id(x) for x in floats.parameters()} <= own


@pytest.mark.parametrize("left", ["0", "2", "4"])
def test_a_site_left_in_float_computes_by_the_models_own_parameters(left: str) -> None:
    model = MODELS["mlp"]()
    gm = canonical(model, normal(2, 16))
    mixed, count = insert(gm, plan_for(gm, floats=(left,)))
    assert count == 2
    assert mixed.get_parameter(f"{left}.weight") is model.get_parameter(f"{left}.weight")
    assert mixed.get_parameter(f"{left}.bias") is model.get_parameter(f"{left}.bias")
    (node,) = [
        node
        for node in calls(mixed, aten.linear.default)
        if node.args[1].op == "get_attr" and node.args[1].target == f"{left}.weight"
    ]
    assert node.args[0].target is not DEQUANTIZE


@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_model(name: str) -> None:
    """With wide 8-bit grids the output stays near that of the float model."""
    model = MODELS[name]()
    gm = canonical(model, *example(name))
    quantized, count = insert(gm)
    assert count == len(list(find_sites(gm.graph)))
    expected = model(*example(name, 8))
    error = (quantized(*example(name, 8))[0] - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.2


def test_a_missing_grid_is_reported() -> None:
    gm = canonical(nn.Linear(16, 8), normal(2, 16))

    class Nothing(FixedParams):
        def activation(self, key: str, spec: QuantSpec) -> QParams:
            raise NotCalibrated(f"no data passed {key}")

    with pytest.raises(NotCalibrated, match=":args_0"):
        insert_qdq(context_of(gm, params=Nothing()))
