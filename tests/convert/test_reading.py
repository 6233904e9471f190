"""A graph as a function reads the model's own tensors, whatever is done to the model."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from flows import BACKENDS, calibrated
from models import normal, seeded
from torch import Tensor, fx, nn

from torch_quant.convert.reading import reading
from torch_quant.ops.library import plain_function


class Shared(nn.Module):
    """Two readers of one weight, a buffer, and a result that is an input."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.register_buffer("table", normal(16))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.first(self.first(x) + self.table)), y


def quantized() -> tuple[Any, tuple[Tensor, Tensor]]:
    model, inputs = seeded(Shared).eval(), (normal(3, 16), normal(2))
    return calibrated(model, [(inputs, {})], backend="reference").quantize(model), inputs


def by_body(quant_model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    (graph,) = quant_model.quantization.graphs
    return graph.body(*inputs)[0]  # type: ignore[no-any-return]


def test_it_is_used_and_gives_what_the_graph_gives() -> None:
    quant_model, inputs = quantized()
    (graph,) = quant_model.quantization.graphs
    assert graph._function() is not graph.body
    assert graph._function() is graph._function()
    assert torch.equal(quant_model(*inputs)[0], by_body(quant_model, inputs))
    assert quant_model(*inputs)[1] is inputs[1]


def test_other_tensors_are_read_at_once() -> None:
    quant_model, inputs = quantized()
    before = quant_model(*inputs)[0]
    state = copy.deepcopy(quant_model.state_dict())
    state["first.bias"] += 1
    quant_model.load_state_dict(state)
    after = quant_model(*inputs)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, by_body(quant_model, inputs))
    quant_model.norm.weight = nn.Parameter(normal(16))
    assert torch.equal(quant_model(*inputs)[0], by_body(quant_model, inputs))
    assert not torch.equal(quant_model(*inputs)[0], after)
    quant_model.to("meta")
    assert quant_model(inputs[0].to("meta"), inputs[1].to("meta"))[0].device.type == "meta"


def test_copies_read_their_own() -> None:
    quant_model, inputs = quantized()
    expected = quant_model(*inputs)[0]
    twin = copy.deepcopy(quant_model)
    with torch.no_grad():
        twin.norm.bias.add_(1.0)
    assert torch.allclose(twin(*inputs)[0], expected + 1.0)
    assert torch.equal(quant_model(*inputs)[0], expected)


def test_another_body_is_another_function() -> None:
    quant_model, inputs = quantized()
    (graph,) = quant_model.quantization.graphs
    _ = quant_model(*inputs)
    body = graph.body
    with body.graph.inserting_before(body.graph.output_node()):
        (leaves,) = body.graph.output_node().args
        doubled = body.graph.call_function(torch.ops.aten.mul.Tensor, (leaves[0], 2.0))
    body.graph.output_node().args = ((doubled, *leaves[1:]),)
    before = quant_model(*inputs)[0]
    body.recompile()
    assert torch.equal(quant_model(*inputs)[0], before * 2.0)


def test_hooks_of_the_graph_run() -> None:
    quant_model, inputs = quantized()
    (graph,) = quant_model.quantization.graphs
    quant_model(*inputs)
    seen: list[int] = []
    graph.body.register_forward_hook(lambda *args: seen.append(1))
    quant_model(*inputs)
    assert seen == [1]


@pytest.mark.parametrize("what", ["a module", "an attribute"])
def test_what_is_no_tensor_of_a_module_is_left_to_the_graph(what: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = nn.Module()
    root.act = nn.ReLU()
    root.value = 3.0
    if what == "a module":
        graph.output(graph.call_module("act", (x,)))
    else:
        graph.output(graph.call_function(torch.add, (x, graph.get_attr("value"))))
    assert reading(fx.GraphModule(root, graph)) is None


@pytest.mark.parametrize("backend", sorted({"onednn"} & set(BACKENDS)))
def test_functions_in_the_place_of_operators_give_the_same(backend: str) -> None:
    """Static layers, a norm that is rounded, and one in float."""
    model, inputs = seeded(Shared).eval(), (normal(3, 16), normal(2))
    quant_model = calibrated(model, [(inputs, {})], backend=backend).quantize(model)
    (graph,) = quant_model.quantization.graphs
    assert any(plain_function(node.target) for node in graph.body.graph.nodes)
    plain = quant_model(*inputs)[0]
    assert torch.equal(plain, by_body(quant_model, inputs))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(quant_model(*inputs)[0], plain)
    assert any(each.name.startswith("torch_quant::") for each in profile.events())
    if "intel_extension_for_pytorch" in sys.modules:
        return  # its norms give other last digits where a gradient is wanted
    with torch.enable_grad():
        seen = quant_model(inputs[0].clone().requires_grad_(), inputs[1])[0]
    assert torch.equal(seen, plain)
