from __future__ import annotations

import copy

import pytest
import torch
from awkward import AWKWARD
from models import normal, seeded
from rewriting import Two, canonical
from torch import Tensor, fx, nn

from torch_quant.graph.serialize import pack, unpack
from torch_quant.graph.sites import find_sites
from torch_quant.passes.constants import evaluate, new_constant, new_constants, settle_names

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
    assert made.target == "encoder.layer.0.weight"
    assert gm.get_buffer(made.target) is value
    assert made.next is node


def test_the_same_value_again_is_the_same_buffer() -> None:
    gm, node = graph_of_two()
    value = torch.ones(3)
    first, second = (new_constant(gm, "l0.factor", value, node) for _ in range(2))
    assert first.target == second.target
    assert names(gm) == {"l0.factor"}


def test_another_value_of_the_same_name_gets_its_own() -> None:
    gm, node = graph_of_two()
    values = [torch.ones(3), torch.ones(3), torch.zeros(3)]
    targets = [new_constant(gm, "l0.weight", value, node).target for value in values]
    assert targets == ["l0.weight_1", "l0.weight_2", "l0.weight_3"]  # the float one has the name
    assert all(gm.get_buffer(t) is value for t, value in zip(targets, values, strict=True))
    assert new_constant(gm, "l0.weight", values[1], node).target == "l0.weight_2"


def settled_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph that can be called."""
    draft = settle_names(gm)
    return fx.GraphModule(draft, draft.graph)


def codes(step: float = 1.0) -> dict[str, Tensor]:
    return {"": torch.ones(16, 16, dtype=torch.int8), "_scale": torch.full((16,), step)}


def test_a_name_that_has_become_free_goes_to_the_new_constant() -> None:
    gm, node = graph_of_two()
    weight, scale = new_constants(gm, "l0.weight", codes(), node)
    assert (weight.target, scale.target) == ("l0.weight_1", "l0.weight_1_scale")
    node.update_arg(1, node.graph.create_node("call_function", aten.mul.Tensor, (weight, scale)))
    node.prepend(node.args[1])
    gm.graph.eliminate_dead_code()
    settled = settled_graph(gm)
    assert list(settled.l0.state_dict()) == ["bias", "weight", "weight_scale"]
    assert isinstance(settled(normal(2, 16))[0], Tensor)


def test_a_float_tensor_that_is_read_keeps_its_name() -> None:
    """The scale follows its weight, though a scale of that name there is none."""
    gm, node = graph_of_two()
    new_constants(gm, "l0.weight", codes(), node)
    float_weight = gm.l0.weight
    settled = settled_graph(gm)
    assert settled.l0.weight.data_ptr() == float_weight.data_ptr()
    assert {"weight_1", "weight_1_scale"} < set(settled.l0.state_dict())


def test_one_tensor_under_two_names_gets_one() -> None:
    gm, node = graph_of_two()
    values = codes()
    for name in ("a.b.weight", "a_b.weight"):
        new_constants(gm, name, values, node)
    found = names(settle_names(gm))
    assert {"a.b.weight", "a.b.weight_scale"} < found
    assert not {name for name in found if name.startswith("a_b")}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("encoder.0.weight", "encoder.0.weight"),
        ("layer@1.weight", "layer@1.weight"),
        ("block-1.f[smooth=1].weight", "block-1.f[smooth=1].weight"),
        ("graph.weight", "graph_1.weight"),
        ("l1.bias.weight", "l1.bias_1.weight"),
        ("l0", "l0_1"),
        ("l0.float", "l0.float_1"),
        (".weight", "weight"),
    ],
)
def test_paths_that_are_taken_or_are_no_identifiers(path: str, found: str) -> None:
    gm, node = graph_of_two()
    value = torch.ones(16)
    expected = gm(normal(2, 16))[0]
    made = new_constant(gm, path, value, node)
    assert made.target == found
    node.update_arg(2, made)
    gm.graph.eliminate_dead_code()
    settled = settled_graph(gm)
    for each in (settled, unpack(pack(settled)), copy.deepcopy(settled)):
        assert torch.equal(each.get_buffer(found), value)
        assert not torch.equal(each(normal(2, 16))[0], expected)


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
