"""Treatments by effect: each site gets the one that the model's outputs ask for.

One pass of an AMP proxy has the noise of every treatment of every site along random directions of
the outputs, ``p = g . d``. The noise of a choice ``x``, one treatment a group of sites, is
``x^T G x`` with the sums of products ``G``: what treatments of two sites add to, or take from, each
other is in it. Groups are gone through in turn, each given what is best with the others as they
are, of what lowers its own noise, until nothing changes. Layers that read one tensor are a group,
so it is quantized once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.amp.fallback import Fallback
from torch_quant.amp.gram import NoiseGram
from torch_quant.amp.groups import find_groups
from torch_quant.amp.optimization import Optimization, Treatments
from torch_quant.amp.options import AmpOptions
from torch_quant.amp.proxy import AmpModel
from torch_quant.amp.ranking import decibels
from torch_quant.amp.records import choice_key
from torch_quant.amp.treatments import Treated, treatments
from torch_quant.config import QConfig
from torch_quant.convert.lowering import Lowering
from torch_quant.core.plan import is_share
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.progress import hidden
from torch_quant.proxies.values import copied
from torch_quant.session import Session

__all__ = ["Chosen", "optimize"]

_LEAST = 0.1
"""Of a group's own noise: what a treatment takes off has to be more than chance makes of it."""
_SWEEPS = 4


@dataclass(frozen=True)
class Chosen:
    """What :func:`optimize` found.

    Args:
        report: for the user.
        configs: site -> its new configuration.
    """

    report: Optimization
    configs: Mapping[str, QConfig]


class _TreatedModel(AmpModel):
    """An AMP proxy that tries treatments."""

    def __init__(self, session: Session, options: AmpOptions, made: Mapping[str, Treated]) -> None:
        self._made = made
        super().__init__(session, options)

    def _start(self) -> None:
        super()._start()
        self.recorder.joint = NoiseGram()

    def _lowerings(self) -> dict[str, tuple[Lowering, Any]]:
        return {name: (each.lowering, each.names) for name, each in self._made.items()}


def optimize(
    amp_model: AmpModel, candidates: Any, min_gain: float, seed: int, show_progress: bool
) -> Chosen:
    """Choose a treatment for each site; arguments as of :meth:`Quantizer.optimize`.

    Raises:
        NotCalibrated: the proxy saw no data, other weights, or knows no noise at the outputs.
        InvalidConfig: candidates or numbers that are none; weights that are rounded already.
    """
    tried = treatments(candidates)
    if isinstance(min_gain, bool) or not is_share(min_gain):
        raise InvalidConfig(f"optimize: min_gain={min_gain!r}; expected a share, 0.02 for 2 %")
    _check(amp_model)
    session = amp_model.session
    summary = session.settings.summary.plan
    made = Treated.of(session, tried)
    plan = session.plan()
    groups = [
        names
        for names in find_groups(session.captured, plan, frozenset({"weight", "input"}))
        if not any(name in summary for name in names)
    ]
    if not made and not any(plan[name].activation for name in plan.quantized):
        raise InvalidConfig(
            "optimize: no candidate applies to any site: print(quantizer.coverage(model)) says "
            "what each is, and smoothing wants channels, which recipes.int8_static() records"
        )
    before = Fallback(amp_model).measure(session.owner.fallen_back)
    proxy = _TreatedModel(session, AmpOptions(seed=seed, mask=amp_model.options.mask), made)
    folds = NoiseGram(), NoiseGram()
    for i, (args, kwargs, _) in enumerate(_shown(amp_model.samples, show_progress)):
        args, kwargs = copied((args, kwargs))
        proxy.recorder.joint = folds[i % 2]
        proxy(*args, **kwargs)
    if proxy.metric != "output":
        raise NotCalibrated(f"optimize needs noise at the outputs, but it is {proxy.note}")
    joint, signal = NoiseGram(), proxy.recorder.output_signal
    for fold in folds:
        joint.add(fold)
    choice = _Choice(joint, groups, made, min_gain)
    picked = choice.run()
    rows = [
        Treatments(names, name, choice.energy(names, ""), choice.energy(names, name))
        for names, name in zip(groups, picked, strict=True)
    ]
    configs = {
        site: _config(session, made[row.chosen], site)
        for row in rows
        if row.chosen
        for site in row.sites
        if site in made[row.chosen].names
    }
    planned = choice.noise([""] * len(groups))
    treated = _foreseen(folds, choice, picked)
    predicted = decibels(signal, planned), decibels(signal, treated)
    return Chosen(Optimization(tuple(rows), predicted, (before, before), signal), configs)


