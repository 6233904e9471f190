from __future__ import annotations

import pytest
import torch
from awkward import AWKWARD
from models import normal, seeded
from rewriting import Two, canonical
from torch import fx, nn

from torch_quant.graph.sites import find_sites
from torch_quant.passes.constants import evaluate, new_constant

aten = torch.ops.aten


def weights(gm: fx.GraphModule) -> list[fx.Node]:
    return [node.args[pattern.weight] for node, pattern, _ in find_sites(gm.graph)]


def test_a_plain_reference_is_the_parameter_itself() -> None:
    model = seeded(Two)
    gm = canonical(model, normal(2, 16))
    values = [evaluate(gm, node) for node in weights(gm)]
    assert values[0] is model.l0.weight
    assert values[1] is model.l1.weight


@pytest.mark.parametrize("grad", [True, False])
def test_an_expression_is_a_new_tensor_without_gradient(grad: bool) -> None:
    model = AWKWARD["scaled_weight"].build().requires_grad_(True)
    gm = canonical(model, normal(2, 24, 16))
    before = model.weight.detach().clone()
    with torch.set_grad_enabled(grad):
        value = evaluate(gm, weights(gm)[0])
        assert torch.is_grad_enabled() == grad
    assert torch.equal(value, (model.weight * model.scale).detach())
    assert not value.requires_grad
    assert torch.equal(model.weight, before)


def test_an_expression_with_keywords_and_lists() -> None:
    graph = fx.Graph()
    root = nn.Module()
    root.register_buffer("w", torch.arange(6.0).reshape(2, 3))
    w = graph.get_attr("w")
    both = graph.call_function(aten.cat.default, ([w, w],), {"dim": 1})
    total = graph.call_function(aten.sum.dim_IntList, (both, [1]), {"dtype": torch.float64})
    graph.output(total)
    gm = fx.GraphModule(root, graph)
    assert torch.equal(evaluate(gm, total), torch.tensor([6.0, 24.0], dtype=torch.float64))


def test_the_current_value_is_read() -> None:
    model = AWKWARD["scaled_weight"].build()
    gm = canonical(model, normal(2, 24, 16))
    node = weights(gm)[0]
    model.scale.data.zero_()
    assert not evaluate(gm, node).any()


def names(gm: fx.GraphModule) -> set[str]:
    return {name for name, _ in gm.named_buffers()}


def graph_of_two() -> tuple[fx.GraphModule, fx.Node]:
    gm = canonical(seeded(Two), normal(2, 16))
    return gm, next(iter(find_sites(gm.graph)))[0]


def test_a_new_constant_is_a_buffer_read_right_before() -> None:
    gm, node = graph_of_two()
    value = torch.full((16, 16), 2.0)
    made = new_constant(gm, "encoder.layer.0.weight", value, node)
    assert made.op == "get_attr"
    assert made.target == "encoder_layer_0_weight"
    assert gm.get_buffer(made.target) is value
    assert made.next is node


def test_the_same_value_again_is_the_same_buffer() -> None:
    gm, node = graph_of_two()
    value = torch.ones(3)
    first, second = (new_constant(gm, "l0.weight", value, node) for _ in range(2))
    assert first.target == second.target
    assert names(gm) == {"l0_weight"}


def test_another_value_of_the_same_name_gets_its_own() -> None:
    gm, node = graph_of_two()
    values = [torch.ones(3), torch.ones(3), torch.zeros(3)]
    targets = [new_constant(gm, "l0.weight", value, node).target for value in values]
    assert targets == ["l0_weight", "l0_weight_1", "l0_weight_2"]
    assert all(gm.get_buffer(t) is value for t, value in zip(targets, values, strict=True))
    assert new_constant(gm, "l0.weight", values[1], node).target == "l0_weight_1"


@pytest.mark.parametrize("name", ["l0", "forward", "graph", "training", "code", "@1.weight"])
def test_names_that_mean_something_to_the_module_are_not_taken(name: str) -> None:
    gm, node = graph_of_two()
    value = torch.ones(3)
    expected = gm(normal(2, 16))[0]
    made = new_constant(gm, name, value, node)
    assert gm.get_buffer(made.target) is value
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(normal(2, 16))[0], expected)
    assert isinstance(gm.l0, nn.Module)
    assert gm.training in (True, False)
