"""What a pass is, and the small graph surgery that passes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, fx

from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import NotCalibrated

__all__ = ["NoParams", "Params", "Pass", "PassContext", "call_like", "copy_graph", "run_passes"]


class Params(Protocol):
    """Where the numbers of a quantized graph come from: calibration, training, a weight method."""

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Scale and zero point of the tensor ``key``; raises :class:`NotCalibrated`."""

    def weight(self, site: str, weight: Tensor, spec: QuantSpec, axis: int) -> QParams:
        """Scales and zero points of a site's weight, whose output channels are ``axis``."""

    def factor(self, entry: SitePlan, key: str) -> Tensor:
        """What the channels of a site's input ``key`` are divided by, shape ``[channels]``."""


class NoParams:
    """The parameters of a graph in which nothing is quantized: every question is an error."""

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Refused."""
        raise NotCalibrated(f"there is no range for {key}")

    def weight(self, site: str, weight: Tensor, spec: QuantSpec, axis: int) -> QParams:
        """Refused."""
        raise NotCalibrated(f"there is no range for the weight of {site}")

    def factor(self, entry: SitePlan, key: str) -> Tensor:
        """Refused."""
        raise NotCalibrated(f"there are no ranges of the channels of {key}")


@dataclass
class PassContext:
    """What passes work on, and what they know.

    Args:
        gm: the graph, changed in place.
        plan: what is done with each site.
        params: scales and zero points.
    """

    gm: fx.GraphModule
    plan: QuantPlan = field(default_factory=QuantPlan)
    params: Params = field(default_factory=NoParams)
    declined: dict[str, str] = field(default_factory=dict)
    """Site -> why it runs in float though the plan has it quantized."""

    def decline(self, site: str, why: str) -> None:
        """Note that ``site`` runs in float arithmetic after all; reports then say ``why``."""
        self.declined.setdefault(site, why)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph


Pass = Callable[[PassContext], int]
"""Rewrites the graph and returns how many changes it made."""


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same parameters and buffers, notes on nodes included."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    return fx.GraphModule(gm, graph)


def run_passes(context: PassContext, passes: Sequence[Pass]) -> dict[str, int]:
    """Run ``passes`` in order; returns the number of changes of each, by function name."""
    counts = {}
    for rewrite in passes:
        counts[getattr(rewrite, "__name__", repr(rewrite))] = rewrite(context)
        context.graph.lint()
    context.graph.eliminate_dead_code()
    context.gm.recompile()
    return counts


def call_like(node: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """Insert a call before ``node`` that stands for the same tensor: it takes over the notes."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new
