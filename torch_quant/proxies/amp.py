"""The proxy that measures, while data runs through it, what quantizing each site would do."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.backends import Backend
from torch_quant.backends.lowering import Lowering
from torch_quant.core.metrics import float_leaves
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import Region
from torch_quant.graph.export import CapturedGraph, run_module
from torch_quant.graph.outputs import flatten_output, unflatten_output
from torch_quant.model import CapturedModel
from torch_quant.nn.probe import SiteProbe, substitute
from torch_quant.passes.probe_sites import LocalSite, cut_sites, insert_site_probes
from torch_quant.proxies.base import Proxy, check_not_empty
from torch_quant.proxies.noise import NoisePass
from torch_quant.sensitivity import Recorder

__all__ = ["AmpModel", "Latency"]

logger = logging.getLogger("torch_quant")

LossFn = Callable[[Any, Any], Tensor]
"""(outputs, batch) -> scalar. ``batch`` is what the proxy was called with: the keywords, the single
positional argument, or the tuple of them."""
KEPT_ROWS = 32
"""How many samples are kept to verify predictions with."""


@dataclass
class Latency:
    """Time of one site in one call of the model, microseconds."""

    float32: float = 0.0
    quantized: float = 0.0


class AmpModel(Proxy):
    """The proxy that :meth:`Quantizer.amp` makes. Not to be made by hand.

    Args:
        captured: the model's regions and graphs.
        model: the float model.
        lowering: how the model's sites would be quantized with the ranges as they are now.
        version: changes when ranges do.
        metric: ``"output"`` or ``"sqnr"``.
        loss_fn: takes the place of the projection of the outputs.
        max_batches: how many are recorded; None for all.
        seed: of the random signs.
    """

    def __init__(
        self,
        captured: CapturedModel,
        model: nn.Module,
        lowering: Callable[[nn.Module], Lowering],
        version: Callable[[], Any],
        metric: str,
        loss_fn: LossFn | None,
        max_batches: int | None,
        seed: int,
    ) -> None:
        self._lowering, self._ranges = lowering, version
        self.metric = "loss" if loss_fn is not None else metric
        self.note = ""
        self.recorder = Recorder()
        self.samples: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        """A few of the inputs, and the float outputs for them."""
        self._loss_fn, self._max_batches = loss_fn, max_batches
        self._signs = torch.Generator().manual_seed(seed)
        self._grad_mode = True
        self._visitor: Callable[[SiteProbe, Tensor, tuple[Any, ...]], Tensor] = _pass_on
        super().__init__(captured, model)

    def _reset(self) -> None:
        super()._reset()
        self._seen = self._state()
        self._graphs: dict[int, torch.fx.GraphModule] = {}
        self._exact: dict[Any, bool] = {}

    def _state(self) -> tuple[Any, ...]:
        """Changes when the ranges or the weights do."""
        model = self._model() if hasattr(self, "_model") else None
        tensors = () if model is None else (*model.parameters(), *model.buffers())
        return (self._ranges(), *(x._version for x in tensors if not x.is_inference()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float model and records sensitivities; same inputs and outputs as the model.

        Raises:
            QuantError: an empty batch, or a sensitivity that is not finite (names the site).
            InvalidConfig: ``loss_fn`` gives no scalar that depends on the outputs.
            NotCalibrated: the inputs take the model where no calibration data went.
        """
        check_not_empty((args, kwargs), self.recorder.batches)
        self._follow()
        if self._max_batches is not None and self.recorder.batches >= self._max_batches:
            return self._executor(*args, **kwargs)
        if self._state() != self._seen:
            self._reset()
        self._grad_mode = torch.is_grad_enabled()
        with torch.inference_mode(False), self._captured.calibrated_only():
            args, kwargs = pytree.tree_map_only(Tensor, _plain, (args, kwargs))
            kept = _copied((args, kwargs))
            with self.recorder.batch() as record:
                outputs = self._recorded(record, args, kwargs, kept)
            if sum(_rows(inputs[:2]) for inputs in self.samples) < KEPT_ROWS:
                self.samples.append((*kept, _copied(outputs)))
        return outputs

    def _recorded(
        self, record: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Any
    ) -> Any:
        if self.metric != "sqnr":
            try:
                pass_ = NoisePass(
                    record, _rows((args, kwargs)), torch.zeros((), requires_grad=True)
                )
                with torch.enable_grad(), self._visiting(pass_.visit):
                    outputs = self._executor(*args, **kwargs)
            except QuantError:
                raise
            except Exception as error:  # whatever an operator that has no gradient raises
                with torch.no_grad(), self._visiting(_pass_on):
                    again = _copied(kept)
                    self._executor(*again[0], **again[1])
                self._give_up(f"{type(error).__name__}: {error}")
                args, kwargs = _copied(kept)
                record.sites.clear()
            else:
                self._backward(record, pass_, outputs, args, kwargs)
                return _detached(outputs)
        with torch.no_grad(), self._visiting(NoisePass(record, _rows((args, kwargs))).visit):
            outputs = self._executor(*args, **kwargs)
        record.output_signal = sum(float(x.square().sum()) for x in _projected(outputs))
        return _detached(outputs)

    def _backward(
        self, record: Recorder, pass_: NoisePass, outputs: Any, args: Any, kwargs: Any
    ) -> None:
        record.output_signal = sum(float(x.detach().square().sum()) for x in _projected(outputs))
        if self._loss_fn is not None:
            batch = kwargs if not args else args[0] if len(args) == 1 and not kwargs else args
            with torch.enable_grad():
                loss = self._loss_fn(outputs, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise InvalidConfig(
                    f"loss_fn(outputs, batch) gave {_describe(loss)}; expected a scalar tensor"
                )
            if not loss.requires_grad:
                raise InvalidConfig(
                    "the loss does not depend on the outputs by differentiable operators: take it "
                    "from the logits, not from argmax() or item()"
                )
        else:
            with torch.enable_grad():
                loss = torch.zeros((), dtype=torch.float64)
                for x in _projected(outputs):
                    loss = loss + (x * self._signs_like(x)).sum()
            if not loss.requires_grad:
                self._give_up(
                    "no output depends on a quantized site by differentiable operators"
                    if record.sites
                    else "no site ran"
                )
                return
        assert pass_.anchor is not None
        try:
            torch.autograd.grad(loss, [pass_.anchor], allow_unused=True)
        except RuntimeError as error:
            self._give_up(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            pass_.finish()
        self._drop_history()

    def _drop_history(self) -> None:
        """Buffers that the model wrote to must not hold on to this batch."""
        for gm in self._graphs.values():
            for buffer in gm.buffers(recurse=False):
                if buffer.requires_grad:
                    buffer.detach_()

    def _give_up(self, reason: str) -> None:
        self.metric = "sqnr"
        for stats in self.recorder.sites.values():  # shares of another measure than from now on
            stats.from_weight = stats.from_activation = 0.0
        self.note = f'ranked by "sqnr": the model cannot be differentiated ({reason})'
        logger.warning("%s", self.note)

    def _signs_like(self, x: Tensor) -> Tensor:
        """Random signs; of mean 0 and variance 1, as the estimate needs."""
        bits = torch.randint(0, 2, x.shape, generator=self._signs, dtype=torch.int8)
        return (2 * bits - 1).to(x)

    # The instrumented graphs

    @contextmanager
    def _visiting(
        self, visit: Callable[[SiteProbe, Tensor, tuple[Any, ...]], Tensor]
    ) -> Iterator[None]:
        self._visitor = visit
        try:
            yield
        finally:
            self._visitor = _pass_on

    def _run(self, region: Region, graph: CapturedGraph, call: Call) -> Any:
        if id(graph) not in self._graphs:
            self._graphs[id(graph)] = self._instrument(region, graph)
        # What kernels are chosen by; where they differ, the float module's own values are given.
        kind = (id(graph), self._grad_mode, call.tensors[0].shape[:1])
        exact = self._exact.get(kind, None if graph.exact else False)
        values = None if exact else run_module(region.module, call, self._grad_mode)
        leaves = self._graphs[id(graph)](*call.tensors)
        if values is None:
            return graph.output(leaves)
        if exact is None:
            self._exact[kind] = all(map(_same, leaves, values))
        return graph.output(map(_valued, leaves, values))

    def _instrument(self, region: Region, graph: CapturedGraph) -> torch.fx.GraphModule:
        prepared = self._captured.prepared(region, graph)
        lowering = self._lowering(self.model)
        plan = lowering.plan
        stored = {name: plan[name].stored for name in plan.quantized}
        sites = cut_sites(prepared, set(plan.quantized), stored)

        def probe(local: LocalSite) -> SiteProbe:
            name = local.site.name
            return SiteProbe(
                name,
                local.gm,
                lowering.graph(local.gm),
                _half(lowering, local),
                local.operand,
                lambda *each: self._visitor(*each),
            )

        with torch.no_grad():
            return insert_site_probes(prepared, sites, probe)

    # Time

    @torch.no_grad()
    def measure_latency(self, repeats: int = 7) -> dict[str, Latency]:
        """Time every site in float and quantized, in turns, on one kept sample batch.

        Args:
            repeats: runs of each; the median counts.
        """
        args, kwargs, _ = self.samples[0]
        found: dict[str, Latency] = {}
        timed: dict[str, SiteProbe] = {}  # of several results of one site, the first

        def visit(probe: SiteProbe, y: Tensor, inputs: tuple[Any, ...]) -> Tensor:
            if timed.setdefault(probe.name, probe) is not probe:
                return y
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(repeats + 1):
                for run, kept in zip((probe.exact, probe.quantized), times, strict=True):
                    start = time.perf_counter()
                    run(*inputs)  # type: ignore[operator]
                    if turn:  # the first one warms up
                        kept.append(1e6 * (time.perf_counter() - start))
            each = found.setdefault(probe.name, Latency())
            each.float32 += sorted(times[0])[repeats // 2]
            each.quantized += sorted(times[1])[repeats // 2]
            return y

        with self._visiting(visit):
            again = _copied((args, kwargs))
            self._executor(*again[0], **again[1])
        return found


def _half(lowering: Lowering, local: LocalSite) -> torch.fx.GraphModule | None:
    """The site with quantized activations and its float weight."""
    entry = lowering.plan[local.site.name]
    if entry.weight is None or entry.activation is None:
        return None
    half = replace(entry, weight=None)
    sites = lowering.plan.values()  # others, of constants, may belong to the local graph
    plan = QuantPlan(half if each is entry else each for each in sites)
    return replace(lowering, plan=plan, backend=Backend.REFERENCE).graph(local.gm)


def _pass_on(probe: SiteProbe, y: Tensor, args: tuple[Any, ...]) -> Tensor:
    return y


def _plain(x: Tensor) -> Tensor:
    """Without gradient history, and usable where gradients are taken."""
    return x.clone() if x.is_inference() else x.detach()


def _rows(inputs: Any) -> int:
    leaves = pytree.tree_leaves(inputs)
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim()), 1)


def _projected(outputs: Any) -> list[Tensor]:
    """The float tensors of the outputs; where they are not finite, which masks are, zero."""
    leaves = float_leaves(outputs)
    if not leaves:
        parts, _ = flatten_output(outputs)
        leaves = [x for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.masked_fill(~torch.isfinite(x), 0.0) for x in leaves]


def _detached(outputs: Any) -> Any:
    leaves, spec = flatten_output(outputs)
    return unflatten_output((x.detach() if isinstance(x, Tensor) else x for x in leaves), spec)


def _same(x: Any, value: Any) -> bool:
    if isinstance(x, Tensor):
        return torch.equal(x.detach().nan_to_num(), value.nan_to_num())
    return bool(x == value)


def _valued(x: Any, value: Any) -> Any:
    """``value`` with the gradient of ``x``."""
    return substitute(x, value) if isinstance(x, Tensor) and x.requires_grad else value


def _copied(value: Any) -> Any:
    """A deep copy, without the gradient history of its tensors."""
    leaves, _ = flatten_output(value)
    memo = {id(x): x.detach().clone() for x in leaves if isinstance(x, Tensor)}
    return copy.deepcopy(value, memo)


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
