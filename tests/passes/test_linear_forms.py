from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from models import normal, seeded
from rewriting import apply, captured, operators
from torch import Tensor, nn

from torch_quant.graph.sites import find_sites, name_tensors
from torch_quant.passes.linear_forms import normalize_linear

aten = torch.ops.aten


class Weights(nn.Module):
    """Two matrices and a bias, for a function of them and the input."""

    def __init__(self, function: Callable[[Tensor, Weights], Tensor]) -> None:
        super().__init__()
        self.w0 = nn.Parameter(torch.randn(16, 8))
        self.w1 = nn.Parameter(torch.randn(8, 16))
        self.batched = nn.Parameter(torch.randn(2, 16, 8))
        self.bias = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(5, 8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def gpt2_conv1d(x: Tensor, m: Weights) -> Tensor:
    """As the layer of that name in GPT-2: a linear with its weight lying the other way."""
    return torch.addmm(m.bias, x.view(-1, x.size(-1)), m.w0).view(*x.shape[:-1], 8)


Function = Callable[[Tensor, Weights], Tensor]

REWRITTEN: dict[str, tuple[Function, tuple[int, ...]]] = {
    "addmm": (lambda x, m: torch.addmm(m.bias, x, m.w0), (5, 16)),
    "GPT-2's Conv1D": (gpt2_conv1d, (2, 5, 16)),
    "mm": (lambda x, m: torch.mm(x, m.w0), (5, 16)),
    "matmul of rows": (lambda x, m: torch.matmul(x, m.w0), (5, 16)),
    "matmul of sequences": (lambda x, m: x @ m.w0, (2, 5, 16)),
    "matmul of images": (lambda x, m: x @ m.w0, (2, 3, 5, 16)),
    "matmul of a vector": (lambda x, m: x @ m.w0, (16,)),
    "transposed": (lambda x, m: x @ m.w1.t(), (2, 5, 16)),
    "computed": (lambda x, m: x @ (m.w0 * m.bias.exp()), (2, 5, 16)),
    "bias of one number": (lambda x, m: torch.addmm(m.bias[:1], x, m.w0), (5, 16)),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name: str) -> None:
    """The sums may be taken in another order, as the weight lies differently in memory."""
    function, shape = REWRITTEN[name]
    model = seeded(lambda: Weights(function))
    gm = captured(model, normal(*shape))
    assert apply(normalize_linear, gm) == 1
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert not {"mm", "addmm", "matmul"} & set(operators(gm))
    name_tensors(gm.graph)
    ((node, pattern, site),) = find_sites(gm.graph)
    assert node is product
    assert pattern.name == "linear"
    assert site.weight_shape == (8, 16)
    for batch in (1, 3):
        x = normal(*shape) if len(shape) == 1 else normal(batch, *shape[1:])
        torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-5, atol=1e-5)


LEFT: dict[str, tuple[Function, tuple[int, ...]]] = {
    "linear": (lambda x, m: F.linear(x, m.w1, m.bias), (5, 16)),
    "constant on the left": (lambda x, m: m.w1 @ x, (16, 5)),
    "batched constant": (lambda x, m: torch.bmm(x, m.batched), (2, 5, 16)),
    "constant with a batch axis": (lambda x, m: x @ m.batched, (2, 5, 16)),
    "vector": (lambda x, m: x @ m.bias, (5, 8)),
    "two activations": (lambda x, m: torch.mm(x, x.t()), (5, 16)),
    "two constants": (lambda x, m: x + torch.mm(m.matrix, m.w1).mean(), (5, 16)),
    "scaled sums": (lambda x, m: torch.addmm(m.bias, x, m.w0, beta=0.5, alpha=2), (5, 16)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is(name: str) -> None:
    function, shape = LEFT[name]
    model = seeded(lambda: Weights(function))
    x = normal(*shape)
    gm = captured(model, x)
    before = operators(gm, constants=True)
    assert apply(normalize_linear, gm) == 0
    assert operators(gm, constants=True) == before
    assert torch.equal(gm(x)[0], model(x))


ADDED: dict[str, Function] = {
    "a matrix": lambda x, m: torch.addmm(m.matrix, x, m.w0),
    "an activation": lambda x, m: torch.addmm(x[:, :8], x, m.w0),
    "an activation of one row": lambda x, m: torch.addmm(x[0, :8], x, m.w0),
    "a column": lambda x, m: torch.addmm(x[:, :1], x, m.w0),
}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_no_bias_is_added_behind(name: str) -> None:
    """The product is a linear layer all the same."""
    model = seeded(lambda: Weights(ADDED[name]))
    x = normal(5, 16)
    gm = captured(model, x)
    assert apply(normalize_linear, gm) == 1
    assert "addmm" not in operators(gm)
    name_tensors(gm.graph)
    ((_, pattern, _),) = find_sites(gm.graph)
    assert pattern.name == "linear"
    torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_all_forms_in_one_model() -> None:
    entry = AWKWARD["matrix_products"]
    model = entry.build()
    (x,), _ = entry.inputs(2)
    gm = captured(model, x)
    assert apply(normalize_linear, gm) == 4
    assert operators(gm).count("linear") == 4
    torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_the_weight_stays_the_models_own() -> None:
    model = seeded(lambda: Weights(REWRITTEN["addmm"][0]))
    gm = captured(model, normal(5, 16))
    apply(normalize_linear, gm)
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    transposed = product.args[1]
    assert transposed.target is aten.t.default
    assert gm.get_parameter(transposed.args[0].target) is model.w0
    assert gm.get_parameter(product.args[2].target) is model.bias
