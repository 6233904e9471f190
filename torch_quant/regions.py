"""Which parts of a model are slower quantized than in float, on this machine.

A part is measured by the whole model, quantized with it and without it, in turns: so its quantizers
count, what its neighbours hand on as integers, and what they no longer can.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from torch_quant.amp.groups import find_groups
from torch_quant.backends import Backend
from torch_quant.core.naming import did_you_mean
from torch_quant.core.plan import SLOWER, QuantPlan, SitePlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.progress import hidden
from torch_quant.graph.rules import modules_of, rules_for
from torch_quant.graph.running import frozen
from torch_quant.graph.sites import Site
from torch_quant.graph.twin import twin_of
from torch_quant.profiling import in_turns, undisturbed
from torch_quant.report.regions import Difference, Region, Regions
from torch_quant.session import Session

__all__ = ["WAYS", "Measure", "find_slower", "measured_regions", "stopwatch"]

logger = logging.getLogger("torch_quant")

Measure = Callable[[Mapping[str, nn.Module]], Mapping[str, Sequence[float]]]
"""From models to the milliseconds of calls of each, made in turns."""

WAYS = ("operator", "module")
"""By what sites are one region."""
_MOST_PARTS = 16
"""Parts of the model that are regions, where these are modules."""
_LEAST = 11
"""Calls of each model: of fewer, chance could make all differences point one way."""
_ROUNDS = 8
"""How often what is slowest is looked for."""
_BEFORE, _AFTER = "quantized", "without"


@dataclass
class _Search:
    """One model on one backend.

    Args:
        session: of the model.
        backend: where it runs.
        measure: how long models take.
        bar: shows what is under way.
    """

    session: Session
    backend: Backend
    measure: Measure
    bar: Any
    made: dict[frozenset[str], nn.Module] = field(default_factory=dict)

    def plan(self, taken: frozenset[str] = frozenset()) -> QuantPlan:
        return self.session.plan(self.backend, slower=dict.fromkeys(taken, SLOWER))

    def model(self, taken: frozenset[str]) -> nn.Module:
        """Quantized, with some sites in float."""
        slower = dict.fromkeys(taken, SLOWER)
        return self.session.lowering(self.backend, slower=slower).run(share=True)

    def compare(self, before: nn.Module, taken: frozenset[str]) -> tuple[Difference, Difference]:
        """What it gains that ``before`` is not as with ``taken`` in float, and what it loses."""
        times = self._times({_BEFORE: before, _AFTER: self.model(taken)})
        self.bar.update()
        both = times[_BEFORE], times[_AFTER]
        return Difference.of(both[1], both[0]), Difference.of(*both)

    def _times(self, models: Mapping[str, nn.Module]) -> Mapping[str, Sequence[float]]:
        found = self.measure(models)
        if missing := [name for name in models if name not in found]:
            raise InvalidConfig(f"never_slower: no times were measured of {', '.join(missing)}")
        return found

    def against_float(self, quantized: nn.Module) -> tuple[Difference, float]:
        """How much longer a quantized model takes, and its own time."""
        floating = twin_of(self.session.model)
        with frozen(floating):
            times = self._times({_BEFORE: quantized, "float32": floating})
        self.bar.update()
        found = Difference.of(times[_BEFORE], times["float32"])
        return found, found.whole + found.milliseconds

    # Regions

    def asked_for(self, plan: QuantPlan) -> set[str]:
        """Sites that an override of the user's has quantized, or in bfloat16."""
        overrides, model = self.session.settings.overrides, self.session.model
        return {
            site.name
            for site, _ in self.session.captured.sites()
            if site.name in plan.reduced and rules_for(site, modules_of(model, site), overrides)
        }

    def groups(self, plan: QuantPlan) -> Iterator[tuple[tuple[str, ...], Site]]:
        """Sites that can only be in one precision together, and the first of each."""
        sites = {site.name: site for site, _ in self.session.captured.sites()}
        shared = self.backend.kernels().share_precision
        for names in find_groups(self.session.captured, plan, shared):
            yield names, sites[names[0]]
        for name in plan.reduced:
            if not plan[name].quantized:  # its weight is a copy, so nothing ties it to others
                yield (name,), sites[name]

    def regions(self, plan: QuantPlan, way: str) -> dict[str, tuple[str, ...]]:
        """Name -> sites."""
        found: dict[str, list[str]] = {}
        groups = list(self.groups(plan))
        depth = _depth([site.module for _, site in groups])
        for names, site in groups:
            part = ".".join(site.module.split(".")[:depth])
            label = _operator(site, plan) if way == "operator" else part or "the model"
            found.setdefault(label, []).extend(names)
        return {label: tuple(names) for label, names in found.items()}

    def candidates(self, plan: QuantPlan) -> dict[str, tuple[str, ...]]:
        """What may be slower: an operator of one size, all of a kind, a module, everything."""
        kept = self.asked_for(plan)
        kinds: dict[str, tuple[str, ...]] = {"everything": plan.reduced}
        for name in plan.reduced:
            label = f"every {plan[name].op}{_lower(plan[name])}"
            kinds[label] = (*kinds.get(label, ()), name)
        ways = [self.regions(plan, way) for way in WAYS]
        together = {name: names for names, _ in self.groups(plan) for name in names}
        found: dict[frozenset[str], str] = {}
        for label, names in {**ways[0], **ways[1], **kinds}.items():
            whole = {other for name in names for other in together[name]}
            free = frozenset(name for name in whole if not kept.intersection(together[name]))
            if free:
                found.setdefault(free, label)
        order = {name: i for i, name in enumerate(plan.reduced)}
        return {
            label: tuple(sorted(names, key=order.__getitem__)) for names, label in found.items()
        }


