"""What the public methods of a quantizer rest on: its settings, what it learned, its models."""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import recipes
from torch_quant.amp.allocation import Allocation, allocate, exactly
from torch_quant.amp.collapse import tell_collapse
from torch_quant.amp.fallback import Fallback
from torch_quant.amp.optimization import Optimization
from torch_quant.amp.optimizing import optimize
from torch_quant.amp.options import AmpOptions
from torch_quant.amp.proxy import AmpModel
from torch_quant.backends import VARIABLE, Backend, usable_backend
from torch_quant.calibrated import is_unfit, tell_unfit, tell_unrecorded
from torch_quant.choices import (
    check_keywords,
    check_positions,
    chosen_backend,
    override,
    overrides_of,
    told,
)
from torch_quant.config import OverrideKey, QConfig
from torch_quant.configuration import configuration, write_configuration
from torch_quant.convert.lowering import Lowering
from torch_quant.convert.quantized import QuantizedModule, plan_of
from torch_quant.core.plan import FALLEN_BACK, PRECISIONS, SLOWER, QuantPlan
from torch_quant.core.switches import NO_COLLECTION
from torch_quant.core.telling import told_together
from torch_quant.errors import InvalidConfig, NotCalibrated, UnsupportedOp
from torch_quant.explain import Explanation, explain
from torch_quant.graph.annotate import tell_misfits, tell_refused, tell_tied
from torch_quant.graph.dynamic import Dynamic, checked_dynamic
from torch_quant.graph.examples import call_example, run_example
from torch_quant.graph.identity import check_model, check_same
from torch_quant.graph.policy import Capture, CapturePolicy, checked_capture, default_capture
from torch_quant.io.summary import Summary
from torch_quant.model import CapturedModel
from torch_quant.module_filter import ModuleFilter
from torch_quant.proxies.base import Proxy, Tied
from torch_quant.proxies.calib import CalibModel
from torch_quant.proxies.values import plain
from torch_quant.report.coverage import Coverage
from torch_quant.report.tuning import Tuning
from torch_quant.rounding import Rounding, rounded
from torch_quant.session import Session
from torch_quant.settings import Settings
from torch_quant.state import QuantState
from torch_quant.unseen import UnseenCalls, checked_choice

__all__ = ["QuantizerBase"]

logger = logging.getLogger("torch_quant")


