"""What a pass is, and the small graph surgery that passes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["Pass", "PassContext", "call_like", "copy_graph", "run_passes"]


@dataclass
class PassContext:
    """What passes work on.

    Args:
        gm: the graph, changed in place.
    """

    gm: fx.GraphModule

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