def _operator(site: Site, plan: QuantPlan) -> str:
    """A kind of operator of one size."""
    sizes = "x".join(map(str, site.weight_shape))
    work = f"{plan[site.name].macs / 1e6:.3g}M" if plan[site.name].macs else ""
    return " ".join(part for part in (site.op, sizes, work) if part) + _lower(plan[site.name])


def _lower(site: SitePlan) -> str:
    return "" if site.quantized else f" ({site.precision})"


def _depth(paths: Sequence[str]) -> int:
    """How far into the model modules are told apart: there are some, and not too many."""
    found = 1
    for depth in range(1, 1 + max((path.count(".") + 1 for path in paths), default=1)):
        parts = {tuple(path.split(".")[:depth]) for path in paths}
        if len(parts) > _MOST_PARTS:
            break
        found = depth
        if len(parts) > 1:
            break
    return found


def measured_regions(
    session: Session, backend: Backend, way: str, measure: Measure, *, progress: bool
) -> Regions:
    """What each region gains by being quantized.

    Args:
        session: of the model.
        backend: where it runs.
        way: one of :data:`WAYS`.
        measure: how long models take.
        progress: whether to show a bar.

    Raises:
        InvalidConfig: ``way`` is none of these.
    """
    if way not in WAYS:
        hint = did_you_mean(str(way), WAYS)
        raise InvalidConfig(f"by={way!r}; expected {' or '.join(map(repr, WAYS))}{hint}")
    with _bar("measuring", progress) as bar:
        search = _Search(session, backend, measure, bar)
        plan = search.plan()
        regions = search.regions(plan, way)
        bar.total = len(regions) + 1
        before = search.model(frozenset())
        found = []
        for label, names in regions.items():
            bar.set_description(f"measuring: {label} in float")
            found.append(Region(label, names, *search.compare(before, frozenset(names))))
        against, whole = search.against_float(before)
    return _report(found, backend, whole, against)


