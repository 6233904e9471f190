"""SmoothQuant on graphs: what is alive while weights are quantized, and what is left."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from models import normal, seeded
from rewriting import FixedParams, canonical, context_of, plan_for
from torch import Tensor, fx, nn

from torch_quant import SmoothQuant, sqnr
from torch_quant.core.granularity import PerChannel
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import NotCalibrated
from torch_quant.ops.qdq import DEQUANTIZE
from torch_quant.passes.insert_qdq import insert_qdq
from torch_quant.passes.transform import transform_sites
from torch_quant.statistics import CHANNELS, MinMaxObserver, Statistic

WIDTH = 24


SMOOTH = SmoothQuant(1.0)
"""The factors are the extremes of the channels."""


class Smoothing(FixedParams):
    """Channels of other extremes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._graph = gm

    def statistic(self, key: str, what: str) -> Statistic:
        if what != CHANNELS:
            raise NotCalibrated(what)
        observer = MinMaxObserver(PerChannel(-1))
        reach = torch.linspace(0.5, 2.0, WIDTH)
        observer.observe(torch.stack([-reach, reach]))
        return observer

    def graphs(self) -> list[fx.GraphModule]:
        return [self._graph]


def smoothing_plan(gm: fx.GraphModule, **changes: object) -> QuantPlan:
    plan = plan_for(gm)
    return QuantPlan([replace(plan[name], transforms=(SMOOTH,), **changes) for name in plan])


def stack(depth: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))


def test_float_weights_are_gone_once_they_are_integers() -> None:
    """At most one product of weight and factors is alive at any time, and none at the end."""
    gm = canonical(seeded(stack), normal(2, WIDTH))
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watched(Smoothing):
        def weight(
            self, site: str, weight: Tensor, spec: QuantSpec, axis: int
        ) -> tuple[Tensor, QParams]:
            made.append(weakref.ref(weight))
            alive.append(sum(ref() is not None for ref in made))
            return super().weight(site, weight, spec, axis)

    context = context_of(gm, smoothing_plan(gm), Watched(gm))
    assert transform_sites(context) == 4
    before = dict(gm.named_buffers())
    sizes = {x.shape for name, x in context.gm.named_buffers() if name not in before}
    assert sizes == {torch.Size([WIDTH])}
    assert insert_qdq(context) == 4
    gc.collect()
    assert alive == [1, 1, 1, 1]
    assert all(ref() is None for ref in made)
    matrices = [x for _, x in context.gm.named_buffers() if x.shape == (WIDTH, WIDTH)]
    assert [x.dtype for x in matrices] == [torch.int8] * 4


class Tied(nn.Module):
    """Two layers with one weight, on one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_tied_weights_smoothed_alike_are_one_buffer() -> None:
    gm = canonical(seeded(Tied), normal(2, WIDTH))
    context = context_of(gm, smoothing_plan(gm), Smoothing(gm))
    transform_sites(context)
    insert_qdq(context)
    found = context.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    found = [node for node in found if node.args[0].op == "get_attr"]
    assert len(found) == 2
    assert len({id(context.gm.get_buffer(node.args[0].target)) for node in found}) == 1


class Wide(Smoothing):
    """Ranges that clip nothing."""

    def statistic(self, key: str, what: str) -> Statistic:
        if what != CHANNELS:
            raise NotCalibrated(what)
        observer = MinMaxObserver(PerChannel(-1))
        reach = torch.linspace(6.0, 24.0, WIDTH)
        observer.observe(torch.stack([-reach, reach]))
        return observer


@pytest.mark.parametrize("weight", [True, False], ids=["int8 weight", "float weight"])
def test_no_product_of_constants_is_left_to_serving(weight: bool) -> None:
    gm = canonical(seeded(stack), x := normal(2, WIDTH))
    plan = smoothing_plan(gm) if weight else smoothing_plan(gm, weight=None)
    context = context_of(gm, plan, Wide(gm))
    transform_sites(context)
    insert_qdq(context)
    context.graph.eliminate_dead_code()
    context.gm.recompile()
    products = context.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert len(products) == 4
    assert all(node.args[0].op != "get_attr" for node in products)
    assert sqnr(gm(x)[0], context.gm(x)[0]) > 20  # the grids are wide: a step is 0.1
