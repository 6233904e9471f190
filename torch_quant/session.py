"""One quantizer and one model: captured graphs, settings, ranges, and the plan that they give."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from torch_quant.algorithms.smoothquant import SmoothQuant
from torch_quant.backends import Backend
from torch_quant.backends.lowering import Lowering
from torch_quant.config import ObserverLike, QConfig
from torch_quant.core.granularity import Granularity, PerChannel, PerTensor
from torch_quant.core.plan import PRECISIONS, QuantPlan, SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.annotate import annotate
from torch_quant.graph.sites import Site
from torch_quant.model import CapturedModel
from torch_quant.settings import Settings, observer_name
from torch_quant.state import CHANNELS, RANGE, Makers, QuantState
from torch_quant.statistics import (
    DEFAULT_OBSERVER,
    MinMaxObserver,
    Observer,
    Statistic,
    observer_class,
)

__all__ = ["Calibrated", "Owner", "Session", "Snapshot"]

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
        self.state.note_weights(self.captured.region.module)

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
        return Lowering(self.captured, plan, backend or self.owner.backend, Calibrated(self, plan))

    # What calibration records

    def statistics(self, key: str) -> Makers:
        """What is recorded of a tensor: its range, and the extremes of its channels if wanted."""
        smoothed = (
            site.smoothable and site.inputs == (key,) and self._smooths(site)
            for prepared in self.captured.graphs()
            for site, _ in prepared.sites
        )
        found: dict[str, Callable[[], Statistic]] = {RANGE: partial(self.observer, key)}
        if any(smoothed):
            found[CHANNELS] = partial(MinMaxObserver, PerChannel(-1))
        return found

    def _smooths(self, site: Site) -> bool:
        config = self.settings.summary.plan.get(site.name) or self._config(site)
        return config is not None and config.smooth is not None

    def observer(self, key: str) -> Observer:
        """A new observer for a tensor: that of the site which decides, see :meth:`observed_by`."""
        _, config = self.observed_by(key)
        return _made((config and config.observer) or DEFAULT_OBSERVER, PerTensor())

    def observed_by(self, key: str) -> tuple[Site, QConfig | None]:
        """The site that decides by what a tensor is observed, and its configuration."""
        sites = (site for prepared in self.captured.graphs() for site, _ in prepared.sites)
        using = [site for site in sites if key in site.keys]
        if not using:
            raise QuantError(f"no site uses the tensor {key}")
        return self._deciding(key, using)

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
        using: dict[str, list[Site]] = {}
        for prepared in self.captured.graphs():
            for site, _ in prepared.sites:
                for key in site.keys:
                    using.setdefault(key, []).append(site)
        found = []
        for key, sites in using.items():
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

    def weight_observer(self, site: Site, granularity: Granularity) -> Observer:
        """A new observer for a site's weight."""
        config = self._config(site) or self.settings.qconfig
        return _made(config.weight_observer, granularity)

    def _config(self, site: Site) -> QConfig | None:
        return self.settings.config_of(self.captured.region.module, site)


class Calibrated:
    """Scales and zero points from calibration, and from the weights as they are.

    Args:
        session: has the ranges.
        plan: which sites are smoothed.
    """

    def __init__(self, session: Session, plan: QuantPlan) -> None:
        self._session = session
        self._sites = {site.name: site for site, _ in session.captured.sites()}
        self._smoothing = SmoothQuant(session.captured, plan, session.state)

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Of the tensor ``key``; raises :class:`NotCalibrated` where no data passed it."""
        return self._smoothing.grid(key, spec)

    def factor(self, entry: SitePlan, key: str) -> Tensor:
        """What the channels of a site's input are divided by; raises as SmoothQuant does."""
        return self._smoothing.factor(entry, key)

    def weight(self, site: str, weight: Tensor, spec: QuantSpec, axis: int) -> QParams:
        """Of a site's weight; raises :class:`QuantError` if it is not finite."""
        spec = replace(spec, granularity=spec.granularity.on(axis))
        observer = self._session.weight_observer(self._sites[site], spec.granularity)
        try:
            observer.observe(weight)
        except QuantError as error:
            raise QuantError(f"the weight of {site}: {error}; mend the model's weights") from error
        return observer.qparams(spec)


def _made(choice: ObserverLike, granularity: Granularity) -> Observer:
    factory = observer_class(choice) if isinstance(choice, str) else choice
    return factory(granularity)
