"""What the tests of passes share: a tiny graph to rewrite, and the operators it is left with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from capturing_once import exported
from models import Compute, Two
from torch import Tensor, fx, nn

from torch_quant.core.functional import quantize
from torch_quant.core.granularity import block_extremes
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.sites import ORIGIN, find_sites, is_constant
from torch_quant.graph.twin import twin_of
from torch_quant.passes.base import Params, Pass, PassContext, copy_graph, run_passes
from torch_quant.passes.canonicalize import canonicalize
from torch_quant.statistics import Statistic

__all__ = [
    "WEIGHT",
    "Compute",
    "FixedParams",
    "Two",
    "apply",
    "by_keywords",
    "canonical",
    "captured",
    "context_of",
    "grid_of",
    "mutating",
    "operators",
    "plan_for",
    "weight_grid_of",
]

V = TypeVar("V")

WEIGHT = QuantSpec.of(signed=True, symmetric=True, per_channel=True)


def captured(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    """The graph of ``model`` before any pass, as passes get it."""
    gm = copy_graph(exported(twin_of(model), flatten_call(inputs, {})).gm)
    for node in gm.graph.nodes:
        node.meta[ORIGIN] = node.name
    return gm


def canonical(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    """The graph after the passes that every captured graph goes through."""
    return canonicalize(exported(twin_of(model), flatten_call(inputs, {})).gm)


def by_keywords(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose calls of operators give every argument by its name."""
    gm = copy_graph(gm)
    for node in gm.graph.nodes:
        if hasattr(node.target, "_schema"):
            declared = node.target._schema.arguments
            given = {each.name: x for each, x in zip(declared, node.args, strict=False)}
            node.args, node.kwargs = (), {**given, **node.kwargs}
    gm.recompile()
    return gm


def apply(rewrite: Pass, gm: fx.GraphModule, plan: QuantPlan | None = None) -> int:
    """Run one pass on ``gm`` as :func:`run_passes` does; the number of changes it reports."""
    (count,) = run_passes(PassContext(gm, plan or QuantPlan(), FixedParams()), [rewrite]).values()
    return count


def operators(gm: fx.GraphModule, *, constants: bool = False) -> list[str]:
    """Names of what is called, ``linear`` or ``t``, constant expressions only if asked for."""
    return [
        getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
        for node in gm.graph.nodes
        if node.op.startswith("call") and (constants or not is_constant(node))
    ]


def mutating(gm: fx.GraphModule) -> list[str]:
    """The operators that write to an argument."""
    return [
        node.target._opname
        for node in gm.graph.nodes
        if node.op == "call_function"
        and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ]


def grid_of(key: str, spec: QuantSpec) -> QParams:
    """A grid for any tensor of these tests, wide enough and different for each key."""
    reach = 3.0 + zlib.crc32(key.encode()) % 1009 / 600
    return choose_qparams(torch.tensor(-reach), torch.tensor(reach * 1.1), spec)


def weight_grid_of(name: str, weight: Tensor, spec: QuantSpec, axis: int) -> QParams:
    """The extremes of each block of the weight."""
    spec = replace(spec, granularity=spec.granularity.on(axis))
    return choose_qparams(*block_extremes(weight, spec.granularity), spec)


class FixedParams:
    """The parameters of these tests; a subclass changes one of them."""

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        return grid_of(key, spec)

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        qparams = weight_grid_of(site, weight, spec, axis)
        return quantize(weight, qparams), qparams

    def statistic(self, key: str, what: str) -> Statistic:
        raise AssertionError(f"the {what} of {key} are asked for, but nothing wants them")

    def graphs(self) -> list[fx.GraphModule]:
        return []

    def shared(self, key: Hashable, make: Callable[[], V]) -> V:
        return make()

    def kept(self, key: Hashable, make: Callable[[], V]) -> V:
        return make()

    def derived(self, key: str, spec: QuantSpec, found: QParams) -> QParams:
        return found


def context_of(
    gm: fx.GraphModule, plan: QuantPlan | None = None, params: Params | None = None
) -> PassContext:
    """What a pass gets: a copy of ``gm``, by default with everything quantized."""
    plan = plan_for(gm) if plan is None else plan
    return PassContext(copy_graph(gm), plan, FixedParams() if params is None else params)


def plan_for(
    gm: fx.GraphModule,
    *,
    floats: tuple[str, ...] = (),
    activation: QuantSpec | None = None,
    weight: QuantSpec = WEIGHT,
) -> QuantPlan:
    """Every site quantized, but for ``floats``."""
    return QuantPlan(
        SitePlan(
            site.name,
            site.op,
            (*site.inputs, *site.internals),
            (activation or QuantSpec()) if site.inputs else None,
            weight if site.weight_shape else None,
            quantized=site.name not in floats,
            reason="the test wants it in float" if site.name in floats else "",
        )
        for _, _, site in find_sites(gm.graph)
    )
