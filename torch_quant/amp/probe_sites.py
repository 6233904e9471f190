"""Cut single sites out of a canonical graph, and put probes behind them in the captured one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends import Backend
from torch_quant.convert.lowering import Lowering
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import (
    KEY,
    ORIGIN,
    Site,
    find_sites,
    is_constant,
    key_of,
    operands,
    results,
    source,
)
from torch_quant.passes.base import copy_graph
from torch_quant.passes.prepare import Prepared

__all__ = ["LocalSite", "activations_only", "cut_sites", "insert_site_probes", "insulated"]

aten = torch.ops.aten


@dataclass(frozen=True)
class LocalSite:
    """One site as a graph of its own.

    Args:
        site: its description.
        gm: takes what the operator reads that is not constant; holds the same parameters.
        arguments: the captured nodes that compute what ``gm`` takes, in order.
        result: the captured node that computes what it returns: one of the site's results.
        operand: position among the arguments of its only quantized operand, None if it has several.
    """

    site: Site
    gm: fx.GraphModule
    arguments: tuple[str, ...]
    result: str
    operand: int | None


def cut_sites(
    prepared: Prepared, names: Collection[str], outputs: Mapping[str, str] | None = None
) -> list[LocalSite]:
    """Every site of ``names`` that a prepared graph has, in order; once for each of its results.

    Args:
        prepared: the graph.
        names: of sites.
        outputs: site -> the key of its result, for those whose results are quantized as well; the
            rectifier in between belongs to the site then.
    """
    found = []
    for node, pattern, site in find_sites(prepared.canonical.graph):
        if site.name not in names:
            continue
        key = (outputs or {}).get(site.name)
        for result in results(node):
            last = next(iter(result.users)) if key and key != key_of(result) else result
            graph, inputs = _cut(node, last)
            single = len(pattern.activations) + len(pattern.internals) == 1
            quantized = [x for x in operands(node, pattern) if x in inputs]
            found.append(
                LocalSite(
                    site,
                    fx.GraphModule(prepared.canonical, graph),
                    tuple(each.meta[ORIGIN] for each in inputs),
                    last.meta[ORIGIN],
                    inputs.index(quantized[0]) if single and quantized else None,
                )
            )
    return found


def _cut(node: fx.Node, last: fx.Node) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph from ``node`` to ``last``, constants included, and the nodes it takes as inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = [each for each in node.all_input_nodes if not is_constant(each)]
    for i, each in enumerate(inputs):
        copies[each] = graph.placeholder(f"input_{i}")
        # Named for the tensor whose grid serves it, as it stands behind data movement.
        copies[each].meta = dict(each.meta) | {KEY: key_of(source(each))}

    def copy(each: fx.Node) -> fx.Node:
        if each not in copies:
            copies[each] = graph.node_copy(each, copy)
        return copies[each]

    graph.output(copy(last))
    return graph, inputs


def _layer_norm(*args: Any, **kwargs: Any) -> Tensor:
    normed: Tensor = aten.layer_norm.default.decompose(*args, **kwargs)
    return normed


def _group_norm(*args: Any, **kwargs: Any) -> Tensor:
    normed: Tensor = aten.group_norm.default.decompose(*args, **kwargs)
    return normed


_DIFFERENTIABLE = {
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
}
"""PyTorch's own definition of what IPEX, once imported, replaces by kernels without gradients."""


def insulated(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph over the same parameters, and over the storage of its buffers.

    What the graph writes to a buffer reaches the model's, but no gradient history does. Parameters
    are the model's own: kernels are chosen by whether a weight wants a gradient.
    """
    graph = copy_graph(gm).graph
    attributes: dict[str, Any] = {}
    for node in graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        insulate = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        attributes[str(node.target)] = value.detach() if insulate else value
    for node in graph.nodes:
        node.target = _DIFFERENTIABLE.get(node.target, node.target)
    return fx.GraphModule(attributes, graph)


def insert_site_probes(
    prepared: Prepared, sites: list[LocalSite], make: Callable[[LocalSite], nn.Module]
) -> fx.GraphModule:
    """A copy of the captured graph with a probe behind the result of each site.

    A probe is called with the result and then the site's arguments, and gives back the result.
    """
    gm = insulated(prepared.captured)
    nodes = {node.name: node for node in gm.graph.nodes}
    for i, local in enumerate(sites):
        result = nodes[local.result]
        gm.add_submodule(f"probe_{i}", make(local))
        with gm.graph.inserting_after(result):
            args = (result, *(nodes[name] for name in local.arguments))
            probe = gm.graph.call_module(f"probe_{i}", args)
        result.replace_all_uses_with(probe, lambda user, probe=probe: user is not probe)
    gm.recompile()
    return gm


def activations_only(lowering: Lowering, local: LocalSite) -> fx.GraphModule | None:
    """The site with quantized activations and its float weight."""
    entry = lowering.plan[local.site.name]
    if entry.weight is None or entry.activation is None:
        return None
    half = replace(entry, weight=None)
    sites = lowering.plan.values()  # others, of constants, may belong to the local graph
    plan = QuantPlan(half if each is entry else each for each in sites)
    return replace(lowering, plan=plan, backend=Backend.REFERENCE).graph(local.gm)
