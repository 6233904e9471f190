"""What may be done with a site beside what is planned, each scored on the same float inputs.

A treatment changes the plan of a site: which share of the recorded range its codes cover, how far
SmoothQuant moves the spread of channels into the weight, copies of the largest channels, or scales
for each token. Where one does not apply, the site is left as planned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_quant.algorithms import OutlierSplit, SmoothQuant
from torch_quant.amp.candidates import candidate_lowerings, checked_candidates
from torch_quant.calibrated import Calibrated
from torch_quant.config import QConfig
from torch_quant.convert.lowering import Lowering
from torch_quant.core.granularity import PerToken
from torch_quant.core.kernels import KernelTable
from torch_quant.core.methods import Transform
from torch_quant.core.naming import did_you_mean
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import Site
from torch_quant.statistics import CHANNELS, RANGE

if TYPE_CHECKING:
    from torch_quant.session import Session

__all__ = [
    "KINDS", "Clipped", "PerTokenScales", "Smoothed", "Split", "Treated", "Treatment", "treatments",
]  # fmt: skip

_SHARES = (0.9, 0.8)
_ALPHAS = (None, 0.6, 0.7, 0.9)
_COPIES = (1 / 64, 1 / 24)
_EVENING = (SmoothQuant, OutlierSplit)
"""Transforms that even out the channels of an input; one of them does at a site."""


@dataclass(frozen=True)
class Treatment(ABC):
    """One change of what is planned for a site."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables call it."""

    costs: bool = False
    """Whether the quantized model takes longer with it."""

    @abstractmethod
    def planned(self, entry: SitePlan, sites: list[Site], session: Session) -> SitePlan | None:
        """The plan of a site that is treated so; None where it cannot be, or already is.

        Args:
            entry: what is planned; it is quantized.
            sites: what the graphs have under that name.
            session: ranges, backend and settings.
        """

    def configured(self, config: QConfig, entry: SitePlan) -> QConfig:
        """The configuration of the site that gives ``entry``, which :meth:`planned` has made.

        Args:
            config: the present one.
            entry: the new plan of the site.
        """
        evening = tuple(each for each in entry.transforms if isinstance(each, _EVENING))
        rest = (each for each in config.transforms if not isinstance(each, _EVENING))
        return replace(config, input=entry.activation, transforms=(*evening, *rest))


@dataclass(frozen=True)
class Clipped(Treatment):
    """Codes stand for a share of the recorded range.

    >>> Clipped(share=0.8).name
    '80% of the range'
    """

    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.share:.0%} of the range"

    def planned(self, entry: SitePlan, sites: list[Site], session: Session) -> SitePlan | None:
        spec = entry.activation
        if spec is None or spec.dynamic or not entry.inputs or spec.clip == self.share:
            return None
        return replace(entry, activation=replace(spec, clip=self.share))


@dataclass(frozen=True)
class Smoothed(Treatment):
    """SmoothQuant with another ``alpha``, or without.

    >>> Smoothed(alpha=0.5).name, Smoothed().name
    ('smooth 0.5', 'not smoothed')
    """

    alpha: float | None = None

    @property
    def name(self) -> str:
        return "not smoothed" if self.alpha is None else f"smooth {self.alpha:g}"

    def planned(self, entry: SitePlan, sites: list[Site], session: Session) -> SitePlan | None:
        smooth: list[Transform] = [] if self.alpha is None else [SmoothQuant(self.alpha)]
        return _evened(entry, smooth, sites, session)


@dataclass(frozen=True)
class Split(Treatment):
    """Channels far larger than the rest have copies, in the place of smoothing.

    It applies where the layers before compute these.

    >>> Split(share=0.05).name
    'split 5.0%'
    """

    share: float = 1 / 64

    @property
    def name(self) -> str:
        return f"split {self.share:.1%}"

    def planned(self, entry: SitePlan, sites: list[Site], session: Session) -> SitePlan | None:
        if not all(site.repeatable for site in sites):
            return None
        return _evened(entry, [OutlierSplit(self.share)], sites, session)


def _evened(
    entry: SitePlan, evening: list[Transform], sites: list[Site], session: Session
) -> SitePlan | None:
    """The plan of a site whose channels these even out, and nothing else."""
    spec = entry.activation
    if spec is None or spec.dynamic or not spec.per_tensor or entry.weight is None:
        return None
    if not all(site.smoothable for site in sites):
        return None
    for site in sites:
        whole, channels = (session.state.find(site.inputs[0], x) for x in (RANGE, CHANNELS))
        if whole is None or channels is None or channels.batches < whole.batches:
            return None
    made = [*evening, *(each for each in entry.transforms if not isinstance(each, _EVENING))]
    return None if tuple(made) == entry.transforms else replace(entry, transforms=tuple(made))


@dataclass(frozen=True)
class PerTokenScales(Treatment):
    """Activations have a scale for each token, chosen at each call.

    >>> PerTokenScales().costs
    True
    """

    costs: bool = True

    @property
    def name(self) -> str:
        return "per token"

    def planned(self, entry: SitePlan, sites: list[Site], session: Session) -> SitePlan | None:
        spec = entry.activation
        if spec is None or spec.dynamic or not spec.per_tensor or not spec.integer:
            return None
        if entry.quantized_output:
            return None
        made = _per_token(entry, session.owner.backend.kernels())
        return None if made is None else replace(entry, activation=made)


