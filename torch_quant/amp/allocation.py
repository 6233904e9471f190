"""Bits by effect: each site gets the format that the outputs can best bear, for a size or an error.

An AMP proxy scores every candidate of every site by the noise that it adds to the outputs, to first
order. Which site gets which is then an integer programme:

    minimize   sum over sites and candidates of score x
    subject to sum of bits x <= budget,  one candidate a site,  x in {0, 1}

or the bits, subject to the sum of the scores. It is solved by branch and bound (HiGHS, in scipy).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from torch_quant.amp.groups import find_groups
from torch_quant.amp.proxy import AmpModel
from torch_quant.amp.ranking import decibels
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.ops.table import OPERATORS

__all__ = ["Allocation", "Choice", "allocate", "exactly"]


@dataclass(frozen=True)
class Choice:
    """One candidate of one site.

    Args:
        candidate: its name.
        bits: for each element of the weight, scales included.
        score: energy of its noise at the outputs, in the units of the output signal.
    """

    candidate: str
    bits: float
    score: float


@dataclass(frozen=True)
class Allocation:
    """Which site got which format; ``print`` shows a table.

    Args:
        chosen: site -> its choice.
        sizes: site -> elements of its weight; 0 where it shares that of another.
        signal: energy of the float outputs.
        uniform: candidate -> bits for each weight and predicted output SQNR, dB, if every site
            that can had it.
    """

    chosen: Mapping[str, Choice]
    sizes: Mapping[str, int]
    signal: float
    uniform: Mapping[str, tuple[float, float]]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights that were chosen for, scales included."""
        total = sum(self.sizes.values())
        return sum(each.bits * self.sizes[site] for site, each in self.chosen.items()) / total

    @property
    def predicted(self) -> float:
        """Output SQNR, dB, as the sum of the sites' noises predicts it."""
        return decibels(self.signal, math.fsum(each.score for each in self.chosen.values()))

    def __str__(self) -> str:
        from tabulate import tabulate

        count = Counter(each.candidate for each in self.chosen.values())
        weights = Counter[str]()
        for site, each in self.chosen.items():
            weights[each.candidate] += self.sizes[site]
        rows = [
            (
                name,
                count[name],
                f"{weights[name] / sum(self.sizes.values()):.1%}",
                f"{bits:.2f}",
                f"{sqnr:.1f}",
            )
            for name, (bits, sqnr) in self.uniform.items()
        ]
        headers = ("format", "sites", "of the weights", "bits", "dB if all had it")
        head = (
            f"{len(self.chosen)} sites: {self.bits_per_weight:.2f} bits a weight, predicted output "
            f"SQNR {self.predicted:.1f} dB"
        )
        return f"{head}\n{tabulate(rows, headers)}"


def exactly(site: str) -> str:
    """A key of ``overrides`` that covers one site and nothing else.

    >>> exactly("encoder.layer.0"), exactly("linear")
    ('encoder.layer.0', 're:linear')
    """
    plain = site not in OPERATORS and not set(site) & set("*?[]") and ":" not in site
    return site if plain else f"re:{re.escape(site)}"


def allocate(
    amp_model: AmpModel, bits_per_weight: float | None, min_sqnr: float | None
) -> Allocation:
    """Choose a candidate for each site; arguments as of :meth:`Quantizer.allocate`.

    Raises:
        NotCalibrated: the proxy saw no data.
        InvalidConfig: it has no candidates; neither or both of the goals are given; the goal is
            out of their reach.
    """
    if (bits_per_weight is None) == (min_sqnr is None):
        raise InvalidConfig("allocate takes one of bits_per_weight= and min_sqnr=")
    goal = min_sqnr if bits_per_weight is None else bits_per_weight
    if isinstance(goal, bool) or not isinstance(goal, (int, float)) or not math.isfinite(goal):
        raise InvalidConfig(f"allocate: expected a number, got {goal!r}")
    amp_model.check(besides={"overrides"})  # candidates are scored whatever these are
    if amp_model.metric != "output":
        raise NotCalibrated(
            f"allocate needs noise at the outputs, but this proxy has {amp_model.metric!r}: "
            f"{amp_model.note or 'it was made with another metric'}"
        )
    groups, options, sizes = _options(amp_model)
    signal = amp_model.recorder.output_signal
    picked = _solve(
        options, [sizes[names[0]] for names in groups], signal, bits_per_weight, min_sqnr
    )
    chosen = {}
    for names, found, which in zip(groups, options, picked, strict=True):
        share = {name: _score(amp_model, name, found[which].candidate) for name in names}
        for name in names:
            each = found[which]
            chosen[name] = Choice(each.candidate, each.bits, share[name])
    held = {name: sizes[name] if name == names[0] else 0 for names in groups for name in names}
    return Allocation(chosen, held, signal, _uniform(options, groups, sizes, signal))


