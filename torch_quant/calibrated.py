"""Scales, zero points and codes of a quantized model: from calibration, and from its weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx

from torch_quant.algorithms import DEFAULT_METHOD, without_data
from torch_quant.core.methods import WeightMethod
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.rounded import RoundedWeight, RoundedWeights, checksum
from torch_quant.core.spec import QuantSpec
from torch_quant.core.telling import at_site
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.graph.annotate import weight_readers
from torch_quant.graph.sites import Site, find_sites
from torch_quant.ops.table import OPERATORS
from torch_quant.passes.constants import evaluate
from torch_quant.state import QuantState
from torch_quant.statistics import RANGE, Observer, Statistic

if TYPE_CHECKING:
    from torch_quant.backends import Backend
    from torch_quant.session import Session

__all__ = [
    "Calibrated",
    "is_unfit",
    "tell_unfit",
    "tell_unrecorded",
    "unfit",
    "without_result",
]

logger = logging.getLogger("torch_quant")

V = TypeVar("V")
_UNFIT = "would keep too little of it"
_PLAIN = QuantSpec()
_UNRECORDED = "quantizes its own result, whose range was not recorded"


class Calibrated:
    """Scales and zero points from calibration, and from the weights as they are.

    Args:
        session: has the ranges.
        plan: says how weights are rounded.
        rounded: take what :meth:`Quantizer.round_weights` made; else, methods that work on blocks
            are replaced by rounding to nearest.
    """

    def __init__(self, session: Session, plan: QuantPlan, *, rounded: bool = True) -> None:
        self._session, self._plan = session, plan
        self._made = session.state.rounded if rounded else RoundedWeights()
        self._blocks = rounded
        self._sites: dict[str, list[Site]] = {}
        for prepared in session.captured.graphs():
            for site, _ in prepared.sites:
                self._sites.setdefault(site.name, []).append(site)
        self._shared: dict[Hashable, Any] = {}
        every = (site for same in self._sites.values() for site in same)
        readers = weight_readers(every, session.model).items()
        self._tied = {x: w.data_ptr() for w, names in readers if len(names) > 1 for x in names}

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Of the tensor ``key``; raises :class:`NotCalibrated` where no data passed it."""
        return self._session.state.qparams(key, spec)

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """Of a site's weight; raises :class:`QuantError` if it cannot be quantized."""
        entry = self._plan[site]
        method = entry.method or DEFAULT_METHOD
        spec = spec.on(axis)
        data = method.wants_statistics or method.wants_blocks or entry.transforms
        if weight.data_ptr() == self._tied.get(site) and not data:
            made: tuple[Tensor, QParams] = self.shared(
                ("tied", weight.data_ptr(), weight.shape, weight.stride(), spec, method),
                lambda: self._weight(site, weight, spec, method),
            )
            return made
        return self._weight(site, weight, spec, method)

    def _weight(
        self, site: str, weight: Tensor, spec: QuantSpec, method: WeightMethod
    ) -> tuple[Tensor, QParams]:
        entry = self._plan[site]
        rounded = self._rounded(site, weight, spec, method)
        if rounded is not None:
            return rounded.codes, rounded.qparams
        blocks = [each for each in (*entry.transforms, method) if each.wants_blocks]
        left_out = site in self._made.left_out
        if blocks and (not self._blocks or left_out):
            method = without_data(method)
        elif left_out and not self._session.state.statistics:
            method = without_data(method)  # and nothing was calibrated besides
        elif blocks:
            was = ", and it was in float, or on another backend, when the weights were rounded"
            raise NotCalibrated(
                f"{site}: {blocks[0]} works on blocks of the model{was if self._made else ''}: run "
                "quantizer.round_weights(model, batches) before quantizer.quantize(model)"
            )
        known = self._behind(method, entry)
        try:
            with at_site(site):
                return method.quantize(weight, spec, known)
        except NotCalibrated:
            raise
        except QuantError as error:
            raise QuantError(f"the weight of {site}: {error}; fix the model's weights") from error

    def _behind(self, method: WeightMethod, entry: SitePlan) -> Mapping[str, Statistic]:
        """What was recorded for a weight method, as the layer reads its input behind transforms."""
        found: Mapping[str, Statistic] = self._known(method, entry.name)
        for each in entry.transforms if found else ():
            if not each.changes_input:
                continue
            moved = each.moved(found, entry.inputs[0], self)
            if moved is None:
                raise InvalidConfig(
                    f"{entry.name}: {method} asks for statistics of the layer's input, which "
                    f"{each} changes; use one of them there"
                )
            found = moved
        return found

    def _rounded(
        self, site: str, weight: Tensor, spec: QuantSpec, method: WeightMethod
    ) -> RoundedWeight | None:
        """What :meth:`Quantizer.round_weights` made of a weight; its later calls share it."""
        made = self._made
        name = site if site in made.sites else site.partition("@")[0]
        rounded = made.sites.get(name)
        again = "run quantizer.round_weights(model, batches) again"
        if rounded is None:
            paths = {f"{each.module}.weight" for each in self._sites[site]}
            if paths & made.scaled.keys():
                raise InvalidConfig(
                    f"{site} was in float when the weights were rounded, and its weight was scaled "
                    f"only: {again}"
                )
            return None
        if (rounded.qparams.spec, rounded.method) != (spec, method):
            raise InvalidConfig(
                f"{site} was rounded to {rounded.qparams.spec} by {rounded.method}, and is to be "
                f"{spec} by {method} now: {again}"
            )
        if rounded.codes.shape != weight.shape:
            sizes = tuple(rounded.codes.shape), tuple(weight.shape)
            raise InvalidConfig(
                f"the weight of {site} was {sizes[0]} when it was rounded and is {sizes[1]} now, "
                f"as OutlierSplit copies other channels of what it reads or computes: {again}"
            )
        if rounded.checksum != checksum(weight):
            raise InvalidConfig(f"the weight of {site} has changed since it was rounded: {again}")
        made.check(name)
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
        if whole is not None and found.batches < whole.batches and not given:
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

    def kept(self, key: Hashable, make: Callable[[], V]) -> V:
        """What ``make`` gave when ``key`` was first asked for."""
        return self.shared(("kept", key), make)

    def derived(self, key: str, spec: QuantSpec, found: QParams) -> QParams:
        """Of a tensor that a transform made: as its statistics have it."""
        return found


