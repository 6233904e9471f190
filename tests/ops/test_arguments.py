"""Arguments by name, whether a call gives them by position, by keyword or not at all."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from torch_quant.ops.arguments import (
    argument,
    arguments,
    in_order,
    part_of,
    positional,
    retarget,
    set_arguments,
)

aten = torch.ops.aten
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": (([1, 2], [3, 4]), {}),
    "by keyword": ((), {"padding": [3, 4], "stride": [1, 2]}),
    "both": (([1, 2],), {"padding": [3, 4]}),
}


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    return graph.call_function(target, (x, w, *args), kwargs)


@pytest.mark.parametrize("how", CALLS)
def test_arguments_of_a_convolution(how: str) -> None:
    args, kwargs = CALLS[how]
    node = call(aten.conv2d.default, *([None, *args] if args else []), **kwargs)
    x, w = node.all_input_nodes
    wanted = {"input": x, "weight": w, "bias": None, "stride": [1, 2], "padding": [3, 4],
              "dilation": [1, 1], "groups": 1}  # fmt: skip
    assert arguments(node) == wanted
    assert positional(node) == tuple(wanted.values())
    for place, (name, value) in enumerate(wanted.items()):
        assert argument(node, name) == argument(node, place) == value


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("new", [{"groups": 4}, {"stride": [5, 5]}, {"bias": 7, "padding": 0}])
def test_other_arguments(how: str, new: dict[str, Any]) -> None:
    args, kwargs = CALLS[how]
    node = call(aten.conv2d.default, *([None, *args] if args else []), **kwargs)
    wanted = arguments(node) | new
    set_arguments(node, new)
    assert arguments(node) == wanted
    assert not {f"arg{i}" for i in range(len(node.args))} & node.kwargs.keys()
    in_order(node)
    assert arguments(node) == wanted
    assert not node.kwargs


def test_what_has_no_position_stays_a_keyword() -> None:
    node = call(aten.add.Tensor)
    set_arguments(node, {"alpha": 3})
    assert node.kwargs == {"alpha": 3}
    assert argument(node, "alpha") == argument(node, 2) == 3
    in_order(node)
    assert node.kwargs == {"alpha": 3}
    assert positional(node) == tuple(node.all_input_nodes)
    retarget(node, aten.mul.Tensor, positional(node))
    assert not node.kwargs


def test_functions_have_names_too() -> None:
    def scaled(x: Any, factor: float = 2.0, *, bias: float = 1.0) -> Any:
        return x * factor + bias

    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(scaled, (x,), {"bias": 0.0})
    assert arguments(node) == {"x": x, "factor": 2.0, "bias": 0.0}
    part = graph.call_function(operator.getitem, (node, 1))
    assert part_of(part) == (node, 1)


def test_a_name_that_the_operator_does_not_have() -> None:
    with pytest.raises(KeyError, match="inputs"):
        argument(call(aten.conv2d.default), "inputs")
