"""Makes QAT models, and quantized models of trained ones."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from torch_quant.backends import Backend
from torch_quant.calibrated import Calibrated
from torch_quant.convert.lowering import Lowering
from torch_quant.convert.quantized import plan_of
from torch_quant.core.functional import quantize
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.core.transformed import transformed_as
from torch_quant.errors import CaptureFailed, InvalidConfig
from torch_quant.ops.table import OPERATORS
from torch_quant.qat.edges import finer_edges
from torch_quant.qat.lowering import LearnedParams, QatLowering, TrainingBackend, weight_offset
from torch_quant.qat.methods import INPUT, WEIGHT, QatMethod
from torch_quant.qat.model import (
    Bond,
    Learned,
    QatModel,
    bond_of,
    learned_qparams,
    read_facts,
)
from torch_quant.qat.switches import add_switches
from torch_quant.session import Session
from torch_quant.unseen import UnseenCalls

__all__ = [
    "Deployed", "qat_lowering", "qat_plan", "start_training", "their_tensors", "trainable",
]  # fmt: skip

V = TypeVar("V")

logger = logging.getLogger("torch_quant")


def qat_plan(plan: QuantPlan) -> QuantPlan:
    """``plan`` with the sites in float that have no gradient in their quantized form."""
    for name, site in plan.items():
        if site.quantized and (why := OPERATORS[site.op].untrainable):
            plan = plan.without([name], f"{why}, so qat() trains it in float")
    return plan


def trainable(planned: QuantPlan, required: QuantPlan) -> QuantPlan:
    """``planned`` without the transforms through which nothing trains, unless they are required."""

    def kept(site: SitePlan) -> SitePlan:
        wanted = required[site.name].transforms
        left = tuple(each for each in site.transforms if each.trains or each in wanted)
        return replace(site, transforms=left)

    return QuantPlan(map(kept, planned.values()), planned.float_ops)


def qat_lowering(
    session: Session, backend: Backend, plan: QuantPlan, method: QatMethod
) -> QatLowering:
    """How a model is made into one that trains.

    Raises:
        InvalidConfig: every parameter is frozen; the plan has rounded weights, or transforms the
            graph by what would have to follow the weights.
    """
    made = session.state.rounded
    if made.scaled or made.left_out or not all(x.method.wants_blocks for x in made.sites.values()):
        raise InvalidConfig(
            "round_weights() has rounded the weights of this quantizer; qat() trains float "
            "weights: use a new Quantizer() and calibrate again"
        )
    for name in plan.quantized:
        for each in plan[name].transforms:
            if not each.trains:
                raise InvalidConfig(
                    f"{name}: {each} is computed from weights that qat() would change: leave it "
                    "out of the QConfig, qat() learns ranges and biases itself"
                )
    model = session.captured.root.module
    if not any(each.requires_grad for each in model.parameters()):
        raise InvalidConfig(
            "every parameter of the model is frozen, so there is nothing to train: "
            "parameter.requires_grad_() for some of model.parameters()"
        )
    params = LearnedParams(Calibrated(session, plan), plan, method, model)
    return QatLowering(session.captured, plan, TrainingBackend(backend, method), params)


def start_training(
    session: Session, lowering: QatLowering, model: QatModel, backend: Backend, unseen: bool
) -> None:
    """Tie a new QAT model to its quantizer; ``unseen``: have it capture new kinds of calls."""
    how = model.quantization
    session = Session(session.owner, session.captured.copied(), session.model)
    assert isinstance(lowering.params, LearnedParams)
    how.bond, how.root = Bond(session, lowering.plan, lowering.params.facts), True
    switches = add_switches(model)
    for module in model.modules():
        if isinstance(module, QatModel):
            module.quantization.switches = switches
    of_several = [
        name for name, x in session.model.named_modules() if isinstance(x, nn.SyncBatchNorm)
    ]
    if of_several:
        logger.warning(
            "%s: a QAT model that trains in several processes normalizes by the batch of each "
            "process alone, not of all as SyncBatchNorm does; QatSchedule(qat_model, "
            "freeze_bn_at=0) keeps the statistics that the model has",
            ", ".join(of_several),
        )
    if unseen:
        _UnseenTraining(session, backend, lowering, model).attend(model)
    how.plan = plan_of(model)
    how.left = {name: site.reason for name, site in lowering.plan.items() if not site.quantized}
    how.description = f"QAT by {how.method!r} for {backend!r}: {how.plan.summary}"
    if finer := finer_edges(session, how.plan):
        how.description += f"; first and last layers with more bits: {', '.join(finer)}"
    how.calibration = session.state.describe()


class _UnseenTraining(UnseenCalls):
    """Makes the graphs that a QAT model lacks; they read the same parameters and scales.

    The weights may have changed, since they are trained, and the configuration too, since trainers
    write to it. A copy has parameters of its own, which
    new graphs would not read, so it makes none. Nor does a model whose tensors were replaced.
    """

    def __init__(
        self, session: Session, backend: Backend, lowering: QatLowering, trained: QatModel
    ) -> None:
        super().__init__(session, backend)
        self._training, self._trained = lowering, weakref.ref(trained)
        self._tensors = _tensors(trained)

    def __deepcopy__(self, memo: Any) -> Any:
        return None

    @staticmethod
    def _present(model: nn.Module) -> tuple[Any, ...]:
        return ()

    def _lowering(self, session: Session) -> Lowering:
        plan = qat_plan(session.plan(optional=False))
        plan = transformed_as(plan, self._training.plan)
        params, trained = self._training.params, self._trained()
        assert isinstance(params, LearnedParams)
        if trained is not None:  # None: a part is called that has outlived the whole
            now = _tensors(trained)
            if replaced := [name for name, x in self._tensors.items() if now.get(name) is not x]:
                raise CaptureFailed(
                    f"{replaced[0]} of the QAT model was replaced since qat() made it, and a new "
                    "graph would read the former one: load_state_dict without assign=True keeps "
                    "the tensors"
                )
            params.facts |= read_facts(trained)
        params = params.beside(Calibrated(session, plan), plan)
        return replace(self._training, captured=session.captured, plan=plan, params=params)


class _Trained(Calibrated):
    """Trained scales; for what was not trained, those of calibration."""

    def __init__(
        self,
        session: Session,
        plan: QuantPlan,
        learned: Learned,
        facts: dict[Hashable, Any],
    ) -> None:
        super().__init__(session, plan)
        self._learned, self._facts = learned, facts
        self._ranges = {
            key: qparams for (role, key, _), qparams in learned.items() if role == INPUT
        }

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """As trained; another format than the trained one covers the trained range."""
        found = self._trained(key, spec)
        return super().activation(key, spec) if found is None else found

    def derived(self, key: str, spec: QuantSpec, found: QParams) -> QParams:
        """The same of a tensor that a transform made."""
        trained = self._trained(key, spec)
        return found if trained is None else trained

    def kept(self, key: Hashable, make: Callable[[], V]) -> V:
        """As the trained model has it."""
        if key not in self._facts:
            return super().kept(key, make)
        found: V = self._facts[key]
        return found

    def _trained(self, key: str, spec: QuantSpec) -> QParams | None:
        if (found := self._learned.get((INPUT, key, spec))) is not None:
            return found
        if (other := self._ranges.get(key)) is None:
            return None
        ends = (other.spec.quant_min, other.spec.quant_max)
        low, high = ((end - other.zero_point) * other.scale for end in ends)
        return choose_qparams(low, high, spec)

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """The current weight as training has it, on the trained scale; that of all its calls."""
        spec = spec.on(axis)
        names = site, site.partition("@")[0]
        known = (self._learned.get((WEIGHT, each, spec)) for each in names)
        found = next((each for each in known if each is not None), None)
        if found is None:
            return super().weight(site, weight, spec, axis)
        offset = weight_offset(self._facts, names, spec)
        return quantize(weight if offset is None else weight + offset, found), found


@dataclass(frozen=True)
class Deployed:
    """What a QAT model has learned, to be put on backends.

    Args:
        learned: the scales.
        left: site -> why it was trained in float; it stays there.
        plan: what was trained.
        facts: what its transforms had computed from the weights that training began with: copies of
            what its graphs hold, and where they hold nothing what the quantizer remembers.
    """

    learned: Learned
    left: Mapping[str, str]
    plan: QuantPlan
    facts: dict[Hashable, Any]

    @classmethod
    def of(cls, model: QatModel) -> Deployed:
        """As it is now."""
        bond = bond_of(model)
        held = {key: x.clone() for key, x in read_facts(model).items()}
        facts = {**bond.facts, **held}
        return cls(learned_qparams(model), model.quantization.left, bond.plan, facts)

    def lowering(self, session: Session, backend: Backend | None = None) -> Lowering:
        """How it is put on ``backend``.

        Args:
            session: of the float model, whose parameters were trained.
            backend: where it will run; the quantizer's by default.
        """
        backend = backend or session.owner.backend
        plan = transformed_as(session.plan(backend, optional=False), self.plan)
        for name, why in self.left.items():
            if name in plan:
                plan = plan.without([name], why)
        params = _Trained(session, plan, self.learned, self.facts)
        return Lowering(session.captured, plan, backend, params)

    def attend(self, session: Session, backend: Backend, quantized: nn.Module) -> None:
        """Have a deployed model capture new kinds of calls, with the scales that were trained.

        It is called inside of :func:`their_tensors`: new graphs read the float model, and are
        refused where that has other weights.
        """
        _UnseenDeployed(session, backend, self).attend(quantized)


class _UnseenDeployed(UnseenCalls):
    """With what was trained; made while the float model has the values that are deployed."""

    _changed = (
        "the float model no longer has the weights that were deployed: it has changed, or a copy "
        "of the QAT model was deployed"
    )

    def __init__(self, session: Session, backend: Backend, deployed: Deployed) -> None:
        super().__init__(session, backend)
        self._deployed = deployed

    def _lowering(self, session: Session) -> Lowering:
        return self._deployed.lowering(session)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextlib.contextmanager
def their_tensors(model: nn.Module, trained: QatModel) -> Iterator[None]:
    """Inside, the float model has the values of ``trained``, which may be a copy."""
    values = _tensors(trained)
    swapped: list[tuple[Tensor, Tensor]] = []
    try:
        for name, mine in (*model.named_parameters(), *model.named_buffers()):
            theirs = values.get(name)
            if theirs is not None and theirs is not mine:
                swapped.append((mine, mine.data))
                mine.data = theirs.data
        yield
    finally:
        for mine, data in swapped:
            mine.data = data
