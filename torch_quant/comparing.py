"""Follows the error of a quantized model from layer to layer.

The captured float graph and the quantized one know which of their nodes compute the same tensor, so
both are run on the same inputs and what they give there is compared. The quantized graph is run in
float arithmetic, since kernels hand on integers and take in what stands behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends import Backend, ReferenceBackend
from torch_quant.convert.quantized import QuantizedModule, quantized_graphs
from torch_quant.core.metrics import float_leaves
from torch_quant.errors import InvalidConfig
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.examples import call_example, is_padded
from torch_quant.graph.executor import Executor
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.sites import KEY, ORIGIN
from torch_quant.proxies.values import copied
from torch_quant.report.comparison import Comparison, LayerError
from torch_quant.session import Session

__all__ = ["Seen", "compared", "listed", "simulated_model", "simulation"]

Seen = dict[str, list[Tensor]]
"""Tensor key -> its values, one for each time it was computed."""


def simulation(backend: Backend) -> Backend:
    """What computes the plan of ``backend`` in float arithmetic.

    >>> simulation(Backend.ONEDNN), simulation(Backend.REFERENCE) is Backend.REFERENCE
    (Backend.REFERENCE, True)
    """
    reference = Backend.get("reference")
    return reference if backend is reference else ReferenceBackend(simulates=backend)


def simulated_model(session: Session, backend: Backend) -> QuantizedModule:
    """The model under the plan of ``backend``, in float arithmetic."""
    slower = session.owner.slower.get(backend.name, {})
    return session.lowering(simulation(backend), slower=slower).run(share=True)


def listed(batches: Any, caller: str) -> list[Any]:
    """``batches`` as a list; raises :class:`InvalidConfig` for what holds none.

    >>> listed(iter([1, 2]), "compare")
    [1, 2]
    """
    if not isinstance(batches, Iterable):
        raise InvalidConfig(
            f"{caller}: batches is of type {type(batches).__name__}; expected a list of inputs of "
            f"the model, as quantizer.{caller}(..., batches=[x])"
        )
    return list(batches)


def compared(
    session: Session,
    backend: Backend,
    quantized: nn.Module,
    batches: Iterable[Any],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    *,
    simulated: QuantizedModule | None = None,
    watch: Callable[[Seen], None] | None = None,
) -> Comparison:
    """Run the float model and the quantized one side by side.

    Args:
        session: the quantizer and the model, which was captured.
        backend: whose plan it is.
        quantized: the model on its kernels.
        batches: inputs, each as for :meth:`Quantizer.calib`.
        progress: goes through them.
        simulated: the same plan in float arithmetic; made if it is not given.
        watch: is shown the tensors of the simulated model, batch by batch.

    Raises:
        InvalidConfig: there are no batches.
    """
    simulated = simulated or simulated_model(session, backend)
    plan = session.plan(backend)
    sums: dict[str, _Sum] = {}
    outputs, simulation_outputs, count, padded = _Sum(), _Sum(), 0, False
    for batch in progress(batches):
        count, padded = count + 1, padded or is_padded(batch)
        expected: Seen = {}
        found: Seen = {}
        reference = call_example(_float(session, expected), copied(batch))
        with _recorded(simulated, found):
            result = call_example(simulated, copied(batch))
        if watch is not None:
            watch(found)
        simulation_outputs.add_all(float_leaves(reference), float_leaves(result))
        actual = call_example(quantized, copied(batch))
        outputs.add_all(float_leaves(reference), float_leaves(actual))
        for key, values in expected.items():
            others = found.get(key, [])
            if len(others) == len(values):
                sums.setdefault(key, _Sum()).add_all(values, others)
    if not count:
        raise InvalidConfig("compare: there are no batches; give a list of inputs of the model")
    layers = [
        LayerError(
            site.name,
            site.op,
            site.format if site.quantized else site.precision,
            _decibels(_before(sums, site.inputs)),
            _decibels(sums[site.name].ratio),
            _added(sums, site.name, site.inputs) if site.quantized else 0.0,
        )
        for site in plan.values()
        if site.name in sums
    ]
    return Comparison(
        tuple(
            replace(each, share=share)
            for each, share in zip(layers, _shares([x.share for x in layers]), strict=True)
        ),
        _decibels(outputs.ratio),
        _decibels(simulation_outputs.ratio),
        repr(backend),
        count,
        len(plan) - len(layers),
        padded,
    )


class _Sum:
    """Powers of a signal and of what is added to it."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.unknown = False
        """Whether numbers were seen, and none that can be compared."""
        self._known = False

    def add_all(self, values: Iterable[Tensor], others: Iterable[Tensor]) -> None:
        for x, y in zip(values, others, strict=True):
            if x.dim() and x.dim() == y.dim():
                y = y[..., : x.shape[-1]]  # channels that are repeated stand behind the others
            if x.shape != y.shape:
                continue
            exact = x.detach().double()
            other = y.detach().double()
            finite = torch.isfinite(exact)
            self._known = self._known or bool((finite | (exact == other)).any())
            self.unknown = not self._known and (self.unknown or exact.numel() > 0)
            self.signal += float(exact[finite].square().sum())
            self.noise += float((exact - other)[finite].square().sum())

    @property
    def ratio(self) -> float:
        """Noise by signal; infinite for noise alone, NaN where nothing can be compared."""
        if self.unknown:
            return math.nan
        if self.signal:
            return self.noise / self.signal
        return self.noise if math.isnan(self.noise) or not self.noise else math.inf