def _score(amp_model: AmpModel, site: str, candidate: str) -> float:
    return amp_model.recorder.candidates[site, candidate].score


def _options(
    amp_model: AmpModel,
) -> tuple[list[tuple[str, ...]], list[list[Choice]], dict[str, int]]:
    """Sites that go together, what each such group may be, and the elements of their weights."""
    session = amp_model.session
    candidates = amp_model.candidate_plans()
    if not candidates:
        raise InvalidConfig(
            "the AMP proxy has no candidates: quantizer.amp(model, candidates=[...]) with the "
            "configurations to choose from"
        )
    shapes = {site.name: site.weight_shape for site, _ in session.captured.sites()}
    seen = {site for site, _ in amp_model.recorder.candidates}
    plan = session.plan(fallen={})
    groups, options = [], []
    sizes = {name: math.prod(shape) if shape else 0 for name, shape in shapes.items()}
    for group in find_groups(session.captured, plan, frozenset({"weight"})):
        names = tuple(name for name in group if name in seen and sizes[name])
        found = []
        for candidate, theirs in candidates.items():
            entries = [theirs[name] for name in names]
            keys = [(name, candidate) in amp_model.recorder.candidates for name in names]
            if names and all(keys) and all(each.quantized and each.weight for each in entries):
                assert entries[0].weight is not None
                bits = entries[0].weight.bits_per_weight(shapes[names[0]])
                score = sum(_score(amp_model, name, candidate) for name in names)
                found.append(Choice(candidate, bits, score))
        if found:
            groups.append(names)
            options.append(found)
    if not groups:
        raise InvalidConfig(
            "no candidate serves any site on this backend: print(quantizer.coverage(model)) says "
            "which formats its kernels take"
        )
    return groups, options, sizes


def _solve(
    options: list[list[Choice]],
    sizes: list[int],
    signal: float,
    bits_per_weight: float | None,
    min_sqnr: float | None,
) -> list[int]:
    """Which option of each group."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    flat = [(i, each) for i, found in enumerate(options) for each in found]
    scores = np.array([each.score for _, each in flat]) / (signal or 1.0)
    total = sum(sizes)
    bits = np.array([each.bits * sizes[i] / total for i, each in flat])
    rows = np.array([i for i, _ in flat])
    one = csr_matrix((np.ones(len(flat)), (rows, np.arange(len(flat)))), (len(options), len(flat)))
    if bits_per_weight is not None:
        goal, spent, budget = scores, bits, bits_per_weight
    else:
        assert min_sqnr is not None
        goal, spent, budget = bits, scores, 10.0 ** (-min_sqnr / 10.0)
    least = sum(min(spent[rows == i]) for i in range(len(options)))
    if not budget >= least:
        what = (
            f"bits_per_weight={bits_per_weight}: the candidates take at least {least:.3f}"
            if bits_per_weight is not None
            else f"min_sqnr={min_sqnr}: the candidates reach {decibels(1.0, least):.1f} dB at most"
        )
        raise InvalidConfig(f"{what}; give others to quantizer.amp(model, candidates=...)")
    unit = float(goal.max()) or 1.0
    result = milp(
        goal / unit,
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(spent[None] / budget, -np.inf, 1.0 + 1e-9),
        ],
        integrality=np.ones(len(flat), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60.0},
    )
    if result.x is None:
        raise InvalidConfig(f"no choice of candidates was found: {result.message}")
    picked = [0] * len(options)
    places = Counter[int]()
    for (i, _), taken in zip(flat, result.x, strict=True):
        if taken > 0.5:
            picked[i] = places[i]
        places[i] += 1
    return picked


def _uniform(
    options: list[list[Choice]],
    groups: list[tuple[str, ...]],
    sizes: Mapping[str, int],
    signal: float,
) -> dict[str, tuple[float, float]]:
    found = {}
    for name in dict.fromkeys(each.candidate for option in options for each in option):
        having = [
            (sizes[names[0]], each)
            for names, option in zip(groups, options, strict=True)
            for each in option
            if each.candidate == name
        ]
        weights = sum(size for size, _ in having)
        bits = sum(size * each.bits for size, each in having) / max(weights, 1)
        found[name] = bits, decibels(signal, math.fsum(each.score for _, each in having))
    return found
