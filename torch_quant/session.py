"""One quantizer and one model: captured graphs, settings, ranges, and the plan that they give."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from torch_quant.backends import Backend
from torch_quant.calibrated import Calibrated, unfit, without_result
from torch_quant.config import Overrides, QConfig, made_observer
from torch_quant.convert.lowering import Lowering
from torch_quant.core.granularity import PerTensor
from torch_quant.core.methods import Method, Transform
from torch_quant.core.plan import PRECISIONS, QuantPlan, SitePlan
from torch_quant.core.rounded import Scaling
from torch_quant.core.transformed import transformed_as
from torch_quant.errors import InvalidConfig
from torch_quant.graph.annotate import annotate
from torch_quant.graph.sites import Site
from torch_quant.model import CapturedModel
from torch_quant.settings import Settings, observer_name
from torch_quant.state import Makers, QuantState, weight_checksums
from torch_quant.statistics import DEFAULT_OBSERVER, RANGE, Observer, Statistic

__all__ = ["Owner", "Session", "Snapshot"]

V = TypeVar("V")

logger = logging.getLogger("torch_quant")


class Owner(Protocol):
    """What a session reads from its quantizer, as it is at that moment."""

    @property
    def backend(self) -> Backend: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def state(self) -> QuantState: ...
    @property
    def fallen_back(self) -> Mapping[str, str]: ...
    @property
    def slower(self) -> Mapping[str, Mapping[str, str]]: ...


@dataclass(frozen=True)
class Snapshot:
    """A quantizer as it was: what it learns later does not reach this.

    Args:
        backend: where the model runs.
        settings: what the user asked for.
        state: the ranges.
        fallen_back: site -> precision of what fell back to float.
        slower: backend -> site -> why it is in float there, though it could be quantized.
    """

    backend: Backend
    settings: Settings
    state: QuantState
    fallen_back: Mapping[str, str]
    slower: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, owner: Owner, backend: Backend) -> Snapshot:
        """A copy of what ``owner`` knows now, to run on ``backend``."""
        state = owner.state.copied()
        settings = replace(owner.settings, overrides=dict(owner.settings.overrides))
        slower = {name: dict(sites) for name, sites in owner.slower.items()}
        return cls(backend, settings, state, dict(owner.fallen_back), slower)


class Session:
    """What a quantizer knows of one model. Proxies and lowering ask it, and nobody else.

    Args:
        owner: the quantizer; its settings and ranges are read anew at each question.
        captured: the model's graphs.
        model: the float model; only a weak reference is kept.
    """

    def __init__(self, owner: Owner, captured: CapturedModel, model: nn.Module) -> None:
        self.owner, self.captured = owner, captured
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        """The float model; raises :class:`InvalidConfig` if it no longer exists."""
        model = self._model()
        if model is None:
            raise InvalidConfig("the float model of this proxy was deleted; keep a reference to it")
        return model

    @property
    def state(self) -> QuantState:
        """The ranges."""
        return self.owner.state

    @property
    def settings(self) -> Settings:
        """What the user asked for."""
        return self.owner.settings

    def basis(self) -> dict[str, Any]:
        """All that a plan and its numbers rest on, by name, to be compared later."""
        state = self.state
        return {
            "the backend": self.owner.backend,
            **self.settings.values(),
            "ranges": (state, state.version),
        }

    def refresh(self) -> None:
        """Notice what has changed in the float model since it was captured, if it still exists."""
        if (model := self._model()) is not None:
            self.captured.refresh(model)

    def seen(self) -> None:
        """A batch was recorded: the ranges are of this model, with these weights."""
        self.state.fingerprint = self.captured.fingerprint
        self.state.note_weights(self.captured.root.module, self.captured.weights)

    def site_names(self) -> list[str]:
        """The sites that are known by now."""
        return [site.name for site, _ in self.captured.sites()]

    def plan(
        self,
        backend: Backend | None = None,
        fallen: Mapping[str, str] | None = None,
        *,
        optional: bool = True,
        slower: Mapping[str, str] | None = None,
    ) -> QuantPlan:
        """What is done with every site.

        Args:
            backend: where it will run; the quantizer's by default.
            fallen: site -> precision of what fell back to float; the quantizer's by default.
            optional: have the optional transforms that help; else none.
            slower: site -> why it is in float since that is faster; the quantizer's by default.
        """
        asked = self._asked(backend)
        if slower is None:
            slower = self.owner.slower.get((backend or self.owner.backend).name, {})
        return self._settled(asked, _in_float(self._fallen(asked, fallen), slower), optional)

    def plans(self, backend: Backend | None = None) -> tuple[QuantPlan, QuantPlan]:
        """Of what is asked for, the plan without optional transforms, and :meth:`plan`."""
        asked = self._asked(backend)
        slower = self.owner.slower.get((backend or self.owner.backend).name, {})
        final = _in_float(self._fallen(asked), slower)
        return self._settled(asked, final, optional=False), self._settled(asked, final)

    def _asked(self, backend: Backend | None) -> QuantPlan:
        """The plan with all optional transforms, before anything falls back."""
        settings, backend = self.settings, backend or self.owner.backend
        plan = self._annotated(backend, settings.qconfig, settings.overrides)
        plan = QuantPlan(plan.values(), self.captured.float_ops())
        settings.summary.check([site for each in self.captured.graphs() for site, _ in each.sites])
        plan = plan.edited(settings.summary.plan, backend.kernels())
        plan = _in_float(plan, without_result(self, plan, backend))
        return _in_float(plan, unfit(self, plan, but_wished=True))

    def _annotated(self, backend: Backend, qconfig: QConfig, overrides: Overrides) -> QuantPlan:
        return annotate(
            self.captured.sites(),
            self.model,
            backend.kernels(),
            qconfig=qconfig,
            overrides=overrides,
            module_filter=self.settings.module_filter,
        )

    def _fallen(self, plan: QuantPlan, fallen: Mapping[str, str] | None = None) -> QuantPlan:
        """``plan`` without what fell back to float."""
        fallen = self.owner.fallen_back if fallen is None else fallen
        for precision in PRECISIONS:
            names = [n for n, given in fallen.items() if given == precision and n in plan]
            plan = plan.without(names, precision=precision)
        return plan

    def lowering(
        self,
        backend: Backend | None = None,
        fallen: Mapping[str, str] | None = None,
        *,
        slower: Mapping[str, str] | None = None,
        transforms: QuantPlan | None = None,
    ) -> Lowering:
        """How the model is put on a backend, with the ranges as they are now; as :meth:`plan`.

        ``transforms`` has those of the sites that it quantizes, whatever would be settled now.
        """
        plan = self.plan(backend, fallen, slower=slower)
        plan = plan if transforms is None else transformed_as(plan, transforms)
        backend, params = backend or self.owner.backend, Calibrated(self, plan)
        held = self.state.rounded.tensors()
        return Lowering(self.captured, plan, backend, params, self._scaled(plan), held)

    def _scaled(self, plan: QuantPlan) -> dict[str, Scaling]:
        """What is scaled of the parameters that stay in float."""
        made = self.state.rounded
        codes = {
            f"{site.module}.weight"
            for site, _ in (self.captured.sites() if made.scaled else ())
            if site.name in made.sites and site.name in plan and plan[site.name].quantized
        }
        return {name: how for name, how in made.scaled.items() if name not in codes}

    def probing(self) -> Lowering:
        """How an AMP proxy quantizes a site by itself: as planned, with weights not rounded yet."""
        plan = self.plan(fallen={})
        params = Calibrated(self, plan, rounded=False)
        return Lowering(self.captured, plan, self.owner.backend, params)

    def candidate(self, config: QConfig) -> Lowering:
        """How the model would be quantized if every site were asked to be ``config``."""
        plan = self._annotated(self.owner.backend, config, {})
        plan = self._settled(plan, plan)
        params = Calibrated(self, plan, rounded=False)
        return Lowering(self.captured, plan, self.owner.backend, params)

    def _settled(self, plan: QuantPlan, final: QuantPlan, optional: bool = True) -> QuantPlan:
        """``final``, ``plan`` with more in float, with optional transforms where they help only."""
        asked = {each for site in plan.values() for each in site.transforms if each.optional}
        if not asked:
            return final
        found: dict[Transform, Mapping[str, Transform | None]] = {}
        if optional:
            self._refresh_settled()
            for each in asked:
                hindered = self._once(each, final, each.hindered)
                helped = self._once(each, plan, each.settled).items()
                found[each] = {name: made for name, made in helped if name not in hindered}

        def kept(site: SitePlan) -> SitePlan:
            made = {
                each: found.get(each, {}).get(site.name) if each in asked else each
                for each in site.transforms
            }
            rivals = [x for x in made if x in asked and made[x] is not None and x.changes_input]
            if len(rivals) > 1:
                every = ((each, self._once(each, plan, each.gains)) for each in rivals)
                gains = {each: of.get(site.name, 0.0) for each, of in every}
                made |= dict.fromkeys(set(rivals) - {max(rivals, key=gains.__getitem__)})
            return replace(site, transforms=tuple(x for x in made.values() if x is not None))

        return QuantPlan(map(kept, final.values()), final.float_ops)

    def _refresh_settled(self) -> None:
        """Forget where optional transforms help if that rested on other ranges or weights."""
        weights = weight_checksums(self.captured.root.module)
        basis = (weakref.ref(self.state), self.state.version, weights, self.captured.graph_count)
        if self.captured.settled_on != basis:
            self.captured.settled_on, self.captured.settled = basis, {}

    def _once(self, transform: Transform, plan: QuantPlan, ask: Callable[..., Any]) -> Any:
        """What a transform says of a plan; it takes long, so it is asked once for each plan."""
        sites = tuple(
            (site.name, site.activation, site.weight, transform in site.transforms)
            for site in plan.values()
            if site.quantized
        )
        settled, key = self.captured.settled, (ask.__name__, transform, sites)
        if key not in settled:
            with torch.no_grad():
                settled[key] = ask(plan, Calibrated(self, plan))
        return settled[key]

    # What calibration records

    def wanted(self, keys: Iterable[str]) -> dict[str, Makers]:
        """What is recorded of these tensors: their range, and what transforms and methods ask for.

        Args:
            keys: of tensors that sites use.
        """
        found: dict[str, dict[str, Callable[[], Statistic]]] = {}
        keys = list(dict.fromkeys(keys))
        users = self._users(frozenset(keys))
        for key in keys:
            using, found[key] = users[key], {}
            ranged = any(key in site.ranged for site in using) or self._gives_result(using)
            if ranged and any(self._ranges(site) for site in _deciding_on_ranges(key, using)):
                found[key][RANGE] = partial(self._observer, key, using)
            for site in using:
                for method in self._methods(site):
                    found[key] |= method.statistics(site).get(key, {})
        return dict(found)

    def _ranges(self, site: Site) -> bool:
        """Whether a site may want ranges, on whatever backend."""
        edit = self.settings.summary.plan.get(site.name)
        if edit is not None and edit.quantized:
            return edit.needs_ranges
        config = self._config(site)
        return config is None or config.needs_ranges

    def _gives_result(self, using: Iterable[Site]) -> bool:
        """Whether the backend has a kernel that quantizes a site's own result."""
        table = self.owner.backend.kernels()
        return any(row.own_result for site in using for row in table.of(site.op))

    def _users(self, keys: frozenset[str] | None = None) -> dict[str, list[Site]]:
        """Tensor key -> the sites that read or make it; of all or of these keys at least."""
        using: dict[str, list[Site]] = {}
        for prepared in self.captured.graphs():
            if keys is not None and keys.isdisjoint(prepared.observed):
                continue
            for site, _ in prepared.sites:
                for key in dict.fromkeys(site.keys):
                    using.setdefault(key, []).append(site)
        return using

    def _methods(self, site: Site) -> list[Method]:
        """The transforms and the method of a site, but for those that get their data in blocks."""
        asked = self.settings.summary.plan.get(site.name) or self._config(site)
        if asked is None:
            return []
        methods = [*asked.transforms, *([asked.method] if asked.method is not None else [])]
        return [x for x in methods if not (x.wants_blocks or x.refusal(site))]

    def _observer(self, key: str, using: Iterable[Site]) -> Observer:
        """A new observer for a tensor: that of the site which decides, see :meth:`observed_by`."""
        _, config = self._deciding(key, using)
        return made_observer((config and config.observer) or DEFAULT_OBSERVER, PerTensor())

    def observed_by(self, key: str) -> tuple[Site, QConfig | None]:
        """The site that decides by what a tensor is observed, and its configuration."""
        return self._deciding(key, self._users()[key])

    def _deciding(self, key: str, using: Iterable[Site]) -> tuple[Site, QConfig | None]:
        """Of the sites that use a tensor, the first whose override names an observer.

        One that reads it goes before the one that makes it. Without such an override, it is the
        first that reads it.
        """

        def rank(candidate: tuple[Site, QConfig | None]) -> tuple[bool, bool]:
            site, config = candidate
            named = config is not None and config.observer is not None
            return named and config is not self.settings.qconfig, key in (
                *site.inputs,
                *site.internals,
            )

        return max(((site, self._config(site)) for site in using), key=rank)

    def tell_observers(self) -> None:
        """Log a warning of tensors that were recorded by another observer than is asked for now."""
        settings = self.settings
        if all(
            c is None or c.observer is None
            for c in (settings.qconfig, *settings.overrides.values())
        ):
            return
        found = []
        for key, sites in self._users().items():
            recorded = self.state.find(key)
            if key in settings.summary.ranges or recorded is None:
                continue
            site, config = self._deciding(key, sites)
            if config is not None and config.observer is not None:
                wanted = observer_name(config.observer)
                if recorded.name != wanted:
                    found.append(f"{site.name} by {recorded.name!r}, not {wanted!r}")
        if found:
            rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
            logger.warning(
                "observers that were set after calibration have no effect: recorded were %s%s. A "
                "new Quantizer() with these settings and quantizer.calib(model) applies them",
                ", ".join(found[:3]),
                rest,
            )

    def _config(self, site: Site) -> QConfig | None:
        return self.settings.config_of(self.captured.root.module, site)


def _deciding_on_ranges(key: str, using: list[Site]) -> list[Site]:
    """Of the sites that use a tensor, those that may quantize it; its maker if none does."""
    keys = {site: (*site.inputs, *site.internals, site.fused_output) for site in using}
    return [site for site in using if key in keys[site]] or using


def _in_float(plan: QuantPlan, reasons: Mapping[str, str]) -> QuantPlan:
    """``plan`` with some sites in float, for these reasons."""
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason and name in plan]
        plan = plan.without(names, reason=reason, reduced=True)
    return plan
