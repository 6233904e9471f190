"""What a pass is, and the small graph surgery that passes share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, fx

from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import NotCalibrated
from torch_quant.ops.arguments import set_arguments
from torch_quant.statistics import RANGE, Observer, Statistic

__all__ = [
    "erase_call",
    "Draft",
    "NoParams",
    "Params",
    "Pass",
    "PassContext",
    "call_again",
    "call_like",
    "copy_graph",
    "run_passes",
]

V = TypeVar("V")


class Params(Protocol):
    """Where the numbers of a quantized graph come from: calibration, training, a weight method."""

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Scale and zero point of the tensor ``key``; raises :class:`NotCalibrated`."""

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """Codes, scales and zero points of a site's weight, whose output channels are ``axis``."""

    def statistic(self, key: str, what: str) -> Statistic:
        """What was recorded of the tensor ``key``; raises :class:`NotCalibrated`."""

    def graphs(self) -> Iterable[fx.GraphModule]:
        """The canonical graphs of the whole model."""

    def shared(self, key: Hashable, make: Callable[[], V]) -> V:
        """What ``make`` gave when ``key`` was first asked for: facts of the whole model."""

    def kept(self, key: Hashable, make: Callable[[], V]) -> V:
        """The same; of a model that trains, what it was when training began."""

    def derived(self, key: str, spec: QuantSpec, found: QParams) -> QParams:
        """Of a tensor that a transform made, whose statistics give ``found``."""


class NoParams:
    """The parameters of a graph in which nothing is quantized: every question is an error."""

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Refused."""
        raise NotCalibrated(f"there is no range for {key}")

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """Refused."""
        raise NotCalibrated(f"there is no range for the weight of {site}")

    def statistic(self, key: str, what: str) -> Statistic:
        """Refused."""
        raise NotCalibrated(f"nothing was recorded of {key}")

    def graphs(self) -> Iterable[fx.GraphModule]:
        """None."""
        return ()

    def shared(self, key: Hashable, make: Callable[[], V]) -> V:
        """Made anew each time."""
        return make()

    def kept(self, key: Hashable, make: Callable[[], V]) -> V:
        """Made anew each time."""
        return make()

    def derived(self, key: str, spec: QuantSpec, found: QParams) -> QParams:
        """As found."""
        return found


@dataclass
class PassContext:
    """What passes work on, and what they know.

    Args:
        gm: the graph, changed in place.
        plan: what is done with each site.
        params: scales and zero points.
        live: weights stay expressions over the model's parameters, which are rounded at each call
            and can be trained, in the place of integers.
    """

    gm: fx.GraphModule
    plan: QuantPlan = field(default_factory=QuantPlan)
    params: Params = field(default_factory=NoParams)
    live: bool = False
    declined: dict[str, str] = field(default_factory=dict)
    """Site -> why it runs in float though the plan has it quantized."""
    derived: dict[str, Mapping[str, Statistic]] = field(default_factory=dict)
    """Tensor that a transform made -> its statistics, by what they are for."""
    weights: dict[Hashable, tuple[Tensor, QParams]] = field(default_factory=dict)
    """What computes a weight, its format, axis and method -> its codes; no float copy is kept."""

    def decline(self, site: str, why: str) -> None:
        """Note that ``site`` runs in float arithmetic after all; reports then say ``why``."""
        self.declined.setdefault(site, why)

    def derive(self, key: str, statistics: Mapping[str, Statistic]) -> None:
        """Say what is known of a new tensor, which a transform has computed from others."""
        self.derived[key] = statistics

    def statistic(self, key: str, what: str) -> Statistic:
        """What is known of a tensor; raises :class:`NotCalibrated` where it was not recorded."""
        if what in (found := self.derived.get(key, {})):
            return found[what]
        return self.params.statistic(key, what)

    def qparams(self, key: str, spec: QuantSpec) -> QParams:
        """Scale and zero point of a tensor; raises :class:`NotCalibrated`."""
        if key not in self.derived:
            return self.params.activation(key, spec)
        observer = self.statistic(key, RANGE)
        assert isinstance(observer, Observer)
        return self.params.derived(key, spec, observer.qparams(spec))

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph


Pass = Callable[[PassContext], int]
"""Rewrites the graph and returns how many changes it made."""


class Draft(fx.GraphModule):
    """A graph that is rewritten and never called: no code is made of it.

    ``fx`` writes and compiles code whenever a module gets a graph, which takes as long as all
    passes together. ``fx.GraphModule(draft, draft.graph)`` can be called.
    """

    def recompile(self) -> Any:
        """Does nothing."""


def copy_graph(gm: fx.GraphModule, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same parameters and buffers, notes on nodes included.

    Args:
        gm: the graph.
        kind: :class:`Draft` for one that is not called.
    """
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    return kind(gm, graph)


def run_passes(context: PassContext, passes: Sequence[Pass]) -> dict[str, int]:
    """Run ``passes`` in order; returns the number of changes of each, by function name."""
    counts = {}
    for rewrite in passes:
        counts[getattr(rewrite, "__name__", repr(rewrite))] = rewrite(context)
    context.graph.eliminate_dead_code()  # which checks the graph first
    context.gm.recompile()
    return counts


def call_again(
    node: fx.Node, values: Mapping[str, Any] | Mapping[int, Any], before: fx.Node | None = None
) -> fx.Node:
    """Insert a call like ``node`` with other values of some arguments; it takes over the notes.

    Args:
        node: calls an operator.
        values: by name or place, as in :func:`set_arguments`.
        before: where to insert it, by default before ``node``.
    """
    with node.graph.inserting_before(before or node):
        new = node.graph.call_function(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    set_arguments(new, values)
    new.meta = dict(node.meta)
    return new


def call_like(node: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """Insert a call before ``node`` that stands for the same tensor: it takes over the notes."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new


def erase_call(node: fx.Node) -> None:
    """Take a call out, and all that was there for it alone.

    >>> gm = fx.symbolic_trace(lambda x: (x + 1) * 2)
    >>> (product,) = gm.graph.output_node().args
    >>> product.replace_all_uses_with(next(iter(gm.graph.nodes)))
    [output]
    >>> erase_call(product), [node.op for node in gm.graph.nodes]
    (None, ['placeholder', 'output'])
    """
    waiting = {node: None}
    while waiting:
        dead, _ = waiting.popitem()
        if not dead.users and not dead._erased and dead.op == "call_function":
            waiting |= dict.fromkeys(dead.all_input_nodes)
            dead.graph.erase_node(dead)
