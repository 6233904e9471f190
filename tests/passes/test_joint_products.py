"""Linear layers with integer weights that one call computes, in whole graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import Quantizer, native, recipes
from torch_quant.native.joint import GATED_LINEAR, WEIGHT_ONLY_LINEARS
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR

pytestmark = [
    pytest.mark.sparse,
    pytest.mark.skipif(native.unavailable() is not None, reason="the kernels are missing"),
]

F = nn.functional


class Layers(nn.Module):
    """Layers that ``function`` calls, and the function."""

    def __init__(
        self, function: Callable[[Any, Tensor], Tensor], odd: str = "", **sizes: int
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.names = list(sizes)
        for name, out in sizes.items():
            inputs = 64 if name == "last" else 32
            setattr(self, name, nn.Linear(inputs, out, bias=name != odd))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def counted(model: nn.Module) -> tuple[Counter[str], Tensor, Tensor]:
    """Operators of the quantized graph, and its output and that of layers one by one."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    recipe = recipes.int4_weight_only(group_size=32)
    quantizer = Quantizer(recipe, backend="onednn", capture="whole")
    whole = quantizer.quantize(model, example_inputs=x)
    modules = Quantizer(recipe, backend="reference", capture="modules")
    (graph,) = whole.quantization.graphs
    found = Counter(
        str(node.target).split(".")[1]
        for node in graph.body.graph.nodes
        if node.target in (GATED_LINEAR, WEIGHT_ONLY_LINEAR, WEIGHT_ONLY_LINEARS)
    )
    return found, whole(x), modules.quantize(model, example_inputs=x)(x)


def near(x: Tensor, y: Tensor) -> bool:
    """Activations have 8 bits in the kernels, and floats in the reference."""
    return bool((x - y).norm() <= 0.02 * y.norm())


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("form", ["gate first", "gate last", "alone"])
def test_gated(name: str, form: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        gate = FUNCTIONS[name](model.a(x))
        if form == "alone":
            return model.last(gate)  # type: ignore[no-any-return]
        return model.last(gate * model.b(x) if form == "gate first" else model.b(x) * gate)  # type: ignore[no-any-return]

    sizes = {"a": 64, "last": 8} if form == "alone" else {"a": 64, "b": 64, "last": 8}
    found, y, wanted = counted(Layers(forward, **sizes).eval())
    assert found == {"gated_linear": 1}
    assert near(y, wanted)


def test_layers_of_one_input() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        q, k, v = model.a(x), model.b(x), model.c(x)
        return (q * k).softmax(-1) * v  # type: ignore[no-any-return]

    found, y, wanted = counted(Layers(forward, a=16, b=16, c=16).eval())
    assert found == {"weight_only_linears": 1}
    assert near(y, wanted)


@pytest.mark.parametrize("odd", ["a", "b", "last"])
def test_one_without_a_bias_is_called_by_itself(odd: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.last(F.silu(model.a(x)) * model.b(x))  # type: ignore[no-any-return]

    found, y, wanted = counted(Layers(forward, odd, a=64, b=64, last=8).eval())
    assert found["gated_linear"] == 0
    assert found["weight_only_linears"] == (odd == "last")
    assert near(y, wanted)


OTHERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, int]]] = {
    "gates of two inputs": (
        lambda m, x: m.last(F.silu(m.a(x)) * m.b(x.sin())),
        {"weight_only_linear": 3},
    ),
    "the gate is read again": (
        lambda m, x: m.last((gate := F.silu(m.a(x))) * m.b(x)) + gate.sum(-1, keepdim=True),
        {"weight_only_linears": 1, "weight_only_linear": 1},
    ),
    "another function": (
        lambda m, x: m.last(torch.tanh(m.a(x)) * m.b(x)),
        {"weight_only_linears": 1, "weight_only_linear": 1},
    ),
    "no function": (
        lambda m, x: m.last(m.a(x) * m.b(x)),
        {"weight_only_linears": 1, "weight_only_linear": 1},
    ),
    "a square": (lambda m, x: m.last(F.silu(m.a(x)) * F.silu(m.a(x))) + m.b(x).sum(), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    function, wanted = OTHERS[name]
    found, y, expected = counted(Layers(function, a=64, b=64, last=8).eval())
    assert not found["gated_linear"]
    assert not wanted or found == wanted
    assert near(y, expected)
