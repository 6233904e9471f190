"""A lowered graph as a row of segments, each of which hands one tensor to the next.

Where only one tensor is alive that depends on what was rounded before, a graph can be cut: behind a
residual sum, say. What depends on the inputs of the model alone (masks, sizes) is computed again in
each segment that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.core.metrics import float_leaves
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import KEY, ORIGIN, is_float
from torch_quant.ops.arguments import positional
from torch_quant.ops.library import NAMESPACE
from torch_quant.ops.table import pattern_of, size_hints
from torch_quant.rounding.simulation import LEARNED, Learned, straight_through

__all__ = ["HeldOperator", "Segment", "joined", "segments_of"]


class HeldOperator(nn.Module):
    """A layer of a graph as a module: its input comes first, and the weight is its own.

    Args:
        target: the operator.
        weight: of the layer.
        place: of the weight among the arguments.
    """

    def __init__(self, target: Any, weight: Tensor, place: int) -> None:
        super().__init__()
        self.target, self.place = target, place
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, *others: Any) -> Any:
        """What the operator gives for the other arguments in their order."""
        given = [x, *others]
        given.insert(self.place, self.weight)
        return self.target(*given)


@dataclass
class Segment:
    """A part of a graph.

    Args:
        module: computes it: of the tensor that the segment before gives, which the first one does
            not take, and of the inputs of the model.
        inputs: places of the inputs of the model that it reads.
        learned: the site of each layer whose weight is learned here -> the module that holds it.
        key: of the tensor that it gives; empty for the outputs of the model.
        first: whether it takes no tensor of another segment.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    learned: dict[str, HeldOperator]
    key: str
    first: bool

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.key or "outputs"


def joined(outputs: Any) -> Tensor:
    """The float tensors among outputs as one: ``[rows, values]``, or if rows differ, ``[values]``.

    Raises:
        InvalidConfig: there is none.

    >>> joined((torch.ones(2, 3), torch.zeros(2, 1, 2))).shape
    torch.Size([2, 5])
    >>> joined((torch.ones(2, 3), torch.tensor(0.0))).shape
    torch.Size([7])
    """
    found = [x.masked_fill(~torch.isfinite(x), 0.0) for x in float_leaves(outputs)]
    if not found:
        raise InvalidConfig(
            "round_weights: the model gives no float tensor to learn weights by; take "
            "GPTQ(), which goes by what layers read"
        )
    if len(found) == 1:
        return found[0]
    if any(not x.dim() or len(x) != len(found[0]) for x in found):
        return torch.cat([x.flatten() for x in found])
    return torch.cat([x.flatten(1) if x.dim() > 1 else x[:, None] for x in found], 1)


