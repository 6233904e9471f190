"""Everything derived once from a captured graph: its canonical form, sites, float-only ops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.plan import FloatOp
from torch_quant.graph.macs import float_products
from torch_quant.graph.picks import last_products
from torch_quant.graph.sites import ORIGIN, Site, behind, find_sites, key_of, operands
from torch_quant.nn.probe import ObserverProbe
from torch_quant.passes.canonicalize import canonicalize
from torch_quant.passes.functionalize import written_tensors

__all__ = ["Prepared", "insert_observers", "prepare"]

_FRESH = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.empty_permuted.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip
"""Operators that give memory with anything in it, even NaN, until it is written to."""


@dataclass
class Prepared:
    """A captured graph, ready to be annotated and rewritten.

    Args:
        captured: the graph as exported; gives the float model's output.
        canonical: the graph that is quantized.
        sites: its sites, each with the reason why the graph does not allow int8, or an empty one.
        float_ops: operators that compute products and are not sites.
        observed: key -> the captured node to observe, and how to compute the key's tensor from
            that node's arguments where it exists only inside the operator.
        last: names of the sites that its outputs are made of, with no other product between.
    """

    captured: fx.GraphModule
    canonical: fx.GraphModule
    sites: list[tuple[Site, str]]
    float_ops: list[FloatOp]
    observed: dict[str, tuple[str, Callable[..., Tensor] | None]] = field(default_factory=dict)
    last: frozenset[str] = frozenset()


def prepare(captured: fx.GraphModule, path: str = "") -> Prepared:
    """Derive all of it; ``path`` is the module's path in the model."""
    canonical = canonicalize(captured, path)
    dirty = written_tensors(canonical.graph)
    origin = {key_of(n): n.meta[ORIGIN] for n in canonical.graph.nodes if ORIGIN in n.meta}
    sites: list[tuple[Site, str]] = []
    observed: dict[str, tuple[str, Callable[..., Tensor] | None]] = {}
    nodes: set[fx.Node] = set()
    for node, pattern, site in find_sites(canonical.graph):
        nodes.add(node)
        late = [x for arg in operands(node, pattern) for x in behind(arg) if x in dirty]
        if {node, *node.users} & dirty:
            # a copy on a grid would miss what is written
            site = replace(site, fused_output="", result="")
        written = f"{key_of(late[0])} is written to in place" if late else ""
        sites.append((site, written or pattern.obstacle(node)))
        fresh = {key_of(x) for x in late if x.target in _FRESH}
        ends = (key for key in (site.output, site.fused_output, site.result) if key)
        for key in dict.fromkeys((*site.inputs, *ends)):
            if key not in fresh:
                observed[key] = (origin[key], None)
        for key, compute in zip(site.internals, pattern.internals.values(), strict=True):
            observed[key] = (node.meta[ORIGIN], compute)
    float_ops = float_products(canonical, nodes, path)
    last = frozenset(map(key_of, last_products(canonical.graph)))
    return Prepared(captured, canonical, sites, float_ops, observed, last)


def insert_observers(
    prepared: Prepared, recorder_of: Callable[[str], Callable[[Tensor], Any] | None]
) -> fx.GraphModule:
    """A copy of the captured graph that calls ``recorder_of(key)`` with every candidate tensor.

    Where that is None, the tensor is not recorded.

    The computation itself is untouched, so the output stays that of the captured graph, bit for
    bit. Each probe comes right behind its tensor: an operator further on may write to it.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(prepared.captured.graph, {}))
    nodes = {node.name: node for node in graph.nodes}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    parts: dict[str, Any] = {
        str(node.target): operator.attrgetter(str(node.target))(prepared.captured)
        for node in graph.find_nodes(op="get_attr")
    }
    for i, (key, (name, compute)) in enumerate(prepared.observed.items()):
        node, recorder = nodes[name], recorder_of(key)
        if recorder is None:
            continue
        parts[f"probe_{i}"] = ObserverProbe(recorder, compute)
        with graph.inserting_after(inputs[-1] if node.op == "placeholder" else node):
            if compute is None:
                graph.call_module(f"probe_{i}", (node,))
            else:
                graph.call_module(f"probe_{i}", node.args, node.kwargs)
    return fx.GraphModule(parts, graph)
