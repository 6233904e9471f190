"""One quantizer and one model: captured graphs, settings, ranges, and the plan that they give."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor, fx, nn

from torch_quant.algorithms import DEFAULT_METHOD
from torch_quant.backends import Backend
from torch_quant.backends.lowering import Lowering
from torch_quant.config import QConfig, made_observer
from torch_quant.core.granularity import PerTensor
from torch_quant.core.methods import Method, WeightMethod
from torch_quant.core.plan import PRECISIONS, QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.rounded import RoundedWeight, checksum
from torch_quant.core.spec import QuantSpec
from torch_quant.core.telling import at_site
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.graph.annotate import annotate
from torch_quant.graph.sites import Site
from torch_quant.model import CapturedModel
from torch_quant.settings import Settings, observer_name
from torch_quant.state import Makers, QuantState
from torch_quant.statistics import DEFAULT_OBSERVER, RANGE, Observer, Statistic

__all__ = ["Calibrated", "Owner", "Session", "Snapshot"]

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


@dataclass(frozen=True)
class Snapshot:
    """A quantizer as it was: what it learns later does not reach this.

    Args:
        backend: where the model runs.
        settings: what the user asked for.
        state: the ranges.
        fallen_back: site -> precision of what fell back to float.
    """

    backend: Backend
    settings: Settings
    state: QuantState
    fallen_back: Mapping[str, str]

    @classmethod
    def of(cls, owner: Owner, backend: Backend) -> Snapshot:
        """A copy of what ``owner`` knows now, to run on ``backend``."""
        state = owner.state.copied()
        settings = replace(owner.settings, overrides=dict(owner.settings.overrides))
        return cls(backend, settings, state, dict(owner.fallen_back))


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
        self.state.note_weights(self.captured.root.module)

    def plan(
        self, backend: Backend | None = None, fallen: Mapping[str, str] | None = None
    ) -> QuantPlan:
        """What is done with every site.

        Args:
            backend: where it will run; the quantizer's by default.
            fallen: site -> precision of what fell back to float; the quantizer's by default.
        """
        kernels, settings = (backend or self.owner.backend).kernels(), self.settings
        plan = annotate(
            self.captured.sites(),
            self.model,
            kernels,
            qconfig=settings.qconfig,
            overrides=settings.overrides,
            module_filter=settings.module_filter,
        )
        plan = QuantPlan(plan.values(), self.captured.float_ops())
        settings.summary.check([site for each in self.captured.graphs() for site, _ in each.sites])
        plan = plan.edited(settings.summary.plan, kernels)
        fallen = self.owner.fallen_back if fallen is None else fallen
        for precision in PRECISIONS:
            names = [n for n, given in fallen.items() if given == precision and n in plan]
            plan = plan.without(names, precision=precision)
        return plan

    def lowering(
        self, backend: Backend | None = None, fallen: Mapping[str, str] | None = None
    ) -> Lowering:
        """How the model is put on a backend, with the ranges as they are now; as :meth:`plan`."""
        plan = self.plan(backend, fallen)
        backend, params = backend or self.owner.backend, Calibrated(self, plan)
        return Lowering(self.captured, plan, backend, params, self.state.rounded.scaled)

    def candidate(self, config: QConfig) -> Lowering:
        """How the model would be quantized if every site were asked to be ``config``."""
        settings = self.settings
        plan = annotate(
            self.captured.sites(),
            self.model,
            self.owner.backend.kernels(),
            qconfig=config,
            overrides={},
            module_filter=settings.module_filter,
        )
        return Lowering(self.captured, plan, self.owner.backend, Calibrated(self, plan))

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
            if any(self._ranges(site) for site in _deciding_on_ranges(key, using)):
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
        """The transforms and the weight method that a site would be quantized with."""
        asked = self.settings.summary.plan.get(site.name) or self._config(site)
        if asked is None:
            return []
        methods = [*asked.transforms, *([asked.method] if asked.method is not None else [])]
        return [each for each in methods if not each.refusal(site)]

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


class Calibrated:
    """Scales and zero points from calibration, and from the weights as they are.

    Args:
        session: has the ranges.
        plan: says how weights are rounded.
    """

    def __init__(self, session: Session, plan: QuantPlan) -> None:
        self._session, self._plan = session, plan
        self._sites: dict[str, list[Site]] = {}
        for prepared in session.captured.graphs():
            for site, _ in prepared.sites:
                self._sites.setdefault(site.name, []).append(site)
        self._shared: dict[Hashable, Any] = {}

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Of the tensor ``key``; raises :class:`NotCalibrated` where no data passed it."""
        return self._session.state.qparams(key, spec)

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """Of a site's weight; raises :class:`QuantError` if it cannot be quantized."""
        entry = self._plan[site]
        method = entry.method or DEFAULT_METHOD
        spec = replace(spec, granularity=spec.granularity.on(axis))
        rounded = self._rounded(site, weight, spec, method)
        if rounded is not None:
            return rounded.codes, rounded.qparams
        blocks = [each for each in (*entry.transforms, method) if each.wants_blocks]
        if blocks and self._session.state.rounded:  # round_weights has said that it left it out
            method = DEFAULT_METHOD
        elif blocks:
            raise NotCalibrated(
                f"{site}: {blocks[0]} works on blocks of the model: run "
                "quantizer.round_weights(model, batches) before quantizer.quantize(model)"
            )
        if entry.transforms and method.wants_statistics:
            raise InvalidConfig(
                f"{site}: {method} asks for statistics of the layer's input, which "
                f"{entry.transforms[0]} changes; use one of them there"
            )
        try:
            with at_site(site):
                return method.quantize(weight, spec, self._known(method, site))
        except NotCalibrated:
            raise
        except QuantError as error:
            raise QuantError(f"the weight of {site}: {error}; mend the model's weights") from error

    def _rounded(
        self, site: str, weight: Tensor, spec: QuantSpec, method: WeightMethod
    ) -> RoundedWeight | None:
        """What :meth:`Quantizer.round_weights` made of a weight; its later calls share it."""
        made = self._session.state.rounded
        rounded = made.sites.get(site) or made.sites.get(site.partition("@")[0])
        if rounded is None or rounded.shape != tuple(weight.shape):
            return None
        again = "run quantizer.round_weights(model, batches) again"
        if (rounded.qparams.spec, rounded.method) != (spec, method):
            raise InvalidConfig(
                f"{site} was rounded to {rounded.qparams.spec} by {rounded.method}, and is to be "
                f"{spec} by {method} now: {again}"
            )
        if rounded.checksum != checksum(weight):
            raise InvalidConfig(f"the weight of {site} has changed since it was rounded: {again}")
        return rounded

    def _known(self, method: WeightMethod, name: str) -> dict[str, Statistic]:
        """What was recorded for a weight method, of all that the site reads in any graph."""
        wanted: dict[tuple[str, str], Callable[[], Statistic]] = {}
        for site in self._sites[name]:
            for key, makers in method.statistics(site).items():
                wanted |= {(key, what): make for what, make in makers.items()}
        found: dict[str, Statistic] = {}
        for (key, what), make in sorted(wanted.items(), key=lambda each: each[0]):
            passed_by = method.serves_unreached and self._session.state.passed_by(key, what)
            statistic = make() if passed_by else self.statistic(key, what)
            if what in found:
                found[what] = copy.deepcopy(found[what])
                found[what].merge(statistic)
            else:
                found[what] = statistic
        return found

    def statistic(self, key: str, what: str) -> Statistic:
        """What was recorded of a tensor; raises :class:`NotCalibrated` unless in all batches."""
        found, whole = (self._session.state.find(key, each) for each in (what, RANGE))
        if found is None:
            raise NotCalibrated(
                f"the {what} of {key} were not recorded: give QConfig(transforms=..., method=...) "
                "to the quantizer before running quantizer.calib(model)"
            )
        given = key in self._session.settings.summary.ranges
        if whole is not None and found.batches != whole.batches and not given:
            raise NotCalibrated(
                f"the {what} of {key} were recorded in {found.batches} of {whole.batches} batches "
                "only: the transform or method came after calibration had begun; calibrate anew"
            )
        return found

    def graphs(self) -> Iterator[fx.GraphModule]:
        """The canonical graphs of the whole model."""
        return (prepared.canonical for prepared in self._session.captured.graphs())

    def shared(self, key: Hashable, make: Callable[[], V]) -> V:
        """What ``make`` gave when ``key`` was first asked for."""
        if key not in self._shared:
            self._shared[key] = make()
        found: V = self._shared[key]
        return found