def _foreseen(folds: Sequence[NoiseGram], choice: _Choice, picked: Sequence[str]) -> float:
    """The noise of a choice, by what choices from half of the batches give on the other half.

    On the data that it was made from, the best of many treatments looks better than it is.
    """
    halves = [choice.on(fold) for fold in folds if fold.draws]
    if len(halves) < 2:
        return choice.noise(picked)
    found = [half.run() for half in halves]
    return halves[0].noise(found[1]) + halves[1].noise(found[0])


def _check(amp_model: AmpModel) -> None:
    if not amp_model.samples:
        raise NotCalibrated(
            "no data was run through the AMP proxy: for batch in loader: amp_model(batch)"
        )
    if "weights" in amp_model.changes():
        raise NotCalibrated(
            "the model's weights changed since the AMP proxy saw its data, so the outputs that it "
            "kept are of another model: quantizer.amp(model), and run data through it"
        )
    if amp_model.session.state.rounded:
        raise InvalidConfig(
            "optimize: the weights were rounded by round_weights(), for the present settings: "
            "call optimize first, and round_weights after it"
        )


def _shown(samples: Sequence[Any], show: bool) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(samples, desc="scoring treatments", unit="batch", disable=hidden(show), delay=2.0)


def _config(session: Session, treated: Treated, site: str) -> QConfig:
    """The configuration that gives a site what its treatment does."""
    for each, _ in session.captured.sites():
        if each.name == site:
            present = session.settings.config_of(session.captured.root.module, each)
            entry = treated.lowering.plan[site]
            return treated.treatment.configured(present or session.settings.qconfig, entry)
    raise AssertionError(site)


class _Choice:
    """One treatment for each group.

    Args:
        joint: the noise of treatments together.
        groups: sites that choose together.
        made: treatment -> where it applies.
        min_gain: of all noise, what a treatment that takes time has to take off.
    """

    def __init__(
        self,
        joint: NoiseGram,
        groups: Sequence[tuple[str, ...]],
        made: Mapping[str, Treated],
        min_gain: float,
    ) -> None:
        self._joint, self._groups, self._made, self._min = joint, groups, made, min_gain
        trust = joint.part(self.keys([""] * len(groups))).trust
        self._matrix = joint.shrunk(trust)

    def on(self, joint: NoiseGram) -> _Choice:
        """The same choice, from other sums."""
        return _Choice(joint, self._groups, self._made, self._min)

    def noise(self, picked: Sequence[str]) -> float:
        """What a choice adds to the outputs."""
        keys = self.keys(picked)
        return self._joint.part(keys).noise(keys)

    def keys(self, picked: Sequence[str]) -> list[str]:
        """What a choice is called in the matrix."""
        every = zip(self._groups, picked, strict=True)
        return [key for names, name in every for key in self._of(names, name)]

    def _of(self, names: Iterable[str], treatment: str) -> list[str]:
        tried = self._made[treatment].names if treatment else ()
        return [choice_key(each, treatment if each in tried else "") for each in names]

    def energy(self, names: Iterable[str], treatment: str) -> float:
        """The noise of a group by itself."""
        x = self._vector(self._of(names, treatment))
        return float(x @ self._matrix @ x)

    def _vector(self, keys: Iterable[str]) -> Tensor:
        x = torch.zeros(len(self._matrix), dtype=torch.float64)
        for key in keys:
            if key in self._joint.index:
                x[self._joint.index[key]] = 1.0
        return x

    def _options(self, names: tuple[str, ...]) -> list[str]:
        """Treatments that lower the noise of a group by itself.

        What only seems to cancel the noise of other layers is left to chance.
        """
        most = (1.0 - _LEAST) * self.energy(names, "")
        applied = (name for name, each in self._made.items() if not each.names.isdisjoint(names))
        return [name for name in applied if self.energy(names, name) <= most]

    def run(self) -> list[str]:
        """A treatment for each group, in their order; empty for what is planned."""
        picked = [""] * len(self._groups)
        options = [self._options(names) for names in self._groups]
        x = self._vector(self.keys(picked))
        whole = float(x @ self._matrix @ x)
        for _ in range(_SWEEPS):
            before = list(picked)
            for i, names in enumerate(self._groups):
                base = x - self._vector(self._of(names, picked[i]))
                toward = self._matrix @ base
                costs = {}
                for name in ("", *options[i]):
                    mine = self._vector(self._of(names, name))
                    costs[name] = float(2.0 * (mine @ toward) + mine @ self._matrix @ mine)
                    if name and self._made[name].treatment.costs:
                        costs[name] += self._min * whole
                picked[i] = min(costs, key=costs.__getitem__)
                x = base + self._vector(self._of(names, picked[i]))
            if picked == before:
                break
        return picked
