"""Sites in bfloat16: casts around them, once for each tensor, constants cast for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, example, normal, seeded, tokens
from rewriting import Compute, Two, apply, canonical, context_of, operators, plan_for
from torch import Tensor, fx, nn

from torch_quant.core.plan import QuantPlan
from torch_quant.passes.base import copy_graph
from torch_quant.passes.insert_qdq import insert_qdq
from torch_quant.passes.lower_precision import lower_precision

aten = torch.ops.aten


def plan_of(gm: fx.GraphModule, precision: str = "bfloat16", **chosen: str) -> QuantPlan:
    """Every site in ``precision``, or only those that ``chosen`` gives one; the rest in float32."""
    return QuantPlan(
        replace(
            site,
            quantized=False,
            precision=chosen.get(site.name, "float32") if chosen else precision,
        )
        for site in plan_for(gm).values()
    )


def lowered(gm: fx.GraphModule, plan: QuantPlan | None = None) -> tuple[fx.GraphModule, int]:
    copy = copy_graph(gm)
    count = apply(lower_precision, copy, plan or plan_of(gm))
    return copy, count


def casts(gm: fx.GraphModule) -> list[torch.dtype]:
    return [n.args[1] for n in gm.graph.find_nodes(op="call_function", target=aten.to.dtype)]


def test_a_linear_in_bfloat16() -> None:
    model, x = seeded(lambda: nn.Linear(16, 8)), normal(4, 16)
    gm, count = lowered(canonical(model, x))
    assert count == 1
    assert casts(gm) == [torch.bfloat16, torch.float32]
    (found,) = gm(x)
    expected = F.linear(x.bfloat16(), model.weight.bfloat16(), model.bias.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
    assert model.weight.dtype == torch.float32


def test_nothing_to_do() -> None:
    model, x = seeded(Two), normal(4, 16)
    gm = canonical(model, x)
    same, count = lowered(gm, plan_of(gm, "float32"))
    assert count == 0
    assert operators(same) == operators(gm)
    assert torch.equal(same(x)[0], gm(x)[0])
    # What is quantized is not lowered.
    assert lowered(gm, plan_for(gm))[1] == 0


def test_only_the_sites_that_are_asked_for() -> None:
    model, x = seeded(Two), normal(4, 16)
    gm = canonical(model, x)
    found, count = lowered(gm, plan_of(gm, l1="bfloat16"))
    assert count == 1
    y = model.l0(x).relu()
    expected = F.linear(y.bfloat16(), model.l1.weight.bfloat16(), model.l1.bias.bfloat16())
    assert torch.equal(found(x)[0], expected.float())


class Fork(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        return self.l0(y) + self.l1(y)


def test_a_tensor_is_cast_once() -> None:
    gm, count = lowered(canonical(seeded(Fork), normal(4, 16)))
    assert count == 2
    assert casts(gm).count(torch.bfloat16) == 1
    assert casts(gm).count(torch.float32) == 2


def test_weights_are_cast_once_and_for_all() -> None:
    gm, _ = lowered(canonical(seeded(Two), normal(4, 16)))
    gm.graph.eliminate_dead_code()
    read = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    tensors = [gm.get_buffer(name) for name in read]
    assert len(tensors) == 4
    assert all(x.dtype == torch.bfloat16 for x in tensors)


def test_integers_stay() -> None:
    model = seeded(lambda: nn.Embedding(64, 16))
    gm, count = lowered(canonical(model, tokens(2)))
    assert count == 1
    expected = F.embedding(tokens(2), model.weight.bfloat16()).float()
    assert torch.equal(gm(tokens(2))[0], expected)
    assert casts(gm) == [torch.float32]


def test_a_folded_batch_norm() -> None:
    """Weight and bias are expressions that a pass made."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    x = normal(2, 3, 6, 6)
    gm, count = lowered(canonical(model, x))
    assert count == 1
    # Eight bits of mantissa in each factor and in the result.
    torch.testing.assert_close(gm(x)[0], model(x), rtol=0.02, atol=0.03)
    assert not torch.equal(gm(x)[0], model(x))


def attend(**options: Any) -> Callable[..., Tensor]:
    return lambda q, *mask: F.scaled_dot_product_attention(q, q, q, *mask, **options)


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (attend(), None),
        (attend(is_causal=True), None),
        (attend(), normal(6, 6)),
        (attend(), normal(6, 6) > -0.5),
        (attend(), torch.zeros(6, 6).masked_fill(normal(6, 6) < 0, torch.finfo().min)),
    ],
    ids=["plain", "causal", "float mask", "bool mask", "mask of the least float"],
)
def test_attention(function: Callable[..., Tensor], mask: Tensor | None) -> None:
    inputs = (normal(2, 2, 6, 8),) if mask is None else (normal(2, 2, 6, 8), mask)
    gm, count = lowered(canonical(Compute(function), *inputs))
    assert count == 1
    found = gm(*inputs)[0]
    assert found.dtype == torch.float32
    # Eight bits of mantissa, averaged over values of unit variance.
    torch.testing.assert_close(found, function(*inputs), rtol=0.02, atol=0.03)


def test_a_row_that_is_masked_as_a_whole() -> None:
    """The least float32 is minus infinity in bfloat16: such a row is 0, not the mean of all."""
    mask = torch.zeros(6, 6)
    mask[2] = torch.finfo().min
    inputs = (normal(2, 2, 6, 8), mask)
    gm, _ = lowered(canonical(Compute(attend()), *inputs))
    found, expected = gm(*inputs)[0], attend()(*inputs)
    assert bool(torch.isfinite(found).all())
    others = [0, 1, 3, 4, 5]
    # As above.
    torch.testing.assert_close(found[:, :, others], expected[:, :, others], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("first", [True, False], ids=["before int8", "behind int8"])
def test_beside_an_int8_site(first: bool) -> None:
    model, x = seeded(Two), normal(8, 16)
    gm = canonical(model, x)
    low, whole = ("l0", "l1") if first else ("l1", "l0")
    plan = QuantPlan(
        replace(site, quantized=False, precision="bfloat16") if site.name == low else site
        for site in plan_for(gm).values()
    )
    assert plan.quantized == (whole,)
    context = context_of(gm, plan)
    assert lower_precision(context) == 1
    assert insert_qdq(context) == 1
    context.gm.recompile()
    error = (context.gm(x)[0] - model(x)).norm() / model(x).norm()
    assert 0.0 < float(error) < 0.05


@pytest.mark.parametrize("name", sorted(MODELS))
def test_whole_models(name: str) -> None:
    x = example(name, 3)
    model = MODELS[name]()
    gm = canonical(model, *x)
    found, count = lowered(gm)
    assert count == len(plan_for(gm))
    error = (found(*x)[0] - model(*x)).norm() / model(*x).norm()
    assert 0.0 < float(error) < 0.03  # 2^-9 for each factor, over a few layers
