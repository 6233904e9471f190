"""What the user asked for, applied to a captured model: plans, observers and grids of weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torch_quant.algorithms.smoothquant import SmoothQuant, channels_key, is_channels_key
from torch_quant.backends import Backend
from torch_quant.backends.lowering import Lowering
from torch_quant.config import ModuleFilter, ObserverLike, Overrides, QConfig, check_names
from torch_quant.core.plan import PRECISIONS, QuantPlan, SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import QuantError
from torch_quant.graph.annotate import annotate
from torch_quant.graph.rules import (
    OP_TYPES,
    OPERATORS,
    is_pattern,
    modules_of,
    qconfig_of,
    rules_of,
)
from torch_quant.graph.sites import Site
from torch_quant.io.summary import Summary
from torch_quant.model import CapturedModel
from torch_quant.observers import (
    DEFAULT_OBSERVER,
    MinMaxObserver,
    Observer,
    observer_class,
)
from torch_quant.state import QuantState

__all__ = ["Calibrated", "Settings", "observer_name"]

logger = logging.getLogger("torch_quant")


@dataclass(frozen=True)
class Settings:
    """Configuration of one quantizer.

    Args:
        qconfig: formats and observers where the backend's own should not be used.
        overrides: exceptions to it.
        module_filter: which sites to quantize at all.
        summary: a file that was read; goes before all of these, site by site.
    """

    qconfig: QConfig
    overrides: Overrides
    module_filter: ModuleFilter
    summary: Summary

    def values(self) -> dict[str, Any]:
        """Every setting by name, to be compared later: what may change in place is copied."""
        return {
            "qconfig": self.qconfig,
            "overrides": dict(self.overrides),
            "module_filter": self.module_filter,
            "the summary": self.summary,
        }

    def check(self) -> None:
        """Raise :class:`InvalidConfig` for an override of nothing, or one that is no QConfig."""
        rules_of(self.overrides)

    def check_names(self, model: nn.Module) -> None:
        """A misspelt module name should not wait for the first batch to be found.

        What may name an operator inside a module, or outside of all, is checked once captured.
        """
        known = [name for name, _ in model.named_modules() if name]
        tops = {name.partition(".")[0] for name in known}
        keys = [str(rule.key) for rule in rules_of(self.overrides) if rule.kind == "name"]
        given = [("ModuleFilter name", name) for name in self.module_filter.names]
        given += [("override", key) for key in keys]
        for what, pattern in given:
            operator = re.sub(r"(_\d+)?(@\d+)?$", "", pattern) in OPERATORS
            if not (pattern.partition(".")[0] in tops or operator or is_pattern(pattern)):
                check_names([pattern], known, what, OP_TYPES if what == "override" else ())

    def plan(
        self,
        captured: CapturedModel,
        model: nn.Module,
        backend: Backend,
        fallen: Mapping[str, str] | None = None,
    ) -> QuantPlan:
        """What is done with every site.

        Args:
            captured: the model's graphs.
            model: the float model.
            backend: where it will run.
            fallen: site -> precision of what fell back to float.
        """
        kernels = backend.kernels()
        plan = annotate(
            captured.sites(),
            model,
            kernels,
            qconfig=self.qconfig,
            overrides=self.overrides,
            module_filter=self.module_filter,
        )
        plan = QuantPlan(plan.values(), captured.float_ops())
        self.summary.check([site for each in captured.graphs() for site, _ in each.sites])
        plan = plan.edited(self.summary.plan, kernels)
        for precision in PRECISIONS:
            names = [n for n, given in (fallen or {}).items() if given == precision and n in plan]
            plan = plan.without(names, precision=precision)
        return plan

    def lowering(
        self,
        captured: CapturedModel,
        model: nn.Module,
        backend: Backend,
        state: QuantState,
        fallen: Mapping[str, str] | None = None,
    ) -> Lowering:
        """How the model is put on a backend, with the ranges as they are now."""
        plan = self.plan(captured, model, backend, fallen)
        return Lowering(captured, plan, backend, Calibrated(self, captured, model, plan, state))

    def statistics(self, captured: CapturedModel, key: str) -> tuple[str, ...]:
        """Under which names a tensor is recorded: its own, and that of its channels if wanted."""
        smoothed = (
            site.smoothable and site.inputs == (key,) and self._smooths(captured, site)
            for prepared in captured.graphs()
            for site, _ in prepared.sites
        )
        return (key, channels_key(key)) if any(smoothed) else (key,)

    def _smooths(self, captured: CapturedModel, site: Site) -> bool:
        edit = self.summary.plan.get(site.name)
        config = edit or self._config(captured.region.module, site)
        return config is not None and config.smooth is not None

    def observer(self, captured: CapturedModel, key: str) -> Observer:
        """A new observer for a tensor: that of the site which decides, see :meth:`observed_by`."""
        if is_channels_key(key):
            return MinMaxObserver(ch_axis=-1)
        _, config = self.observed_by(captured, key)
        return _make((config and config.observer) or DEFAULT_OBSERVER, None)

    def observed_by(self, captured: CapturedModel, key: str) -> tuple[Site, QConfig | None]:
        """The site that decides by what a tensor is observed, and its configuration."""
        sites = (site for prepared in captured.graphs() for site, _ in prepared.sites)
        using = [site for site in sites if key in site.keys]
        if not using:
            raise QuantError(f"no site uses the tensor {key}")
        return self._deciding(captured.region.module, key, using)

    def _deciding(
        self, model: nn.Module, key: str, using: Iterable[Site]
    ) -> tuple[Site, QConfig | None]:
        """Of the sites that use a tensor, the first whose override names an observer.

        One that reads it goes before the one that makes it. Without such an override, it is the
        first that reads it.
        """

        def rank(candidate: tuple[Site, QConfig | None]) -> tuple[bool, bool]:
            site, config = candidate
            named = config is not None and config.observer is not None
            return named and config is not self.qconfig, key in (*site.inputs, *site.internals)

        return max(((site, self._config(model, site)) for site in using), key=rank)

    def tell_observers(self, captured: CapturedModel, state: QuantState) -> None:
        """Log a warning of tensors that were recorded by another observer than is asked for now."""
        if all(c is None or c.observer is None for c in (self.qconfig, *self.overrides.values())):
            return
        using: dict[str, list[Site]] = {}
        for prepared in captured.graphs():
            for site, _ in prepared.sites:
                for key in site.keys:
                    using.setdefault(key, []).append(site)
        found = []
        for key, sites in using.items():
            recorded = state.observers.get(key)
            if key in self.summary.ranges or recorded is None or not recorded.batches:
                continue
            site, config = self._deciding(captured.region.module, key, sites)
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

    def _config(self, model: nn.Module, site: Site) -> QConfig | None:
        return qconfig_of(site, modules_of(model, site), self.qconfig, self.overrides)

    def weight_observer(self, model: nn.Module, site: Site, axis: int | None) -> Observer:
        """A new observer for a site's weight, ``axis`` being that of its channels."""
        config = self._config(model, site) or self.qconfig
        return _make(config.weight_observer, axis)