def without_gradient(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator that has no gradient: to what comes before, its result is a constant.

    >>> without_gradient(torch.add, torch.ones(1, requires_grad=True), 1.0).requires_grad
    False
    """
    with torch.no_grad():
        return target(*args, **kwargs)


def segments_of(
    gm: fx.GraphModule, known: Collection[str], weights: Mapping[str, Learned], most: int
) -> list[Segment]:
    """The segments of a graph, in the order in which they run.

    Args:
        gm: what :class:`~torch_quant.rounding.simulation.Simulation` made.
        known: keys of the tensors that the float graph computes too.
        weights: of the sites that are learned.
        most: layers with learned weights up to which neighbours are put together.
    """
    ends = _ends(gm.graph, known)
    parts = _put_together(gm.graph, ends, most)
    held = _held(gm.graph, weights)
    found, before, seen = [], None, set[str]()
    for nodes, end in parts:
        found.append(_segment(gm, nodes, before, end, held, seen))
        before = end
    return found


def _moved(graph: fx.Graph) -> set[fx.Node]:
    """What is not computed from the inputs of the model alone by the float model's operators."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        rounds = _own(node) or node.target is straight_through or LEARNED in node.meta
        if rounds or any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def _own(node: fx.Node) -> bool:
    """Whether a node calls an operator of this package."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def _ends(graph: fx.Graph, known: Collection[str]) -> list[fx.Node]:
    """Tensors behind each of which nothing else is alive that may differ from the float model's."""
    moved, order = _moved(graph), list(graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    last = {node: max((place[user] for user in node.users), default=0) for node in moved}
    alive: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    for i, node in enumerate(order[:-1]):
        alive = {each for each in alive if last[each] > i}
        if node in moved and last[node] > i:
            alive.add(node)
        if len(alive) == 1:
            (end,) = alive
            if ORIGIN in end.meta and end.meta.get(KEY) in known and is_float(end):
                found[end] = None
    return list(found)


def _layers(nodes: Sequence[fx.Node]) -> int:
    return sum(LEARNED in node.meta for node in nodes)


def _put_together(
    graph: fx.Graph, ends: Sequence[fx.Node], most: int
) -> list[tuple[list[fx.Node], fx.Node | None]]:
    """The nodes between ends, neighbours with few layers put together; None is the last end."""
    moved = _moved(graph)
    whole = [node for node in graph.nodes if node in moved]
    place = {node: i for i, node in enumerate(whole)}
    parts: list[tuple[list[fx.Node], fx.Node | None]] = []
    start = 0
    for end in [*ends, None]:
        stop = len(whole) if end is None else place[end] + 1
        parts.append((whole[start:stop], end))
        start = stop
    found: list[tuple[list[fx.Node], fx.Node | None]] = []
    waiting: list[fx.Node] = []
    for nodes, end in parts:
        nodes, waiting = [*waiting, *nodes], []
        mine, before = _layers(nodes), found[-1] if found else None
        if mine and (before is None or _layers(before[0]) + mine > most):
            found.append((nodes, end))
        elif before is not None and (mine or end is None or _sizes(end) == _sizes(before[1])):
            found[-1] = ([*before[0], *nodes], end)
        elif end is None:
            found.append((nodes, end))
        else:
            waiting = nodes
    return found


def _sizes(node: fx.Node | None) -> int:
    """How many values a tensor has on the example."""
    return 0 if node is None else math.prod(size_hints(node))


def _base(site: str) -> str:
    """The site of the first call of a module."""
    return site.partition("@")[0]


def _held(graph: fx.Graph, weights: Mapping[str, Learned]) -> dict[str, HeldOperator]:
    """The layers whose weights are learned; calls of one module share one."""
    found: dict[str, HeldOperator] = {}
    for node in graph.nodes:
        site = node.meta.get(LEARNED)
        if site is None:
            continue
        pattern = pattern_of(node)
        assert pattern is not None
        assert pattern.weight is not None
        first, mine = weights.get(_base(site)), weights[site]
        same = first is not None and first.checksum == mine.checksum and first.spec == mine.spec
        if same and _base(site) in found:
            found[site] = found[_base(site)]
        else:
            found[site] = HeldOperator(node.target, weights[site].weight, pattern.weight)
    return found


def _segment(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    before: fx.Node | None,
    end: fx.Node | None,
    held: Mapping[str, HeldOperator],
    seen: set[str],
) -> Segment:
    """One segment as a module of its own.

    Args:
        gm: the whole graph.
        nodes: of the segment, but for what depends on the inputs of the model alone.
        before: what the segment before gives.
        end: what this one gives; None for the outputs of the model.
        held: layers by site.
        seen: those of segments before; grows.
    """
    needed = _needed(gm.graph, nodes, before)
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    if before is not None:
        new[before] = graph.placeholder("before")
    inputs = tuple(i for i, node in enumerate(places) if node in needed)
    for i in inputs:
        new[places[i]] = graph.placeholder(f"input_{i}")
    root = nn.Module()
    learned: dict[str, HeldOperator] = {}
    numbers = {site: f"layer_{i}" for i, site in enumerate(held)}
    for node in gm.graph.nodes:
        if node not in needed or node in new or node.op == "output":
            continue
        site = node.meta.get(LEARNED)
        if site is None:
            new[node] = graph.node_copy(node, new.__getitem__)
            if _own(node):
                copied = new[node]
                args: Any = (copied.target, *copied.args)
                copied.target, copied.args = without_gradient, args
            continue
        module = held[site]
        root.add_module(numbers[site], module)
        given = list(positional(node))
        given.pop(module.place)
        new[node] = graph.call_module(numbers[site], fx.node.map_arg(tuple(given), new.__getitem__))
        if not any(module is held[each] for each in seen):
            learned[site] = module
            seen.add(site)
    if end is None:
        outputs = gm.graph.output_node().args[0]
        graph.output(graph.call_function(joined, (fx.node.map_arg(outputs, new.__getitem__),)))
    else:
        graph.output(new[end])
    for node in graph.find_nodes(op="get_attr"):
        name = f"tensor_{len(root._buffers)}"
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            root.register_buffer(name, value.clone() if value.is_inference() else value.detach())
        else:
            name = f"constant_{len(vars(root))}"
            setattr(root, name, value)
        node.target = name
    key = "" if end is None else str(end.meta[KEY])
    return Segment(fx.GraphModule(root, graph), inputs, learned, key, before is None)


def _needed(graph: fx.Graph, nodes: Sequence[fx.Node], before: fx.Node | None) -> set[fx.Node]:
    """The nodes of a segment and all that they read."""
    waiting, found = list(nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node is not before and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
