from __future__ import annotations

import pytest
import torch
from models import MODELS, example, normal, seeded
from rewriting import Two, captured
from torch import fx

from torch_quant.graph.calls import flatten_call
from torch_quant.graph.export import export_graph
from torch_quant.graph.sites import KEY, ORIGIN, key_of
from torch_quant.graph.twin import twin_of
from torch_quant.passes.base import PassContext, call_like, copy_graph, run_passes
from torch_quant.passes.canonicalize import CANONICAL_PASSES, canonicalize

aten = torch.ops.aten


def relus_to_tanhs(context: PassContext) -> int:
    found = context.graph.find_nodes(op="call_function", target=aten.relu.default)
    for node in found:
        new = call_like(node, aten.tanh.default, node.args)
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
    return len(found)


def test_a_copy_is_a_graph_of_its_own_over_the_same_tensors() -> None:
    model = seeded(Two)
    gm = captured(model, normal(2, 16))
    copy = copy_graph(gm)
    assert run_passes(PassContext(copy), [relus_to_tanhs]) == {"relus_to_tanhs": 1}
    assert [n.target for n in gm.graph.nodes].count(aten.relu.default) == 1
    assert copy.get_parameter("l0.weight") is gm.get_parameter("l0.weight") is model.l0.weight
    assert torch.equal(gm(normal(3, 16))[0], model(normal(3, 16)))
    assert torch.equal(copy(normal(3, 16))[0], model.l1(model.l0(normal(3, 16)).tanh()))


def test_a_copy_takes_the_notes_along() -> None:
    gm = captured(Two(), normal(2, 16))
    for old, new in zip(gm.graph.nodes, copy_graph(gm).graph.nodes, strict=True):
        assert old.name == new.name
        assert old.meta == new.meta or old.op == "output"  # which computes no tensor
        assert old.meta is not new.meta


def test_counts_are_by_pass_and_in_order() -> None:
    def nothing(context: PassContext) -> int:
        return 0

    counts = run_passes(PassContext(captured(Two(), normal(2, 16))), [relus_to_tanhs, nothing])
    assert list(counts.items()) == [("relus_to_tanhs", 1), ("nothing", 0)]


def test_what_nobody_reads_is_removed() -> None:
    def forget(context: PassContext) -> int:
        (output,) = context.graph.find_nodes(op="output")
        (first,) = context.graph.find_nodes(op="call_function", target=aten.relu.default)
        output.args = ((first,),)
        return 1

    gm = captured(Two(), normal(2, 16))
    run_passes(PassContext(gm), [forget])
    assert [n.target for n in gm.graph.nodes].count(aten.linear.default) == 1


def test_a_pass_that_breaks_the_graph_is_found_at_once() -> None:
    def misplace(context: PassContext) -> int:
        (relu,) = context.graph.find_nodes(op="call_function", target=aten.relu.default)
        relu.prepend(relu.users.copy().popitem()[0])
        return 1

    with pytest.raises(RuntimeError, match="before it has been defined"):
        run_passes(PassContext(captured(Two(), normal(2, 16))), [misplace])


def test_a_call_in_place_of_another_takes_over_its_notes() -> None:
    gm = captured(Two(), normal(2, 16))
    (relu,) = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    relu.meta[KEY] = "the key"
    new = call_like(relu, aten.clamp.default, relu.args, min=0.0)
    assert new.next is relu
    assert new.kwargs == {"min": 0.0}
    assert key_of(new) == "the key"
    assert new.meta[ORIGIN] == relu.name


def export(name: str) -> fx.GraphModule:
    return export_graph(twin_of(MODELS[name]()), flatten_call(example(name), {})).gm


@pytest.mark.parametrize("name", MODELS)
def test_canonical_graphs_compute_what_was_captured(name: str) -> None:
    """Up to the roundings of folding a batch norm; else bit for bit."""
    gm = export(name)
    nodes = [(node.name, node.target) for node in gm.graph.nodes]
    canonical = canonicalize(gm)
    assert [(node.name, node.target) for node in gm.graph.nodes] == nodes
    tolerance = 1e-5 if "cnn" in name else 0.0
    expected, actual = gm(*example(name, 3))[0], canonical(*example(name, 3))[0]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_a_canonical_graph_has_nothing_left_to_rewrite(name: str) -> None:
    canonical = canonicalize(export(name))
    counts = run_passes(PassContext(copy_graph(canonical)), CANONICAL_PASSES)
    assert set(counts.values()) == {0}


@pytest.mark.parametrize("name", MODELS)
def test_origins_are_nodes_of_the_captured_graph(name: str) -> None:
    gm = export(name)
    canonical = canonicalize(gm)
    known = {node.name for node in gm.graph.nodes}
    origins = [node.meta[ORIGIN] for node in canonical.graph.nodes if ORIGIN in node.meta]
    assert set(origins) <= known
    assert {node.name for node in gm.graph.find_nodes(op="placeholder")} <= set(origins)
