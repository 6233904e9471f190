"""When a QAT model observes, rounds, and stops the statistics of batch norms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from torch_quant.errors import InvalidConfig
from torch_quant.qat.model import QatModel, switches_of
from torch_quant.qat.switches import FAKE_QUANTIZE, FREEZE_BN, OBSERVE, STEPS, checked_step

__all__ = ["QatSchedule", "detect_nonfinite", "follow", "switch"]


def switch(
    qat_model: nn.Module,
    *,
    observe: bool | None = None,
    fake_quantize: bool | None = None,
    freeze_bn: bool | None = None,
) -> None:
    """Set what a QAT model does in train mode; None leaves a switch as it is.

    Args:
        qat_model: what ``quantizer.qat`` made.
        observe: scales follow the data: a moving average of the extremes of each activation, over
            all processes of ``torch.distributed``, and the present extremes of each weight. They
            get gradients of zero meanwhile. A model begins with this off, with calibrated scales.
        fake_quantize: values are rounded; off, it trains in float, and may observe meanwhile.
        freeze_bn: batch norms normalize by their running statistics, which stay, as in eval mode.

    Raises:
        InvalidConfig: it is no QAT model, or a part of one; a switch is no bool.

    >>> import torch
    >>> from torch_quant import Quantizer
    >>> model, quantizer = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), Quantizer()
    >>> x = torch.randn(4, 1, 3, 3)
    >>> _ = quantizer.calib(model.eval())(x)
    >>> qat_model = quantizer.qat(model).train()
    >>> switch(qat_model, freeze_bn=True)
    >>> _ = qat_model(x)
    >>> model[1].running_mean
    tensor([0., 0.])
    """
    switches = switches_of(qat_model)
    names = {"observe": OBSERVE, "fake_quantize": FAKE_QUANTIZE, "freeze_bn": FREEZE_BN}
    given = {"observe": observe, "fake_quantize": fake_quantize, "freeze_bn": freeze_bn}
    for name, value in given.items():
        if not isinstance(value, bool | None):
            raise InvalidConfig(f"{name}={value!r}; expected True, False, or None to leave it")
    for name, value in given.items():
        if value is not None:
            switches.write(names[name], int(value))
    follow(qat_model)


def follow(qat_model: nn.Module) -> None:
    """Have every part of a QAT model run as its switches say."""
    for module in qat_model.modules():
        if isinstance(module, QatModel):
            module.follow_switches()


@contextlib.contextmanager
def detect_nonfinite(qat_model: nn.Module) -> Iterator[None]:
    """Inside, the first value of a QAT model that is NaN or infinite raises, naming its site.

    What is rounded, its scales and the results of weighted products are looked at in the forward
    pass, and their gradients in the backward pass, which has to be inside too. Each look reads a
    tensor, so this is for finding out and not for training.

    Args:
        qat_model: what ``quantizer.qat`` made.

    Raises:
        QuantError: from inside: where the value is, and in which pass.

    >>> import torch
    >>> from torch_quant import Quantizer
    >>> model, x, quantizer = nn.Linear(4, 2), torch.rand(8, 4), Quantizer("reference")
    >>> _ = quantizer.calib(model)(x)
    >>> qat_model = quantizer.qat(model)
    >>> with detect_nonfinite(qat_model):  # doctest: +ELLIPSIS
    ...     qat_model(x / 0)
    Traceback (most recent call last):
    torch_quant.errors.QuantError: linear: the input holds infinity, shape (8, 4), in the forward...
    """
    switches = switches_of(qat_model)
    switches.watches = True
    follow(qat_model)
    try:
        yield
    finally:
        switches.watches = False
        follow(qat_model)


class QatSchedule:
    """Moves the switches of a QAT model as training goes on.

    The count of steps is in the model's ``state_dict``: a schedule of a model that was loaded from
    a checkpoint goes on where it was.

    Args:
        qat_model: what ``quantizer.qat`` made.
        observe_until: scales follow the data for so many steps, and are learned from then on.
        freeze_bn_at: the step from which the statistics of batch norms stay; None for never.
        quantize_from: the step from which values are rounded.

    Raises:
        InvalidConfig: it is no QAT model; a step is negative or no integer.

    >>> import torch
    >>> from torch_quant import Quantizer
    >>> model, x, quantizer = nn.Linear(4, 2), torch.rand(8, 4), Quantizer()
    >>> _ = quantizer.calib(model)(x)
    >>> schedule = QatSchedule(quantizer.qat(model), observe_until=1, freeze_bn_at=2)
    >>> for _ in range(3):  # in a loop, behind optimizer.step()
    ...     print(schedule)
    ...     schedule.step()
    QatSchedule(step 0: observing)
    QatSchedule(step 1)
    QatSchedule(step 2: batch norms frozen)
    """

    def __init__(
        self,
        qat_model: nn.Module,
        *,
        observe_until: int = 0,
        freeze_bn_at: int | None = None,
        quantize_from: int = 0,
    ) -> None:
        self.qat_model, self._switches = qat_model, switches_of(qat_model)
        self.observe_until = checked_step("observe_until", observe_until)
        self.quantize_from = checked_step("quantize_from", quantize_from)
        self.freeze_bn_at = freeze_bn_at
        if freeze_bn_at is not None:
            checked_step("freeze_bn_at", freeze_bn_at)
        if self.quantize_from and self.quantize_from < self.observe_until:
            raise InvalidConfig(
                f"quantize_from={quantize_from} lies before observe_until={observe_until}: a "
                "model that is rounded by ranges still observed may do so from the start, "
                "quantize_from=0"
            )
        self._apply()

    @property
    def steps(self) -> int:
        """How many were taken.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, quantizer = nn.Linear(4, 2), Quantizer("reference")
        >>> _ = quantizer.calib(model)(torch.rand(8, 4))
        >>> QatSchedule(quantizer.qat(model)).steps
        0
        """
        return self._switches.read()[0]

    def step(self) -> None:
        """One step of the optimizer was taken.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, quantizer = nn.Linear(4, 2), Quantizer("reference")
        >>> _ = quantizer.calib(model)(torch.rand(8, 4))
        >>> schedule = QatSchedule(quantizer.qat(model), freeze_bn_at=1)
        >>> schedule.step()
        >>> schedule
        QatSchedule(step 1: batch norms frozen)
        """
        self._switches.write(STEPS, self.steps + 1)
        self._apply()

    def _apply(self) -> None:
        steps = self.steps
        frozen = self.freeze_bn_at is not None and steps >= self.freeze_bn_at
        wanted = steps < self.observe_until, steps >= self.quantize_from, frozen
        if wanted != self._switches.read()[1:]:
            observe, rounds, _ = wanted
            switch(self.qat_model, observe=observe, fake_quantize=rounds, freeze_bn=frozen)

    def __repr__(self) -> str:
        steps, observe, rounds, frozen = self._switches.read()
        facts = [
            *(["observing"] if observe else []),
            *([] if rounds else ["in float"]),
            *(["batch norms frozen"] if frozen else []),
        ]
        return f"QatSchedule(step {steps}{': ' if facts else ''}{', '.join(facts)})"