def find_slower(
    session: Session, backend: Backend, measure: Measure, *, progress: bool
) -> tuple[dict[str, str], Regions]:
    """The sites that are slower quantized, each with the reason, and the table of what was tried.

    Of what is slow throughout, what gains most is taken back to float first, and the others are
    measured again without it, until nothing takes longer quantized by more than chance.

    Args:
        session: of the model.
        backend: where it runs.
        measure: how long models take.
        progress: whether to show a bar.
    """
    with _bar("never slower", progress) as bar:
        search = _Search(session, backend, measure, bar)
        plan = search.plan()
        waiting, taken = search.candidates(plan), frozenset[str]()
        kept = search.asked_for(plan)
        bar.total = len(waiting) + 2
        before = start = search.model(taken)
        table: dict[str, Region] = {}
        reasons: dict[str, str] = {}
        for _ in range(_ROUNDS):
            tried = {}
            for label, names in waiting.items():
                if taken.issuperset(names):
                    continue
                bar.set_description(f"never slower: {label} in float")
                tried[label] = search.compare(before, taken.union(names))
                table.setdefault(label, Region(label, names, *tried[label]))
            losers = {label: each for label, each in tried.items() if each[1].certain}
            if not losers:
                break
            parts = _slow_throughout({label: {*waiting[label]} - taken for label in losers})
            worst = max(parts, key=lambda label: losers[label][1].milliseconds)
            gain, loss = losers[worst]
            now = [name for name in waiting[worst] if name not in taken]
            table[worst] = replace(table[worst], gain=gain, loss=loss, in_float=True)
            reasons |= dict.fromkeys(now, _reason(worst, loss))
            taken = taken.union(waiting[worst])
            before = search.model(taken)
            waiting = {label: waiting[label] for label in losers if label != worst}
            bar.total += len(waiting)
        _, whole = search.against_float(start)
        against, _ = search.against_float(before)
        rest = search.candidates(search.plan(taken))
        if against.certain and rest:  # small losses add up
            label, names = max(rest.items(), key=lambda each: len(each[1]))
            gain, loss = search.compare(before, taken.union(names))
            if loss.milliseconds > 0.0:
                table[label] = Region(label, names, gain, loss, in_float=True)
                reasons |= dict.fromkeys(names, _reason(label, loss))
                against, _ = search.against_float(search.model(taken.union(names)))
    found = [
        replace(each, kept="an override asks for it")
        if each.loss.certain and not each.in_float and kept.intersection(each.sites)
        else each
        for each in table.values()
    ]
    return reasons, replace(_report(found, backend, whole, against), asked=tuple(sorted(kept)))


def _slow_throughout(losers: Mapping[str, set[str]]) -> list[str]:
    """Those that have no slower part, or that consist of such parts.

    Another one has parts beside the slow ones, which may well be faster quantized.
    """
    least = {
        label: sites
        for label, sites in losers.items()
        if not any(other < sites for other in losers.values())
    }
    return [
        label
        for label, sites in losers.items()
        if sites == set().union(*(part for part in least.values() if part <= sites))
    ]


def _reason(label: str, loss: Difference) -> str:
    return (
        f"{SLOWER}: a call takes {loss.milliseconds:.3g} ms more than with {label} in float "
        f"({loss.whole:.3g} ms)"
    )


def _report(
    found: Sequence[Region], backend: Backend, whole: float, against: Difference
) -> Regions:
    ordered = sorted(found, key=lambda each: -each.gain.milliseconds)
    threads = torch.get_num_threads()
    return Regions(tuple(ordered), repr(backend), whole, against.whole, threads, against)


def _bar(what: str, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=what, unit="region", disable=hidden(progress))


def stopwatch(example_inputs: Any, seconds: float) -> Measure:
    """Measure here, with these inputs, about so long each time."""

    def measure(models: Mapping[str, nn.Module]) -> Mapping[str, Sequence[float]]:
        return undisturbed(in_turns(models, example_inputs, seconds, _LEAST)[0])

    return measure
