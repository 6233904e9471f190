"""What the tests of captured graphs share: capture in one call, and look at the result."""

from __future__ import annotations

from typing import Any

from capturing_once import exported
from models import Compute, Two
from torch import fx, nn

from torch_quant.graph.calls import flatten_call
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.executor import Executor
from torch_quant.graph.export import CapturedGraph, export_graph
from torch_quant.graph.sites import Site, find_sites
from torch_quant.graph.twin import twin_of
from torch_quant.passes.canonicalize import canonicalize

__all__ = [
    "Compute",
    "Two",
    "canonical",
    "capture",
    "executor",
    "serve",
    "shared",
    "site_names",
    "sites_of",
]


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph:
    """The graph of ``model`` for this call."""
    return export_graph(twin_of(model), flatten_call(args, kwargs))


def serve(graph: CapturedGraph, *args: Any, **kwargs: Any) -> Any:
    """What a captured graph gives for a call, its contract checked."""
    call = flatten_call(args, kwargs)
    graph.contract.check(call)
    return graph(call)


def shared(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph:
    """The same, for tests of what is done with it: equal models are exported once."""
    return exported(twin_of(model), flatten_call(args, kwargs))


def canonical(model: nn.Module, *args: Any, path: str = "", **kwargs: Any) -> fx.GraphModule:
    """The canonical graph of ``model`` for this call."""
    return canonicalize(shared(model, *args, **kwargs).gm, path)


def sites_of(gm: fx.GraphModule) -> list[Site]:
    return [site for _, _, site in find_sites(gm.graph)]


def site_names(gm: fx.GraphModule) -> list[str]:
    return [site.name for site in sites_of(gm)]


def executor(model: nn.Module) -> tuple[Executor, CapturedModule]:
    """``model`` run through its captured graphs, and where they are kept."""
    submodule = CapturedModule(twin_of(model))
    return Executor(submodule, lambda submodule, graph, call: graph(call)), submodule