class QuantizerBase(Tied):
    """Everything of a :class:`Quantizer` but its public methods."""

    def __init__(
        self,
        choice: Backend | str | QConfig | None = None,
        /,
        *more: NoReturn,
        backend: Backend | str | None = None,
        qconfig: QConfig | str | None = None,
        overrides: Mapping[OverrideKey, QConfig | str | None] | None = None,
        module_filter: ModuleFilter | None = None,
        unseen_calls: str = "capture",
        dynamic: Dynamic | None = None,
        capture: Capture | None = None,
        **unknown: NoReturn,
    ) -> None:
        check_positions(choice, more)
        check_keywords(unknown, inspect.signature(QuantizerBase.__init__).parameters)
        backend, config = told(choice, backend, qconfig)
        self._capture = None if capture is None else checked_capture(capture)
        self.unseen_calls = checked_choice(unseen_calls)
        self._asked, self.backend, self._forced = chosen_backend(backend)
        self._taken = self.backend
        self.qconfig = config or recipes.int8_static()
        self.overrides = overrides_of({} if overrides is None else overrides)
        self.module_filter = ModuleFilter() if module_filter is None else module_filter
        self._dynamic = checked_dynamic(dynamic)
        self._summary = Summary(QuantPlan(), {})
        self.settings.check()
        self.state = QuantState()
        self.plan = QuantPlan()
        self.fallen_back: dict[str, str] = {}  # site -> precision
        self.slower: dict[str, dict[str, str]] = {}  # backend -> site -> reason
        self.tuning: Tuning | None = None
        self._sessions = weakref.WeakKeyDictionary[nn.Module, Session]()

    def __repr__(self) -> str:
        forced = self._forced if self.backend is self._forced else None
        note = "" if forced is None else f" by {VARIABLE}"
        if forced is not None and self._asked is not None:
            note += f" in the place of {self._asked!r}"
        if self._capture is not None or not self._policy.whole:
            note += f", capture={self._policy.data()!r}"
        return (
            f"Quantizer({self.backend!r}{note}, {self.state.batches} batches seen, {self.plan!r})"
        )

    @property
    def _policy(self) -> CapturePolicy:
        """What is captured as a graph, of models that were not captured yet."""
        return (
            self._capture
            or self._summary.capture
            or default_capture(self.qconfig, self.backend.one_graph)
        )

    @property
    def _captured_by(self) -> CapturePolicy:
        """What was captured as a graph of the models that this quantizer has seen."""
        used = {session.captured.root.policy for session in self._sessions.values()}
        return used.pop() if len(used) == 1 else self._policy

    @property
    def settings(self) -> Settings:
        """The configuration as it is now."""
        return Settings(self.qconfig, self.overrides, self.module_filter, self._summary)

    def _session(self, model: nn.Module, backend: Backend | None = None) -> Session:
        backend = backend or self.backend
        if isinstance(model, (Proxy, QuantizedModule)):
            raise InvalidConfig("this is a proxy; give the float model it was made from")
        check_model(model, backend.devices, repr(backend))
        if self.state.fingerprint:
            check_same(self.state.fingerprint, model)
        session = self._sessions.get(model)
        if session is None:
            captured = CapturedModel(model, self._dynamic, self._policy)
            session = self._sessions[model] = Session(self, captured, model)
        session.refresh()
        self.settings.check_names(model, session.site_names)
        return session

    def _fallback(self, proxy: AmpModel, precision: str = PRECISIONS[0]) -> Fallback:
        self._check_own(proxy)
        proxy.check()
        return Fallback(proxy, precision)

    def _check_own(self, proxy: AmpModel) -> None:
        if not isinstance(proxy, AmpModel):
            quantized = isinstance(proxy, QuantizedModule)
            found = "a quantized model" if quantized else type(proxy).__name__
            raise InvalidConfig(f"expected the proxy that quantizer.amp(model) makes, got {found}")
        if self._sessions.get(proxy.session.model) is not proxy.session:
            raise InvalidConfig(
                "the AMP proxy is of another model or another quantizer: use the quantizer that "
                "made it, or quantizer.amp(model) and run data through it"
            )

    def _ready(
        self, model: nn.Module, backend: Backend | str | None, example_inputs: Any, method: str
    ) -> tuple[Backend, Session]:
        """The backend and the model, captured, for ``method``."""
        if isinstance(example_inputs, Backend):
            given = f"{method}(model, {example_inputs!r})"
            name = f"backend={example_inputs.name!r}"
            raise InvalidConfig(f"{given}: inputs stand second; {method}(model, {name})")
        chosen = self.backend if backend is None else usable_backend(backend)
        session = self._session(model, chosen)
        if example_inputs is not None:
            run_example(session.captured.root, example_inputs)
        no_data = self.state.batches == 0 and self.qconfig.needs_ranges
        session.captured.check_called(method, no_data)
        return chosen, session

    def _calib(self, model: nn.Module, example_inputs: Any) -> CalibModel:
        session = self._session(model)
        if example_inputs is not None:
            run_example(session.captured.root, example_inputs)
        return CalibModel(session)

    def _explain(
        self, site: str, model: nn.Module | None, example_inputs: Any, backend: Backend | str | None
    ) -> Explanation:
        if not isinstance(site, str):
            raise InvalidConfig(
                f"explain({type(site).__name__}, ...): the name of the site comes first, and then "
                'the model: quantizer.explain("head", model)'
            )
        model = self._only(model, "explain")
        with self.state.lock:
            chosen, session = self._ready(model, backend, example_inputs, "explain")
            return explain(session, chosen, site)

    def _coverage(
        self, model: nn.Module, example_inputs: Any, backend: Backend | str | None
    ) -> Coverage:
        with self.state.lock:
            chosen, session = self._ready(model, backend, example_inputs, "coverage")
            captured, plan = session.captured, session.plan(chosen)
            return Coverage.of(captured, captured.as_lowered(plan, chosen.name), repr(chosen))

    def _amp(self, model: nn.Module, options: AmpOptions, example_inputs: Any) -> AmpModel:
        session = self._session(model)
        if example_inputs is not None:
            run_example(session.captured.root, example_inputs)
        with self.state.lock:
            plan = session.plan()
        wanting = _needs_ranges(plan) if plan else self.qconfig.needs_ranges
        if self.state.batches == 0 and wanting:
            raise NotCalibrated(
                "no calibration data was seen: run it through the proxy that "
                "quantizer.calib(model) returns, then ask for sensitivity"
            )
        self.state.compare_weights(model)
        return AmpModel(session, options)

    def _round(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        folder: str | os.PathLike[str] | None,
        show_progress: bool,
    ) -> Rounding:
        if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping, str)):
            raise InvalidConfig(
                f"round_weights: batches is a {type(batches).__name__}; expected a list or a "
                "generator of inputs of the model: [ids]"
            )
        session, kept = self._session(model), list(batches)
        if kept and not session.captured.root.called:
            run_example(session.captured.root, kept[0])
        plan = session.plan()
        tell_of(session, plan)
        self.state.compare_weights(model)
        with told_together(), torch.inference_mode(False):
            kept = pytree.tree_map_only(Tensor, plain, kept)
            made, report = rounded(session, plan, kept, folder=folder, show_progress=show_progress)
        self.state.rounded = made
        self.state.fingerprint = session.captured.fingerprint
        self.state.version += 1
        self.plan = QuantPlan()
        return report

    def _allocate(
        self, amp_model: AmpModel, bits_per_weight: float | None, min_sqnr: float | None
    ) -> Allocation:
        self._check_own(amp_model)
        found = allocate(amp_model, bits_per_weight, min_sqnr)
        candidates = amp_model.candidates
        self.overrides = dict(self.overrides)
        for site, each in found.chosen.items():
            self.overrides[exactly(site)] = candidates[each.candidate]
        self.plan = QuantPlan()
        return found

    def _optimize(
        self, amp_model: AmpModel, candidates: Any, min_gain: float, seed: int, progress: bool
    ) -> Optimization:
        self._check_own(amp_model)
        with self.state.lock, told_together():
            found = optimize(amp_model, candidates, min_gain, seed, progress)
            measured, present, kept = found.report.measured[0], self.overrides, False
            changed = dict(present)
            for site, config in found.configs.items():
                key = exactly(site)
                changed.pop(key, None)  # of equal keys, the last given holds
                changed[key] = config
            self.overrides = changed
            try:
                after = Fallback(amp_model).measure(self.fallen_back)
                kept = not after < measured
            finally:
                if not kept:
                    self.overrides = present
                self.plan = QuantPlan()
        report = replace(found.report, measured=(measured, after), kept=kept)
        if not kept:
            logger.warning("optimize: %s", report.headline)
        return report

    def _set(self, pattern: OverrideKey, config: QConfig | str | None) -> None:
        overrides = {key: value for key, value in self.overrides.items() if key != pattern}
        overrides[pattern] = override(pattern, config)
        settings = replace(self.settings, overrides=overrides)
        settings.check()
        for model, session in self._sessions.items():
            settings.check_names(model, session.site_names)
        self.overrides = dict(settings.overrides)
        self.plan = QuantPlan()

    def _to_config(self, path: str | os.PathLike[str] | None) -> dict[str, Any]:
        asked = self._asked if self.backend is self._taken else self.backend
        data = configuration(asked, self.settings, self.unseen_calls, self._dynamic, self._capture)
        if path is not None:
            write_configuration(path, data)
        return data

    def _quantized(
        self,
        model: nn.Module,
        backend: Backend | str | None,
        example_inputs: Any,
        share_float_weights: bool,
    ) -> QuantizedModule:
        with self.state.lock:  # another thread may calibrate
            return self._made(model, backend, example_inputs, share_float_weights)

    def _made(
        self,
        model: nn.Module,
        backend: Backend | str | None,
        example_inputs: Any,
        share_float_weights: bool,
    ) -> QuantizedModule:
        chosen, session = self._ready(model, backend, example_inputs, "quantize")
        self.state.compare_weights(model)
        session.tell_observers()
        lowering = session.lowering(chosen)
        quantized = self._lowered(session, lowering, share_float_weights)
        if self.unseen_calls == "capture":
            UnseenCalls(session, chosen, lowering.plan).attend(quantized)
        tell_collapse(session, lowering.plan, chosen, quantized)
        if example_inputs is not None and chosen.compiles and not session.captured.keeps_state:
            call_example(quantized, example_inputs)
        return self._described(quantized, chosen)

    def _lowered(self, session: Session, lowering: Lowering, share: bool) -> QuantizedModule:
        """What ``lowering`` makes of a model; raises as :meth:`Quantizer.quantize` does."""
        plan = lowering.plan
        lower = any(site.precision != PRECISIONS[0] for site in plan.values())
        if not (plan.quantized or lower) and not any(
            is_unfit(x) or x.reason.startswith((FALLEN_BACK, SLOWER)) for x in plan.values()
        ):
            reasons = sorted({f"{site.op}: {site.reason}" for site in plan.values()})
            rest = f"; and {len(reasons) - 2} more reasons" if len(reasons) > 2 else ""
            raise UnsupportedOp(
                "nothing in the model can be quantized: "
                + ("; ".join(reasons[:2]) or session.captured.nothing_captured())
                + f"{rest}. print(quantizer.coverage(model)) lists every operator"
            )
        if not (plan.quantized or lower or any(map(is_unfit, plan.values()))):
            logger.warning(
                "all %d sites are in float, since those that can be quantized fell back or are "
                "faster so: the model gains nothing. quantizer.reset_fallback() quantizes it, and "
                "a smaller fallback most of it",
                len(plan),
            )
        if _needs_ranges(plan) and self.state.batches == 0:
            raise NotCalibrated(
                "no calibration data was seen: run it through the proxy of quantizer.calib(model)"
            )
        if not self.state.rounded:  # it was told then
            tell_of(session, plan)
        with told_together(), NO_COLLECTION:
            return lowering.run(share=share)

    def _described(self, quantized: QuantizedModule, backend: Backend) -> QuantizedModule:
        """A new quantized model with what is known of it, and its plan as the last one."""
        how, self.plan = quantized.quantization, plan_of(quantized)
        how.description = f"{backend!r}: {self.plan.summary}"
        how.calibration = self.state.describe()
        logger.info("quantized: %s", how.description)
        return quantized

    def _only(self, model: nn.Module | None, method: str) -> nn.Module:
        """``model``, or the one that this quantizer has captured."""
        if model is not None:
            return model
        known = list(self._sessions)
        if len(known) != 1:
            have = f"{len(known)} models were" if known else "no model was"
            raise InvalidConfig(
                f"{have} captured by this quantizer: quantizer.{method}(..., model)"
            )
        return known[0]


def tell_of(session: Session, plan: QuantPlan) -> None:
    """Warn of what is not as was asked for: sites in float, other methods, a weight kept twice."""
    sites, settings = session.captured.sites(), session.settings
    tell_unrecorded(plan)
    tell_unfit(session, plan)
    tell_misfits(sites, plan)
    tell_tied(sites, session.model, plan)
    tell_refused(sites, session.model, plan, qconfig=settings.qconfig, overrides=settings.overrides)


def _needs_ranges(plan: QuantPlan) -> bool:
    return any(site.quantized and site.needs_ranges for site in plan.values())
