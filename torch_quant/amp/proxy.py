"""The proxy that measures, while data runs through it, what quantizing each site would do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.amp.candidates import candidate_lowerings
from torch_quant.amp.noise import NoisePass, culprit
from torch_quant.amp.options import AmpOptions
from torch_quant.amp.padding import Real, Widths, batch_of, kept_outputs, real_positions
from torch_quant.amp.probe_sites import (
    LocalSite,
    activations_only,
    cut_sites,
    insert_site_probes,
)
from torch_quant.amp.records import Recorder
from torch_quant.config import QConfig
from torch_quant.convert.lowering import Lowering
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.effects import assign
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.running import run_module
from torch_quant.nn.probe import SiteProbe
from torch_quant.proxies.base import Proxy, check_differentiable, check_not_empty
from torch_quant.proxies.values import (
    batch_size,
    copied,
    describe,
    detached,
    plain,
    projected,
    same,
    valued,
)
from torch_quant.session import Session
from torch_quant.state import weight_checksums

__all__ = ["AmpModel", "Latency"]

logger = logging.getLogger("torch_quant")

KEPT_ROWS = 32
"""How many samples are kept to verify predictions with."""


_UNCHANGED = (Tensor, bool, int, float, str, type(None))
"""Arguments that a model cannot change, or that graphs write to themselves."""


@dataclass
class Latency:
    """Time of one site in one call of the model, microseconds."""

    float32: float = 0.0
    quantized: float = 0.0


class AmpModel(Proxy):
    """The proxy that :meth:`Quantizer.amp` makes. Not to be made by hand.

    Args:
        session: the quantizer and the model.
        options: metric and loss, how many batches, the seed.
    """

    def __init__(self, session: Session, options: AmpOptions) -> None:
        if options.metric != "sqnr":
            check_differentiable(session.captured.root.module, 'amp (but for metric="sqnr")')
        self.options = options
        self._grad_mode = True
        self._visitor: Callable[[SiteProbe, Tensor, tuple[Any, ...]], Tensor] = _pass_on
        self._start()
        super().__init__(session)
        self._basis = self._present()

    def _start(self) -> None:
        """As if no data had been seen."""
        options = self.options
        self._metric = "loss" if options.loss_fn is not None else options.metric
        self._note = ""
        self.recorder = Recorder()
        self.samples: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        """A few of the inputs, and the float outputs for them."""
        self._signs = torch.Generator().manual_seed(options.seed)
        self._widths = Widths()

    @property
    def metric(self) -> str:
        """What the scores are: as asked for, unless the model gives no gradient for that."""
        return "sqnr" if self.recorder.without_gradient else self._metric

    @property
    def note(self) -> str:
        """What a reader of the scores must know."""
        recorder = self.recorder
        if self._note or not recorder.left_out:
            return self._note
        if recorder.without_gradient:
            return f'ranked by "sqnr": {recorder.cause} for any sample that was seen'
        return f"samples left out of the scores: {recorder.left_out}, {recorder.cause} for them"

    def _reset(self) -> None:
        super()._reset()
        self._written = self._versions()
        self._graphs: dict[int, torch.fx.GraphModule] = {}
        self._exact: dict[Any, bool] = {}

    def _versions(self) -> tuple[int, ...]:
        """Changes when a buffer is written to: constants of the graphs may depend on it."""
        buffers = self.captured.root.module.buffers()
        return tuple(x._version for x in buffers if not x.is_inference())

    def _present(self) -> dict[str, Any]:
        """What is recorded rests on, as it is now."""
        return self.session.basis() | {"weights": weight_checksums(self.captured.root.module)}

    def changes(self) -> list[str]:
        """What has changed since the first batch was recorded, so that it holds no longer."""
        self._follow()
        present = self._present()
        return [name for name, value in present.items() if self._basis[name] != value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float model and records sensitivities; same inputs and outputs as the model.

        Samples whose gradient is not finite are left out of the scores: a warning names the
        operator. If no sample is left, local noise ranks.

        Raises:
            QuantError: an empty batch, or a sensitivity that is not finite (names the site).
            InvalidConfig: ``loss_fn`` gives no scalar that depends on the outputs.
            NotCalibrated: the inputs take the model where no calibration data went.
        """
        check_not_empty((args, kwargs), self.recorder.batches)
        if changed := self.changes():
            if self.recorder.batches:
                logger.warning(
                    "%s changed since this AMP proxy saw its first batch: it forgets what it has "
                    "recorded and starts anew with this one",
                    ", ".join(changed),
                )
            self._start()
            self._reset()
            self._basis = self._present()
        most = self.options.max_batches
        if most is not None and self.recorder.batches >= most:
            return self._execute(self._executor, args, kwargs)
        if self._versions() != self._written:
            self._reset()
        given = (args, kwargs)
        self._grad_mode = torch.is_grad_enabled()
        with torch.inference_mode(False), self.captured.calibrated_only():
            args, kwargs = pytree.tree_map_only(Tensor, plain, (args, kwargs))
            kept = copied((args, kwargs))
            with self.recorder.batch() as record:
                outputs = self._recorded(record, args, kwargs, kept)
            self._widths.tell()
            if record.left_out and record.left_out == self.recorder.left_out:  # the first ones
                logger.warning(
                    "samples of batch %d left out of the scores: %d of %d, %s for them",
                    self.recorder.batches - 1,
                    record.left_out,
                    batch_size(kept),
                    record.cause,
                )
            if sum(batch_size(inputs[:2]) for inputs in self.samples) < KEPT_ROWS:
                self.samples.append((*kept, copied(outputs)))
            if any(not isinstance(x, _UNCHANGED) for x in (*args, *kwargs.values())):
                # The model may have changed them; no history of gradients may stay in them.
                assign(given, detached((args, kwargs)))
        return outputs

    def _recorded(
        self, record: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Any
    ) -> Any:
        rows, real = batch_size((args, kwargs)), self.real(args, kwargs)
        if self._metric != "sqnr":
            try:
                anchor = torch.zeros((), requires_grad=True)
                pass_ = NoisePass(record, rows, anchor, real=real)
                with torch.enable_grad(), self._visiting(pass_.visit):
                    outputs = self._execute(self._executor, args, kwargs)
            except QuantError:
                raise
            except Exception as error:  # whatever an operator that has no gradient raises
                with torch.no_grad(), self._visiting(_pass_on):
                    again = copied(kept)
                    self._execute(self._executor, *again)
                self._give_up(f"{type(error).__name__}: {error}")
                args, kwargs = copied(kept)
                record.sites.clear()
            else:
                self._backward(record, pass_, outputs, args, kwargs)
                return detached(outputs)
        with torch.no_grad(), self._visiting(NoisePass(record, rows, real=real).visit):
            outputs = self._execute(self._executor, args, kwargs)
        leaves = kept_outputs(real, projected(outputs))
        record.output_signal = sum(float(x.square().sum()) for x in leaves)
        return detached(outputs)

    def _backward(
        self, record: Recorder, pass_: NoisePass, outputs: Any, args: Any, kwargs: Any
    ) -> None:
        loss_fn = self.options.loss_fn
        if loss_fn is not None:
            with torch.enable_grad():
                loss = loss_fn(outputs, batch_of(args, kwargs))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise InvalidConfig(
                    f"loss_fn(outputs, batch) gave {describe(loss)}; expected a scalar tensor"
                )
            if not loss.requires_grad:
                raise InvalidConfig(
                    "the loss does not depend on the outputs by differentiable operators: take it "
                    "from the logits, not from argmax() or item()"
                )
        else:
            with torch.enable_grad():
                loss = torch.zeros((), dtype=torch.float64)
                for i, x in enumerate(projected(outputs)):
                    signs = pass_.real.kept(self._signs_like(x), f"output {i}")
                    loss = loss + (x * signs).sum()
            if not loss.requires_grad:
                self._give_up(
                    "no output depends on a quantized site by differentiable operators"
                    if record.sites
                    else "no site ran"
                )
                return
        assert pass_.anchor is not None
        try:
            # The graph of gradients is kept for culprit(), which goes through it once more.
            torch.autograd.grad(loss, [pass_.anchor], allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            self._give_up(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            pass_.finish(kept_outputs(pass_.real, projected(outputs)))
            if record.left_out:
                record.culprit = culprit(loss, pass_.anchor)
        self._drop_history()

    def _drop_history(self) -> None:
        """Buffers that the model wrote to must not hold on to this batch."""
        for gm in self._graphs.values():
            for buffer in gm.buffers(recurse=False):
                if buffer.requires_grad:
                    buffer.detach_()

    def _give_up(self, reason: str) -> None:
        self._metric = "sqnr"
        self.recorder.drop_shares()  # of another measure than from now on
        self._note = f'ranked by "sqnr": the model cannot be differentiated ({reason})'
        logger.warning("%s", self._note)

    def _signs_like(self, x: Tensor) -> Tensor:
        """Random signs; of mean 0 and variance 1, as the estimate needs."""
        bits = torch.randint(0, 2, x.shape, generator=self._signs, dtype=torch.int8)
        return (2 * bits - 1).to(x)

    def real(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Real:
        """Which positions of a batch are real."""
        rows = batch_size((args, kwargs))
        signature, mask = self.captured.root.signature, self.options.mask
        return real_positions(mask, signature, args, kwargs, rows, self._widths)

    @property
    def candidates(self) -> Mapping[str, QConfig]:
        """What it was asked to try, by name."""
        return self.options.candidates

    def candidate_plans(self) -> dict[str, QuantPlan]:
        """Candidate -> what would be done with every site."""
        return {name: each.plan for name, (each, _) in self._lowerings().items()}

    def _lowerings(self) -> dict[str, tuple[Lowering, Container[str]]]:
        """How each candidate would quantize the model, and the sites where it is tried."""
        made = candidate_lowerings(self.session, self.options.candidates)
        return {name: (each, each.plan.quantized) for name, each in made.items()}

    def check(self, besides: Container[str] = ()) -> None:
        """Raise :class:`NotCalibrated` unless what was recorded holds as things are now.

        Args:
            besides: what may have changed.
        """
        if self.recorder.batches == 0:
            raise NotCalibrated(
                "no data was run through the AMP proxy: for batch in loader: amp_model(batch)"
            )
        if changed := [name for name in self.changes() if name not in besides]:
            raise NotCalibrated(
                f"{', '.join(changed)} changed since the AMP proxy saw its data, so what it "
                "recorded holds no longer: run data through it again, it then starts anew"
            )

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

    def _run(self, submodule: CapturedModule, graph: CapturedGraph, call: Call) -> Any:
        if id(graph) not in self._graphs:
            self._graphs[id(graph)] = self._instrument(submodule, graph)
        # What kernels are chosen by; where they differ, the float module's own values are given.
        kind = (id(graph), self._grad_mode, call.tensors[0].shape[:1])
        exact = self._exact.get(kind, None if graph.exact else False)
        values = (
            None if exact else run_module(submodule.module, call, self._grad_mode, graph.writes)
        )
        leaves = self._graphs[id(graph)](*call.tensors)
        if values is None:
            return graph.output(leaves, call)
        if exact is None:
            self._exact[kind] = all(map(same, leaves, values))
        return graph.output(map(valued, leaves, values), call)

    def _instrument(self, submodule: CapturedModule, graph: CapturedGraph) -> torch.fx.GraphModule:
        prepared = self.captured.prepared(submodule, graph)
        lowering = self.session.probing()
        plan = lowering.plan
        outputs = {name: plan[name].quantized_output for name in plan.quantized}
        sites = cut_sites(prepared, set(plan.quantized), outputs)
        others = self._lowerings()

        def probe(local: LocalSite) -> SiteProbe:
            name = local.site.name
            return SiteProbe(
                name,
                local.gm,
                lowering.graph(local.gm),
                activations_only(lowering, local),
                local.operand,
                lambda *each: self._visitor(*each),
                {x: each.graph(local.gm) for x, (each, at) in others.items() if name in at},
            )

        with torch.no_grad():
            return insert_site_probes(prepared, sites, probe)

    # Time

    @torch.no_grad()
    def measure_latency(self, repeats: int = 7) -> dict[str, Latency]:
        """Time every site in float and quantized, in turns, on one kept sample batch.

        Args:
            repeats: runs of each; the median counts.

        Raises:
            NotCalibrated: the proxy has seen no data, or settings, ranges or weights have changed
                since.
        """
        self.check()
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
            again = copied((args, kwargs))
            self._execute(self._executor, *again)
        return found


def _pass_on(probe: SiteProbe, y: Tensor, args: tuple[Any, ...]) -> Tensor:
    return y