def _per_token(entry: SitePlan, kernels: KernelTable) -> QuantSpec | None:
    """The first such format that the backend has a kernel for."""
    assert entry.activation is not None
    wanted = replace(entry.activation, granularity=PerToken(), dynamic=True, clip=1.0)
    signed = QuantSpec.of("int8", granularity=PerToken(), dynamic=True)
    for spec in (wanted, signed):
        if kernels.choose(entry.op, spec, entry.weight)[0] is not None:
            return spec
    return None


@dataclass(frozen=True)
class _Given(Treatment):
    """A configuration of the user's."""

    title: str = ""
    config: QConfig = field(default_factory=QConfig)

    @property
    def name(self) -> str:
        return self.title

    def planned(self, entry: SitePlan, sites: list[Site], session: Session) -> SitePlan | None:
        return None  # it has a plan of its own, which settles what is optional

    def configured(self, config: QConfig, entry: SitePlan) -> QConfig:
        return self.config


KINDS: Mapping[str, tuple[Treatment, ...]] = {
    "clip": tuple(Clipped(share=share) for share in (1.0, *_SHARES)),
    "smooth": tuple(Smoothed(alpha=alpha) for alpha in (*_ALPHAS, 0.8)),
    "split": tuple(Split(share=share) for share in _COPIES),
    "per_token": (PerTokenScales(),),
}
"""What ``quantizer.optimize(candidates=...)`` may name."""
_DEFAULT = ("smooth", "split", "per_token")
"""Not ``"clip"``: what a rare value beyond the range costs cannot be seen in a few samples."""


def treatments(candidates: Any) -> tuple[Treatment, ...]:
    """What to try: kinds that do no harm to rare values for None, or what is named or given.

    Raises:
        InvalidConfig: an unknown kind, or something else.

    >>> [each.name for each in treatments(["per_token"])]
    ['per token']
    """
    if candidates is None:
        candidates = _DEFAULT
    if isinstance(candidates, str):
        candidates = [candidates]
    if isinstance(candidates, Iterable) and not isinstance(candidates, Mapping):
        candidates = list(candidates)
        if candidates and all(isinstance(each, str) for each in candidates):
            for each in candidates:
                if each not in KINDS:
                    raise InvalidConfig(
                        f"optimize: there is no kind of candidates {each!r}; expected "
                        f"{', '.join(KINDS)}, or QConfigs{did_you_mean(each, KINDS)}"
                    )
            return tuple(each for kind in dict.fromkeys(candidates) for each in KINDS[kind])
    found = checked_candidates(candidates)
    if not found:
        raise InvalidConfig("optimize: there are no candidates; leave them out to try all kinds")
    return tuple(_Given(title=name, config=config) for name, config in found.items())


class _Shared(Calibrated):
    """Codes of weights that several treatments have in common, such as those of GPTQ, once."""

    def __init__(self, session: Session, plan: QuantPlan, codes: dict[Any, Any]) -> None:
        super().__init__(session, plan, rounded=False)
        self._codes = codes

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        key = site, spec, axis, self._plan[site].method
        if key not in self._codes:
            self._codes[key] = super().weight(site, weight, spec, axis)
        made: tuple[Tensor, QParams] = self._codes[key]
        return made


@dataclass(frozen=True)
class Treated:
    """A model with one treatment wherever it applies.

    Args:
        treatment: what is done.
        lowering: how each site is quantized so.
        names: the sites where it is done.
    """

    treatment: Treatment
    lowering: Lowering
    names: frozenset[str]

    @classmethod
    def of(cls, session: Session, tried: Iterable[Treatment]) -> dict[str, Treated]:
        """Every treatment by its name, those that apply nowhere left out."""
        plan = session.plan(fallen={})
        sites: dict[str, list[Site]] = {}
        for prepared in session.captured.graphs():
            for site, _ in prepared.sites:
                sites.setdefault(site.name, []).append(site)
        codes: dict[Any, Any] = {}
        found = {}
        for each in tried:
            if isinstance(each, _Given):
                made = candidate_lowerings(session, {each.name: each.config})[each.name]
                names = [name for name in plan.quantized if made.plan[name].quantized]
            else:
                entries = {
                    name: each.planned(plan[name], sites[name], session) for name in plan.quantized
                }
                changed = {name: entry for name, entry in entries.items() if entry is not None}
                names = list(changed)
                new = QuantPlan(
                    (changed.get(entry.name, entry) for entry in plan.values()), plan.float_ops
                )
                # What a transform does to the weight depends on the others that read its input.
                same = all(new[name].transforms == plan[name].transforms for name in plan)
                params = _Shared(session, new, codes if same else {})
                made = Lowering(session.captured, new, session.owner.backend, params)
            if names:
                found[each.name] = cls(each, made, frozenset(names))
        return found
