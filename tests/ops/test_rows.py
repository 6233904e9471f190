"""Which graphs compute each row by itself, however their calls give the arguments."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from rewriting import by_keywords
from torch import fx, nn

from torch_quant.ops.qdq import CHOOSE_QPARAMS, FAKE_QUANTIZE, QUANTIZE_PER_TENSOR
from torch_quant.ops.rows import computes_rows

aten = torch.ops.aten


def linear_of(rounding: str) -> fx.GraphModule:
    """A linear layer on what is rounded."""
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("weight", torch.ones(2, 4))
    root.register_buffer("scale", torch.ones(() if rounding == "static" else (3, 1)))
    root.register_buffer("zero", torch.zeros((), dtype=torch.int32))
    x = graph.placeholder("x")
    weight, scale, zero = map(graph.get_attr, ("weight", "scale", "zero"))
    rounded: Any = x
    if rounding in ("per_token", "per_tensor"):
        chosen = graph.call_function(CHOOSE_QPARAMS, (x, "uint8", False, rounding, "float32"))
        parts = [graph.call_function(operator.getitem, (chosen, i)) for i in range(2)]
        rounded = graph.call_function(FAKE_QUANTIZE, (x, *parts, "uint8"))
    elif rounding in ("static", "of a batch"):
        rounded = graph.call_function(FAKE_QUANTIZE, (x, scale, zero, "uint8"))
    elif rounding == "numbers":
        rounded = graph.call_function(QUANTIZE_PER_TENSOR, (x, 0.1, 3, 0, 127, torch.uint8))
    operands = (weight, rounded) if rounding == "weight" else (rounded, weight)
    graph.output((graph.call_function(aten.linear.default, operands),))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("none", True), ("static", True), ("numbers", True), ("per_token", True),
        ("per_tensor", False), ("of a batch", False), ("weight", False),
    ],
)  # fmt: skip
def test_rows(rounding: str, expected: bool) -> None:
    gm = linear_of(rounding)
    assert computes_rows(gm) is expected
    assert computes_rows(by_keywords(gm)) is expected
