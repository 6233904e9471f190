"""From a captured model and a plan to the quantized module."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from torch_quant.backends.base import Backend
from torch_quant.backends.ownership import SharedWeights, own_tensors
from torch_quant.backends.quantized import Absent, QuantizedGraph, QuantizedRegion
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.capture import Region, glue
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.hooks import give_hooks
from torch_quant.graph.kinds import Kind
from torch_quant.graph.shadow import shadow
from torch_quant.model import CapturedModel
from torch_quant.passes.base import Params, Pass, PassContext, copy_graph, run_passes
from torch_quant.passes.constants import settle_names
from torch_quant.passes.dynamic_sizes import dynamic_sizes
from torch_quant.passes.insert_qdq import insert_qdq
from torch_quant.passes.lower_precision import lower_precision
from torch_quant.passes.transform import transform_sites

__all__ = ["QUANTIZE", "Lowering"]

QUANTIZE: tuple[Pass, ...] = (lower_precision, transform_sites, insert_qdq)
"""From a canonical graph to one with quantize/dequantize pairs, whatever the backend."""


@dataclass(frozen=True)
class Lowering:
    """One ``quantize``: the same plan, ranges and backend for every region."""

    captured: CapturedModel
    plan: QuantPlan
    backend: Backend
    params: Params
    declined: dict[str, str] = field(default_factory=dict)
    """Site -> why it runs in float in every graph that was lowered and has it."""
    kept: set[str] = field(default_factory=set)
    """Sites that some graph has as planned."""

    def run(self, *, share: bool = False) -> QuantizedRegion:
        """The whole model, quantized; the float model is untouched.

        Args:
            share: let it compute with the large float weights of the float model itself.
        """
        self.captured.tell_unreached()
        quantized = self._region(self.captured.region)
        assert isinstance(quantized, QuantizedRegion)
        shared = SharedWeights() if share else None
        own_tensors(quantized, self._theirs(), shared)
        quantized.shared = shared
        self.captured.declined[self.backend.name] = dict(self.declined)
        quantized.plan = self.captured.as_lowered(self.plan, self.backend.name)
        return quantized

    def _theirs(self) -> dict[str, Tensor]:
        """The tensors of the float model, and those that capturing found in its code."""
        module = self.captured.region.module
        theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for prepared in self.captured.graphs():
            gm = prepared.canonical
            for node in gm.graph.find_nodes(op="get_attr"):
                value = operator.attrgetter(str(node.target))(gm)
                if isinstance(value, Tensor):
                    theirs.setdefault(f"{node.target} (a constant)", value)
        return theirs

    def _region(self, region: Region) -> nn.Module:
        graphs = [self._graph(region, kind, graph) for kind, graph in region.graphs]
        free = region.plain or self._serves_any_call(region)
        rest: nn.Module | None = shadow(region.module) if free else None
        if rest is None and (region.opened or not graphs):
            rest = glue(region, self._child if region.failure or not graphs else self._part)
        quantized = QuantizedRegion(region.path, region.signature, graphs, rest)
        quantized.backend, quantized.in_pieces = self.backend.name, free or bool(region.failure)
        give_hooks(quantized, region.hooks)
        if region.lists_parameters:
            quantized.register_parameter("no_values", nn.Parameter(torch.empty(0), False))
        return _lent(quantized, region)

    def _graph(self, region: Region, kind: Kind, graph: CapturedGraph) -> QuantizedGraph:
        prepared = self.captured.prepared(region, graph)
        body, declined = self._lowered(prepared.canonical)
        self._note({site.name for site, _ in prepared.sites}, declined)
        compiler = self.backend if self.backend.compiles else None
        return QuantizedGraph(body, kind, graph.contract, graph.out_spec, compiler)

    def quantized_graph(self, region: Region, kind: Kind, graph: CapturedGraph) -> QuantizedGraph:
        """One graph of a region by itself, which owns what it computes with."""
        made = self._graph(region, kind, graph)
        own_tensors(made, self._theirs(), None)
        return made

    def _serves_any_call(self, region: Region) -> bool:
        """Whether a piece computes as the float module does, so that this serves other calls.

        Where the code around it calls parts of it too, no part of it may have hooks or a state.
        """
        below = list(region.walk())[1:]
        if not region.path or not region.graphs or region.failure:
            return False
        if any(each.state or any(each.hooks.values()) for each in below):
            return False
        prepared = [
            self.captured.prepared(each, graph)
            for each in (region, *below)
            for _, graph in each.graphs
        ]
        sites = (self.plan[site.name] for each in prepared for site, _ in each.sites)
        return not any(site.quantized or site.precision != "float32" for site in sites)

    def _child(self, region: Region) -> nn.Module:
        return self._region(region) if region.called else glue(region, self._child)

    def _part(self, region: Region) -> nn.Module:
        """A child of what runs as one graph: only what others called of it is needed."""
        return self._region(region) if region.called else _lent(Absent(region.path), region)

    def _note(self, names: set[str], declined: Mapping[str, str]) -> None:
        self.kept.update(names - declined.keys())
        self.declined.update(declined)
        for name in self.kept & self.declined.keys():
            del self.declined[name]

    def graph(self, canonical: fx.GraphModule) -> fx.GraphModule:
        """One canonical graph, or a part of one, on the backend's kernels."""
        return self._lowered(canonical)[0]

    def _lowered(self, canonical: fx.GraphModule) -> tuple[fx.GraphModule, Mapping[str, str]]:
        """The lowered graph, and the sites of it that run in float after all, with the reason."""
        context = PassContext(copy_graph(canonical), self.plan, self.params)
        run_passes(context, (*QUANTIZE, *self.backend.kernels().passes))
        lowered = self.backend.lower(context)
        run_passes(PassContext(lowered), [dynamic_sizes])
        return settle_names(lowered), context.declined


def _lent(module: nn.Module, region: Region) -> nn.Module:
    """Give ``module`` what the code around the region has read from it."""
    for path in sorted(region.borrowed):
        *parts, name = path.split(".")
        owner = module
        for part in parts:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if name not in vars(owner):
            setattr(owner, name, operator.attrgetter(path)(region.module))
    return module