class Calibrated:
    """Scales and zero points from calibration, and from the weights as they are.

    Args:
        settings: what the user asked for.
        captured: the model's graphs.
        model: the float model.
        plan: which sites are smoothed.
        state: the ranges.
    """

    def __init__(
        self,
        settings: Settings,
        captured: CapturedModel,
        model: nn.Module,
        plan: QuantPlan,
        state: QuantState,
    ) -> None:
        self._settings, self._model = settings, model
        self._sites = {site.name: site for site, _ in captured.sites()}
        self._smoothing = SmoothQuant(captured, plan, state)

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Of the tensor ``key``; raises :class:`NotCalibrated` where no data passed it."""
        return self._smoothing.grid(key, spec)

    def factor(self, entry: SitePlan, key: str) -> Tensor:
        """What the channels of a site's input are divided by; raises as SmoothQuant does."""
        return self._smoothing.factor(entry, key)

    def weight(self, site: str, weight: Tensor, spec: QuantSpec, axis: int) -> QParams:
        """Of a site's weight; raises :class:`QuantError` if it is not finite."""
        channels = axis if spec.per_channel else None
        observer = self._settings.weight_observer(self._model, self._sites[site], channels)
        try:
            observer.observe(weight)
        except QuantError as error:
            raise QuantError(f"the weight of {site}: {error}; mend the model's weights") from error
        return observer.qparams(spec)


def observer_name(choice: ObserverLike) -> str:
    """The name of an observer that a :class:`QConfig` asks for.

    >>> observer_name("minmax"), observer_name(MinMaxObserver)
    ('minmax', 'minmax')
    """
    if isinstance(choice, str):
        return choice
    return str(getattr(choice, "name", getattr(choice, "__qualname__", repr(choice))))


def _make(choice: ObserverLike, axis: int | None) -> Observer:
    factory = observer_class(choice) if isinstance(choice, str) else choice
    return factory(axis)