def _decibels(ratio: float) -> float:
    """Of noise by signal."""
    return -10.0 * math.log10(ratio) if ratio else math.inf


def _before(sums: dict[str, _Sum], inputs: tuple[str, ...]) -> float:
    """Noise by signal of the worst input."""
    ratios = [sums[key].ratio for key in inputs if key in sums]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)


def _added(sums: dict[str, _Sum], site: str, inputs: tuple[str, ...]) -> float:
    """Noise by signal of a result beyond that of what it is made of.

    Infinite where a result is the first that is no number, or has no signal.
    """
    before, after = _before(sums, inputs), sums[site].ratio
    if not math.isfinite(before):
        return 0.0
    return max(after - before, 0.0) if math.isfinite(after) else math.inf


def _shares(added: list[float]) -> list[float]:
    """Of the whole; what is infinite is all of it.

    >>> _shares([1.0, 3.0]), _shares([1.0, float("inf")])
    ([0.25, 0.75], [0.0, 1.0])
    """
    if math.inf in added:
        added = [1.0 if each == math.inf else 0.0 for each in added]
    whole = sum(added) or 1.0
    return [each / whole for each in added]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps some of its tensors.

    Args:
        gm: the graph.
        keys: node -> under which name its value is kept.
        seen: where.
    """

    def __init__(self, gm: fx.GraphModule, keys: dict[str, str], seen: Seen) -> None:
        super().__init__(gm)
        self.keys, self.seen = keys, seen
        self.extra_traceback = False  # errors of the model are the caller's to see as they are

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        key = self.keys.get(n.name)
        if key is not None and isinstance(value, Tensor) and value.is_floating_point():
            self.seen.setdefault(key, []).append(value.detach().clone())
        return value


def _float(session: Session, seen: Seen) -> Callable[..., Any]:
    """The float model by its captured graphs, whose tensors are kept."""

    def run(submodule: CapturedModule, graph: CapturedGraph, call: Call) -> Any:
        prepared = session.captured.prepared(submodule, graph)
        keys = {
            str(node.meta[ORIGIN]): str(node.meta[KEY])
            for node in prepared.canonical.graph.nodes
            if ORIGIN in node.meta and KEY in node.meta
        }
        return graph.output(_Recorder(graph.gm, keys, seen).run(*call.tensors), call)

    return Executor(session.captured.root, run)


@contextmanager
def _recorded(model: QuantizedModule, seen: Seen) -> Iterator[None]:
    """While the quantized model runs, the tensors of its graphs are kept."""

    def nothing(*given: Any) -> None:
        """A hook: with it, a graph is called as a module."""

    graphs = list(dict.fromkeys(graph for _, graph in quantized_graphs(model)))
    hooks = []
    for graph in graphs:
        body = graph.body
        keys = {
            node.name: str(node.meta[KEY])
            for node in body.graph.nodes
            if KEY in node.meta and ORIGIN in node.meta and node.op != "get_attr"
        }
        hooks += [
            graph.register_forward_pre_hook(nothing),
            body.register_forward_hook(nothing),
        ]
        body.forward = _Recorder(body, keys, seen).run
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for graph in graphs:
            del graph.body.forward