def without_result(session: Session, plan: QuantPlan, backend: Backend) -> dict[str, str]:
    """Sites whose inputs were recorded, and whose own results were not in each batch, and why.

    Args:
        session: of the model.
        plan: what would be done.
        backend: where it runs.
    """
    state, given = session.state, session.settings.summary.ranges
    if not state.batches or not any(row.own_result for row in backend.kernels().rows):
        return {}
    graphs = [[site for site, _ in each.sites] for each in session.captured.graphs()]
    found = {}
    for name, each in plan.items():
        key = each.quantized_output
        inputs = [state.find(source) for source in each.inputs]
        if not (each.quantized and key) or not all(inputs):
            continue
        result = state.find(key)
        with_it = [sites for sites in graphs if any(key in site.keys for site in sites)]
        reading = [g for g in graphs if any({*each.inputs} & {*site.keys} for site in g)]
        fewest = min((source.batches for source in inputs if source is not None), default=0)
        fewer = result is not None and result.batches < fewest and len(with_it) == len(reading)
        if result is None or (fewer and not given.keys() & {key, *each.inputs}):
            count = "" if result is None else f" in {fewest - result.batches} of {fewest} batches"
            found[name] = (
                f"{backend!r} {_UNRECORDED}{count}: calibrate with Quantizer({backend.name!r})"
            )
    return found


@dataclass(frozen=True)
class _Known:
    """The numbers of calls in one graph; see :class:`~torch_quant.ops.table.Known`."""

    gm: fx.GraphModule
    state: QuantState

    def scale(self, key: str, spec: QuantSpec) -> Tensor:
        return self.state.qparams(key, spec).scale

    def is_zero(self, key: str) -> bool:
        observer = self.state.find(key)
        return isinstance(observer, Observer) and not any(x.any() for x in observer.range(_PLAIN))

    def value(self, constant: fx.Node) -> Tensor:
        return evaluate(self.gm, constant)


@torch.no_grad()
def unfit(session: Session, plan: QuantPlan, *, but_wished: bool = False) -> dict[str, str]:
    """Sites that the ranges found do not serve, and why.

    Args:
        session: of the model.
        plan: what would be done.
        but_wished: leave out those that the user has asked for; see :func:`_wished`.
    """
    rows = {name for name, row in OPERATORS.items() if row.unfit is not None}
    state = session.state
    found: dict[str, str] = {}
    if not state.batches or not any(each.op in rows for each in plan.values()):
        return {}
    for prepared in session.captured.graphs():
        for node, pattern, site in list(find_sites(prepared.canonical.graph)):
            entry = plan.get(site.name)
            if pattern.unfit is None or entry is None or not entry.quantized:
                continue
            if entry.needs_ranges and all(state.find(key) is not None for key in entry.inputs):
                why = pattern.unfit(node, entry, _Known(prepared.canonical, state))
                if why:
                    found[site.name] = f"{entry.format} {_UNFIT}, {why}"
    explicit = _wished(session) if found and but_wished else frozenset()
    return {name: why for name, why in found.items() if name not in explicit}


def is_unfit(entry: SitePlan) -> bool:
    """Whether a site is in float as the ranges found do not serve it."""
    return _UNFIT in entry.reason


def _wished(session: Session) -> frozenset[str]:
    """Sites that an override, a summary or formats of the quantizer's own QConfig quantize.

    Args:
        session: of the model.
    """
    settings = session.settings
    default = settings.qconfig
    formats = default.input is not None or default.weight is not None
    found = set()
    for site, _ in session.captured.sites():
        edit = settings.summary.plan.get(site.name)
        own = settings.config_of(session.captured.root.module, site) is not default
        if formats or own or (edit is not None and edit.quantized):
            found.add(site.name)
    return frozenset(found)


def tell_unfit(session: Session, plan: QuantPlan) -> None:
    """Log a warning of sites that the ranges found do not serve, quantized as was asked for.

    Args:
        session: of the model.
        plan: what is done.
    """
    for name, why in unfit(session, plan).items():
        logger.warning("%s is quantized as it was asked to be, but %s", name, why)


def tell_unrecorded(plan: QuantPlan) -> None:
    """Log a warning of sites in float since calibration recorded too little, or too wide ranges."""
    marks = (_UNRECORDED, _UNFIT)
    found = {x: site.reason for x, site in plan.items() if any(m in site.reason for m in marks)}
    if found:
        (name, reason), *others = found.items()
        rest = f", and {len(others)} more" if others else ""
        logger.warning("stays in float: %s (%s)%s", name, reason, rest)
