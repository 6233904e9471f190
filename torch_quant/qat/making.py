"""Makes QAT models, and quantized models of trained ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from torch_quant.backends import Backend
from torch_quant.calibrated import Calibrated
from torch_quant.convert.lowering import Lowering
from torch_quant.convert.quantized import plan_of
from torch_quant.core.functional import quantize
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.ops.table import OPERATORS
from torch_quant.qat.edges import finer_edges
from torch_quant.qat.lowering import LearnedParams, QatLowering, TrainingBackend
from torch_quant.qat.methods import INPUT, WEIGHT, QatMethod
from torch_quant.qat.model import (
    Bond,
    Learned,
    QatModel,
    learned_qparams,
)
from torch_quant.qat.switches import add_switches
from torch_quant.session import Session
from torch_quant.unseen import UnseenCalls

__all__ = ["Deployed", "qat_lowering", "qat_plan", "start_training", "their_tensors"]

logger = logging.getLogger("torch_quant")


def qat_plan(plan: QuantPlan) -> QuantPlan:
    """``plan`` with the sites in float that have no gradient in their quantized form."""
    for name, site in plan.items():
        if site.quantized and (why := OPERATORS[site.op].untrainable):
            plan = plan.without([name], f"{why}, so qat() trains it in float")
    return plan


def qat_lowering(
    session: Session, backend: Backend, plan: QuantPlan, method: QatMethod
) -> QatLowering:
    """How a model is made into one that trains.

    Raises:
        InvalidConfig: every parameter is frozen; the plan transforms the graph, or has rounded
            weights: what was computed from the weights before would not follow them.
    """
    if session.state.rounded:
        raise InvalidConfig(
            "round_weights() has rounded the weights of this quantizer; qat() trains float "
            "weights: use a new Quantizer() and calibrate again"
        )
    for name in plan.quantized:
        if plan[name].transforms:
            raise InvalidConfig(
                f"{name}: {plan[name].transforms[0]} was computed from weights that qat() would "
                "change: leave transforms out of the QConfig, qat() learns the ranges itself"
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
    how.bond, how.root = Bond(session), True
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
        _UnseenTraining(session, backend, lowering).attend(model)
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
    new graphs would not read, so it makes none.
    """

    def __init__(self, session: Session, backend: Backend, lowering: QatLowering) -> None:
        super().__init__(session, backend)
        self._training = lowering

    def __deepcopy__(self, memo: Any) -> Any:
        return None

    @staticmethod
    def _present(model: nn.Module) -> tuple[Any, ...]:
        return ()

    def _lowering(self, session: Session) -> Lowering:
        plan, params = qat_plan(session.plan(optional=False)), self._training.params
        assert isinstance(params, LearnedParams)
        params = params.beside(Calibrated(session, plan), plan)
        return replace(self._training, captured=session.captured, plan=plan, params=params)


class _Trained(Calibrated):
    """Trained scales; for what was not trained, those of calibration."""

    def __init__(self, session: Session, plan: QuantPlan, learned: Learned) -> None:
        super().__init__(session, plan)
        self._learned = learned
        self._ranges = {
            key: qparams for (role, key, _), qparams in learned.items() if role == INPUT
        }

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """As trained; another format than the trained one covers the trained range."""
        if (found := self._learned.get((INPUT, key, spec))) is not None:
            return found
        if (other := self._ranges.get(key)) is None:
            return super().activation(key, spec)
        ends = (other.spec.quant_min, other.spec.quant_max)
        low, high = ((end - other.zero_point) * other.scale for end in ends)
        return choose_qparams(low, high, spec)

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """The current weight, rounded to nearest on the trained scale."""
        spec = spec.on(axis)
        found = self._learned.get((WEIGHT, site, spec))
        if found is None:
            return super().weight(site, weight, spec, axis)
        return quantize(weight, found), found


@dataclass(frozen=True)
class Deployed:
    """What a QAT model has learned, to be put on backends.

    Args:
        learned: the scales.
        left: site -> why it was trained in float; it stays there.
    """

    learned: Learned
    left: Mapping[str, str]

    @classmethod
    def of(cls, model: QatModel) -> Deployed:
        """As it is now."""
        return cls(learned_qparams(model), model.quantization.left)

    def lowering(self, session: Session, backend: Backend | None = None) -> Lowering:
        """How it is put on ``backend``.

        Args:
            session: of the float model, whose parameters were trained.
            backend: where it will run; the quantizer's by default.
        """
        backend = backend or session.owner.backend
        plan = session.plan(backend, optional=False)
        for name, why in self.left.items():
            if name in plan:
                plan = plan.without([name], why)
        return Lowering(session.captured, plan, backend, _Trained(session, plan, self.learned))

    def attend(self, session: Session, backend: Backend, quantized: nn.Module) -> None:
        """Have a deployed model capture new kinds of calls, with the scales that were trained."""
        _UnseenDeployed(session, backend, self).attend(quantized)


class _UnseenDeployed(UnseenCalls):
    def __init__(self, session: Session, backend: Backend, deployed: Deployed) -> None:
        super().__init__(session, backend)
        self._deployed = deployed

    def _lowering(self, session: Session) -> Lowering:
        return self._deployed.lowering(session)


@contextlib.contextmanager
def their_tensors(model: nn.Module, trained: QatModel) -> Iterator[None]:
    """Inside, the float model has the values of ``trained``, which may be a copy."""
    values = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}
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
